"""The learning self-test says what is wrong with a run, nothing of one that learns, and changes nothing in it."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from rlhf_fast.algorithms.launch import run_stage, single_stage
from rlhf_fast.models import peft_io
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.rollout.agreement import Agreement
from rlhf_fast.training import self_test
from rlhf_fast.training.self_test import reload_error
from tests.training.tiny_runs import config_of, job_of, values_of


def results_of(tmp_path: Path, algorithm: str, **changes) -> dict[str, dict]:
    """self_test.json of a run."""
    values = values_of(algorithm, **{"steps": 1, "output_dir": str(tmp_path / "run"), **changes})
    run_stage(Console(quiet=True), single_stage(values), resume=None, overwrite=False)
    path = tmp_path / "run" / "self_test.json"
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.mark.parametrize(
    ("algorithm", "roles"), [("ppo", ("policy", "critic")), ("dpo", ("policy",)), ("reward_model", ("reward",))]
)
def test_a_run_that_learns_passes_and_says_nothing(algorithm, roles, tmp_path, capsys):
    results = results_of(tmp_path, algorithm)
    expected = {f"{what} {role}" for role in roles for what in ("moves", "gradients", "reload")}
    assert results.keys() == expected | ({"ratio"} if algorithm == "ppo" else set())
    assert all(result["passed"] and result["step"] == 1 for result in results.values())
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    for role in roles:
        assert results[f"gradients {role}"]["value"] == metrics[f"grad_norm_{role}"]
    assert "self-test" not in capsys.readouterr().err


def test_all_weights_are_tested_too(tmp_path):
    assert results_of(tmp_path, "sft", lora_rank=0).keys() == {"moves model", "gradients model"}


def test_it_changes_nothing_in_the_run(tmp_path):
    weights = []
    for on in (True, False):
        results = results_of(tmp_path / str(on), "ppo", steps=2, self_test=on)
        assert bool(results) == on
        weights.append(load_file(tmp_path / str(on) / "run" / "adapter_model.safetensors"))
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_weights_that_stay_are_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    results = results_of(tmp_path, "sft", steps=2)
    assert results["gradients policy"]["passed"]
    assert not results["moves policy"]["passed"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "self-test" in line]
    assert line.startswith("self-test: moves policy after 2 steps: no weight of policy has changed")


def test_a_step_that_teaches_nothing_may_be_followed_by_one_that_does(tmp_path, monkeypatch, capsys):
    """The reward is the same for all completions of the first step, and then differs; or it never does."""
    (tmp_path / "reward.py").write_text(
        "from itertools import count\n\nCALLS = count()\n\n\n"
        "def late(completions):\n    k = next(CALLS)\n"
        "    return [float(k > 2) * (i % 2) for i, _ in enumerate(completions)]\n"
        "\n\ndef never(completions):\n    return [0.0] * len(completions)\n"
    )
    common = {"steps": 3, "objective": "ppo_clip", "reference_refresh_every": None}
    results = results_of(tmp_path / "late", "grpo", reward=f"{tmp_path}/reward.py:late", **common)
    assert (results["moves policy"]["passed"], results["moves policy"]["step"]) == (True, 2)
    assert "self-test" not in capsys.readouterr().err
    results = results_of(tmp_path / "never", "grpo", reward=f"{tmp_path}/reward.py:never", **common)
    assert (results["gradients policy"]["value"], results["gradients policy"]["step"]) == (0.0, 3)
    assert "the gradient norm of policy is 0" in capsys.readouterr().err


def test_the_policy_is_waited_for_while_the_critic_alone_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(self_test, "PATIENCE", 1)
    results = results_of(tmp_path, "ppo", steps=2, critic_warmup_steps=1)
    assert {name: result["step"] for name, result in results.items() if "moves" in name} == {
        "moves critic": 1,
        "moves policy": 2,
    }
    assert all(result["passed"] for result in results.values())
    assert "self-test" not in capsys.readouterr().err


def test_old_logprobs_of_another_policy_are_told(tmp_path, monkeypatch, capsys):
    logprobs_and_collisions = Backbone.logprobs_and_collisions

    def hotter(self, *args, temperature, **options):
        return logprobs_and_collisions(self, *args, temperature=1.5 * temperature, **options)

    monkeypatch.setattr(Backbone, "logprobs_and_collisions", hotter)
    monkeypatch.setattr(Agreement, "is_rounding", False)  # the sampler's would be taken
    result = results_of(tmp_path, "grpo")["ratio"]
    assert not result["passed"]
    assert result["value"] > 0.01
    assert "self-test: ratio after 1 steps: a ratio of the first minibatch is" in capsys.readouterr().err


def test_an_adapter_that_reloads_as_another_is_told(tmp_path, monkeypatch, capsys):
    """As an alpha of nearly 0 in the file, which another trainer wrote."""
    job = job_of(config_of("sft"))
    assert reload_error(job.backbone, "policy") <= 1e-6
    assert set(job.backbone.adapters) == {"policy"}
    config = peft_io._config
    monkeypatch.setattr(peft_io, "_config", lambda *args: {**config(*args), "lora_alpha": 1e-6, "alpha_pattern": {}})
    monkeypatch.setattr(peft_io, "check_reload", lambda *args: None)
    assert reload_error(job.backbone, "policy") > 0.1
    assert set(job.backbone.adapters) == {"policy"}
    result = results_of(tmp_path, "dpo", learning_rate=0.5)["reload policy"]
    assert not result["passed"]
    assert "self-test: reload policy after 1 steps: a saved adapter loads as another" in capsys.readouterr().err


def test_what_peft_says_of_a_saved_adapter_is_said(tmp_path, monkeypatch):
    def refuse(*args):
        raise self_test.UserError("PEFT makes something else of it")

    monkeypatch.setattr(self_test, "save_adapter", refuse)
    result = results_of(tmp_path, "sft")["reload policy"]
    assert (result["passed"], result["why"]) == (False, "PEFT makes something else of it")
