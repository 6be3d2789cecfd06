"""A run in several processes is that of one on the same global batch, to rounding."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast.algorithms.launch import launch
from rlhf_fast.data.reading import read_jsonl
from tests.training.tiny_runs import folder, values_of

# What has no equal: clocks, and ranks, which rounding decides between answers of one score.
UNEQUAL = {"seconds", "tokens_per_second", "spearman_length"}
# Adam divides a gradient by its own size: where that is rounding alone, adam_eps has to be above it.
STEADY = {"adam_eps": 1e-3, "learning_rate": 0.01, "steps": 3, "self_test": False}


def run(values, resume=None):
    launch(None, values, dry_run=False, resume=resume, overwrite=False)


def lines(place: Path, name: str) -> list[dict]:
    return [without(row) for row in read_jsonl(place / name)]


def without(row: dict) -> dict:
    # Rounding alone decides the sign of margins that are 0, those of a policy that is still its reference.
    even = {"accuracy"} if abs(row.get("margin", 1.0)) < 1e-6 else set()
    return {key: value for key, value in row.items() if key not in UNEQUAL | even}


def assert_same_run(ours: Path, theirs: Path) -> None:
    for name in ("metrics.jsonl", "eval.jsonl"):
        found, expected = lines(ours, name), lines(theirs, name)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            ours_told, theirs_told = (without(row.get("metrics", row)) for row in (one, other))
            assert ours_told == pytest.approx(theirs_told, rel=1e-4, abs=1e-5)
    samples = [[(row["completion"], pytest.approx(row["reward"])) for row in lines(place, "samples.jsonl")]
               for place in (ours, theirs)]  # fmt: skip
    assert samples[0] == samples[1]
    weights = sorted(path.relative_to(theirs) for path in theirs.rglob("*.safetensors"))
    assert weights == sorted(path.relative_to(ours) for path in ours.rglob("*.safetensors"))
    for path in weights:
        found, expected = load_file(ours / path), load_file(theirs / path)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


REWARD = f"{folder() / 'reward.py'}:score"
LIKELIHOOD = {"variant": "reinforce", "aggregation": "token_mean"}
TAUGHT = {"teacher": str(folder() / "teacher"), "on_policy": 1.0, "num_generations": 1, "reward": None,
          "objective": None, "reference_refresh_every": None}  # fmt: skip
CASES = {
    "sft": ("sft", {}),
    "sft in parts": ("sft", {"micro_batch_size": 1, "batch_size": 5}),
    "sft of all weights": ("sft", {"lora_rank": 0, "learning_rate": 0.001}),
    "grpo": ("grpo", {}),
    "grpo with its policy scored in the first minibatch": ("grpo", {"num_minibatches": 1, "ppo_epochs": 1}),
    "ppo": ("ppo", {}),
    "ppo in parts": ("ppo", {"micro_batch_size": 1}),
    # A reference that has just become the policy leaves accuracies to rounding.
    "online_dpo": ("online_dpo", {"reference_refresh_every": None}),
    "dpo": ("dpo", {}),
    "kto": ("kto", {}),
    "reward_model": ("reward_model", {}),
    "hpo": ("hpo", {}),
    "aot in parts, whose pairs are compared": ("dpo", {"algorithm": "aot", "micro_batch_size": 2}),
    "clip_cov in parts, whose tokens are": (
        "grpo",
        {"algorithm": "clip_cov", "micro_batch_size": 2, "objective": None},
    ),
    "raft": ("grpo", {"algorithm": "raft", "num_generations": 2, "objective": LIKELIHOOD}),
    "gkd": ("grpo", {"algorithm": "gkd", **TAUGHT}),
    "ilql": ("sft", {"algorithm": "ilql", "reward": REWARD, "max_new_tokens": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_run_of_one(case, two, tmp_path):
    like, changes = CASES[case]
    values = {key: value for key, value in (values_of(like) | STEADY | changes).items() if value is not None}
    run({**values, "output_dir": str(tmp_path / "one")})
    two.run(run, {**values, "output_dir": str(tmp_path / "two")})
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_of_four_processes_some_have_no_rows(four, tmp_path):
    """Three prompts, of which each has two completions; two held-out ones."""
    values = values_of("grpo", **STEADY, batch_size=6, num_minibatches=3)
    run({**values, "output_dir": str(tmp_path / "one")})
    four.run(run, {**values, "output_dir": str(tmp_path / "four")})
    assert_same_run(tmp_path / "four", tmp_path / "one")
