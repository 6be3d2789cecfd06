"""A run that was stopped or killed inside an epoch and resumed is the uninterrupted run, bit for bit."""

import os
import signal

import pytest

from rlhf_fast.data import encoded
from rlhf_fast.errors import UserError
from rlhf_fast.signals import Stopped
from tests.training.interruptions import Killed, assert_resumes, contents, interrupt, kill, run, terminate
from tests.training.tiny_runs import ALGORITHMS, values_of
from tests.training.tiny_runs import folder as data_folder

SPECIAL = {
    "sft of all weights": values_of("sft", lora_rank=0),
    "an ensemble of rewards": values_of("reward_model", ensemble=2, lora_dropout=0.3),
}


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, *SPECIAL])
def test_a_run_stopped_by_a_signal_resumes_bit_for_bit(algorithm, tmp_path, monkeypatch):
    values = SPECIAL[algorithm] if algorithm in SPECIAL else values_of(algorithm)
    run({**values, "output_dir": str(tmp_path / "whole")})
    stopped = {**values, "output_dir": str(tmp_path / "stopped")}
    interrupt(monkeypatch, 2, terminate)
    with pytest.raises(Stopped, match=r"after step 3 of 5.*--resume auto") as info:
        run(stopped)
    assert info.value.exit_code == 128 + signal.SIGTERM
    run(stopped, resume="auto")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert len(contents(tmp_path / "whole")["metrics.jsonl"]) == 5


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_killed_run_resumes_from_its_last_checkpoint_bit_for_bit(algorithm, tmp_path, monkeypatch):
    """With everything on that could go its own way: dropout, evaluations between, passes over the data, their seed."""
    values = values_of(
        algorithm, save_every=2, eval_every=1, lora_dropout=0.3, data_seed=11, epochs=2.3, warmup_ratio=0.5
    )
    del values["steps"]
    assert len(assert_resumes(values, tmp_path, monkeypatch, step=3)["eval.jsonl"]) > 4


def test_all_that_ppo_may_carry_from_step_to_step_resumes_bit_for_bit(tmp_path, monkeypatch):
    changes = {
        "critic": "shared", "critic_warmup_steps": 1, "kl_variant": "exact", "kl_coef": 0.1, "policy_ema": 0.5,
        "objective": {"kl_coef": 0.1, "kl_variant": "exact_forward"}, "normalize_rewards": "scale",
        "optimizer": "rmsprop", "ptx_data": str(data_folder() / "sft.jsonl"),
        "best_by": "reward", "eval_every": 1, "save_every": 2, "steps": 3, "learning_rate": 1e-3,
    }  # fmt: skip
    values = values_of("ppo", **changes)
    found = assert_resumes(values, tmp_path, monkeypatch, step=2)
    for place in ("", "critic/", "ema/", "best/"):
        assert f"{place}adapter_model.safetensors" in found


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, monkeypatch):
    assert_resumes(values_of("sft"), tmp_path, monkeypatch, step=1)


@pytest.mark.parametrize("ends", [kill, terminate])
def test_a_run_that_ends_while_another_process_encodes_the_rows_ahead_resumes_bit_for_bit(ends, tmp_path, monkeypatch):
    """It is the run in which nobody does."""
    values = values_of("sft", batch_size=2, save_every=2)
    monkeypatch.setattr(encoded, "KEPT", 5)
    workers, ahead = [], encoded.Ahead
    monkeypatch.setattr(encoded, "Ahead", lambda work: workers.append(ahead(work)) or workers[-1])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    run({**values, "output_dir": str(tmp_path / "alone")})
    assert not workers
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    values["output_dir"] = str(tmp_path / "ended")
    begun = []

    def end():
        begun.append(len(workers[-1]._asked) + len(workers[-1]._done))
        ends()

    interrupt(monkeypatch, 2, end)
    with pytest.raises((Killed, Stopped)):
        run(values)
    assert begun[0] > 0, "rows of the fourth step"
    run(values, resume="auto")
    assert len(workers) == 2
    assert contents(tmp_path / "ended") == contents(tmp_path / "alone")


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_reward_that_fails_or_hangs_loses_no_step(algorithm, tmp_path):
    (tmp_path / "reward.py").write_text(
        "import pathlib, time\n"
        f"calls, hangs = (pathlib.Path({str(tmp_path)!r}) / name for name in ('calls', 'hangs'))\n"
        "def score(completions):\n"
        "    if hangs.exists(): calls.open('a').write('.')\n"
        "    if hangs.exists() and len(calls.read_text()) >= 6: time.sleep(60)\n"
        "    return [len(c) % 11 / 5.0 for c in completions]\n"
    )
    values = values_of(algorithm, reward=f"{tmp_path / 'reward.py'}:score", reward_timeout=1)
    run({**values, "output_dir": str(tmp_path / "whole")})
    (tmp_path / "hangs").touch()
    failed = {**values, "output_dir": str(tmp_path / "failed")}
    with pytest.raises(UserError, match=r"no answer in 1 s .*; the checkpoint of step 3 is saved: --resume auto"):
        run(failed)
    (tmp_path / "hangs").unlink()
    run(failed, resume="auto")
    assert contents(tmp_path / "failed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_evaluations_between_leave_no_trace_in_the_run(algorithm, tmp_path):
    plain = values_of(algorithm, steps=3)
    run({**plain, "output_dir": str(tmp_path / "plain")})
    run({**plain, "output_dir": str(tmp_path / "often"), "eval_every": 1})
    often, rarely = contents(tmp_path / "often"), contents(tmp_path / "plain")
    assert [row["step"] for row in often.pop("eval.jsonl")] == [0, 1, 2, 3]
    assert [row["step"] for row in rarely.pop("eval.jsonl")] == [0, 3]
    assert often == rarely


def test_a_finished_run_can_be_continued_with_more_steps(tmp_path):
    run({**values_of("sft", steps=5), "output_dir": str(tmp_path / "whole")})
    longer = {**values_of("sft", steps=3), "output_dir": str(tmp_path / "longer")}
    run(longer)
    run({**longer, "steps": 5}, resume="auto")
    ours, whole = contents(tmp_path / "longer"), contents(tmp_path / "whole")
    assert ours["metrics.jsonl"] == whole["metrics.jsonl"]
    assert ours["adapter_model.safetensors"] == whole["adapter_model.safetensors"]
