"""Other libraries' functions for the same jobs, with our names and arguments; one that cannot be imported is left out.

A job is a key of JOBS; its peers are functions that import the library and give the contender, or raise ImportError.
Imports are made there, not at the top: each of them takes seconds. Hyper-parameters are those of benchmarks.cases.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl", "openrlhf", "torchrl")
Function = Callable[..., Any]  # of tensors by name

CLIP, GAMMA, LAM, BETA = 0.2, 0.99, 0.95, 0.1
_found: set[str] = set()
_reasons: dict[str, str] = {}  # of the last one that was not there


def find(job: str) -> dict[str, Function]:
    """The peers that can do `job` here."""
    found = {}
    for name, load in JOBS[job].items():
        try:
            found[name] = load()
        except ImportError as error:
            _reasons[name] = str(error).splitlines()[0]
    _found.update(found)
    return found


def absent() -> dict[str, str]:
    """The peers that were asked for and could do none of the jobs, with the reason."""
    return {name: reason for name, reason in _reasons.items() if name not in _found}


def versions() -> dict[str, str]:
    """The version of every peer that is installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def need_gpu() -> None:
    if not torch.cuda.is_available():
        raise ImportError("needs a GPU")


def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def trl_token_logprobs() -> Function:
    from trl.trainer.utils import selective_log_softmax

    return lambda logits, targets: selective_log_softmax(logits, targets)


def trl_token_logprobs_and_entropy() -> Function:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return lambda logits, targets: selective_log_softmax_and_entropy(logits, targets)


def verl_token_logprobs() -> Function:
    from verl.utils.torch_functional import logprobs_from_logits

    return lambda logits, targets: logprobs_from_logits(logits, targets)


def openrlhf_token_logprobs() -> Function:
    from openrlhf.models.utils import log_probs_from_logits

    return lambda logits, targets: log_probs_from_logits(logits, targets)


def quack_token_logprobs() -> Function:
    need_gpu()
    from quack import cross_entropy

    return lambda logits, targets: -cross_entropy(logits, targets, reduction="none", inplace_backward=True)


def trl_linear_logprobs() -> Function:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return lambda hidden, weight, targets: ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, 32_768, None, 1.0, ()
    )[0]


def verl_linear_logprobs() -> Function:
    from verl.utils.experimental.torch_functional import FusedLinearForPPOFunction

    return lambda hidden, weight, targets: FusedLinearForPPOFunction.apply(hidden, weight, targets, 1.0, 512)[0]


def liger_linear_logprobs() -> Function:
    need_gpu()
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return lambda hidden, weight, targets: (
        -first(LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets))
    )


def cce_linear_logprobs() -> Function:
    need_gpu()
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: -linear_cross_entropy(hidden, weight, targets, reduction="none")


def torch_mean_nll() -> Function:
    from torch.nn import LinearCrossEntropyOptions  # torch >= 2.13

    options = LinearCrossEntropyOptions()
    return lambda hidden, weight, targets: torch.nn.functional.linear_cross_entropy(
        hidden, weight, targets, options=options
    )


def cce_mean_nll() -> Function:
    need_gpu()
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets)


def quack_mean_nll() -> Function:
    need_gpu()
    from quack import chunked_linear_cross_entropy

    return lambda hidden, weight, targets: chunked_linear_cross_entropy(hidden, weight, targets)


def liger_mean_nll() -> Function:
    need_gpu()
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda hidden, weight, targets: first(LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets))


def trl_linear_kl() -> Function:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return lambda hidden, ref_hidden, weight: ChunkedDivergenceFunction.apply(
        hidden, weight, None, ref_hidden, weight.detach(), None, 1.0
    )[0]


