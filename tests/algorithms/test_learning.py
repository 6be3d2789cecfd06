"""Both policy-gradient algorithms learn, not only run."""

import pytest
from rich.console import Console

from rlhf_fast.algorithms.launch import run_stage, single_stage
from rlhf_fast.training.run import read_jsonl
from tests.training.tiny_runs import save_supple_model, values_of, write_jsonl

OWN_KEYS = {
    "ppo": {"reference_ema": None, "kl_target": None, "lam": 1.0},
    "grpo": {"reference_refresh_every": None, "num_generations": 8, "objective": "ppo_clip"},
}


@pytest.mark.parametrize("algorithm", OWN_KEYS)
def test_the_reward_rises_far_beyond_noise(algorithm, tmp_path):
    """A model that mostly repeats printable bytes is paid for the other ones."""
    save_supple_model(tmp_path / "model")
    (tmp_path / "reward.py").write_text(
        "def score(completions):\n    return [sum(not ' ' <= x <= '~' for x in c) / 8 for c in completions]\n"
    )
    write_jsonl(tmp_path / "held_out.jsonl", [{"prompt": "ab"}] * 40)
    values = values_of(
        algorithm, model=str(tmp_path / "model"), reward=f"{tmp_path}/reward.py:score", steps=12, batch_size=32,
        max_new_tokens=8, learning_rate=0.01, kl_coef=0.0, eval_data=str(tmp_path / "held_out.jsonl"), eval_size=40,
        output_dir=str(tmp_path / "run"), **OWN_KEYS[algorithm],
    )  # fmt: skip
    run_stage(Console(quiet=True), single_stage(values), resume=None, overwrite=False)
    before, after = (row["metrics"] for row in read_jsonl(tmp_path / "run" / "eval.jsonl"))
    noise = (before["reward_se"] ** 2 + after["reward_se"] ** 2) ** 0.5
    assert after["reward"] - before["reward"] > 8 * noise
    assert before["kl"] == pytest.approx(0.0, abs=1e-6)  # the sampler's log-probabilities beside scored ones
    assert after["kl"] > 1.0
