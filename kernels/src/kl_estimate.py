"""Per-token KL estimates with their derivatives; formulas in rlhf_fast/ops/kl_estimate.py."""

from __future__ import annotations

import triton
import triton.language as tl
from rlhf_fast.kernels.scalar import exp_minus_1_minus, expm1
from torch import Tensor

BLOCK = 1024


@triton.jit
def k1(x):
    return -x, x * 0.0 - 1.0


@triton.jit
def k2(x):
    return 0.5 * x * x, x


@triton.jit
def k3(x):
    return exp_minus_1_minus(x), expm1(x)


# x = ref_logprob - logprob -> (value, d value / d x)
ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


@triton.jit
def _kernel(
    logprobs,  # (rows, columns), any strides
    ref_logprobs,  # (rows, columns), any strides
    value,  # (rows, columns) contiguous
    derivative,  # (rows, columns) contiguous, by logprobs
    N,
    columns,
    row_stride,
    column_stride,
    ref_row_stride,
    ref_column_stride,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc = value.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    row, column = i // columns, i % columns
    logprob = tl.load(logprobs + row * row_stride + column * column_stride, mask=inside, other=0.0).to(acc)
    reference = ref_logprobs + row * ref_row_stride + column * ref_column_stride
    result, slope = ESTIMATOR(tl.load(reference, mask=inside, other=0.0).to(acc) - logprob)
    tl.store(value + i, result, mask=inside)
    tl.store(derivative + i, -slope, mask=inside)


def forward(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, value: Tensor, derivative: Tensor) -> None:
    """Fills `value` and `derivative` (by logprobs), both (rows, columns) like the inputs."""
    if value.numel() == 0:
        return
    _kernel[(triton.cdiv(value.numel(), BLOCK),)](
        logprobs, ref_logprobs, value, derivative, value.numel(), value.shape[1], *logprobs.stride(),
        *ref_logprobs.stride(), ESTIMATOR=ESTIMATORS[estimator], BLOCK=BLOCK,
    )  # fmt: skip
