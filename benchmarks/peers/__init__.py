"""Other libraries' functions for the same jobs, with our names and arguments; one that cannot be imported is left out.

A job is a key of JOBS; its peers are functions that import the library and give the contender, or raise ImportError.
Imports are made there, not at the top: each of them takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from benchmarks.peers import advantages, heads, losses
from benchmarks.peers.settings import BETA, CLIP, GAMMA, LAM, VALUE_COEF, Function

__all__ = ["BETA", "CLIP", "GAMMA", "JOBS", "LAM", "VALUE_COEF", "absent", "find", "versions"]

PACKAGES = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl", "openrlhf", "torchrl", "torchtune")


def find(job: str) -> dict[str, Function]:
    """The peers that can do `job` here."""
    return loaded(job)[0]


def absent() -> dict[str, str]:
    """The peers that can do none of the jobs, with the reason."""
    functions, reasons = zip(*map(loaded, JOBS), strict=True)
    there = {name for of_job in functions for name in of_job}
    return {name: reason for of_job in reasons for name, reason in of_job.items() if name not in there}


def loaded(job: str) -> tuple[dict[str, Function], dict[str, str]]:
    """The peers that can do `job`, and of the others why not."""
    functions, reasons = {}, {}
    for name, load in JOBS[job].items():
        try:
            functions[name] = load()
        except ImportError as error:
            reasons[name] = str(error).splitlines()[0]
    return functions, reasons


def versions() -> dict[str, str]:
    """The version of every peer that is installed."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


JOBS: dict[str, dict[str, Callable[[], Function]]] = {
    "token_logprobs": {
        "trl": heads.trl_token_logprobs, "verl": heads.verl_token_logprobs, "openrlhf": heads.openrlhf_token_logprobs,
        "torchtune": heads.torchtune_token_logprobs,
    },
    "token_logprobs and entropy": {"trl": heads.trl_token_logprobs_and_entropy},
    "token_logprobs, differentiable": {
        "trl": heads.trl_token_logprobs, "verl": heads.verl_token_logprobs, "openrlhf": heads.openrlhf_token_logprobs,
        "torchtune": heads.torchtune_token_logprobs, "quack": heads.quack_token_logprobs,
    },
    "linear_logprobs": {
        "trl": heads.trl_linear_logprobs, "verl": heads.verl_linear_logprobs, "liger": heads.liger_linear_logprobs,
        "cce": heads.cce_linear_logprobs,
    },
    "mean negative log-likelihood": {
        "F.linear_cross_entropy": heads.torch_mean_nll, "liger": heads.liger_mean_nll, "cce": heads.cce_mean_nll,
        "quack": heads.quack_mean_nll,
    },
    "linear_kl": {"trl": heads.trl_linear_kl},
    "linear_policy_loss": {"liger": heads.liger_linear_policy_loss},
    "linear_preference_loss": {"liger": heads.liger_linear_preference_loss},
    "gae": {"torchrl": advantages.torchrl_gae, "openrlhf": advantages.openrlhf_gae},
    "gae + whiten": {"verl": advantages.verl_gae_whitened},
    "discounted_returns": {"openrlhf": advantages.openrlhf_discounted_returns},
    "whiten": {"verl": advantages.verl_whiten, "torchtune": advantages.torchtune_whiten},
    "group_advantages": {"verl": advantages.verl_group_advantages},
    "policy_loss": {"verl": losses.verl_policy_loss, "openrlhf": losses.openrlhf_policy_loss},
    "value_loss": {"verl": losses.verl_value_loss, "openrlhf": losses.openrlhf_value_loss},
    "policy_loss + value_loss": {"torchtune": losses.torchtune_ppo_losses},
    "kl_estimate": {"verl": losses.verl_kl_estimate, "openrlhf": losses.openrlhf_kl_estimate},
    "preference_loss": {"openrlhf": losses.openrlhf_preference_loss, "torchtune": losses.torchtune_preference_loss},
    "reward_loss": {"openrlhf": losses.openrlhf_reward_loss},
}  # fmt: skip
