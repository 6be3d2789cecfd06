"""Runs that end in their midst, by a kill or a signal, and are resumed: what tests of that share."""

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from rlhf_fast.algorithms import preference
from rlhf_fast.algorithms.launch import run_stage, single_stage
from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.rewards import Rewards
from rlhf_fast.rollout.drawing import Drawing
from rlhf_fast.training import job, kept, on_policy, supervised
from rlhf_fast.training.run import Run

# name -> (what is counted, how often it may be done twice)
PHASES = {
    "tokens": ((Drawing, "draw"), 2),  # those of a chunk
    "scores": ((Backbone, "score"), 1),
    "rewards": ((Rewards, "__call__"), 1),
    "micro_batches": ((Tensor, "backward"), 1),
    "updates": ((on_policy, "update"), 1),
    "batches": ((supervised, "update"), 1),
    "references": ((preference, "references_of"), 2),  # a part, and the held-out pairs, which every process scores
    "evaluations": ((Run, "evaluate"), 1),
    "savings": ((job, "save_adapter"), 1),
}


class Killed(BaseException):
    """Stands for a kill: nothing in the code under test may catch it."""


def kill():
    raise Killed


def terminate():
    signal.raise_signal(signal.SIGTERM)


def run(values, *, resume=None):
    run_stage(Console(quiet=True), single_stage(values), resume=resume, overwrite=False)


def interrupt(monkeypatch, step: int, action) -> None:
    """Call `action` once, at the end of the step with this number (from 0)."""
    log = Run.log

    def logged(self, index, metrics, **rest):
        log(self, index, metrics, **rest)
        if index == step:
            monkeypatch.setattr(Run, "log", log)
            action()

    monkeypatch.setattr(Run, "log", logged)


def counted(monkeypatch, places: dict[str, tuple[Any, str]]) -> "Calls":
    """Counts, by name, the calls of the functions `places`, each (owner, attribute)."""
    calls = Calls()
    for name, (owner, attribute) in places.items():
        monkeypatch.setattr(owner, attribute, calls.counting(name, getattr(owner, attribute)))
    return calls


class Calls(Counter):
    """action: is called in the call number `number` (from 1) of the function `name`, before it does anything.
    inside: the names of what counts while `in_step` alone."""

    name, number, action = "", 0, None
    inside, in_step = frozenset(), False

    def counting(self, name, function):
        def called(*arguments, **options):
            if name in self.inside and not self.in_step:
                return function(*arguments, **options)
            self[name] += 1
            if self.action is not None and (name, self[name]) == (self.name, self.number):
                self.action()
            return function(*arguments, **options)

        return called

    def at(self, name, number, action) -> None:
        self.clear()
        self.in_step = False
        self.name, self.number, self.action = name, number, action


def contents(folder: Path) -> dict:
    """All that a run leaves, less the clock: weights bitwise, metrics, samples, evaluations."""
    found = {str(p.relative_to(folder)): {k: v.tolist() for k, v in load_file(p).items()}
             for p in folder.rglob("*.safetensors")}  # fmt: skip
    for name in ("metrics.jsonl", "samples.jsonl", "eval.jsonl"):
        path = folder / name
        rows = read_jsonl(path)
        found[name] = [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]
    return found


def assert_resumes(values, place: Path, monkeypatch, *, step: int) -> dict:
    """A run that is killed at the end of a step (from 0) and resumed leaves what one does that is left alone."""
    run({**values, "output_dir": str(place / "whole")})
    killed = {**values, "output_dir": str(place / "killed")}
    interrupt(monkeypatch, step, kill)
    with pytest.raises(Killed):
        run(killed)
    run(killed, resume="auto")
    found = contents(place / "killed")
    assert found == contents(place / "whole")
    return found


def watched(patch: pytest.MonkeyPatch) -> "Calls":
    """Counts what is done; of what is done in steps and elsewhere, that in steps."""
    patch.setattr(kept, "PATIENCE", 0.0)
    calls = counted(patch, {name: place for name, (place, _) in PHASES.items()})
    calls.inside = {"tokens", "scores", "rewards", "micro_batches"}
    for name, inside in (("begin", True), ("end", False)):
        method = getattr(kept.Kept, name)

        def marked(self, *arguments, method=method, inside=inside):
            calls.in_step = inside
            method(self, *arguments)

        patch.setattr(kept.Kept, name, marked)
    return calls
