"""How long one run takes: the wall clock on a CPU; on a GPU its work alone, without the time that launches take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

CYCLES_PER_MS = 2_000_000  # of a GPU's clock, or fewer
SHORTEST_LEAD, LONGEST_LEAD = 0.5, 64.0  # milliseconds


class Clock(Protocol):
    def time(self, run: Callable[[], Any]) -> float:
        """Milliseconds of one run."""

    def remarks(self) -> dict[str, Any]:
        """What a result says beside its times."""


def clock_for(device: str) -> Clock:
    return GpuClock() if device == "cuda" else WallClock()


class WallClock:
    def time(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    def remarks(self) -> dict[str, Any]:
        return {}


class GpuClock:
    """A kernel that only waits holds the stream until the run is queued behind it, between two events.

    Where the GPU was through with the wait, `lead`, before all of the run was queued, the run is repeated with twice
    the wait. One that waits for the GPU itself, or launches more than a GPU queues (about a thousand kernels), never is
    ahead of it: beyond the longest lead its times hold what the host took, and the remarks say so.
    """

    def __init__(self) -> None:
        self.lead, self.host_bound = SHORTEST_LEAD, False

    def time(self, run: Callable[[], Any]) -> float:
        while not self.host_bound:
            milliseconds, ahead = self._once(run)
            if ahead:
                return milliseconds
            self.host_bound = self.lead >= LONGEST_LEAD
            self.lead = min(2 * self.lead, LONGEST_LEAD)
        return self._once(run)[0]

    def _once(self, run: Callable[[], Any]) -> tuple[float, bool]:
        """(milliseconds between the events, whether all of it was queued before the GPU came to the first)"""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if not self.host_bound:
            torch.cuda._sleep(int(self.lead * CYCLES_PER_MS))
        begin.record()
        run()
        end.record()
        ahead = not begin.query()
        end.synchronize()
        return begin.elapsed_time(end), ahead

    def remarks(self) -> dict[str, Any]:
        return {"host_bound": True} if self.host_bound else {}
