"""What the elementwise losses share: masked means over a (possibly global) denominator, one kernel, one backward.

The kernel makes the loss, the metrics and d loss / d input of every element in one pass over the inputs (in Triton
times the denominator, which is known only then); backward is one scale. It takes a loss variant as a function:
math/losses.h in C++, kernels/losses.py in Triton. The sums are made in two stages over partial sums whose number
depends on the input's size alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import native, packed, prefer_huge_pages, threads, triton_kernels
from rlhf_fast.backends import plane as native_plane
from rlhf_fast.ops.core import check, registration
from rlhf_fast.ops.core.loss import Loss


def plane(tensor: Tensor) -> Tensor:
    """The (rows, columns) view of a tensor of one or two dimensions."""
    return tensor[None] if tensor.dim() == 1 else tensor


def per_token_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """The shape of `tensor`, which must be padded (B, T) or packed (N,)."""
    check.that(tensor.dim() in (1, 2), name, "(B, T) or (N,)", tensor)
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


class Over(NamedTuple):
    """What a loss is summed over, and what the sum is divided by: 1 counts; the number that count where it is None."""

    mask: Tensor | None = None
    denominator: Tensor | None = None


def over(
    like: tuple[str, Tensor], shape: tuple[int, ...], meaning: str, mask: Tensor | None,
    denominator: Tensor | float | None,
) -> Over:  # fmt: skip
    """The mask as bytes of `shape`, the denominator as a tensor. Raises ValueError for what does not fit `like`."""
    check.same_device(like, ("mask", mask))
    return Over(check.mask_bytes(mask, shape, meaning), denominator_tensor(denominator, like[1]))


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


def mean(x: Tensor, over: Over) -> Tensor:
    """sum of x over the mask / denominator; 0 where nothing counts."""
    denominator = over.denominator
    if denominator is None:
        denominator = (torch.ones_like(x) if over.mask is None else over.mask.to(x.dtype)).sum()
    return counted(x, over.mask, x.dtype).sum() / torch.where(denominator == 0, 1, denominator)


def means(loss: Tensor, over: Over, **metrics: Tensor) -> Loss:
    """The mean of the losses and of the metrics, which are detached."""
    return Loss(mean(loss, over), {name: mean(x.detach(), over) for name, x in metrics.items()})


class PairInputs(NamedTuple):
    """What the kernel of a loss of pairs reads, (B,) each; what is not given has stride 0."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    weights: Tensor
    chosen_shifts: Tensor
    rejected_shifts: Tensor


class PairNumbers(NamedTuple):
    """kernel: its name. parameter: the one that only this kernel has. divergence: 0 reverse KL, 1 alpha, 2 JS."""

    kernel: str
    beta: float
    label_smoothing: float = 0.0
    parameter: float = 0.0
    divergence: float = 0.0
    divergence_alpha: float = 0.0


def constants(like: Tensor, *values: float) -> list[Tensor]:
    """Each of `values` in the compute dtype and the shape of `like`, with stride 0."""
    dtype = check.compute_dtype(like.dtype)
    return [like.new_full((), value, dtype=dtype).expand(like.shape) for value in values]


def cpu(inputs: list[Tensor], over: Over, numbers: tuple[Any, ...], outputs: list[Tensor]) -> None:
    """Fills outputs, see `empty_outputs`. numbers: the kernel's name, then what it takes."""
    shape, (kernel, *parameters) = inputs[0].shape, numbers
    native().masked_loss(
        kernel, [native_plane(x) for x in inputs], packed(over.mask), packed(over.denominator), parameters,
        *(shape if len(shape) == 2 else (1, *shape)), outputs[0].dtype == torch.float64,
        [packed(x) for x in outputs], threads(),
    )  # fmt: skip


def triton(inputs: list[Tensor], over: Over, numbers: tuple[Any, ...], outputs: list[Tensor]) -> None:
    """The same in Triton."""
    kernel, *parameters = numbers
    triton_kernels("losses").masked_loss(kernel, inputs, over.mask, over.denominator, parameters, outputs)


IMPLS = {"cpu": cpu, "triton": triton}


def empty_outputs(like: Tensor, gradients: int) -> list[Tensor]:
    """What an implementation fills: [loss (), metrics (4,), divisor (), a coefficient like `like` per gradient].

    divisor: what the coefficients have yet to be divided by.
    """
    dtype = check.compute_dtype(like.dtype)
    return [like.new_empty(shape, dtype=dtype) for shape in ((), (4,), (), *[like.shape] * gradients)]


def register(op: str, inputs: type, numbers: type, *, differentiable: Sequence[str]) -> Callable[..., list[Tensor]]:
    """Registers ``rlhf_fast::<op>`` and returns its call: (inputs, over, numbers, backend) -> `empty_outputs`, filled.

    inputs: a NamedTuple of tensors (B, T) or (N,), in the order of the kernel, which takes those that are not None.
    numbers: a NamedTuple of the kernel's name and its numbers. differentiable: the first ones of the inputs.
    """

    def compute(inputs: Any, over: Over, numbers: Any, backend: str, gradients: int = len(differentiable)):  # type: ignore[no-untyped-def]
        outputs = empty_outputs(inputs[0], gradients)
        IMPLS[backend]([x for x in inputs if x is not None], over, numbers, outputs)
        return outputs

    return registration.op(
        op, (inputs, Over, numbers), compute, fake=lambda inputs, *_: empty_outputs(inputs[0], len(differentiable)),
        differentiable=differentiable, saves_results=slice(2, None),
        backward=scaled_gradients(differentiable, divided=True), returned=2,
        without_gradient=partial(compute, gradients=0),
    )  # fmt: skip


def call(run: Callable[..., list[Tensor]], inputs: Any, over: Over, numbers: Any, backend: str,
         metrics: Sequence[str]) -> Loss:  # fmt: skip
    """Calls what `register` returned. metrics: the names of the first ones."""
    loss, values, *_ = run(inputs, over, numbers, backend)
    return Loss(loss, dict(zip(metrics, values.detach().unbind(0), strict=False)))


def scaled_gradients(
    fields: Sequence[str], *, divided: bool = False
) -> Callable[[registration.Saved, Sequence[Tensor | None]], dict[str, registration.Gradient]]:
    """The backward pass of a loss that saves d loss / d field for the first of `fields`, in their order.

    divided: before them it saves a divisor, which they have yet to be divided by.
    """

    def backward(saved: registration.Saved, upstream: Sequence[Tensor | None]) -> dict[str, registration.Gradient]:
        scale, coefficients = upstream[0], saved.results
        if scale is None:
            return {}
        if divided:
            divisor, *coefficients = coefficients
            scale = scale / divisor
        return {
            name: scaled_gradient(coefficient, scale, saved.dtypes[name])
            for name, coefficient in zip(fields, coefficients, strict=False)
            if saved.needs[name]
        }

    return backward


def scaled_gradient(coefficient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """coefficient * scale in `dtype`: what the backward pass of a loss returns.

    On the CPU the coefficient itself for the 1 of loss.backward(): a head's is large. Autograd keeps the version of
    what it saved: who writes into this gradient and goes backward again gets an error.
    """
    plain = type(scale) is Tensor and scale.dim() == 0 and scale.device.type == "cpu"
    if plain and coefficient.dtype == dtype and scale.item() == 1:
        return coefficient
    return torch.mul(coefficient, scale, out=prefer_huge_pages(torch.empty_like(coefficient, dtype=dtype)))
