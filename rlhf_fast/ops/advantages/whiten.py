"""whiten: zero mean and unit variance over everything that counts, on all ranks, in one pass over the numbers.

With n numbers x_i that count:

    mean = sum x_i / n,   variance = sum (x_i - mean)^2 / (n - 1)   (0 for n < 2)
    y_i = (x_i - mean) / sqrt(variance + eps)   (+ mean, with shift_mean=False)

One pass for the statistics, which leaves a table of partial moments, and one to apply them.

Numerics. Count, mean and M2 = sum (x - mean)^2 of blocks, computed from the distances to the block's first number and
combined by Chan's rule in float64: nothing cancels, and equal numbers give exactly 0 (or exactly their mean).
The ranks' (count, mean, M2) meet in one all_reduce of a table with a row per rank, of which each rank fills its own:
every rank combines the same rows in the same order and gets the same bits.

The result is a constant of the loss, without a derivative; `reference` has one.

Cost per number of s bytes: 2 s bytes read (and 2 for the mask), 4 written.

Sources: Chan, Golub & LeVeque 1983 ("Algorithms for computing the sample variance"), eq. 2.1; the n - 1 and the eps
inside the root are those of the PPO trainers of the field, after Ziegler et al. 2019 (arXiv 1909.08593).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import DTYPE_CODES, native, packed, resolve, threads, triton_kernels
from rlhf_fast.ops.core import check, registration

_SPAN, _PARTS = 4096, 512  # the statistics are of at most _PARTS spans, of at least _SPAN numbers where there are more


@check.takes_numbers
def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """x with mean 0 and variance 1 over all that counts; 0 behind the mask.

    x: any shape, float32, bfloat16, float16 or float64. mask: its shape, any dtype, nonzero counts.
    shift_mean: False keeps the mean (as for rewards) and changes the variance alone.
    eps: > 0, added to the variance.
    process_group: the statistics are those of all its ranks together; every rank must call, on any number of elements.

    Returns the shape of x, float32 (float64 for float64), detached.
    Raises ValueError or TypeError for shapes, types and values that do not fit.
    """
    check.floating("x", x)
    check.same_device(("x", x), ("mask", mask))
    eps = check.positive("eps", eps)
    mask = check.mask_bytes(mask, x.shape, "x.shape")
    name = resolve("whiten", IMPLS, x.device, backend)
    x = x.detach().contiguous()
    numbers = Numbers(x, mask)
    moments = reference_moments(x, mask) if name == "reference" else _moments(numbers, name)[0]
    if process_group is not None:
        moments = _of_all_ranks(moments, process_group)
    if name == "reference":
        return reference(x, mask, shift_mean=shift_mean, eps=eps, moments=moments)
    return _run(numbers, Whitening(moments, shift_mean, eps), name)[0]


def reference(
    x: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, eps: float = 1e-8, moments: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The whitened numbers by definition, differentiable any number of times; `moments` (P, 3): all that counts."""
    dtype = check.compute_dtype(x.dtype)
    count, mean, m2 = merged(reference_moments(x, mask) if moments is None else moments)
    scale = torch.rsqrt(m2 / (count - 1).clamp_min(1) + eps)
    counts = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    # What is behind the mask is replaced before any arithmetic, so that nothing there gets through.
    rounded = mean.to(dtype)
    rest = (mean - rounded.double()).to(dtype)  # a mean of 1e6 is rounded by more than a small deviation
    distance = torch.where(counts, x.to(dtype) - rounded - rest, torch.zeros_like(x, dtype=dtype))
    whitened = distance * scale.to(dtype)
    return whitened if shift_mean else torch.where(counts, whitened + rounded, torch.zeros_like(whitened))


def reference_moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """(1, 3) float64: count, mean and sum of squared deviations of what counts in x."""
    counts = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    count = counts.sum().double()
    values = torch.where(counts, x.double(), torch.zeros_like(x, dtype=torch.float64))
    mean = values.sum() / count.clamp_min(1)
    mean = mean + torch.where(counts, values - mean, 0).sum() / count.clamp_min(1)  # the rounding error
    m2 = torch.where(counts, values - mean, torch.zeros_like(values)).square().sum()
    return torch.stack([count, mean, m2])[None]


def merged(moments: Tensor) -> Tensor:
    """(3,): the moments of the union of P disjoint sets, from (P, 3)."""
    counts, means, m2s = moments.unbind(-1)
    origin = means.gather(0, counts.argmax(0, keepdim=True))  # of a set that is not empty: equal means stay exact
    count = counts.sum()
    mean = origin[0] + (counts * (means - origin)).sum() / count.clamp_min(1)
    return torch.stack([count, mean, (m2s + counts * (means - mean).square()).sum()])


def _of_all_ranks(moments: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """(world, 3): the moments of every rank."""
    table = moments.new_zeros(torch.distributed.get_world_size(group), 3)
    table[torch.distributed.get_rank(group)] = merged(moments)
    torch.distributed.all_reduce(table, group=group)
    return table


class Numbers(NamedTuple):
    x: Tensor
    mask: Tensor | None


class Whitening(NamedTuple):
    moments: Tensor  # (P, 3) float64
    shift_mean: bool
    eps: float


def _cpu_moments(numbers: Numbers, outputs: list[Tensor]) -> None:
    native().whiten_moments(*_native_arguments(numbers, outputs[0]), threads())


def _cpu_whiten(numbers: Numbers, whitening: Whitening, outputs: list[Tensor]) -> None:
    moments, shift_mean, eps = whitening
    native().whiten(*_native_arguments(numbers, moments), shift_mean, eps, packed(outputs[0]), threads())


def _native_arguments(numbers: Numbers, moments: Tensor) -> tuple[int, ...]:
    x, mask = numbers
    return packed(x), DTYPE_CODES[x.dtype], x.numel(), packed(mask), packed(moments), moments.shape[0]


def _triton_moments(numbers: Numbers, outputs: list[Tensor]) -> None:
    triton_kernels("whiten").whiten_moments(*numbers, *outputs)


def _triton_whiten(numbers: Numbers, whitening: Whitening, outputs: list[Tensor]) -> None:
    triton_kernels("whiten").whiten(*numbers, *whitening, *outputs)


# of (numbers, [moments (P, 3)]) and of (numbers, whitening, [whitened numbers])
MOMENTS = {"cpu": _cpu_moments, "triton": _triton_moments}
IMPLS = {"cpu": _cpu_whiten, "triton": _triton_whiten}
OPS = {"whiten": tuple(IMPLS)}


def _empty_moments(numbers: Numbers, backend: str) -> list[Tensor]:
    """[(P, 3) float64], unwritten; P depends on the number of elements alone, so the bits do too."""
    parts = torch.sym_max(1, torch.sym_min(_PARTS, (numbers.x.numel() + _SPAN - 1) // _SPAN))
    return [numbers.x.new_empty((parts, 3), dtype=torch.float64)]


def _empty(numbers: Numbers, whitening: Whitening, backend: str) -> list[Tensor]:
    return [torch.empty_like(numbers.x, dtype=check.compute_dtype(numbers.x.dtype))]


_moments = registration.op_without_gradient(
    "whiten_moments", (Numbers,), registration.filled(MOMENTS, _empty_moments), fake=_empty_moments
)
_run = registration.op_without_gradient("whiten", (Numbers, Whitening), registration.filled(IMPLS, _empty), fake=_empty)
