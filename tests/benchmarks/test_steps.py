import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import plots
from benchmarks.steps import compare, parity, report
from benchmarks.steps.__main__ import TRL_1_12
from benchmarks.steps.ours import OWN
from benchmarks.steps.recorder import STAGES, Recorder
from benchmarks.steps.setting import Setting, build, share_of_letters


def setting(algorithm, **changes):
    values = {"model": "tiny", "steps": 3, "batch_size": 4, "num_generations": 2, "max_new_tokens": 4}
    values |= {"learning_rate": 5e-4, "gradient_checkpointing": False, "seed": 3}
    return Setting(algorithm=algorithm, **values | changes)


def need_trl(algorithm):
    reason = compare.why_no_trl(algorithm, TRL_1_12)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def dpo():
    """One repeat of everyone who is there."""
    return compare.measure(setting("dpo"), 1, TRL_1_12)


@pytest.mark.parametrize("name", sorted([*OWN, parity.ENDED]))
def test_the_first_steps_of_every_trainer_are_those_of_trl_to_rounding(name):
    need_trl(parity.algorithm_of(name))
    row = parity.compared(name, steps=3)
    differences = [row[series] for series in parity.SERIES if row[series] is not None]
    assert differences
    assert max(differences) < 1e-4
    if name.startswith("ppo"):
        assert (row["ended"] > 0) == (name == parity.ENDED)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_every_stage_of_sampling_trainers_is_timed(algorithm, tmp_path):
    need_trl(algorithm)
    workspace = build(tmp_path, parity.setting(algorithm)).folder
    for name in ("rlhf_fast", "trl"):
        steps = compare.run(workspace, name, algorithm, TRL_1_12, "--steps", "3")["seconds"]
        assert all(step[stage] > 0 for step in steps for stage in STAGES)


def test_times_and_bytes_of_every_contender_are_recorded(dpo):
    for row in dpo["contenders"].values():
        (repeat,) = row["repeats"]
        assert all(set(step) == set(STAGES) for step in repeat["seconds"])
        assert all(step["scoring"] > 0 and step["update"] > 0 and step["generation"] == 0 for step in repeat["seconds"])
        assert 0 < repeat["resident_bytes"] <= repeat["peak_bytes"]
        assert row["tensor_peak_bytes"] > 0
    # The base is 1.5 MB of fp32; every adapter parameter has two more for AdamW.
    assert dpo["contenders"]["rlhf_fast"]["repeats"][0]["held_bytes"] > 2**21


def test_the_page_has_a_row_for_each_contender_and_a_picture_beside_it(dpo, tmp_path):
    page = report.section(with_command(dpo))
    assert all(f"| {name} {row['version']} |" in page for name, row in dpo["contenders"].items())
    plots.save(report.curves([dpo]), tmp_path / "steps.png", "dpo.json")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_says_why_trl_did_not_run(dpo):
    alone = {**dpo, "contenders": {"rlhf_fast": dpo["contenders"]["rlhf_fast"]}, "absent": {"trl": "not there"}}
    assert "trl did not run: not there." in report.section(with_command(alone))


def with_command(results):
    return {**results, "machine": {**results["machine"], "command": "python -m benchmarks.steps"}}


def timed(generation, update, held):
    """A contender: constant times in milliseconds."""
    step = {"generation": generation / 1e3, "scoring": 0.0, "update": update / 1e3}
    repeat = {"seconds": [step] * 3, "held_bytes": held, "resident_bytes": 1, "peak_bytes": 1}
    return {"version": "1.2", "repeats": [repeat], "tensor_peak_bytes": 1}


def test_the_summary_has_a_line_per_algorithm_and_marks_where_we_take_more():
    both = {"rlhf_fast": timed(20, 5, 10), "trl": timed(10, 20, 10)}
    alone = {"setting": {"algorithm": "ppo"}, "contenders": {"rlhf_fast": both["rlhf_fast"]}}
    head, _, line = report.summary([{"setting": {"algorithm": "dpo"}, "contenders": both}, alone]).splitlines()
    row = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert row["| rlhf_fast / TRL"] == "| DPO, TRL 1.2"
    assert (row["whole step"], row["generation"], row["scoring"], row["held"]) == ("0.83", "**2.00**", "", "1.00")


def test_where_rlhf_fast_is_worse_is_said_first():
    worse, better = report.verdict(*map(report.row_of, (timed(20, 5, 10), timed(10, 20, 10)))).splitlines()
    assert worse == "- **rlhf_fast takes more**: generation 2.00 x."
    assert "whole step 0.83 x, update 0.25 x, held 1.00 x" in better


def test_the_first_step_of_a_repeat_is_not_timed():
    slow, fast = ({"generation": 0.0, "scoring": 0.0, "update": s} for s in (9.0, 1.0))
    repeat = {"seconds": [slow, fast, fast], "held_bytes": 1, "resident_bytes": 1, "peak_bytes": 1}
    assert report.row_of({"repeats": [repeat, repeat], "tensor_peak_bytes": 1})["update"]["max_ms"] == 1000


class Trainer:
    def sample(self):
        time.sleep(0.02)
        return torch.rand(())

    def collect(self):
        time.sleep(0.01)
        return self.sample()


def test_a_stage_inside_a_stage_is_charged_alone_and_the_rest_is_the_update():
    recorder, trainer = Recorder(2, seed=0), Trainer()
    recorder.watch(trainer, "collect", "scoring")
    recorder.watch(trainer, "sample", "generation")
    for _ in recorder.steps():
        trainer.collect()
        time.sleep(0.005)
    for step in recorder.seconds:
        assert step["generation"] >= 0.02
        assert 0.01 <= step["scoring"] < step["generation"] + step["scoring"] - 0.019
        assert step["update"] >= 0.005


def test_scoring_ahead_of_the_steps_is_spread_over_them():
    recorder, trainer = Recorder(4, seed=0), Trainer()
    recorder.watch(trainer, "collect", "scoring")
    trainer.collect()
    for _ in recorder.steps():
        pass
    assert all(step["scoring"] >= 0.03 / 4 for step in recorder.seconds)


def test_sampling_starts_from_the_number_of_the_step_whatever_was_drawn_before():
    draws = []
    for drawn_before in (0, 3):
        recorder, trainer = Recorder(2, seed=5), Trainer()
        recorder.watch(trainer, "sample", "generation", seeded=True)
        for _ in recorder.steps():
            torch.rand(drawn_before)
            draws.append(float(trainer.sample()))
    assert draws[:2] == draws[2:]
    assert draws[0] != draws[1]


def test_calls_with_gradients_are_not_charged_to_scoring():
    recorder, trainer = Recorder(1, seed=0), Trainer()
    recorder.watch(trainer, "collect", "scoring", without_grad=True)
    for _ in recorder.steps():
        trainer.collect()
    assert recorder.seconds[0]["scoring"] == 0


def test_one_step_cannot_be_timed():
    with pytest.raises(ValueError, match="needs 2 steps"):
        compare.measure(setting("dpo", steps=1), 1, TRL_1_12)


def test_a_missing_trl_is_named_with_the_command_that_gets_it(tmp_path):
    assert "trl==1.12.0" in compare.why_no_trl("ppo", tmp_path)


def test_a_contender_that_fails_shows_its_error(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho out of memory >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError, match="rlhf_fast failed:\nout of memory"):
        compare.run(tmp_path, "rlhf_fast", "dpo", Path())


def test_the_reward_is_the_share_of_ascii_letters():
    assert share_of_letters(["", ""], ["ab1é", ""]) == [0.5, 0.0]
