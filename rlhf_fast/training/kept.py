"""What a step has made before it is done, kept in the run folder: a run that ends inside of a step goes on from there.

A step is a fixed sequence of things that take long: a chunk of a rollout, a pass of scoring, a call of the rewards, an
update. Each is a function of the state at the step's begin and of those before it, and random numbers come from the
global generators. So a file holds each result and the generators' state behind it, and a step that is done again takes
its results from there for as long as there are any. Of updates, whose result are weights, the last state alone is kept.
They stay until a checkpoint has what was learnt from them: also the steps since the last one are done again in little
time.
"""

import hashlib
import io
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf_fast.training import ranks
from rlhf_fast.training.files import WriteError, staged, writing
from rlhf_fast.training.folder import KEPT
from rlhf_fast.training.job import (
    FULL,
    Job,
    capture,
    passing_state,
    random_state,
    restore,
    restore_passing,
    set_random_state,
)

T = TypeVar("T")
# The weights between two updates of a step are written when so many times what writing them takes has passed.
PATIENCE = 50.0


class Kept:
    """The results of the steps of a run. changed: an update of the present step was made."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder / KEPT
        # Several processes would have to go on from the same place.
        self.active = ranks.world() == 1
        self.step = 0
        self.changed = False
        self._begun: dict[str, Any] = {}  # what passes, at the begin of the step
        self._base: dict[str, Any] | None = None  # the whole state there, once it is needed
        self._key = ""  # of the state at the first result
        self._number = 0  # of results so far
        self._results: list[dict[str, Any]] = []  # of the updates so far
        self._stored: dict[str, Any] | None = None  # of the updates that an earlier process made
        self._boundary: dict[str, Any] = {}  # what passes, behind the last update or micro-batch
        self._sums: list[dict[str, Tensor]] = []  # of the micro-batches so far, in a step with one minibatch
        self._cost, self._written = 0.0, 0.0  # seconds that the last writing of updates or sums took, and its time

    def begin(self, step: int) -> None:
        """Results are those of this step (from 0) from here on, until `end`."""
        self.step, self.changed, self._begun, self._base = step, False, passing_state(self.job), None
        self._key, self._number, self._results, self._stored, self._sums = "", 0, [], None, []
        self._boundary = {}
        self.job.kept = self

    def end(self) -> None:
        self.job.kept = None

    def __call__(self, what: str, make: Callable[[], T]) -> T:
        """What `make` gives, or gave before: numbers, texts and tensors on the CPU, in lists, tuples and dicts."""
        if not self.active:
            return make()
        self._key = self._key or key_of(self.job)
        path = self._place / f"{self._number:04d}.pt"
        self._number += 1
        stored = read(path, f"{self._key} {what}")
        if stored is not None:
            set_random_state(stored["random"])
            return stored["value"]
        value = make()
        self._write(path, f"{self._key} {what}", {"value": value, "random": random_state()})
        return value

    def update(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """One of the several updates of a step: what `make` gives, with which the weights change."""
        if not self._results:
            self._key = self._key or key_of(self.job)
            self._base = copied(capture(self.job)) if FULL not in self.job.optimizers else None
            self._stored = read(self._updates, self._key) if self.active else None
            self._written = time.monotonic()
        if self._stored is not None and len(self._results) < len(self._stored["results"]):
            self._results.append(self._stored["results"][len(self._results)])
            if len(self._results) == len(self._stored["results"]):
                restore(self.job, self._stored["state"])
                self.changed, self._boundary = True, passing_state(self.job)
            return self._results[-1]
        self._results.append(make())
        self._boundary = passing_state(self.job)
        if time.monotonic() - self._written >= PATIENCE * self._cost:
            self._write_updates()
        return self._results[-1]

    def sums(self) -> list[dict[str, Tensor]]:
        """The metrics of the micro-batches that an earlier process did, whose gradients are put back."""
        self._key, self._written = self._key or key_of(self.job), time.monotonic()
        stored = read(self._gradients, self._key) if self.active else None
        if stored is None:
            return []
        for parameter, gradient in zip(self._parameters(), stored["gradients"], strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        restore_passing(self.job, stored["passing"])
        self._sums = [{name: value.to(self.job.device) for name, value in part.items()} for part in stored["sums"]]
        return list(self._sums)

    def keep_sums(self, sums: list[dict[str, Tensor]]) -> None:
        """The metrics of the micro-batches so far; their gradients are where an optimizer finds them."""
        self._sums, self._boundary = list(sums), passing_state(self.job)
        if time.monotonic() - self._written >= PATIENCE * self._cost:
            self._write_sums()

    def can_stop(self) -> bool:
        """Whether the state at the step's begin is still there."""
        return not self.changed or self._base is not None

    def state_of_begin(self) -> dict[str, Any]:
        """What `capture` gave, or would have given, at the step's begin."""
        assert self.can_stop()
        return (capture(self.job) if self._base is None else self._base) | self._begun

    def stop(self) -> None:
        """Keep the updates, or the sums, that were made since they were last written."""
        if self.changed and self._base is not None:
            self._write_updates()
        elif self._sums and not self.changed:
            self._write_sums()

    def forget(self, steps: int) -> None:
        """A checkpoint has what was learnt in the first so many steps."""
        if not ranks.is_first():
            return
        for place in self.folder.glob("step-*"):
            number = place.name.removeprefix("step-")
            if number.isdecimal() and int(number) <= steps and not place.is_symlink():
                for path in place.glob("*.pt"):
                    path.unlink()
                with suppress(OSError):  # something else is in it
                    place.rmdir()
        with suppress(OSError):
            self.folder.rmdir()

    @property
    def _place(self) -> Path:
        return self.folder / f"step-{self.step + 1:06d}"

    @property
    def _updates(self) -> Path:
        return self._place / "updates.pt"

    @property
    def _gradients(self) -> Path:
        return self._place / "gradients.pt"

    def _parameters(self) -> list[torch.nn.Parameter]:
        optimizers = self.job.optimizers.values()
        return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]

    def _write_updates(self) -> None:
        made = {"results": self._results}
        self._write_state(self._updates, lambda: made | {"state": capture(self.job) | self._boundary})

    def _write_sums(self) -> None:
        gradients = [p.grad for p in self._parameters()]
        self._write_state(
            self._gradients, lambda: {"sums": self._sums, "gradients": gradients, "passing": self._boundary}
        )

    def _write_state(self, path: Path, make: Callable[[], Any]) -> None:
        """What is large: not of all weights of a model."""
        if FULL not in self.job.optimizers:
            start = time.monotonic()
            self._write(path, self._key, make())
            self._written = time.monotonic()
            self._cost = self._written - start

    def _write(self, path: Path, key: str, value: Any) -> None:
        """Where the system refuses, the run goes on without."""
        if not self.active:
            return
        try:
            with writing(path):
                write(path, key, value)
        except WriteError as error:
            self.active = False
            print(f"warning: {error}; what a step has made is not kept from here on", file=sys.stderr)


