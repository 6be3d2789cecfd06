"""Scalar functions without cancellation or overflow, and partial sums, for Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    # The rounding error of 1 + x is put back (Kahan).
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def bounded(x, low, high):
    """x within [low, high]; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def product(weight, x):
    """weight * x, where a weight of 0 takes x out: 0 times infinity is 0."""
    return tl.where(weight == 0, 0.0, weight * x)


@triton.jit
def softplus(x):
    """log(1 + exp(x))"""
    return tl.where(x > 0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))"""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def exp_minus_1_minus_near_0(x):
    """exp(x) - 1 - x for |x| < 0.5, where it is near x^2 / 2: a Taylor series whose first term left out is below half a
    unit."""
    terms: tl.constexpr = 13 if x.dtype == tl.float64 else 7
    series = x * 0.0 + 1.0
    for i in tl.static_range(terms):
        series = 1.0 + series * x * (1.0 / (terms + 2 - i))
    return 0.5 * x * x * series


@triton.jit
def exp_minus_1_minus(x):
    """exp(x) - 1 - x"""
    near = tl.abs(x) < 0.5
    return tl.where(near, exp_minus_1_minus_near_0(tl.where(near, x, 0.0)), (tl.exp(x) - 1.0) - x)


@triton.jit
def expm1(x):
    """exp(x) - 1"""
    return tl.where(tl.abs(x) < 0.5, exp_minus_1_minus(x) + x, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    """To a few units in the last place, near 0 as well."""
    e = expm1(-2.0 * tl.abs(x))
    t = -e / (2.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def tanh_slope(x):
    """1 - tanh(x)^2, in a form that does not cancel where the tanh is near 1."""
    e = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def divide(x, y):
    """x / y to the last bit: `/` on float32 is approximate, and the mean of ones must be 1."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def load_parts(partials, COUNT: tl.constexpr, programs, PARTS: tl.constexpr):
    """The first COUNT of partials (sums, programs), PARTS each: all are asked for before a sum waits for one."""
    part = tl.arange(0, PARTS)
    parts = ()
    for k in tl.static_range(COUNT):
        parts += (tl.load(partials + k * programs + part, mask=part < programs, other=0.0),)
    return parts
