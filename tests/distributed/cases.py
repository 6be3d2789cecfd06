"""Small runs that are the same in any number of processes: rows of ALGORITHMS, and what else is of a whole batch."""

from functools import cache
from typing import Any

from rlhf_fast.algorithms import ALGORITHMS
from rlhf_fast.models.tiny import tiny
from tests.algorithms.test_presets import values_of_row
from tests.distributed.runs import run
from tests.training.tiny_runs import folder, values_of

# Adam divides a gradient by its own size: where that is rounding alone, adam_eps has to be above it.
STEADY = {"adam_eps": 1e-3, "learning_rate": 0.01, "steps": 3, "self_test": False}
REWARD, OTHER, EVEN = (f"{folder() / 'reward.py'}:{name}" for name in ("letters", "score", "even"))
JUDGE = {"form": "compare", "prompt": "Answer 1: {first} Answer 2: {second} tag {tag}"}
RATED = {"scale": "1-3", "prompt": "{completion}"}


def values_of_case(name: str) -> dict[str, Any]:
    """The keys of the case. None in its changes leaves a key out."""
    row, changes = CASES[name]
    values = {**_of_row(row), **changes}
    if values.get("reward") == "adapter":
        values["reward"] = reward_adapter()
    if row == "constitutional":  # its questions are longer than the context of the other cases' model
        values["model"] = longer_model()
    return {key: value for key, value in values.items() if value is not None}


def _of_row(row: str) -> dict[str, Any]:
    if row in ("label", "constitutional"):  # they know other keys
        values = {**values_of("grpo"), "algorithm": row, "max_new_tokens": 4}
        others = ("reward", "ppo_epochs", "num_minibatches", "objective", "reference_refresh_every", "num_generations")
        return {key: value for key, value in values.items() if key not in others}
    values = {**values_of_row(row), **STEADY}
    if ":apart" in str(values.get("reward")):  # a count of its calls, which each process has for itself
        values["reward"] = REWARD
    if "num_minibatches" in values and row not in ("rs_dpo", "iterative_dpo"):
        values["batch_size"] = 8
    return values


@cache
def reward_adapter() -> str:
    place = folder() / "reward_adapter"
    run({**values_of("reward_model"), "output_dir": str(place)})
    return str(place)


@cache
def longer_model() -> str:
    place = folder() / "longer_model"
    for part in tiny(0, hidden_size=32, layers=2, heads=2, max_length=512):
        part.save_pretrained(place)
    return str(place)


# Data as short as a context of 128 bytes needs, and nothing of which differs from process to process.
SHORT: dict[str, dict[str, Any]] = {
    "label": {"judge": JUDGE, "num_generations": 2, "steps": None, "lora_rank": None, "learning_rate": None},
    "constitutional": {
        "critique_tokens": 2, "max_repetition": 1.0, "principles": ["Be kind."], "reward": REWARD, **STEADY,
    },
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {row: (row, SHORT.get(row, {})) for row in ALGORITHMS}
CASES |= {
    "sft of all weights": ("sft", {"lora_rank": 0, "learning_rate": 0.001}),
    "sft in parts, with an empty share": ("sft", {"micro_batch_size": 1, "batch_size": 3}),
    "an ensemble with its bound": ("reward_model", {"ensemble": 2, "bound": True, "micro_batch_size": 1}),
    "an ensemble of heads": ("reward_model", {"ensemble": 3, "ensemble_of": "heads"}),
    "dpo with DoRA": ("dpo", {"use_dora": True, "reward": REWARD, "max_new_tokens": 4}),
    "bco in parts, whose pairs are compared": ("bco", {"micro_batch_size": 2}),
    "aot in parts, whose pairs are compared": ("aot", {"micro_batch_size": 2}),
    "kto in parts": ("kto", {"micro_batch_size": 1, "batch_size": 5}),
    "hpo paid by an adapter": ("hpo", {"reward": "adapter", "micro_batch_size": 2}),
    "ilql paid by a function": ("ilql", {"data": f"{folder() / 'sft.jsonl'}", "reward": REWARD, "max_new_tokens": 4}),
    "ilql paid by an adapter": ("ilql", {"data": f"{folder() / 'sft.jsonl'}", "reward": "adapter"}),
    "the policy scored in the first minibatch": ("grpo", {"num_minibatches": 1, "ppo_epochs": 1}),
    "clip_cov in parts, whose tokens are compared": ("clip_cov", {"micro_batch_size": 2}),
    "an exact KL in the loss": (
        "grpo", {"objective": {"variant": "grpo", "kl_coef": 0.1, "kl_variant": "exact"}, "top_layers": 1},
    ),
    "dynamic sampling": ("grpo", {"reward": EVEN, "max_resamples": 3}),
    "unfinished completions": (
        "grpo", {"missing_eos_penalty": 0.5, "overlong_buffer": 0.5, "mask_truncated_completions": True,
                 "max_new_tokens": 40, "temperature": 2.0},
    ),
    "an early stop": ("grpo", {"early_stop_kl": 1e-5, "ppo_epochs": 3}),
    "the sampler's own log-probabilities": ("grpo", {"sampler_correction": True}),
    "costs with a test": (
        "grpo", {"cost": [EVEN, OTHER], "cost_limit": [0.5, 1.0], "cost_confidence": 0.6, "eval_every": 1,
                 "best_by": "reward"},
    ),
    "a floor under a reward": ("grpo", {"reward": [REWARD, EVEN], "reward_floors": [None, 0.9]}),
    "weights of rewards that move": (
        "grpo", {"reward": [REWARD, EVEN], "reward_weights": [1.0, 0.0], "final_reward_weights": [0.0, 1.0]},
    ),
    "a judge": ("grpo", {"reward": None, "judge": RATED}),
    "grpo paid by an adapter": ("grpo", {"reward": "adapter", "whole_rollouts": False, "micro_batch_size": 3}),
    "ppo in parts": ("ppo", {"micro_batch_size": 1, "reward": "adapter"}),
    "an adaptive KL and a reference that moves": (
        "ppo", {"kl_coef": 0.1, "kl_target": 0.5, "kl_horizon": 50, "reference_ema": 0.9, "policy_ema": 0.9},
    ),
    "an exact KL in the reward": ("ppo", {"kl_variant": "exact"}),
    "whitened rewards": ("ppo", {"whiten_rewards": True, "reward_clip": 1.0}),
    "standardised rewards": ("ppo", {"normalize_rewards": "standardize"}),
    "a shared critic of a distribution": (
        "ppo", {"critic": "shared", "critic_loss": "distributional", "critic_gradient": 0.5, "critic_warmup_steps": 1},
    ),
    "lambdas by length": ("ppo", {"length_adaptive_alpha": 0.05, "critic_lam": 1.0}),
    "a hint": ("star", {"reward": EVEN, "hint": "{prompt} h"}),
    "pairs of all samples in parts": ("online_dpo", {"micro_batch_size": 2, "num_generations": 4, "pick": "all_above"}),
}  # fmt: skip
