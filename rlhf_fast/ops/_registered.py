"""An op with a gradient: registered for compilers and modes, called past the dispatcher where only autograd looks.

A torch.library.custom_op walks its arguments in Python in forward and in backward, for longer than a small kernel runs.
So an op is defined by its schema, with an autograd.Function of its own, which an eager call applies to the computation
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def only_autograd_looks(tensors: Iterable[Any]) -> bool:
    """Whether no compiler, mode or tensor subclass is there, which must see the registered op."""
    plain = all(type(x) is Tensor or type(x) is Parameter for x in tensors if isinstance(x, Tensor))
    return plain and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode()


def op(
    name: str,
    schema: str,
    compute: Callable[..., list[Tensor]],
    *,
    fake: Callable[..., list[Tensor]],
    setup_context: Callable[[Any, tuple[Any, ...], list[Tensor]], None],
    backward: Callable[[Any, tuple[Tensor | None, ...]], tuple[Tensor | None, ...]],
    without_gradient: Callable[..., list[Tensor]] | None = None,
) -> Callable[..., list[Tensor]]:
    """Registers ``rlhf_fast::<name>`` of `schema` ("(arguments) -> Tensor[]") and returns how to call it.

    compute, fake: the arguments -> the results, and empty ones of their shapes. setup_context(ctx, arguments, results)
    and backward(ctx, gradients of the results) -> those of the arguments: as torch.library.register_autograd has them.
    without_gradient: the computation of an eager call where no argument requires a gradient; `compute` by default.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
            arguments, run = given[:-1], given[-1]  # run is last: ctx.needs_input_grad begins with the arguments
            results = run(*arguments)
            setup_context(ctx, arguments, results)
            return tuple(results)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            return *backward(ctx, gradients), None

    qualified = f"rlhf_fast::{name}"
    torch.library.define(qualified, schema)
    registered = getattr(torch.ops.rlhf_fast, name)

    def below_autograd(*arguments: Any) -> list[Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return registered(*arguments)

    torch.library.impl(qualified, "CompositeExplicitAutograd")(compute)
    torch.library.impl(qualified, "Autograd")(lambda *arguments: list(Differentiable.apply(*arguments, below_autograd)))
    torch.library.register_fake(qualified)(fake)

    def call(*arguments: Any) -> list[Tensor]:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if not only_autograd_looks(tensors):
            return registered(*arguments)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return Differentiable.apply(*arguments, compute)
        return (without_gradient or compute)(*arguments)

    return call
