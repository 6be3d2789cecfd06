"""The algorithms, each one file that reads from top to bottom, and the table of their presets.

Every module has the same five names, which the command line calls in this order:
    AlgorithmConfig          the keys of the YAML file and of the flags
    prepare(config) -> Job   model, roles, data, rewards: all that can fail on bad input, nothing written
    evaluate(job, config)    held-out metrics and samples, before and after
    train(job, config, run)  the loop
    save(job, config, folder) what the run leaves: adapters, or the model
"""

import importlib
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

from rlhf_fast.errors import UserError
from rlhf_fast.ops.core.check import nearest


class Preset(NamedTuple):
    """A module, and values for its keys that stand below everything a user says."""

    module: str
    defaults: Mapping[str, Any] = MappingProxyType({})


def _policy(objective: str | Mapping[str, Any], **defaults: Any) -> Preset:
    """Completions of one prompt compared, and the policy loss `objective`."""
    return Preset("grpo", {"objective": objective, **defaults})


def _stale(objective: str | Mapping[str, Any], **defaults: Any) -> Preset:
    """The same for a loss that differs from GRPO's only where the policy has moved since it sampled."""
    return _policy(objective, **{"num_minibatches": 4, **defaults})


def _pairs(objective: str | dict[str, float], **numbers: float) -> Preset:
    return Preset("preference", {"objective": {"variant": objective, **numbers}})


def _answers(objective: str) -> Preset:
    return Preset("unpaired", {"objective": {"variant": objective}})


def _samples(**defaults: Any) -> Preset:
    return Preset("online_preference", defaults)


def _kept(keep: str, **defaults: Any) -> Preset:
    likelihood = {"variant": "reinforce", "aggregation": "token_mean"}
    return Preset("best_of_n", {"objective": likelihood, "keep": keep, **defaults})


# PPO-max, Zheng et al. 2023 (2307.04964): rewards over their running deviation, no whitened advantages, both clips, a
# critic that starts as the reward model and trains first. Numbers of the code of the authors (OpenLMLab/MOSS-RLHF,
# run_en.sh, run_zh.sh), whose KL weights are 0.01 and 0.1; the clip of the rewards and the length of the critic's
# warm-up are from memory of the paper.
_PPO_MAX = {
    "normalize_rewards": "scale", "reward_clip": 10.0, "whiten_advantages": False, "value_clip_eps": 0.2, "lam": 0.95,
    "kl_coef": 0.05, "critic_warmup_steps": 50, "adam_beta2": 0.95, "adam_eps": 1e-6, "temperature": 0.8, "top_p": 0.9,
}  # fmt: skip

