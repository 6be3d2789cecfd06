"""Affine maps x -> scale * x + shift as elements of a scan."""

from __future__ import annotations

import triton


@triton.jit
def compose(later_scale, later_shift, scale, shift):
    # The map of this step after that of the later ones; a reverse scan hands over the later part first.
    return later_scale * scale, scale * later_shift + shift
