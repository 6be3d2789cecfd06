"""Each detector on a made history that it fires on, and on one that it is silent on."""

import random

import pytest
import torch

from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.training.detectors import DETECTORS, LIMITS, Watch
from rlhf_fast.training.experience import correlation_of, repetition_of
from rlhf_fast.training.run import Run
from tests.training.tiny_runs import config_of, job_of

STEPS = 40


def line(start: float, end: float) -> list[float]:
    return [start + (end - start) * i / (STEPS - 1) for i in range(STEPS)]


def healthy() -> dict[str, list[float]]:
    """Of a run that learns and has nothing wrong."""
    noise = random.Random(0)
    return {
        "reward": line(0, 1), "reward/judge": line(0, 0.5), "kl": line(0, 5), "entropy": line(2, 1.2),
        "completion_length": [20 + noise.uniform(-1, 1) for _ in range(STEPS)], "finished": line(0.9, 1),
        "length_correlation": [noise.uniform(-0.3, 0.3) for _ in range(STEPS)], "repetition": line(0.02, 0.05),
        "equal_groups": line(0.2, 0.5), "clip_fraction": line(0.02, 0.1), "ratio_max": line(1.3, 1.5),
        "explained_variance": line(-0.5, 0.6), "sampler_kl": line(0.0, 0.001),
    }  # fmt: skip


SICK = {
    "length_drift": {"completion_length": line(20, 40)},
    "repetition": {"repetition": line(0.02, 0.6)},
    "kl_explosion": {"kl": [2.0**i / 1000 for i in range(STEPS)]},
    "source_falls": {"reward/judge": line(0.5, 0)},
    "entropy_collapse": {"entropy": line(2, 0)},
    "dead_groups": {"equal_groups": line(0.2, 1.0)},
    "clipped_much": {"clip_fraction": line(0.02, 0.6)},
    "never_clipped": {"clip_fraction": [0.0] * STEPS, "ratio_max": line(1.001, 1.002)},
    "sampler_mismatch": {"sampler_kl": line(0.0, 0.1)},
    "useless_critic": {"explained_variance": line(-0.5, -0.01)},
    "missing_eos": {"finished": line(1, 0.2)},
}
# Near to what is sick: what must be left alone.
WELL = {
    "length_drift": {"completion_length": line(20, 40), "reward": line(1, 0)},
    "repetition": {"repetition": line(0.5, 0.55)},
    "kl_explosion": {"kl": line(30, 60)},
    "source_falls": {"reward/judge": line(0.5, 0), "reward": line(1, 0)},
    "entropy_collapse": {"entropy": line(0.1, 0.09)},
    "dead_groups": {"equal_groups": line(0, 0.8)},
    "clipped_much": {"clip_fraction": line(0.25, 0.25)},
    "never_clipped": {"clip_fraction": [0.0] * STEPS, "ratio_max": [1.0] * STEPS},
    "sampler_mismatch": {"sampler_kl": [0.05, *line(0, 0)[1:]]},
    "useless_critic": {"explained_variance": [0.01 if i % 15 == 0 else -1.0 for i in range(STEPS)]},
    "missing_eos": {"finished": line(0.1, 0.0)},
}


def told(changes: dict[str, list[float]]) -> list[dict]:
    columns = healthy() | changes
    watch = Watch()
    rows = [{name: values[i] for name, values in columns.items()} for i in range(STEPS)]
    return [warning for i, row in enumerate(rows) for warning in watch.step(i + 1, row)]


@pytest.mark.parametrize("cause", SICK)
def test_a_detector_speaks_once_of_what_is_sick_and_not_of_what_is_well(cause):
    (warning,) = told(SICK[cause])
    assert warning["cause"] == cause
    assert LIMITS.window <= warning["step"] <= STEPS
    assert (warning["means"], warning["try"]) == DETECTORS[cause][1:]
    assert f"{warning['value']:.0e}"[0] in warning["seen"] or f"{warning['value']:.0%}" in warning["seen"]
    assert told(WELL[cause]) == []


def test_a_healthy_run_is_told_nothing():
    assert told({}) == []


def test_the_first_step_compares_sampler_and_trainer():
    for gap, count in ((2e-3, 1), (5e-4, 0), (float("nan"), 1)):
        assert len(Watch().step(1, {"sampler_gap": gap, "sampler_gap_limit": 1e-3})) == count


@pytest.mark.parametrize(("last", "count"), [(0.5, 1), (0.95, 0)])
def test_a_held_out_reward_that_falls_while_training_rises(last, count):
    watch, found = Watch(), []
    for step, reward in enumerate(line(0, 1), 1):
        found += watch.step(step, {"reward": reward})
        if step % 10 == 0:
            held_out = {10: 0.2, 20: 0.6, 30: 1.0, 40: last}[step]
            found += watch.evaluation(step, {"reward": held_out, "reward_se": 0.1})
    assert [(warning["step"], warning["cause"]) for warning in found] == [(40, "held_out_falls")] * count
    assert count == 0 or "from 1 to 0.5" in found[0]["seen"]


def test_every_detector_is_tried():
    assert set(SICK) == set(WELL) == set(DETECTORS) - {"held_out_falls"}


def test_a_run_writes_warnings_and_a_resumed_one_goes_on_where_it_was(tmp_path, capsys):
    """Stopped at any step, it says what the whole run says, and nothing twice."""
    columns = healthy() | SICK["dead_groups"] | SICK["missing_eos"]
    rows = [{name: values[i] for name, values in columns.items()} for i in range(STEPS)]
    config = config_of("grpo", output_dir=str(tmp_path / "run"), steps=STEPS)
    job = job_of(config, scrambled=False)
    with Run(config, job, resume=None, overwrite=False) as run:
        for step, row in enumerate(rows):
            run.log(step, row, tokens=1)
            if step == 19:
                run.evaluation(20, {"metrics": {"reward": 0.3}, "samples": []})
    whole = read_jsonl(tmp_path / "run" / "warnings.jsonl")
    assert {warning["cause"] for warning in whole} == {"dead_groups", "missing_eos"}
    assert [row["warnings"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")][-1] == 2
    lines = [text for text in capsys.readouterr().err.splitlines() if text.startswith("warning: ")]
    assert [text.split()[1] for text in lines] == [warning["cause"] for warning in whole]
    evaluations = read_jsonl(tmp_path / "run" / "eval.jsonl")
    for stopped in (5, 20, whole[0]["step"], 37):
        known = [warning for warning in whole if warning["step"] <= stopped]
        metrics = [{"step": i + 1, **row} for i, row in enumerate(rows[:stopped])]
        seen = [row for row in evaluations if row["step"] <= stopped]
        watch = Watch.of(metrics, seen, [warning["cause"] for warning in known])
        later = []
        for step in range(stopped, STEPS):
            later += watch.step(step + 1, rows[step])
            later += watch.evaluation(20, {"reward": 0.3}) if step == 19 else []
        assert known + later == whole


def test_repeated_4_grams_and_the_correlation_with_lengths_by_hand():
    assert repetition_of([[1, 2, 3, 4, 5]]) == 0.0
    assert repetition_of([[7] * 7, [1, 2]]) == pytest.approx(0.5 * (1 - 1 / 4))
    assert repetition_of([[1, 2, 3, 4] * 2]) == pytest.approx(1 / 5)
    x, y = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 1.0, 1.0])
    assert float(correlation_of(x, y)) == pytest.approx(-8 / 3 / (14 / 3 * 8 / 3) ** 0.5)
    assert float(correlation_of(x, torch.ones(3))) == 0.0
