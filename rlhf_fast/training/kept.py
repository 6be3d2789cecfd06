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
from collections.abc import Callable, Sequence
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
SPEED = 1e8  # bytes a second that a disk is taken to write


class Kept:
    """The results of the steps of a run. changed: an update of the present step was made.

    Of several processes each keeps the results of its own rows. Updates are those of all, and the first one keeps them.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder / KEPT
        self.active = True
        self.step = 0
        self.changed = False
        self._begun: dict[str, Any] = {}  # what passes, at the begin of the step
        self._base: dict[str, Any] | None = None  # the whole state there, once it is needed
        self._state = ""  # of the weights and what passes, at the first result
        self._key = ""  # of that and of the results so far
        self._number = 0  # of results so far
        self._rows: dict[str, tuple[dict[str, Tensor], int]] | None = None  # that another number of processes made
        self._told = False
        self._results: list[dict[str, Any]] = []  # of the updates so far
        self._stored: dict[str, Any] | None = None  # of the updates that an earlier process made
        self._boundary: dict[str, Any] = {}  # what passes, behind the last update
        self._minibatch = 0  # of the step, from 0
        self._sums: list[dict[str, Tensor]] = []  # of its micro-batches so far
        self._passing: dict[str, Any] = {}  # behind the last of them
        self._before = 0  # rows of its micro-batches that were done before, and that `before` has not told of yet
        self._done = 0  # rows of its micro-batches so far
        self.logprobs: list[tuple[Tensor, Tensor]] = []  # (rows, log-probabilities) of its micro-batches so far
        # Seconds that the last writing of updates or sums took, when that was, and when the first micro-batch began.
        self._cost, self._written, self._started = 0.0, 0.0, 0.0

    def begin(self, step: int) -> None:
        """Results are those of this step (from 0) from here on, until `end`."""
        self.step, self.changed, self._begun, self._base = step, False, passing_state(self.job), None
        self._state, self._key, self._number, self._rows = "", "", 0, None
        self._results, self._stored, self._boundary, self._minibatch = [], None, {}, -1
        self.close()
        self.job.kept = self

    def end(self) -> None:
        self.job.kept = None

    def __call__(self, what: str, make: Callable[[], T], *, rows: Sequence[str] = (), together: bool = False) -> T:
        """What `make` gives, or gave before: numbers, texts and tensors on the CPU, in lists, tuples and dicts.

        rows: of a chunk of tokens, (B, T) with -1 behind each row's, what tells a row from others: then those that
        another number of processes made count too. together: all processes take part in `make`.
        """
        self._key = hashlib.sha256(f"{self._key or self._key_of_step()} {what} {[*rows]}".encode()).hexdigest()
        path = self._place / f"{self._number:04d}-{self._who}.pt"
        self._number += 1
        stored = read(path, self._key) if self.active else None
        if stored is None and rows and self.active:
            stored = self._of_others(rows)
        if together and int(ranks.all_max(torch.tensor(int(stored is None)))):
            stored = None
        if stored is not None:
            set_random_state(stored["random"])
            return stored["value"]
        value = make()
        if together:
            ranks.heed()
        self._write(path, self._key, {"value": value, "random": random_state(), "of": self._state, "rows": [*rows]})
        return value

    def update(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """One of the several updates of a step: what `make` gives, with which the weights change."""
        if not self._results:
            self._key_of_step()
            if FULL not in self.job.optimizers:
                self._base = copied(capture(self.job)) if ranks.is_first() else {}
            self._stored = self._alike(read(self._updates, self._state) if self.active else None)
            self._written = time.monotonic()
        if self._stored is not None and len(self._results) < len(self._stored["results"]):
            self._results.append(self._stored["results"][len(self._results)])
            if len(self._results) == len(self._stored["results"]):
                restore(self.job, self._stored["state"])
                self.changed, self._boundary = True, passing_state(self.job)
            self.close()
            return self._results[-1]
        self._results.append(make())
        self._boundary = passing_state(self.job)
        if time.monotonic() - self._written >= PATIENCE * self._cost:
            self._write_updates()
        return self._results[-1]

    def sums(self) -> list[dict[str, Tensor]]:
        """The metrics of this process's micro-batches that were done before, whose gradients are put back; `before`
        says which."""
        self._started = self._written = time.monotonic()
        stored = read(self._gradients, self._key_of_sums()) if self.active else None
        if stored is None:
            return []
        for parameter, gradient in zip(self.job.trained_parameters, stored["gradients"], strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        restore_passing(self.job, stored["passing"])
        device = self.job.device
        self._sums = [{name: value.to(device) for name, value in part.items()} for part in stored["sums"]]
        self._before = self._done = stored["rows"]
        self.logprobs = [(rows, made.to(device)) for rows, made in stored["logprobs"]]
        return list(self._sums)

    def before(self, rows: int) -> int:
        """How many of this process's rows, or of the next ones of them, were done before."""
        done = min(self._before, rows)
        self._before -= done
        return done

    def keep_sums(self, sums: list[dict[str, Tensor]], rows: int) -> None:
        """The metrics of the micro-batches so far, of so many rows; their gradients are where an optimizer finds
        them."""
        self._sums, self._done, self._passing = list(sums), rows, passing_state(self.job)
        if FULL not in self.job.optimizers and time.monotonic() - self._written >= PATIENCE * self._cost:
            self._write_sums()

    def close(self) -> None:
        """The minibatch has all its micro-batches: what is added to their gradients is not theirs."""
        self._minibatch, self._sums, self._before, self.logprobs = self._minibatch + 1, [], 0, []

    def can_stop(self) -> bool:
        """Whether the state at the step's begin is still there."""
        return not self.changed or self._base is not None

    def state_of_begin(self) -> dict[str, Any]:
        """What `capture` gave, or would have given, at the step's begin."""
        assert self.can_stop()
        return (capture(self.job) if self._base is None else self._base) | self._begun

    def stop(self) -> bool:
        """Keep the updates, or the sums, that were made since they were last written; whether all of them are kept."""
        if self.changed:
            self._write_updates()
        if self._sums and not self._worth_writing():
            return False
        if self._sums:
            self._write_sums()
        return self.active

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
    def _who(self) -> str:
        return f"{ranks.rank()}-of-{ranks.world()}"

    @property
    def _updates(self) -> Path:
        return self._place / "updates.pt"

    @property
    def _gradients(self) -> Path:
        return self._place / f"gradients-{self._who}.pt"

    def _key_of_step(self) -> str:
        """The key of the state at the first result."""
        if not self._state:
            self._state = key_of(self.job)
            self._tell()
        return self._state

    def _tell(self) -> None:
        """Say it where another number of processes began the step."""
        counts = {path.stem.rpartition("-of-")[2] for path in self._place.glob("*-of-*.pt")} - {str(ranks.world())}
        if counts and not self._told and ranks.is_first():
            self._told = True
            print(f"warning: step {self.step + 1} was begun by {' or '.join(sorted(counts))} processes, not "
                  f"{ranks.world()}: of what they kept completions and updates are taken, the rest is made anew",
                  file=sys.stderr)  # fmt: skip

    def _alike(self, stored: dict[str, Any] | None) -> dict[str, Any] | None:
        """The updates that all processes have read; None where one has not."""
        count = 0 if stored is None else len(stored["results"])
        most, least = ranks.all_max(torch.tensor([count, -count])).tolist()
        return stored if most == -least else None

    def _of_others(self, rows: Sequence[str]) -> dict[str, Any] | None:
        """What another number of processes kept of these rows; of those that it has nothing of, no tokens."""
        if self._rows is None:
            self._rows = {}
            for path in self._place.glob("[0-9]*-of-*.pt"):
                found = None if path.stem.endswith(f"-of-{ranks.world()}") else read(path)
                if found is not None and found["of"] == self._state:
                    lengths = (found["value"]["tokens"] >= 0).sum(1).tolist() if found["rows"] else []
                    named = zip(found["rows"], lengths, strict=True)
                    self._rows |= {row: (found["value"], i) for i, (row, length) in enumerate(named) if length}
        theirs = [self._rows.get(row) for row in rows]
        known = [place for place in theirs if place is not None]
        if not known:
            return None
        width = max(value["tokens"].shape[1] for value, _ in known)
        made = dict(known[0][0])
        for name in [name for name, value in made.items() if value.dim() > 1]:
            made[name] = torch.full((len(rows), width), -1.0 if name == "tokens" else 0.0).to(made[name])
            for row, place in zip(made[name], theirs, strict=True):
                if place is not None:
                    of_row = place[0][name][place[1]]
                    row[: len(of_row)] = of_row
        return {"value": made, "random": random_state()}

    def _worth_writing(self) -> bool:
        """Whether making the sums took longer than writing them does, which of all weights of a model is long."""
        size = sum(p.grad.nbytes for p in self.job.trained_parameters if p.grad is not None) * ranks.world()
        return FULL not in self.job.optimizers or time.monotonic() - self._started >= size / SPEED

    def _write_updates(self) -> None:
        if self._base is not None and ranks.is_first():
            state = capture(self.job) | self._boundary
            self._write_timed(self._updates, self._state, {"results": self._results, "state": state})

    def _write_sums(self) -> None:
        gradients = [p.grad for p in self.job.trained_parameters]
        made = {"sums": self._sums, "rows": self._done, "logprobs": self.logprobs, "passing": self._passing}
        self._write_timed(self._gradients, self._key_of_sums(), made | {"gradients": gradients})

    def _key_of_sums(self) -> str:
        return f"{self._key_of_step()} {self._minibatch}"

    def _write_timed(self, path: Path, key: str, value: Any) -> None:
        start = time.monotonic()
        self._write(path, key, value)
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


