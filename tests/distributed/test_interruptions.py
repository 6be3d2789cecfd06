"""Runs of several processes that end inside of a step, by a kill of one or by signals, and go on from there."""

import os
import signal
import time
from pathlib import Path

import pytest

from rlhf_fast import rollout
from rlhf_fast.algorithms import preference
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.rewards import Rewards
from rlhf_fast.training import job, kept, on_policy, ranks, supervised
from rlhf_fast.training.folder import KEPT
from rlhf_fast.training.run import Run, Stopped
from tests.distributed.test_equal_to_one import assert_same_run, run
from tests.training.interruptions import Killed, contents, counted
from tests.training.tiny_runs import values_of

PLACES = {
    "tokens": (rollout._Heed, "__call__"),
    "scores": (Backbone, "score"),
    "rewards": (Rewards, "__call__"),
    "parts": (ranks, "heed"),
    "updates": (on_policy, "update"),
    "batches": (supervised, "update"),
    "references": (preference, "references_of"),
    "evaluations": (Run, "evaluate"),
    "savings": (job, "save_adapter"),
}
PPO = values_of("ppo", steps=2, save_every=1, micro_batch_size=1, rollout_chunk=2, eval_every=1, lora_dropout=0.1)
VALUES = {
    "ppo": PPO,
    "sft": values_of("sft", steps=2, save_every=1, micro_batch_size=1, eval_every=1, lora_dropout=0.1),
    "full": values_of("sft", steps=2, save_every=1, micro_batch_size=1, lora_rank=0, learning_rate=0.001),
    "dpo": values_of("dpo", steps=2, save_every=1, micro_batch_size=2),
    "shards": {**PPO, "shards": 2, "whole_rollouts": False, "lora_dropout": 0.0},
}


def attempt(values, sent=(), *, phase="", number=0, resume=None):
    """A run in which, before what is done as number `number` of its phase, the signals `sent` = {rank: signal} come;
    -9 stands for a kill. What the process says, how often everything was done, and seconds from the signal on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "PATIENCE", 0.0)
        patch.setattr(ranks, "GRACE", 0.2)
        calls, times = counted(patch, PLACES), []

        def act():
            times.append(time.monotonic())
            own = dict(sent).get(ranks.rank())
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
        return said, dict(calls), time.monotonic() - times[0] if times else None


@pytest.fixture(scope="module")
def whole(two, tmp_path_factory):
    """Of each algorithm what a run of two processes leaves that nothing disturbs, and how often all was done in it."""
    found = {}

    def of(algorithm):
        if algorithm not in found:
            place = tmp_path_factory.mktemp(algorithm)
            answers = two.run(attempt, {**VALUES[algorithm], "output_dir": str(place)})
            found[algorithm] = contents(place), [calls for _, calls, _ in answers]
        return found[algorithm]

    return of


BOTH = {0: signal.SIGTERM, 1: signal.SIGTERM}
CASES = [
    ("ppo", "tokens", {1: signal.SIGTERM}), ("ppo", "tokens", {0: signal.SIGHUP}), ("ppo", "tokens", {1: signal.SIGKILL}),
    ("ppo", "rewards", {1: signal.SIGTERM}), ("ppo", "parts", BOTH), ("ppo", "updates", {1: signal.SIGKILL}),
    ("sft", "parts", {1: signal.SIGTERM}), ("sft", "batches", {0: signal.SIGKILL}),
    ("sft", "evaluations", {1: signal.SIGTERM}), ("full", "parts", {0: signal.SIGTERM}),
    ("dpo", "references", {1: signal.SIGTERM}), ("dpo", "savings", BOTH),
    ("shards", "tokens", {1: signal.SIGTERM}), ("shards", "parts", {0: signal.SIGTERM}),
]  # fmt: skip


@pytest.mark.parametrize(("algorithm", "phase", "sent"), CASES, ids=str)
def test_processes_end_together_and_go_on_from_there(algorithm, phase, sent, whole, two, tmp_path):
    expected, counts = whole(algorithm)
    values = {**VALUES[algorithm], "output_dir": str(tmp_path)}
    number = max(counts[0].get(phase, 0), counts[1].get(phase, 0)) // 2 + 1
    answers = two.run(attempt, values, sent, phase=phase, number=number)
    print([said for said, _, _ in answers], [seconds for _, _, seconds in answers])
    again = two.run(attempt, values, resume="auto")
    assert [said for said, _, _ in again] == [None, None]
    assert contents(tmp_path) == expected
    assert not (tmp_path / KEPT).exists()
    for (_, first, _), (_, second, _), all_of in zip(answers, again, counts, strict=True):
        print({name: (first.get(name, 0), second.get(name, 0), all_of.get(name, 0)) for name in PLACES})