def liger_linear_policy_loss() -> Function:
    """Of 8 sequences of equal length, one advantage each, mean over the tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="bnpo", temperature=1.0
    )

    def liger(hidden: Tensor, weight: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        padded = hidden.view(8, -1, hidden.shape[-1])
        ids, old, advantage = (x.view(8, -1) for x in (targets, old_logprobs, advantages))
        mask = torch.ones_like(ids)
        return loss(padded, weight, ids, mask, advantage[:, 0], old_per_token_logps=old)[0]

    return liger


def liger_linear_preference_loss() -> Function:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)
    return lambda hidden, weight, targets: loss(weight, hidden, targets)[0]


def verl_gae_whitened() -> Function:
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    def verl(rewards: Tensor, values: Tensor, mask: Tensor) -> list[Tensor]:
        return [x * mask for x in compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM)]

    return verl


def torchrl_gae() -> Function:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    def torchrl(rewards: Tensor, values: Tensor) -> list[Tensor]:
        done = torch.zeros_like(rewards, dtype=torch.bool)
        done[:, -1] = True
        following = torch.nn.functional.pad(values[:, 1:], (0, 1))
        given = [x[..., None] for x in (values, following, rewards, done)]
        return [x[..., 0] for x in vec_generalized_advantage_estimate(GAMMA, LAM, *given)]

    return torchrl


def verl_whiten() -> Function:
    from verl.utils.torch_functional import masked_whiten

    return lambda x, mask: masked_whiten(x, mask) * mask


def verl_group_advantages() -> Function:
    import numpy
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    def verl(rewards: Tensor, group_ids: Tensor) -> Tensor:
        column = rewards[:, None]
        index = numpy.asarray(group_ids.cpu())
        return compute_grpo_outcome_advantage(column, torch.ones_like(column), index, epsilon=1e-4)[0][:, 0]

    return verl


def verl_policy_loss() -> Function:
    from verl.trainer.ppo.core_algos import compute_policy_loss

    no_dual_clip = 1e9
    return lambda logprobs, old_logprobs, advantages, mask: compute_policy_loss(
        old_logprobs, logprobs, advantages, mask, CLIP, clip_ratio_c=no_dual_clip
    )[0]


def openrlhf_policy_loss() -> Function:
    from openrlhf.models.loss import PolicyLoss

    loss = PolicyLoss(CLIP, CLIP)
    return lambda logprobs, old_logprobs, advantages, mask: loss(logprobs, old_logprobs, advantages, mask)[0]


def verl_value_loss() -> Function:
    from verl.trainer.ppo.core_algos import compute_value_loss

    return lambda values, old_values, returns, mask: compute_value_loss(values, returns, old_values, mask, CLIP)[0]


def openrlhf_value_loss() -> Function:
    from openrlhf.models.loss import ValueLoss

    loss = ValueLoss(CLIP)
    return lambda values, old_values, returns, mask: first(loss(values, old_values, returns, mask))


def verl_kl_estimate() -> Function:
    from verl.trainer.ppo.core_algos import kl_penalty_forward

    return lambda logprobs, ref_logprobs: kl_penalty_forward(logprobs, ref_logprobs, "low_var_kl")


def openrlhf_kl_estimate() -> Function:
    from openrlhf.models.utils import compute_approx_kl

    return lambda logprobs, ref_logprobs: compute_approx_kl(logprobs, ref_logprobs, kl_estimator="k3")


def openrlhf_preference_loss() -> Function:
    from openrlhf.models.loss import DPOLoss

    loss = DPOLoss(BETA)
    return lambda chosen, rejected, ref_chosen, ref_rejected: loss(chosen, rejected, ref_chosen, ref_rejected)[0]


def openrlhf_reward_loss() -> Function:
    from openrlhf.models.loss import PairWiseLoss

    loss = PairWiseLoss()
    return lambda chosen_rewards, rejected_rewards: loss(chosen_rewards, rejected_rewards)


JOBS: dict[str, dict[str, Callable[[], Function]]] = {
    "token_logprobs": {
        "trl": trl_token_logprobs, "verl": verl_token_logprobs, "openrlhf": openrlhf_token_logprobs,
    },
    "token_logprobs and entropy": {"trl": trl_token_logprobs_and_entropy},
    "token_logprobs, differentiable": {
        "trl": trl_token_logprobs, "verl": verl_token_logprobs, "openrlhf": openrlhf_token_logprobs,
        "quack": quack_token_logprobs,
    },
    "linear_logprobs": {
        "trl": trl_linear_logprobs, "verl": verl_linear_logprobs, "liger": liger_linear_logprobs,
        "cce": cce_linear_logprobs,
    },
    "mean negative log-likelihood": {
        "F.linear_cross_entropy": torch_mean_nll, "liger": liger_mean_nll, "cce": cce_mean_nll, "quack": quack_mean_nll,
    },
    "linear_kl": {"trl": trl_linear_kl},
    "linear_policy_loss": {"liger": liger_linear_policy_loss},
    "linear_preference_loss": {"liger": liger_linear_preference_loss},
    "gae": {"torchrl": torchrl_gae},
    "gae + whiten": {"verl": verl_gae_whitened},
    "whiten": {"verl": verl_whiten},
    "group_advantages": {"verl": verl_group_advantages},
    "policy_loss": {"verl": verl_policy_loss, "openrlhf": openrlhf_policy_loss},
    "value_loss": {"verl": verl_value_loss, "openrlhf": openrlhf_value_loss},
    "kl_estimate": {"verl": verl_kl_estimate, "openrlhf": openrlhf_kl_estimate},
    "preference_loss": {"openrlhf": openrlhf_preference_loss},
    "reward_loss": {"openrlhf": openrlhf_reward_loss},
}  # fmt: skip
