"""Runs of several processes that end inside of a step, by a kill of one or by signals, and go on from there."""

import os
import signal

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.signals import Stopped
from rlhf_fast.training import ranks
from rlhf_fast.training.folder import KEPT
from rlhf_fast.training.run import Run
from tests.distributed.cases import STEADY
from tests.distributed.runs import assert_same_run, run
from tests.training.interruptions import PHASES, Killed, contents, watched
from tests.training.tiny_runs import values_of

SMALL = {"steps": 2, "save_every": 1, "micro_batch_size": 1, "lora_dropout": 0.1, "self_test": False}
PPO = values_of("ppo", **SMALL, rollout_chunk=2)
VALUES = {
    "ppo": PPO,
    "sft": values_of("sft", **SMALL, eval_every=1),
    "dpo": values_of("dpo", **SMALL),
    "shards": {**PPO, "shards": 2, "whole_rollouts": False, "lora_dropout": 0.0},
}
BOTH = {0: signal.SIGTERM, 1: signal.SIGTERM}


def attempt(values, sent=None, *, phase="", number=0, resume=None):
    """A run in which, before what is done as number `number` of its phase, the signals `sent` = {process: signal} come;
    SIGKILL is an exception that nothing catches. What the process says, and how often everything was done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "GRACE", 0.2)
        calls = watched(patch)

        def act():
            own = sent.get(ranks.rank())
            if own == signal.SIGKILL:
                raise Killed
            if own is not None:
                os.kill(os.getpid(), own)

        calls.at(phase, number, act)
        said = None
        try:
            run(values, resume)
        except (Stopped, UserError, SystemExit, Killed) as ended:
            said = f"{type(ended).__name__} {ended}"
        return said, dict(calls)


@pytest.fixture(scope="module")
def whole(two, tmp_path_factory):
    """Of an algorithm what a run of two processes leaves that nothing disturbs, and how often each did everything."""
    found = {}

    def of(algorithm):
        if algorithm not in found:
            place = tmp_path_factory.mktemp(algorithm)
            answers = two.run(attempt, {**VALUES[algorithm], "output_dir": str(place)})
            found[algorithm] = contents(place), [calls for _, calls in answers]
        return found[algorithm]

    return of


CASES = [
    ("ppo", "tokens", {1: signal.SIGTERM}), ("ppo", "scores", {0: signal.SIGHUP}),
    ("ppo", "rewards", {1: signal.SIGKILL}),
    ("ppo", "micro_batches", {1: signal.SIGTERM}), ("ppo", "updates", {0: signal.SIGKILL}),
    ("sft", "micro_batches", BOTH), ("sft", "evaluations", {1: signal.SIGTERM}),
    ("dpo", "references", {1: signal.SIGTERM}), ("dpo", "savings", {0: signal.SIGTERM}),
    ("shards", "tokens", {1: signal.SIGTERM}),
]  # fmt: skip


@pytest.mark.parametrize(("algorithm", "phase", "sent"), CASES, ids=str)
def test_processes_end_together_and_go_on_from_there(algorithm, phase, sent, whole, two, tmp_path):
    expected, counts = whole(algorithm)
    values = {**VALUES[algorithm], "output_dir": str(tmp_path)}
    number = max(1, min(counts[rank].get(phase, 0) for rank in sent)) // 2 + 1
    ended = two.run(attempt, values, sent, phase=phase, number=number)
    (first, _), (second, _) = ended
    by = next(iter(sent.values()))
    if by == signal.SIGKILL:
        assert "Killed " in (first, second)
    else:
        assert first.startswith("Stopped stopped ")
        assert f" by {by.name}; saved: " in first
        assert second == f"SystemExit {128 + by}"
    again = two.run(attempt, values, resume="auto")
    assert [said for said, _ in again] == [None, None]
    assert contents(tmp_path) == expected
    assert not (tmp_path / KEPT).exists()
    for (_, before), (_, after), all_of in zip(ended, again, counts, strict=True):
        for name, (_, often) in PHASES.items():
            if (algorithm, name) == ("shards", "tokens"):
                often = 6  # processes that sample together keep whole completions
            twice = before.get(name, 0) + after.get(name, 0) - all_of.get(name, 0)
            if name not in ("evaluations", "savings"):
                assert twice <= often, f"{name}: {twice} were done twice"


def test_another_number_of_processes_takes_completions_and_updates(two, tmp_path, capsys):
    values = {**PPO, **STEADY, "steps": 2, "lora_dropout": 0.0}
    run({**values, "output_dir": str(tmp_path / "one")})
    changing = {**values, "output_dir": str(tmp_path / "changing")}
    two.run(attempt, changing, {1: signal.SIGKILL}, phase="updates", number=7)
    capsys.readouterr()
    said, calls = attempt(changing, resume="auto")
    assert said is None
    assert "step 2 was begun by 2 processes, not 1: " in capsys.readouterr().err
    assert "tokens" not in calls
    assert calls["updates"] == 2
    assert_same_run(tmp_path / "changing", tmp_path / "one")


def late(values, *rest, **options):
    """Each process but the first finds that its last checkpoint is old."""
    with pytest.MonkeyPatch.context() as patch:
        due = Run._checkpoint_is_due

        def of_the_old(self):
            self.saved_at -= 1e9 * ranks.rank()
            return due(self)

        patch.setattr(Run, "_checkpoint_is_due", of_the_old)
        return attempt(values, *rest, **options)


def test_any_process_may_be_asked_for_a_checkpoint_but_one_clock_counts(two, tmp_path):
    values = {**VALUES["sft"], "steps": 3, "save_every": 50, "save_minutes": 60, "output_dir": str(tmp_path)}
    two.run(late, values, {1: signal.SIGUSR1}, phase="batches", number=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-1", "step-3"]
