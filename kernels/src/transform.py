"""The transform of a row of logits, z = softcap(logit_scale * x) / temperature, for every kernel that reads logits."""

from __future__ import annotations

import triton
import triton.language as tl
from rlhf_fast.kernels.scalar import tanh, tanh_slope


@triton.jit
def row_factor(temperatures, row, temperature, logit_scale, acc, HAS_TEMPERATURES: tl.constexpr, HAS_CAP: tl.constexpr):
    """z = factor * capped(x)"""
    t = tl.full([], temperature, tl.float64)
    if HAS_TEMPERATURES:
        t = tl.load(temperatures + row).to(tl.float64)
    scale = tl.full([], 1.0 if HAS_CAP else logit_scale, tl.float64)
    return (scale / t).to(acc)


@triton.jit
def capped(x, logit_scale, cap, HAS_CAP: tl.constexpr):
    """x, or cap tanh(logit_scale x / cap) under a softcap."""
    if HAS_CAP:
        x = cap * tanh(x * (logit_scale / cap))
    return x


@triton.jit
def capped_slope(x, logit_scale, cap):
    """d capped / d x"""
    return logit_scale * tanh_slope(x * (logit_scale / cap))