def keep(job: Job, what: str, make: Callable[[], T]) -> T:
    """What `make` gives, a result of the step that the job is in; outside of a step nothing is kept. See Kept."""
    return make() if job.kept is None else job.kept(what, make)


def key_of(job: Job) -> str:
    """A hash of the state: what passes, and enough of the weights to tell those of one step from another's."""
    coefficient = None if job.kl_controller is None else job.kl_controller.coefficient
    digest = hashlib.sha256(f"{sorted(job.counters.items())} {coefficient}".encode())
    digest.update(torch.get_rng_state().numpy().tobytes())
    weights = [tensor for name in job.changing_adapters() for tensor in job.backbone.named_parameters_of(name).values()]
    sampled = [w.detach().flatten()[:: max(1, w.numel() // 64)].float() for w in weights]
    digest.update(torch.cat(sampled).cpu().numpy().tobytes() if sampled else b"")
    return digest.hexdigest()


def copied(value: Any) -> Any:
    """The same with copies of its tensors, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: copied(part) for name, part in value.items()}
    return type(value)(map(copied, value)) if isinstance(value, (list, tuple)) else value


def write(path: Path, key: str, value: Any) -> None:
    """A file with a checksum; a kill leaves all of it or nothing, and what a power loss damages is made again: nobody
    waits for the disk."""
    data = io.BytesIO()
    torch.save({"key": key, "value": value}, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path).open("wb") as file:
        file.write(hashlib.sha256(data.getbuffer()).digest())
        file.write(data.getbuffer())
    staged(path).replace(path)


def read(path: Path, key: str) -> Any:
    """What was written there under this key; None where it is absent, damaged, or of something else."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        return None
    stored = torch.load(io.BytesIO(data[32:]), map_location="cpu", weights_only=True)
    return stored["value"] if stored["key"] == key else None