def keep(job: Job, what: str, make: Callable[[], T], **how: Any) -> T:
    """What `make` gives, a result of the step that the job is in; outside of a step nothing is kept. See Kept."""
    if job.kept is not None:
        return job.kept(what, make, **how)
    value = make()
    if how.get("together"):
        ranks.heed()
    return value


def key_of(job: Job) -> str:
    """A hash of the state: what passes, and enough of the weights to tell those of one step from another's."""
    coefficient = None if job.kl_controller is None else job.kl_controller.coefficient
    digest = hashlib.sha256(f"{sorted(job.counters.items())} {coefficient}".encode())
    digest.update(torch.get_rng_state().numpy().tobytes())
    weights = [tensor for name in job.changing_adapters() for tensor in job.backbone.named_parameters_of(name).values()]
    weights += job.backbone.model.parameters() if FULL in job.optimizers else []
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
    while not path.parent.is_dir():  # which another process may remove while it is empty
        with suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path).open("wb") as file:
        file.write(hashlib.sha256(data.getbuffer()).digest())
        file.write(data.getbuffer())
    staged(path).replace(path)


def read(path: Path, key: str | None = None) -> Any:
    """What was written there under this key, or any; None where it is absent, damaged, or of something else."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        return None
    stored = torch.load(io.BytesIO(data[32:]), map_location="cpu", weights_only=True)
    return stored["value"] if key in (None, stored["key"]) else None
