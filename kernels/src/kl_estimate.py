"""Per-token KL estimates with their derivatives; formulas in rlhf_fast/ops/tokens/kl_estimate.py."""

from __future__ import annotations

import triton
import triton.language as tl
from rlhf_fast.kernels.launch import launch
from rlhf_fast.kernels.plane import plane, read
from rlhf_fast.kernels.scalar import bounded, exp_minus_1_minus, expm1, product
from torch import Tensor

BLOCK = 1024


@triton.jit
def k1(x):
    return -x, tl.full(x.shape, -1.0, x.dtype)


@triton.jit
def k2(x):
    return 0.5 * x * x, x


@triton.jit
def k3(x):
    return exp_minus_1_minus(x), expm1(x)


# x = ref_logprob - logprob -> (value, d value / d x)
VARIANTS = {"k1": k1, "k2": k2, "k3": k3}


@triton.jit
def _kernel(
    logprobs,  # Plane
    ref_logprobs,  # Plane
    old_logprobs,  # Plane, or None
    values,  # (rows, columns) contiguous
    by_logprob,  # (rows, columns) contiguous, or None
    by_ref,  # (rows, columns) contiguous, or None
    log_ratio_clip,
    value_clip,
    weight_clip,
    N,
    columns,
    ESTIMATE: tl.constexpr,
    GRADIENT: tl.constexpr,  # an estimate, None for ESTIMATE's own
    BLOCK: tl.constexpr,
):
    acc = values.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    row, column = i // columns, i % columns
    logprob = read(logprobs, row, column, inside, acc)
    log_ratio = read(ref_logprobs, row, column, inside, acc) - logprob

    x = bounded(log_ratio, -log_ratio_clip, log_ratio_clip)
    raw, slope = ESTIMATE(x)
    value = bounded(raw, -value_clip, value_clip)
    weight = tl.full([BLOCK], 1.0, acc)
    through_weight = tl.zeros([BLOCK], acc)
    if old_logprobs is not None:
        weight = tl.exp(logprob - read(old_logprobs, row, column, inside, acc))
        through_weight = tl.where(weight > weight_clip, 0.0, value)
        weight = tl.where(weight > weight_clip, weight_clip, weight)
    if GRADIENT is None:
        slope = tl.where((x == log_ratio) & (value == raw), slope, 0.0)
    else:
        _unused, slope = GRADIENT(log_ratio)
        through_weight = tl.zeros([BLOCK], acc)
    tl.store(values + i, product(weight, value), mask=inside)
    if by_logprob is not None:
        tl.store(by_logprob + i, product(weight, through_weight - slope), mask=inside)
    if by_ref is not None:
        tl.store(by_ref + i, product(weight, slope), mask=inside)


def forward(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    old_logprobs: Tensor | None,
    variant: str,
    gradient: str,
    clips: list[float],
    value: Tensor,
    by_logprob: Tensor,
    by_ref: Tensor,
) -> None:
    """Fills the estimates and their derivatives, (rows, columns) like the inputs; empty ones are left out."""
    if value.numel() == 0:
        return
    derivatives = [x if x.numel() else None for x in (by_logprob, by_ref)]
    launch(
        _kernel, (triton.cdiv(value.numel(), BLOCK),),
        plane(logprobs), plane(ref_logprobs), plane(old_logprobs), value, *derivatives, *clips, value.numel(),
        value.shape[1], ESTIMATE=VARIANTS[variant], GRADIENT=VARIANTS.get(gradient), BLOCK=BLOCK,
    )  # fmt: skip