# Sources: ops/policy/policy_loss.py, ops/advantages/group_advantages.py, ops/preference.
ALGORITHMS = {
    "sft": Preset("sft"),
    # Of what people said: pairs, rankings, ratings, likes, steps
    "reward_model": Preset("reward_model"),
    "ranking": Preset("reward_model", {"form": "rankings"}),
    "plackett_luce": Preset("reward_model", {"form": "rankings", "ranking": "plackett_luce"}),
    "rating": Preset("reward_model", {"form": "ratings"}),
    "like": Preset("reward_model", {"form": "likes"}),
    "process_reward_model": Preset("reward_model", {"form": "steps"}),
    # Of what a judge says
    "label": Preset("label"),
    "constitutional": Preset("constitutional"),
    # With a critic
    "ppo": Preset("ppo"),
    # InstructGPT (2203.02155); the moving average and the minibatches are [mem]
    "ppo_ptx": Preset("ppo", {"ptx_coef": 27.8, "kl_coef": 0.02, "policy_ema": 0.992, "num_minibatches": 8}),
    "ppo_max": Preset("ppo", _PPO_MAX),
    # Stable-Baselines3's A2C (2.7), less its learning rate
    "a2c": Preset("ppo", {"objective": "a2c", "lam": 1.0, "whiten_advantages": False, "value_clip_eps": None,
                          "vf_coef": 0.5, "max_grad_norm": 0.5, "optimizer": "rmsprop", "adam_beta2": 0.99,
                          "adam_eps": 1e-5}),
    # Without a critic
    "grpo": _policy({"variant": "grpo", "kl_coef": 0.04}),
    "dr_grpo": _policy("dr_grpo", advantage="dr_grpo"),
    "dapo": _stale("dapo", max_resamples=9, overlong_buffer=0.2, mask_truncated_completions=True),
    "gspo": _stale("gspo"),
    "gspo_token": _stale("gspo_token"),
    "luspo": _stale("luspo"),
    "gmpo": _stale("gmpo"),
    "cispo": _stale("cispo"),
    "sapo": _stale("sapo"),
    "vespo": _stale("vespo"),
    "dppo_tv": _stale("dppo_tv"),
    "dppo_kl": _stale("dppo_kl"),
    "clip_cov": _stale("clip_cov"),
    "kl_cov": _stale("kl_cov"),
    "gpg": _policy("gpg", advantage="dr_grpo", correct_equal_groups=True),
    "rloo": _policy("reinforce", advantage="rloo", kl_coef=0.05),
    "opo": _policy("reinforce", advantage="opo"),
    "remax": _policy("reinforce", advantage="remax", num_generations=1, kl_coef=0.05),
    "reinforce_pp": _policy("ppo_clip", advantage="reinforce_pp", num_generations=1, kl_coef=0.01),
    "reinforce_baseline": _policy(
        {"variant": "ppo_clip", "kl_coef": 1e-5, "kl_variant": "k2"}, advantage="reinforce_baseline"
    ),
    "optimal_token_baseline": _policy("ppo_clip", advantage="optimal_token_baseline"),
    "pass_at_k": _policy("ppo_clip", advantage="pass_at_k", pass_k=4),
    "gdpo": _policy("ppo_clip", advantage="gdpo"),
    "process_grpo": _policy({"variant": "grpo", "kl_coef": 0.04}, advantage="process"),
    "pure": _policy("ppo_clip", advantage="process", min_temperature=0.1),
    # Under a limit on costs
    "grpo_lagrangian": _policy({"variant": "grpo", "kl_coef": 0.04}, cost_limit=0.0),
    "ppo_lagrangian": Preset("ppo", {"cost_limit": 0.0, "kl_coef": 0.01}),
    # From pairs
    "dpo": Preset("preference"),
    "ipo": _pairs("ipo"),
    "hinge": _pairs("hinge"),
    "rso": _pairs("rso"),
    "robust": _pairs("robust", label_smoothing=0.1),
    "exo": _pairs("exo_pair", label_smoothing=1e-3),
    "nca": _pairs("nca_pair"),
    "bco": _pairs("bco_pair"),
    "sppo": _pairs("sppo_hard", beta=1e-3),
    "aot": _pairs("aot"),
    "aot_unpaired": _pairs("aot_unpaired"),
    "apo_zero": _pairs("apo_zero"),
    "apo_down": _pairs("apo_down"),
    "discopop": _pairs("discopop"),
    "sigmoid_norm": _pairs("sigmoid_norm", beta=5.0),
    "simpo": _pairs("simpo", beta=2.0, gamma=1.0),
    "cpo": _pairs("cpo"),
    "orpo": _pairs("orpo"),
    "rpo": _pairs({"sigmoid": 1.0, "sft": 1.0}),
    "mpo": _pairs({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}),
    "wpo": Preset("preference", {"wpo": True}),
    "ld_dpo": Preset("preference", {"ld_alpha": 0.5}),
    "dpo_ranking": Preset("preference", {"ranking": "plackett_luce"}),
    "hpo": Preset("hpo"),
    # From pairs of own samples
    "online_dpo": Preset("online_preference"),
    "iterative_dpo": _samples(num_generations=8, num_minibatches=4, reference_refresh_every=1),
    "rs_dpo": _samples(num_generations=16, pick="threshold"),
    "spin": _samples(rival="data", num_generations=1, reference_refresh_every=10),
    "sppo_online": _samples(learn="win_rate", num_generations=4, objective={"beta": 1e-3}, reference_refresh_every=1),
    "nash_md": _samples(learn="policy_gradient", rival="mixture", num_generations=1),
    "xpo": _samples(rival="mixture", mixture_coef=1.0, num_generations=1, optimism=1e-5),
    # From answers that are liked or not
    "kto": Preset("unpaired"),
    "bco_unpaired": _answers("bco"),
    "apo_zero_unpaired": _answers("apo_zero_unpaired"),
    # From the best of its own samples
    "raft": _kept("best"),
    "rft": _kept("percentile"),
    "star": _kept("correct"),
    "best_of_n_distillation": _kept("best", sample_from="reference"),
    # From answers that are paid
    "ilql": Preset("ilql"),
    # From a teacher
    "gkd": Preset("distillation", {"on_policy": 0.5, "js_weight": 0.5, "temperature": 0.9}),
    "on_policy_distillation": Preset("distillation"),
    "policy_gradient_distillation": Preset("distillation", {"learn": "advantage", "num_generations": 4}),
    "sdpo": Preset("distillation", {"teacher": "self", "num_generations": 8, "is_clip": 2.0}),
}  # fmt: skip


def load_algorithm(name: str) -> ModuleType:
    """The module of an algorithm; UserError for a name that is none."""
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise UserError(f"unknown algorithm {name!r}{nearest(str(name), ALGORITHMS)} (`rlhf_fast keys` lists them)")
    return importlib.import_module(f"rlhf_fast.algorithms.{ALGORITHMS[name].module}")
