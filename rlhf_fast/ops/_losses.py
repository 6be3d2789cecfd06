"""What the elementwise losses share: masked means over a (possibly global) denominator, one kernel, one backward.

The kernel makes the loss, the metrics and d (loss * denominator) / d input of every element in one pass over the
inputs; backward is one scale. It takes a loss variant as a function: math/losses.h in C++, kernels/losses.py in
Triton. The sums are made in two stages over partial sums whose number depends on the input's size alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from rlhf_fast.backends import DTYPE_CODES, address, native, prefer_huge_pages, threads
from rlhf_fast.ops import _check

Implementation = Callable[[str, list[Tensor], Tensor | None, Tensor | None, list[float], list[Tensor]], None]


# --- Arguments --------------------------------------------------------------------------------------------------------


def plane(tensor: Tensor) -> Tensor:
    """The (rows, columns) view of a tensor of one or two dimensions."""
    return tensor[None] if tensor.dim() == 1 else tensor


def per_token_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """The shape of `tensor`, which must be padded (B, T) or packed (N,)."""
    if tensor.dim() not in (1, 2):
        raise ValueError(f"{name} must be (B, T) or (N,), got {tuple(tensor.shape)}")
    return tuple(tensor.shape)


def floats(shape: tuple[int, ...], meaning: str, **tensors: Tensor) -> None:
    """Every tensor must be floating, of exactly `shape` and on one device."""
    first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        _check.shaped(name, _check.floating(name, tensor), shape, meaning)
    _check.same_device(first, *tensors.items())


def denominator_tensor(denominator: Tensor | float | None, like: Tensor) -> Tensor | None:
    """A 0-d tensor of the compute dtype, without synchronising. Raises for a number that is not positive."""
    dtype = _check.compute_dtype(like.dtype)
    if denominator is None:
        return None
    if not isinstance(denominator, Tensor):
        return like.new_full((), _check.positive("denominator", denominator), dtype=dtype)
    _check.shaped("denominator", denominator, (), "a number or a 0-d tensor")
    _check.same_device(("denominator", denominator), ("the inputs", like))
    return denominator.detach().to(dtype)


# --- The reference's two steps ----------------------------------------------------------------------------------------


def counted(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, 0 behind the mask: what stands there never gets through, NaN included."""
    x = x.to(dtype)
    return x if mask is None else torch.where(mask != 0, x, torch.zeros_like(x))


def mean(x: Tensor, mask: Tensor | None, denominator: Tensor | None) -> Tensor:
    """sum of x over the mask / denominator, which is the count of the mask by default; 0 where nothing counts."""
    if denominator is None:
        denominator = torch.ones_like(x) if mask is None else mask.to(x.dtype)
        denominator = denominator.sum()
    return counted(x, mask, x.dtype).sum() / torch.where(denominator == 0, 1, denominator)


# --- The implementations ----------------------------------------------------------------------------------------------


def cpu(variant: str, inputs: list[Tensor], mask: Tensor | None, denominator: Tensor | None, parameters: list[float],
        outputs: list[Tensor]) -> None:  # fmt: skip
    """Fills outputs = [loss (), means (5,), a coefficient (rows, columns) per differentiable input, or none at all]."""
    planes = [(address(x), DTYPE_CODES[x.dtype], *x.stride()) for x in inputs]
    native().masked_loss(
        variant, planes, address(mask), address(denominator), parameters, *inputs[0].shape,
        outputs[0].dtype == torch.float64, [address(x) for x in outputs], threads(),
    )  # fmt: skip


def triton(*args: Any) -> None:
    """The same in Triton."""
    from rlhf_fast.kernels import losses as kernels

    kernels.masked_loss(*args)


# --- The registered ops -----------------------------------------------------------------------------------------------


def empty_outputs(inputs: Sequence[Tensor], gradients: int) -> list[Tensor]:
    """What an implementation fills: [loss (), means (5,), a coefficient (rows, columns) per gradient]."""
    new, dtype = inputs[0].new_empty, _check.compute_dtype(inputs[0].dtype)
    coefficients = [new(inputs[0].shape, dtype=dtype) for _ in range(gradients)]
    return [new((), dtype=dtype), new((5,), dtype=dtype), *coefficients]


# Defined by its schema, with an autograd.Function of its own: a torch.library.custom_op walks lists of tensors in
# Python at every call, which takes longer than the kernel.
_SCHEMA = (
    "(Tensor[] inputs, Tensor? mask, Tensor? denominator, str variant, float[] parameters, str backend) -> Tensor[]"
)
_COMPUTE: dict[str, Callable[..., list[Tensor]]] = {}


