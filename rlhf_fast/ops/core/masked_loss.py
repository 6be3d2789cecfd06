"""What the elementwise losses share: masked means over a (possibly global) denominator, one kernel, one backward.

The kernel makes the loss, the metrics and d loss / d input of every element in one pass over the inputs (in Triton
times the denominator, which is known only then); backward is one scale. It takes a loss variant as a function:
math/losses.h in C++, kernels/losses.py in Triton. The sums are made in two stages over partial sums whose number
depends on the input's size alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.backends import native, packed, prefer_huge_pages, threads
from rlhf_fast.backends import plane as native_plane
from rlhf_fast.ops.core import check
from rlhf_fast.ops.core import registration_by_schema as registration

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


def constant(tensor: Tensor) -> Tensor:
    """The tensor without its graph."""
    return tensor.detach() if tensor.requires_grad else tensor


def floats(shape: tuple[int, ...], meaning: str, **tensors: Tensor | None) -> None:
    """Every tensor that is there must be floating, of exactly `shape` and on the device of the first."""
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        if tensor is not None:
            check.shaped(name, check.floating(name, tensor), shape, meaning)
            check.same_device((first, tensors[first]), (name, tensor))  # type: ignore[arg-type]


def denominator_tensor(denominator: Tensor | float | None, like: Tensor, name: str = "denominator") -> Tensor | None:
    """A 0-d tensor of the compute dtype, without synchronising. Raises for a number that is not positive."""
    dtype = check.compute_dtype(like.dtype)
    if denominator is None:
        return None
    if not isinstance(denominator, Tensor):
        return like.new_full((), check.positive(name, denominator), dtype=dtype)
    check.shaped(name, denominator, (), "a number or a 0-d tensor")
    check.same_device((name, denominator), ("the inputs", like))
    return denominator.detach().to(dtype)


# --- The reference's two steps ----------------------------------------------------------------------------------------


def counted(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, 0 behind the mask: what stands there never gets through, NaN included."""
    x = x.to(dtype)
    return x if mask is None else torch.where(mask != 0, x, torch.zeros_like(x))


def product(weight: Tensor | float, x: Tensor) -> Tensor:
    """weight * x, where a weight of 0 takes x out: 0 times infinity is 0, in value and gradient."""
    if not isinstance(weight, Tensor):
        return weight * x if weight else torch.zeros_like(x)
    nothing = weight == 0
    return torch.where(nothing, 0.0, weight * torch.where(nothing, 0.0, x))


def mean(x: Tensor, mask: Tensor | None, denominator: Tensor | None) -> Tensor:
    """sum of x over the mask / denominator, which is the count of the mask by default; 0 where nothing counts."""
    if denominator is None:
        denominator = torch.ones_like(x) if mask is None else mask.to(x.dtype)
        denominator = denominator.sum()
    return counted(x, mask, x.dtype).sum() / torch.where(denominator == 0, 1, denominator)


# --- The implementations ----------------------------------------------------------------------------------------------


def cpu(variant: str, inputs: list[Tensor], mask: Tensor | None, denominator: Tensor | None, parameters: list[float],
        outputs: list[Tensor]) -> None:  # fmt: skip
    """Fills outputs = [loss (), means (5,), a coefficient of their shape per differentiable input, or none]."""
    shape = inputs[0].shape
    native().masked_loss(
        variant, [native_plane(x) for x in inputs], packed(mask), packed(denominator), parameters,
        *(shape if len(shape) == 2 else (1, *shape)), outputs[0].dtype == torch.float64,
        [packed(x) for x in outputs], threads(),
    )  # fmt: skip


def triton(*args: Any) -> None:
    """The same in Triton."""
    from rlhf_fast.kernels import losses as kernels

    kernels.masked_loss(*args)


# --- The registered ops -----------------------------------------------------------------------------------------------


def empty_outputs(inputs: Sequence[Tensor], gradients: int) -> list[Tensor]:
    """What an implementation fills: [loss (), means (5,), a coefficient of the inputs' shape per gradient]."""
    new, dtype = inputs[0].new_empty, check.compute_dtype(inputs[0].dtype)
    coefficients = [new(inputs[0].shape, dtype=dtype) for _ in range(gradients)]
    return [new((), dtype=dtype), new((5,), dtype=dtype), *coefficients]


def register(op: str, impls: dict[str, Implementation], *, inputs: int, gradients: int) -> Callable[..., list[Tensor]]:
    """Registers ``rlhf_fast::<op>``, which differentiates the first `gradients` of its inputs, and returns its call.

    (`inputs` tensors (B, T) or (N,), or None, mask, denominator, variant, parameters, backend)
        -> [loss (), means (5,), a coefficient of that shape per gradient]
    means: four metrics, and what the coefficients have yet to be divided by.
    """

    def compute(*arguments: Any, gradients: int = gradients) -> list[Tensor]:
        planes = [x for x in arguments[:inputs] if x is not None]
        mask, denominator, variant, parameters, backend = arguments[inputs:]
        outputs = empty_outputs(planes, gradients)
        impls[backend](variant, planes, mask, denominator, parameters, outputs)
        return outputs

    def setup_context(ctx, arguments, results):
        _, means, *coefficients = results
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(means)  # coefficients are: their derivative is the error that says it is missing
        ctx.dtypes = [x.dtype for x in arguments[:gradients]]
        ctx.save_for_backward(means, *coefficients)

    def backward(ctx, grads):
        if grads[0] is None:
            return [None] * gradients
        means, *coefficients = ctx.saved_tensors
        scale = grads[0] / means[4]
        wanted = zip(coefficients, ctx.dtypes, ctx.needs_input_grad, strict=False)
        return [scaled_gradient(coefficient, scale, dtype) if needs else None for coefficient, dtype, needs in wanted]

    tensors = ", ".join(f"Tensor{'?' * (k > 0)} x{k}" for k in range(inputs))
    return registration.op(
        op,
        f"({tensors}, Tensor? mask, Tensor? denominator, str variant, float[] parameters, str backend) -> Tensor[]",
        compute,
        fake=lambda *arguments: empty_outputs(arguments[:1], gradients),
        differentiable=range(gradients),
        setup_context=setup_context,
        backward=backward,
        returned=2,
        without_gradient=partial(compute, gradients=0),
    )


def call(
    run: Callable[..., list[Tensor]],
    inputs: Sequence[Tensor | None],
    mask: Tensor | None,
    denominator: Tensor | None,
    variant: str,
    parameters: Sequence[float],
    backend: str,
    metrics: Sequence[str],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Calls what `register` returned: the loss, and its metrics by name (0-d, detached)."""
    loss, means, *_ = run(*inputs, mask, denominator, variant, list(parameters), backend)
    return loss, dict(zip(metrics, means.detach().unbind(0)[: len(metrics)], strict=True))


def scaled_gradient(coefficient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """coefficient * scale in `dtype`: what the backward pass of a loss returns.

    On the CPU the coefficient itself for the 1 of loss.backward(): a head's is large. Autograd keeps the version of
    what it saved: who writes into this gradient and goes backward again gets an error.
    """
    plain = type(scale) is Tensor and scale.dim() == 0 and scale.device.type == "cpu"
    if plain and coefficient.dtype == dtype and scale.item() == 1:
        return coefficient
    return torch.mul(coefficient, scale, out=prefer_huge_pages(torch.empty_like(coefficient, dtype=dtype)))
