"""Ops registered by a written schema; to be replaced by registration, file by file.

A torch.library.custom_op walks its arguments in Python in forward and in backward, for longer than a small kernel runs.
So an op with a gradient is defined by its schema, with an autograd.Function of its own, which an eager call applies to
the computation itself; and an eager call of one without a gradient is the computation.

What a kernel cannot do is an error here, for all ops and on every way into one: a derivative in forward mode, a second
one, those of torch.func, vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

INSTEAD = "backend='reference' can do that"


def only_autograd_looks(tensors: Iterable[Any]) -> bool:
    """Whether no compiler, mode, transform or tensor subclass is there, which must see the registered op.

    Nor forward-mode differentiation, nor a negated view (of the imaginary part of a conjugate): the dispatcher makes a
    tensor of it.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or is_in_torch_dispatch_mode():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    return all(
        [(type(x) is Tensor or type(x) is Parameter) and not x.is_neg() for x in tensors if isinstance(x, Tensor)]
    )


def op_without_gradient(name: str, *, instead_of_vmap: str = INSTEAD) -> Callable[[Callable[..., Any]], Any]:
    """Registers the decorated computation as ``rlhf_fast::<name>`` and gives how to call it, with its register_fake.

    Nothing is differentiated by its arguments, tensors and lists of them among others. instead_of_vmap: what to do.
    """

    def define(compute: Callable[..., Any]) -> Any:
        registered = torch.library.custom_op(f"rlhf_fast::{name}", compute, mutates_args=())
        _refuse_vmap(name, instead_of_vmap)

        @wraps(compute)
        def call(*arguments: Any) -> Any:
            return (compute if only_autograd_looks(_tensors(arguments)) else registered)(*arguments)

        call.register_fake = registered.register_fake  # type: ignore[attr-defined]
        return call

    return define


def op(
    name: str,
    schema: str | None,
    compute: Callable[..., list[Tensor]],
    *,
    fake: Callable[..., list[Tensor]],
    differentiable: Sequence[int],
    setup_context: Callable[[Any, tuple[Any, ...], list[Tensor]], None],
    backward: Callable[[Any, Any], Sequence[Tensor | None]],
    returned: int,
    without_gradient: Callable[..., list[Tensor]] | None = None,
) -> Callable[..., list[Tensor]]:
    """Registers ``rlhf_fast::<name>`` of `schema` ("(arguments) -> Tensor[]") and returns how to call it.

    schema: None for that of the annotations of `compute`. compute, fake: the arguments -> the results, and empty ones
    of their shapes. differentiable: the places of the arguments that may have a gradient, tensors or lists of them.
    setup_context(ctx, arguments, results) saves what backward(ctx, gradients of the results) makes theirs from, in that
    order, a list's one after the other, which is also that of ctx.needs_input_grad.
    returned: how many of the results, the first ones, callers see; they may write into them. The others are kept.
    without_gradient: the computation of an eager call where none of them requires a gradient; `compute` by default.
    """
    if schema is None:
        schema = torch.library.infer_schema(compute, mutates_args=())
    with_lists = any(mark in schema.split("->")[0] for mark in ("Tensor[]", "Tensor?[]"))

    def looked_at(arguments: tuple[Any, ...]) -> list[Any]:
        chosen = [arguments[place] for place in differentiable]
        return [y for x in chosen for y in (x if isinstance(x, list) else (x,))] if with_lists else chosen

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
            arguments, run = given[-2:]  # the others are what autograd looks at; it takes its time for each
            results = run(*arguments)
            setup_context(ctx, arguments, results)
            # What backward reads is no tensor that a caller could write into.
            saved = {id(x) for x in ctx.to_save or ()}
            return tuple(x.clone() if i < returned and id(x) in saved else x for i, x in enumerate(results))

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():
                return *backward(ctx, gradients), None, None
            with torch.no_grad():
                found = backward(ctx, gradients)
            return *_once(name, found, (*gradients, *ctx.saved_tensors)), None, None

    qualified = f"rlhf_fast::{name}"
    torch.library.define(qualified, schema)
    registered = getattr(torch.ops.rlhf_fast, name)

    def below_autograd(*arguments: Any) -> list[Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return registered(*arguments)

    torch.library.impl(qualified, "CompositeExplicitAutograd")(compute)

    def differentiated(*arguments: Any) -> list[Tensor]:
        inputs = looked_at(arguments)
        _refuse_tangents(name, inputs)
        if torch._C._are_functorch_transforms_active():
            _refuse_torch_func(name, inputs)
            return below_autograd(*arguments)
        return list(Differentiable.apply(*inputs, arguments, below_autograd))

    torch.library.impl(qualified, "Autograd")(differentiated)
    torch.library.register_fake(qualified)(fake)
    _refuse_vmap(name)

    def call(*arguments: Any) -> list[Tensor]:
        if not only_autograd_looks(_tensors(arguments) if with_lists else arguments):
            return registered(*arguments)
        if torch.is_grad_enabled():
            inputs = looked_at(arguments)
            if any([x is not None and x.requires_grad for x in inputs]):
                return Differentiable.apply(*inputs, arguments, compute)
        return (without_gradient or compute)(*arguments)

    return call


def _tensors(arguments: Iterable[Any]) -> list[Any]:
    """The arguments, those of lists among them."""
    return [y for x in arguments for y in (x if isinstance(x, list) else (x,))]


def _refuse_tangents(name: str, tensors: Iterable[Any]) -> None:
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f"rlhf_fast::{name} has no forward-mode derivative; {INSTEAD}")


def _refuse_torch_func(name: str, tensors: Iterable[Any]) -> None:
    if any(x is not None and x.requires_grad for x in tensors):
        raise NotImplementedError(f"rlhf_fast::{name} cannot be differentiated by torch.func; {INSTEAD}")


def _refuse_vmap(name: str, instead: str = INSTEAD) -> None:
    def refuse(info: Any, in_dims: Any, *arguments: Any) -> Any:
        raise NotImplementedError(f"rlhf_fast::{name} has no rule for torch.vmap; {instead}")

    torch.library.register_vmap(f"rlhf_fast::{name}", refuse)


def _once(name: str, gradients: Sequence[Tensor | None], of: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients, which depend on `of`; who differentiates them gets an error."""
    given = [x for x in of if x is not None and x.requires_grad]
    made = [x for x in gradients if x is not None]
    if not given or not made:
        return list(gradients)
    marked = iter(_Once.apply(name, len(made), *made, *given))
    return [None if x is None else next(marked) for x in gradients]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(f"rlhf_fast::{ctx.name} has no second derivative; {INSTEAD}")