def register(op: str, impls: dict[str, Implementation], gradients: int) -> None:
    """Registers ``rlhf_fast::<op>``, which differentiates the first `gradients` of its inputs.

    (inputs [(rows, columns)], mask, denominator, variant, parameters, backend)
        -> [loss (), means (5,): four metrics and the denominator, a coefficient (rows, columns) per gradient]
    """
    name = f"rlhf_fast::{op}"

    def compute(inputs: list[Tensor], mask: Tensor | None, denominator: Tensor | None, variant: str,
                parameters: list[float], backend: str, *, gradients: int = gradients) -> list[Tensor]:  # fmt: skip
        outputs = empty_outputs(inputs, gradients)
        impls[backend](variant, inputs, mask, denominator, parameters, outputs)
        return outputs

    def below_autograd(*arguments: Any) -> list[Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.rlhf_fast, op)(*arguments)

    def differentiable(inputs: list[Tensor], *others: Any) -> list[Tensor]:
        return list(_Differentiable.apply(below_autograd, others, *inputs))

    torch.library.define(name, _SCHEMA)
    torch.library.impl(name, "CompositeExplicitAutograd", compute)
    torch.library.impl(name, "Autograd", differentiable)
    torch.library.register_fake(name, lambda inputs, *_: empty_outputs(inputs, gradients))
    _COMPUTE[op] = compute


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, others, *inputs):
        loss, means, *coefficients = compute(list(inputs), *others)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(means, *coefficients)
        ctx.dtypes = [x.dtype for x in inputs]
        ctx.save_for_backward(means, *coefficients)
        return loss, means, *coefficients

    @staticmethod
    def backward(ctx, grad, *_):
        results: list[Tensor | None] = [None] * (2 + len(ctx.dtypes))
        if grad is not None:
            means, *coefficients = ctx.saved_tensors
            scale = grad / means[4]
            for k, coefficient in enumerate(coefficients):
                if ctx.needs_input_grad[2 + k]:
                    results[2 + k] = scaled_gradient(coefficient, scale, ctx.dtypes[k])
        return tuple(results)


def only_autograd_looks(tensors: Iterable[Tensor | None]) -> bool:
    """Whether no compiler, mode or tensor subclass is there, which must see the registered op."""
    plain = all(x is None or type(x) is Tensor or type(x) is Parameter for x in tensors)
    return plain and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode()


def call(
    op: str,
    inputs: Sequence[Tensor],
    mask: Tensor | None,
    denominator: Tensor | None,
    variant: str,
    parameters: Sequence[float],
    backend: str,
    metrics: Sequence[str],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs ``rlhf_fast::<op>``: the loss, and its metrics by name (0-d, detached)."""
    mask = None if mask is None else plane(mask)
    planes, others = [plane(x) for x in inputs], (mask, denominator, variant, list(parameters), backend)
    if not only_autograd_looks(planes):  # the dispatcher, twice, would take as long as the kernel
        loss, means, *_ = getattr(torch.ops.rlhf_fast, op)(planes, *others)
    elif torch.is_grad_enabled() and any(x.requires_grad for x in planes):
        loss, means, *_ = _Differentiable.apply(_COMPUTE[op], others, *planes)
    else:
        loss, means = _COMPUTE[op](planes, *others, gradients=0)
    return loss, dict(zip(metrics, means.unbind(0), strict=False))


class _Scaled(torch.autograd.Function):
    """Its own derivative would need that of the coefficient, which no kernel makes."""

    @staticmethod
    def forward(ctx, coefficient, scale, dtype):
        return _product(coefficient, scale, dtype)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("a kernel has no second derivative; backend='reference' has")


def _product(coefficient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mul(coefficient, scale, out=prefer_huge_pages(torch.empty_like(coefficient, dtype=dtype)))


def scaled_gradient(coefficient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """coefficient * scale in `dtype`: what the backward pass of a loss returns, which cannot be differentiated again.

    On the CPU the coefficient itself for the 1 of loss.backward(): a head's is large. Autograd keeps the version of
    what it saved: who writes into this gradient and goes backward again gets an error.
    """
    if torch.is_grad_enabled():
        return _Scaled.apply(coefficient, scale, dtype)
    plain = type(scale) is Tensor and scale.dim() == 0 and scale.device.type == "cpu"
    if plain and coefficient.dtype == dtype and scale.item() == 1:
        return coefficient
    return _product(coefficient, scale, dtype)
