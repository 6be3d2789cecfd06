"""Seconds by stage, losses and memory of every step, for any trainer."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import memory_kib, resident_kib

STAGES = ("generation", "scoring", "update")


class Recorder:
    """What a trainer did. It is also the `run` that rlhf_fast's train functions take.

    A stage is what was spent inside the functions that `watch` was given for it; "update" is the rest of a step. Where
    one stage calls another, the inner one alone is charged.
    """

    def __init__(self, steps: int, seed: int) -> None:
        self.count, self.seed = steps, seed
        self.seconds: list[dict[str, float]] = []
        self.losses: list[float] = []
        self.rewards: list[float] = []
        self.grad_norms: list[float] = []
        self.finished: list[float] = []
        self.resident = self.peak = 0
        self.folder = Path()
        self._imported = memory_kib("VmRSS")
        self._stages = ["update"]
        self._spent: dict[str, float] = defaultdict(float)
        self._ahead = 0.0
        self._mark = time.perf_counter()

    def watch(self, owner: Any, name: str, stage: str, *, seeded: bool = False, without_grad: bool = False) -> None:
        """Replace owner.name by itself with a clock, for the life of the process.

        seeded: set the random state to the number of the step before each call, so that every trainer samples from
        the same random numbers. without_grad: charge only the calls made without gradients.
        """
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            if without_grad and torch.is_grad_enabled():
                return function(*arguments, **options)
            if seeded:
                torch.manual_seed(self.seed + len(self.seconds))
            with self.stage(stage):
                return function(*arguments, **options)

        setattr(owner, name, watched)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._charge()
        self._stages.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stages.pop()

    def start(self) -> None:
        """The steps begin. What was scored ahead of them is spread over them; the other preparations do not count."""
        self._charge()
        self._ahead = self._spent["scoring"] / self.count
        self._spent.clear()

    def end_step(self) -> None:
        self._charge()
        spent = {stage: self._spent[stage] for stage in STAGES}
        spent["scoring"] += self._ahead
        self.seconds.append(spent)
        if len(self.seconds) == 1:
            self.resident = resident_kib() - self._imported
        self.peak = memory_kib("VmHWM") - self._imported
        self._spent.clear()
        self._mark = time.perf_counter()

    def _charge(self) -> None:
        now = time.perf_counter()
        self._spent[self._stages[-1]] += now - self._mark
        self._mark = now

    # The `run` of rlhf_fast's train functions

    def steps(self) -> Iterator[int]:
        self.start()
        for step in range(self.count):
            yield step
            self.end_step()

    def track(self, what: str, parts: Sequence[Any]) -> Sequence[Any]:
        """The parts, without a progress bar."""
        return parts

    def log(self, step: int, metrics: dict[str, float], *, tokens: int) -> None:
        self.losses.append(metrics["loss"])
        trained = [name for name in ("grad_norm_policy", "grad_norm_reward") if name in metrics]
        self.grad_norms += [metrics[name] for name in trained]
        if "reward" in metrics:
            self.rewards.append(metrics["reward"])
        if "finished" in metrics:
            self.finished.append(metrics["finished"])

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Samples are not kept."""
