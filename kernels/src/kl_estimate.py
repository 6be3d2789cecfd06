"""Per-token KL estimates with their derivatives; formulas in rlhf_fast/ops/tokens/kl_estimate.py."""

from __future__ import annotations

import triton
import triton.language as tl
from rlhf_fast.kernels.launch import launch
from rlhf_fast.kernels.scalar import exp_minus_1_minus, expm1, product
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
def _clipped(x, bound):
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@triton.jit
def _kernel(
    logprobs,  # (rows, columns), any strides
    ref_logprobs,  # (rows, columns), any strides
    old_logprobs,  # (rows, columns), any strides
    values,  # (rows, columns) contiguous
    by_logprob,  # (rows, columns) contiguous
    by_ref,  # (rows, columns) contiguous
    log_ratio_clip: tl.float64,
    value_clip: tl.float64,
    weight_clip: tl.float64,
    N,
    columns,
    row_stride,
    column_stride,
    ref_row_stride,
    ref_column_stride,
    old_row_stride,
    old_column_stride,
    ESTIMATOR: tl.constexpr,
    GRADIENT: tl.constexpr,  # an estimator, None for ESTIMATOR's own
    HAS_OLD: tl.constexpr,
    HAS_BY_LOGPROB: tl.constexpr,
    HAS_BY_REF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc = values.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    row, column = i // columns, i % columns
    logprob = tl.load(logprobs + row * row_stride + column * column_stride, mask=inside, other=0.0).to(acc)
    reference = ref_logprobs + row * ref_row_stride + column * ref_column_stride
    log_ratio = tl.load(reference, mask=inside, other=0.0).to(acc) - logprob

    x = _clipped(log_ratio, tl.full([], log_ratio_clip, tl.float64).to(acc))
    raw, slope = ESTIMATOR(x)
    value = _clipped(raw, tl.full([], value_clip, tl.float64).to(acc))
    weight = tl.full([BLOCK], 1.0, acc)
    through_weight = tl.zeros([BLOCK], acc)
    if HAS_OLD:
        old = old_logprobs + row * old_row_stride + column * old_column_stride
        weight = tl.exp(logprob - tl.load(old, mask=inside, other=0.0).to(acc))
        bound = tl.full([], weight_clip, tl.float64).to(acc)
        through_weight = tl.where(weight > bound, 0.0, value)
        weight = tl.where(weight > bound, bound, weight)
    if GRADIENT is None:
        slope = tl.where((x == log_ratio) & (value == raw), slope, 0.0)
    else:
        _unused, slope = GRADIENT(log_ratio)
        through_weight = tl.zeros([BLOCK], acc)
    tl.store(values + i, product(weight, value), mask=inside)
    if HAS_BY_LOGPROB:
        tl.store(by_logprob + i, product(weight, through_weight - slope), mask=inside)
    if HAS_BY_REF:
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
    launch(
        _kernel, (triton.cdiv(value.numel(), BLOCK),),
        logprobs, ref_logprobs, old_logprobs, value, by_logprob, by_ref, *clips, value.numel(), value.shape[1],
        *logprobs.stride(), *ref_logprobs.stride(), *((0, 0) if old_logprobs is None else old_logprobs.stride()),
        ESTIMATOR=VARIANTS[variant], GRADIENT=VARIANTS.get(gradient), HAS_OLD=old_logprobs is not None,
        HAS_BY_LOGPROB=by_logprob.numel() > 0, HAS_BY_REF=by_ref.numel() > 0, BLOCK=BLOCK,
    )  # fmt: skip
