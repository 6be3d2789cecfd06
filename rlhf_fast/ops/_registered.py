"""Ops: registered for compilers and modes, called past the dispatcher where nothing but autograd looks.

A torch.library.custom_op walks its arguments in Python in forward and in backward, for longer than a small kernel runs.
So an op with a gradient is defined by its schema, with an autograd.Function of its own, which an eager call applies to
the computation itself; and an eager call of one without a gradient is the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def only_autograd_looks(tensors: Iterable[Any]) -> bool:
    """Whether no compiler, mode, transform or tensor subclass is there, which must see the registered op.

    Nor a negated view (of the imaginary part of a conjugate): the dispatcher makes a tensor of it.
    """
    plain = all(
        [(type(x) is Tensor or type(x) is Parameter) and not x.is_neg() for x in tensors if isinstance(x, Tensor)]
    )
    looking = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return plain and not looking and not torch._C._are_functorch_transforms_active()


def op_without_gradient(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers the decorated computation as ``rlhf_fast::<name>`` and gives how to call it, with its register_fake.

    Nothing is differentiated by its arguments, tensors and lists of them among others.
    """

    def define(compute: Callable[..., Any]) -> Any:
        registered = torch.library.custom_op(f"rlhf_fast::{name}", compute, mutates_args=())

        @wraps(compute)
        def call(*arguments: Any) -> Any:
            each = [y for x in arguments for y in (x if isinstance(x, list) else (x,))]
            return (compute if only_autograd_looks(each) else registered)(*arguments)

        call.register_fake = registered.register_fake  # type: ignore[attr-defined]
        return call

    return define


def op(
    name: str,
    schema: str,
    compute: Callable[..., list[Tensor]],
    *,
    fake: Callable[..., list[Tensor]],
    differentiable: Sequence[int],
    setup_context: Callable[[Any, tuple[Any, ...], list[Tensor]], None],
    backward: Callable[[Any, tuple[Tensor | None, ...]], Sequence[Tensor | None]],
    without_gradient: Callable[..., list[Tensor]] | None = None,
) -> Callable[..., list[Tensor]]:
    """Registers ``rlhf_fast::<name>`` of `schema` ("(arguments) -> Tensor[]") and returns how to call it.

    compute, fake: the arguments -> the results, and empty ones of their shapes. differentiable: the places of the
    arguments that may have a gradient. setup_context(ctx, arguments, results) saves what backward(ctx, gradients of the
    results) makes theirs from, in that order, which is also that of ctx.needs_input_grad.
    without_gradient: the computation of an eager call where none of them requires a gradient; `compute` by default.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
            arguments, run = given[-2:]  # the others are what autograd looks at; it takes its time for each
            results = run(*arguments)
            setup_context(ctx, arguments, results)
            return tuple(results)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            return *backward(ctx, gradients), None, None

    qualified = f"rlhf_fast::{name}"
    torch.library.define(qualified, schema)
    registered = getattr(torch.ops.rlhf_fast, name)

    def below_autograd(*arguments: Any) -> list[Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return registered(*arguments)

    torch.library.impl(qualified, "CompositeExplicitAutograd")(compute)

    def differentiated(*arguments: Any) -> list[Tensor]:
        return list(Differentiable.apply(*[arguments[place] for place in differentiable], arguments, below_autograd))

    torch.library.impl(qualified, "Autograd")(differentiated)
    torch.library.register_fake(qualified)(fake)

    def call(*arguments: Any) -> list[Tensor]:
        if not only_autograd_looks(arguments):
            return registered(*arguments)
        if torch.is_grad_enabled():
            looked_at = [arguments[place] for place in differentiable]
            if any([x is not None and x.requires_grad for x in looked_at]):
                return Differentiable.apply(*looked_at, arguments, compute)
        return (without_gradient or compute)(*arguments)

    return call
