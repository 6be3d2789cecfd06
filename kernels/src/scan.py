"""Recurrences over time as an associative scan of affine maps x -> scale * x + shift."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _compose(later_scale, later_shift, later_got_scale, later_got_shift, scale, shift, got_scale, got_shift):
    # A reverse scan hands over the later part first. Beside the map up to and with this step stands that without it.
    return (
        later_scale * scale, scale * later_shift + shift, later_scale * got_scale, got_scale * later_shift + got_shift
    )  # fmt: skip


@triton.jit
def backward(scale, shift, carry, lanes):
    """(what every step gets from the one after it, what it hands on, what the first one hands on), from the last step,
    which gets the carry; a step that gets x hands on scale * x + shift."""
    one = tl.full(scale.shape, 1.0, scale.dtype)
    scale, shift, got_scale, got_shift = tl.associative_scan(
        (scale, shift, one, tl.zeros_like(scale)), 0, _compose, reverse=True
    )
    handed = scale * carry + shift
    return got_scale * carry + got_shift, handed, tl.sum(tl.where(lanes == 0, handed, 0.0), 0)
