"""How much memory a function takes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch

from rlhf_fast.ops.head.tiles import free_tile_buffer


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes of CPU tensors made by `function` that are alive at a time."""
    free_tile_buffer()  # of an earlier call: it counts
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    changes = (e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(accumulate(changes), default=0)
