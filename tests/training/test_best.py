"""The best policy of a run stays, whatever comes after it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast.training.best import keep_best
from tests.training.tiny_runs import config_of, job_of


def test_the_policy_of_the_best_evaluation_within_the_budget_is_kept(tmp_path):
    config = config_of("ppo", best_by="reward", kl_budget=3.0, eval_every=1)
    job = job_of(config)
    head = next(iter(job.backbone.named_parameters_of("policy")))
    evaluations = [(0, 1.0, 0.0), (1, 2.0, 1.0), (2, 9.0, 3.5), (3, 1.5, 0.5), (4, 2.5, 3.0), (5, 2.5, 0.1)]
    kept = []
    for done, reward, kl in evaluations:
        with torch.no_grad():
            job.backbone.named_parameters_of("policy")[head].fill_(done / 8)
        keep_best(job, config, tmp_path, done, {"reward": reward, "kl": kl})
        assert not (tmp_path / "best" / ".new").exists()
        weights = load_file(tmp_path / "best" / "adapter_model.safetensors")[f"base_model.model.{head}"]
        kept.append((json.loads((tmp_path / "best" / "best.json").read_text())["step"], float(weights.max()) * 8))
    assert kept == [(0, 0), (1, 1), (1, 1), (1, 1), (4, 4), (4, 4)]


@pytest.mark.parametrize(("changes", "message"), [
    ({"best_by": "reward"}, "best_by reward needs eval_every"),
    ({"kl_budget": 1.0}, r"kl_budget 1\.0 needs best_by"),
], ids=str)  # fmt: skip
def test_a_best_policy_needs_evaluations(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of("ppo", **changes)
