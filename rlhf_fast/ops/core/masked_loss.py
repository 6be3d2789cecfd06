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

from rlhf_fast.backends import native, prefer_huge_pages, threads, triton_kernels
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
    first, like = next(iter(tensors.items()))
    device = like.device  # type: ignore[union-attr]
    for name, tensor in tensors.items():
        if tensor is not None:
            if tensor.dtype not in check.FLOATS or tensor.shape != shape:
                check.shaped(name, check.floating(name, tensor), shape, meaning)
            if tensor.device != device:
                check.same_device((first, like), (name, tensor))  # type: ignore[arg-type]


def denominator_tensor(denominator: Tensor | float | None, like: Tensor, name: str = "denominator") -> Tensor | None:
    """A 0-d tensor of the compute dtype, without synchronising. Raises for a number that is not positive."""
    if denominator is None:
        return None
    dtype = check.compute_dtype(like.dtype)
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
    """What the kernel of a loss of pairs reads, (B,) each; None for what is not given."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    weights: Tensor | None = None
    chosen_shifts: Tensor | None = None
    rejected_shifts: Tensor | None = None


ABSENT = (0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0)  # from ref_chosen on


class PairNumbers(NamedTuple):
    """kernel: its name. parameter: the one that only this kernel has. divergence: 0 reverse KL, 1 alpha, 2 JS."""

    kernel: str
    beta: float
    label_smoothing: float = 0.0
    parameter: float = 0.0
    divergence: float = 0.0
    divergence_alpha: float = 0.0


def constant_plane(like: Tensor, value: float) -> Tensor:
    """`value` in the compute dtype and the shape of `like`, with stride 0."""
    return like.new_full((), value, dtype=check.compute_dtype(like.dtype)).expand(like.shape)


def cpu(
    inputs: tuple[Any, ...], absent: tuple[float, ...], over: Over, numbers: tuple[Any, ...], outputs: list[Tensor]
) -> None:
    """Fills outputs, see `empty_outputs`. inputs, absent: see `register`. numbers: the kernel's name, its numbers."""
    native().masked_loss(numbers, inputs, absent, over, outputs, threads())


def triton(
    inputs: tuple[Any, ...], absent: tuple[float, ...], over: Over, numbers: tuple[Any, ...], outputs: list[Tensor]
) -> None:
    """The same in Triton."""
    kernel, *parameters = numbers
    planes = present(inputs, absent)
    triton_kernels("losses").masked_loss(kernel, planes, over.mask, over.denominator, parameters, outputs)


IMPLS = {"cpu": cpu, "triton": triton}


def empty_outputs(like: Tensor, metrics: int, gradients: int, backend: str) -> list[Tensor]:
    """What an implementation fills: [loss (), metrics, a coefficient like `like` per gradient], and last the divisor ()
    of these, where it counts the elements only after them."""
    dtype, device = check.compute_dtype(like.dtype), like.device
    outputs = [torch.empty((), dtype=dtype, device=device), torch.empty(metrics, dtype=dtype, device=device)]
    alike = like.dtype == dtype and like.is_contiguous()
    for _ in range(gradients):
        outputs.append(torch.empty_like(like) if alike else torch.empty(like.shape, dtype=dtype, device=device))
    if backend != "cpu":
        outputs.append(torch.empty((), dtype=dtype, device=device))
    return outputs


def register(
    op: str, inputs: type, numbers: type, *, differentiable: Sequence[str], metrics: Sequence[str],
    absent: tuple[float, ...] = (),
) -> Callable[..., Loss]:  # fmt: skip
    """Registers ``rlhf_fast::<op>`` and returns its call: (inputs, over, numbers, backend) -> loss and metrics.

    inputs: a NamedTuple of tensors (B, T) or (N,), or () for all elements, in the order of the kernel.
    differentiable: the first ones of them.
    absent: what the kernel reads for the last ones where they are None; without it, it has fewer inputs then.
    numbers: a NamedTuple of the kernel's name and its numbers. metrics: the names of the kernel's.
    """

    count = len(metrics)

    def compute(
        inputs: Any, over: Over, numbers: Any, backend: str, gradients: int = len(differentiable)
    ) -> list[Tensor]:
        outputs = empty_outputs(inputs[0], count, gradients, backend)
        IMPLS[backend](inputs, absent, over, numbers, outputs)
        return outputs

    run = registration.op(
        op, (inputs, Over, numbers), compute,
        fake=lambda inputs, over, numbers, backend: empty_outputs(
            inputs[0], len(metrics), len(differentiable), backend
        ),
        differentiable=differentiable, saves_results=slice(2, None), backward=scaled_gradients(differentiable),
        returned=2, without_gradient=partial(compute, gradients=0), saves_gradients=True,
    )  # fmt: skip

    def call(inputs: Any, over: Over, numbers: Any, backend: str) -> Loss:
        loss, values, *_ = run(inputs, over, numbers, backend)
        return Loss(loss, dict(zip(metrics, values.detach().unbind(0), strict=True)))

    return call


def computed(
    inputs: Any, absent: tuple[float, ...], over: Over, numbers: Any, backend: str, metrics: int, gradients: int
) -> list[Tensor]:
    outputs = empty_outputs(inputs[0], metrics, gradients, backend)
    IMPLS[backend](inputs, absent, over, numbers, outputs)
    return outputs


def present(inputs: Sequence[Tensor | None], absent: Sequence[float]) -> list[Tensor]:
    """Planes of the inputs that are there, and of the numbers that `absent` has for the last ones."""
    like, numbers = inputs[0], (*[None] * (len(inputs) - len(absent)), *absent)
    assert like is not None
    return [
        constant_plane(like, number) if x is None else x.expand(like.shape)  # type: ignore[arg-type]
        for x, number in zip(inputs, numbers, strict=True)
        if x is not None or number is not None
    ]


def scaled_gradients(
    fields: Sequence[str],
) -> Callable[[registration.Saved, Sequence[Tensor | None]], dict[str, registration.Gradient]]:
    """The backward pass of a loss that saves d loss / d field for the first of `fields`, in their order, and last,
    where there is one more, what they have yet to be divided by."""

    def backward(saved: registration.Saved, upstream: Sequence[Tensor | None]) -> dict[str, registration.Gradient]:
        scale, coefficients = upstream[0], saved.results
        if scale is None:
            return {}
        if len(coefficients) > len(fields):
            scale = scale / coefficients[-1]
        as_it_is = registration.is_one(scale)
        return {
            name: scaled_gradient(coefficient, scale, saved.dtypes[name], as_it_is)
            for name, coefficient in zip(fields, coefficients, strict=False)
            if saved.needs[name]
        }

    return backward


def scaled_gradient(coefficient: Tensor, scale: Tensor, dtype: torch.dtype, as_it_is: bool = False) -> Tensor:
    """coefficient * scale in `dtype`: what the backward pass of a loss returns.

    as_it_is: `registration.is_one(scale)`. Then it is the coefficient itself: a head's is large. Autograd keeps the
    version of what it saved: who writes into this gradient and goes backward again gets an error.
    """
    if as_it_is and coefficient.dtype == dtype:
        return coefficient
    return torch.mul(coefficient, scale, out=prefer_huge_pages(torch.empty_like(coefficient, dtype=dtype)))
