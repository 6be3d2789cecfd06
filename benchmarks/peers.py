"""Other libraries' functions for the same jobs, with our names and arguments; one that cannot be imported is left out.

A job is a key of JOBS; its peers are functions that import the library and give the contender, or raise ImportError.
Imports are made there, not at the top: each of them takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.errors import first_line
from rlhf_fast.testing.stand_ins import stand_ins

PACKAGES = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl", "openrlhf", "torchrl", "torchtune")
GPU_ALONE = ("quack", "cut_cross_entropy", "liger_kernel.ops")
CLIP, GAMMA, LAM, BETA, VALUE_COEF = 0.2, 0.99, 0.95, 0.1, 0.1  # of every contender

Function = Callable[..., Any]  # of tensors by name
Load = Callable[[], Function]


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
            reasons[name] = first_line(error)
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


def of(where: str, use: Callable[[Any], Function], *settings: Any, **named: Any) -> Load:
    """Imports `where`, "module:name", and gives what `use` makes of it: of a class, an object with the settings."""
    module, name = where.split(":")

    def load() -> Function:
        if module.startswith(GPU_ALONE) and not torch.cuda.is_available():
            raise ImportError("needs a GPU")
        with stand_ins() if module.startswith("openrlhf") else nullcontext():
            imported = import_module(module)
        try:
            function = attrgetter(name)(imported)
        except AttributeError as error:  # of another version of the library
            raise ImportError(str(error)) from None
        return use(function(*settings, **named) if isinstance(function, type) else function)

    return load


def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def of_logits(function: Function) -> Function:
    return lambda logits, targets: function(logits, targets)


def of_hidden(function: Function) -> Function:
    return lambda hidden, weight, targets: function(hidden, weight, targets)


def gae_of_torchrl(estimate: Function) -> Function:
    def torchrl(rewards: Tensor, values: Tensor) -> list[Tensor]:
        done = torch.zeros_like(rewards, dtype=torch.bool)
        done[:, -1] = True
        following = torch.nn.functional.pad(values[:, 1:], (0, 1))
        columns = [x[..., None] for x in (values, following, rewards, done)]
        return [x[..., 0] for x in estimate(GAMMA, LAM, *columns)]

    return torchrl


def group_advantages_of_verl(estimate: Function) -> Function:
    import numpy

    def verl(rewards: Tensor, group_ids: Tensor) -> Tensor:
        column = rewards[:, None]
        index = numpy.asarray(group_ids.cpu())
        return estimate(column, torch.ones_like(column), index, epsilon=1e-4)[0][:, 0]

    return verl


def linear_policy_loss_of_liger(loss: Function) -> Function:
    """Of 8 sequences of equal length, one advantage each, mean over the tokens."""

    def liger(hidden: Tensor, weight: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        padded = hidden.view(8, -1, hidden.shape[-1])
        ids, old, advantage = (x.view(8, -1) for x in (targets, old_logprobs, advantages))
        mask = torch.ones_like(ids)
        return loss(padded, weight, ids, mask, advantage[:, 0], old_per_token_logps=old)[0]

    return liger


TOKEN_LOGPROBS: dict[str, Load] = {
    "trl": of("trl.trainer.utils:selective_log_softmax", of_logits),
    "verl": of("verl.utils.torch_functional:logprobs_from_logits", of_logits),
    "openrlhf": of("openrlhf.models.utils:log_probs_from_logits", of_logits),
    "torchtune": of(
        "torchtune.rlhf:logits_to_logprobs", lambda f: lambda logits, targets: f(logits[None], targets[None])[0]
    ),
}
JOBS: dict[str, dict[str, Load]] = {
    "token_logprobs": TOKEN_LOGPROBS,
    "token_logprobs and entropy": {
        "trl": of("trl.trainer.utils:selective_log_softmax_and_entropy", of_logits),
    },
    "token_logprobs, differentiable": TOKEN_LOGPROBS | {
        "quack": of(
            "quack:cross_entropy",
            lambda f: lambda logits, targets: -f(logits, targets, reduction="none", inplace_backward=True),
        ),
    },
    "linear_logprobs": {
        "trl": of(
            "trl.kernels.chunked_logprob:ChunkedLogProbFunction.apply",
            lambda f: lambda hidden, weight, targets: f(
                hidden, weight, None, targets, 1.0, 32_768, None, 1.0, ()
            )[0],
        ),
        "verl": of(
            "verl.utils.experimental.torch_functional:FusedLinearForPPOFunction.apply",
            lambda f: lambda hidden, weight, targets: f(hidden, weight, targets, 1.0, 512)[0],
        ),
        "liger": of(
            "liger_kernel.ops.fused_linear_scaled_cross_entropy:LigerFusedLinearScaledCrossEntropyFunction.apply",
            lambda f: lambda hidden, weight, targets: -first(f(hidden, weight, targets)),
        ),
        "cce": of(
            "cut_cross_entropy:linear_cross_entropy",
            lambda f: lambda hidden, weight, targets: -f(hidden, weight, targets, reduction="none"),
        ),
    },
    "mean negative log-likelihood": {
        "F.linear_cross_entropy": of(  # torch >= 2.13
            "torch.nn:LinearCrossEntropyOptions",
            lambda options: lambda hidden, weight, targets: torch.nn.functional.linear_cross_entropy(
                hidden, weight, targets, options=options
            ),
        ),
        "liger": of(
            "liger_kernel.ops.fused_linear_cross_entropy:LigerFusedLinearCrossEntropyFunction.apply",
            lambda f: lambda hidden, weight, targets: first(f(hidden, weight, targets)),
        ),
        "cce": of("cut_cross_entropy:linear_cross_entropy", of_hidden),
        "quack": of("quack:chunked_linear_cross_entropy", of_hidden),
    },
    "linear_kl": {
        "trl": of(
            "trl.kernels.chunked_divergence:ChunkedDivergenceFunction.apply",
            lambda f: lambda hidden, ref_hidden, weight: f(
                hidden, weight, None, ref_hidden, weight.detach(), None, 1.0
            )[0],
        ),
    },
    "linear_policy_loss": {
        "liger": of(
            "liger_kernel.chunked_loss:LigerFusedLinearGRPOLoss", linear_policy_loss_of_liger, beta=0.0,
            use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="bnpo", temperature=1.0,
        ),
    },
    "linear_preference_loss": {
        "liger": of(
            "liger_kernel.chunked_loss:LigerFusedLinearDPOLoss",
            lambda loss: lambda hidden, weight, targets: loss(weight, hidden, targets)[0],
            beta=BETA, use_ref_model=False,
        ),
    },
    "gae": {
        "torchrl": of("torchrl.objectives.value.functional:vec_generalized_advantage_estimate", gae_of_torchrl),
        "openrlhf": of(
            "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.get_advantages_and_returns",
            lambda f: lambda rewards, values: f(None, values, rewards, None, GAMMA, LAM),
        ),
    },
    "gae + whiten": {
        "verl": of(
            "verl.trainer.ppo.core_algos:compute_gae_advantage_return",
            lambda f: lambda rewards, values, mask: [x * mask for x in f(rewards, values, mask, GAMMA, LAM)],
        ),
    },
    "discounted_returns": {
        "openrlhf": of(
            "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.get_cumulative_returns",
            lambda f: lambda rewards, mask: f(None, rewards, mask, GAMMA),
        ),
    },
    "whiten": {
        "verl": of("verl.utils.torch_functional:masked_whiten", lambda f: lambda x, mask: f(x, mask) * mask),
        "torchtune": of("torchtune.rlhf:whiten", lambda f: lambda x, mask: f(x, mask, shift_mean=False) * mask),
    },
    "group_advantages": {
        "verl": of("verl.trainer.ppo.core_algos:compute_grpo_outcome_advantage", group_advantages_of_verl),
    },
    "policy_loss": {
        "verl": of(
            "verl.trainer.ppo.core_algos:compute_policy_loss",
            lambda f: lambda logprobs, old_logprobs, advantages, mask: f(
                old_logprobs, logprobs, advantages, mask, CLIP, clip_ratio_c=1e9  # never clips twice
            )[0],
        ),
        "openrlhf": of(
            "openrlhf.models.loss:PolicyLoss",
            lambda loss: lambda logprobs, old_logprobs, advantages, mask: loss(
                logprobs, old_logprobs, advantages, mask
            )[0],
            CLIP, CLIP,
        ),
    },
    "value_loss": {
        "verl": of(
            "verl.trainer.ppo.core_algos:compute_value_loss",
            lambda f: lambda values, old_values, returns, mask: f(values, returns, old_values, mask, CLIP)[0],
        ),
        "openrlhf": of(
            "openrlhf.models.loss:ValueLoss",
            lambda loss: lambda values, old_values, returns, mask: loss(values, old_values, returns, mask), CLIP,
        ),
    },
    "policy_loss + value_loss": {
        "torchtune": of(
            "torchtune.rlhf.loss:PPOLoss",
            lambda loss: lambda logprobs, old_logprobs, advantages, values, old_values, returns, mask: loss(
                old_logprobs, logprobs, advantages, old_values, values, returns, mask, mask
            )[0],
            epsilon=CLIP, value_clip_range=CLIP, value_coeff=VALUE_COEF,
        ),
    },
    "kl_estimate": {
        "verl": of(
            "verl.trainer.ppo.core_algos:kl_penalty_forward",
            lambda f: lambda logprobs, ref_logprobs: f(logprobs, ref_logprobs, "low_var_kl"),
        ),
        "openrlhf": of(
            "openrlhf.models.utils:compute_approx_kl",
            lambda f: lambda logprobs, ref_logprobs: f(logprobs, ref_logprobs, kl_estimator="k3"),
        ),
    },
    "preference_loss": {
        "openrlhf": of(
            "openrlhf.models.loss:DPOLoss",
            lambda loss: lambda chosen, rejected, ref_chosen, ref_rejected: loss(
                chosen, rejected, ref_chosen, ref_rejected
            )[0],
            BETA,
        ),
        "torchtune": of(
            "torchtune.rlhf.loss:DPOLoss",
            lambda loss: lambda chosen, rejected, ref_chosen, ref_rejected: loss(
                chosen, rejected, ref_chosen, ref_rejected
            )[0].mean(),
            BETA,
        ),
    },
    "reward_loss": {
        "openrlhf": of(
            "openrlhf.models.loss:PairWiseLoss",
            lambda loss: lambda chosen_rewards, rejected_rewards: loss(chosen_rewards, rejected_rewards),
        ),
    },
}  # fmt: skip
