"""Masked means of elementwise losses, with gradients and metrics, in one pass over the inputs.

A loss variant is one function of a single element (formulas in rlhf_fast/ops/<op>.py), which the one kernel takes as
a `tl.constexpr`. Sums are made in two stages over a number of partial sums that depends on the input's size alone, so
the same inputs give the same bits. Clamps are written with `where`, which keeps NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from rlhf_fast.kernels.launch import launch
from rlhf_fast.kernels.plane import is_short, place
from rlhf_fast.kernels.preference_losses import PAIRED, UNPAIRED
from rlhf_fast.kernels.scalar import divide, load_parts, product, sigmoid, softplus
from torch import Tensor

BLOCK = 1024  # elements of a program at a time; fewer where there are many inputs, or registers would be spilled
PARTS = 1024  # partial sums at most: as many programs as run at a time on a large GPU
PARAMETERS = 5  # of a variant, at most


@triton.jit
def value(x, p):
    error = x[0] - x[1]
    return 0.5 * error * error, error, 0.0, 0.0, 0.0, 0.0, 0.0


@triton.jit
def value_clip(x, p):
    value, target, old_value = x
    low = old_value - p[0]
    high = old_value + p[0]
    bounded = tl.where(value >= low, tl.where(value > high, high, value), low)  # NaN bounds give NaN
    error = value - target
    bounded_error = bounded - target
    clipped = bounded_error * bounded_error > error * error
    active = tl.where(clipped | (bounded_error != bounded_error), bounded_error, error)
    return 0.5 * active * active, tl.where(clipped, 0.0, active), 0.0, tl.where(clipped, 1.0, 0.0), 0.0, 0.0, 0.0


@triton.jit
def step_bce(x, p):
    score, label = x
    loss = product(label, softplus(-score)) + product(1 - label, softplus(score))
    slope = (1 - label) * sigmoid(score) - label * sigmoid(-score)
    return loss, slope, 0.0, tl.where((score > 0) == (label > 0.5), 1.0, 0.0), 0.0, 0.0, 0.0


@triton.jit
def step_mse(x, p):
    score, label = x
    error = score - label
    return error * error, 2 * error, 0.0, tl.where((score > 0.5) == (label > 0.5), 1.0, 0.0), 0.0, 0.0, 0.0


@triton.jit
def as_they_are(m0, m1, m2, m3):
    return m0, m1, m2, m3


class Variant(NamedTuple):
    """function: (inputs, parameters) -> (loss, d loss / d input 0 and 1, 4 metrics), of one element each.

    finish: (means of the 4 metrics) -> the 4 metrics.
    """

    function: triton.JITFunction
    inputs: int
    finish: triton.JITFunction = as_they_are


VARIANTS = {
    "value": Variant(value, 2),
    "value_clip": Variant(value_clip, 3),
    "step_bce": Variant(step_bce, 2),
    "step_mse": Variant(step_mse, 2),
    **{name: Variant(*entry) for name, entry in (PAIRED | UNPAIRED).items()},
}


@triton.jit
def _elements_kernel(
    inputs,  # a tuple of (rows, columns) of any strides
    strides,  # their (row, column) strides
    mask,  # (rows * columns,) uint8
    coefficient0,  # (rows * columns,)
    coefficient1,  # (rows * columns,)
    partials,  # (6, programs): sums of loss, four metrics, count
    p0: tl.float64,
    p1: tl.float64,
    p2: tl.float64,
    p3: tl.float64,
    p4: tl.float64,
    N,
    columns,
    FUNCTION: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = partials.dtype.element_ty
    p = (
        tl.full([], p0, acc), tl.full([], p1, acc), tl.full([], p2, acc), tl.full([], p3, acc), tl.full([], p4, acc)
    )  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    loss_sum = tl.zeros([BLOCK], acc)
    count = tl.zeros([BLOCK], acc)
    sum0 = tl.zeros([BLOCK], acc)
    sum1 = tl.zeros([BLOCK], acc)
    sum2 = tl.zeros([BLOCK], acc)
    sum3 = tl.zeros([BLOCK], acc)
    for block in range(program, tl.cdiv(N, BLOCK), programs):
        i = tl.full([], block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < N
        counts = inside
        if HAS_MASK:
            counts = inside & (tl.load(mask + i, mask=inside, other=0) != 0)
        row, column = place(i, columns, SHORT)
        x = ()
        for k in tl.static_range(len(inputs)):
            at = inputs[k] + row * strides[k][0] + column * strides[k][1]
            x += (tl.load(at, mask=counts, other=0.0).to(acc),)
        loss, g0, g1, m0, m1, m2, m3 = FUNCTION(x, p)
        if COEFFICIENTS > 0:
            tl.store(coefficient0 + i, tl.where(counts, g0, 0.0), mask=inside)
        if COEFFICIENTS > 1:
            tl.store(coefficient1 + i, tl.where(counts, g1, 0.0), mask=inside)
        loss_sum += tl.where(counts, loss, 0.0)
        count += tl.where(counts, 1.0, 0.0)
        sum0 += tl.where(counts, m0, 0.0)
        sum1 += tl.where(counts, m1, 0.0)
        sum2 += tl.where(counts, m2, 0.0)
        sum3 += tl.where(counts, m3, 0.0)
    tl.store(partials + program, tl.sum(loss_sum, 0))
    tl.store(partials + programs + program, tl.sum(sum0, 0))
    tl.store(partials + 2 * programs + program, tl.sum(sum1, 0))
    tl.store(partials + 3 * programs + program, tl.sum(sum2, 0))
    tl.store(partials + 4 * programs + program, tl.sum(sum3, 0))
    tl.store(partials + 5 * programs + program, tl.sum(count, 0))


@triton.jit
def _means_kernel(
    partials,  # (6, programs)
    denominator,  # () or None
    loss,  # ()
    metrics,  # (METRICS,)
    divisor,  # (): what the coefficients have yet to be divided by
    programs,
    HAS_DENOMINATOR: tl.constexpr,
    METRICS: tl.constexpr,
    FINISH: tl.constexpr,
    PARTS: tl.constexpr,
):
    parts = load_parts(partials, 6, programs, PARTS)
    count = tl.sum(parts[5], 0)
    if HAS_DENOMINATOR:
        count = tl.load(denominator)
    count = tl.where(count == 0, 1.0, count)  # nothing counts: every sum is 0
    tl.store(loss, divide(tl.sum(parts[0], 0), count))
    m = FINISH(
        divide(tl.sum(parts[1], 0), count), divide(tl.sum(parts[2], 0), count), divide(tl.sum(parts[3], 0), count),
        divide(tl.sum(parts[4], 0), count),
    )  # fmt: skip
    for k in tl.static_range(METRICS):
        tl.store(metrics + k, m[k])
    tl.store(divisor, count)


def masked_loss(
    variant: str,
    inputs: list[Tensor],
    mask: Tensor | None,
    denominator: Tensor | None,
    parameters: list[float],
    outputs: list[Tensor],
) -> None:
    """Fills outputs = [loss (), metrics, at most four, a coefficient per differentiable input, or none, divisor ()].

    inputs, coefficients: (rows, columns), or (N,) for one row.
    """
    function, count, finish = VARIANTS[variant]
    loss, metrics, *coefficients, divisor = outputs
    n, columns = inputs[0].numel(), inputs[0].shape[-1]
    first, last = (coefficients[0], coefficients[-1]) if coefficients else (loss, loss)
    block = BLOCK if count <= 5 else BLOCK // 4
    programs = max(1, min(PARTS, triton.cdiv(n, block)))
    partials = loss.new_empty(6, programs)
    inputs = inputs[:count]
    strides = tuple(x.stride() if x.dim() == 2 else (0, x.stride(0)) for x in inputs)
    launch(
        _elements_kernel, (programs,),
        tuple(inputs), strides, mask, first, last, partials,
        *parameters, *[0.0] * (PARAMETERS - len(parameters)), n, columns,
        FUNCTION=function, COEFFICIENTS=len(coefficients), HAS_MASK=mask is not None, SHORT=is_short(n),
        BLOCK=block,
    )  # fmt: skip
    launch(
        _means_kernel, (1,),
        partials, denominator, loss, metrics, divisor, programs, HAS_DENOMINATOR=denominator is not None,
        METRICS=len(metrics), FINISH=finish, PARTS=PARTS,
        num_warps=8,
    )  # fmt: skip
