"""OpenRLHF's losses, KL estimates and advantages on our ops: `rlhf_fast.patch("openrlhf")`, in every Ray worker.

Where a batch counts no token, OpenRLHF's losses are NaN and these are 0, connected to their inputs; what stands behind
a mask is not looked at, NaN included. A mask is 0 or 1. Only what a trainer differentiates has a gradient: the policy's
log-probabilities, the values, the rewards of a reward model.

Source: OpenRLHF 0.11.2, openrlhf/models/{loss,utils}.py and openrlhf/trainer/ppo_utils/experience_maker.py.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast import (
    PreferenceObjective,
    discounted_returns,
    gae,
    kl_estimate,
    preference_loss,
    reward_loss,
    shaped_rewards,
    token_logprobs,
)
from rlhf_fast.integrations._openrlhf_losses import (
    GPTLMLoss,
    PolicyLoss,
    SFTLoss,
    ValueLoss,
    aggregate_loss,
    counted,
    masked_mean,
    masked_normalize,
    result_type,
)
from rlhf_fast.integrations._tensors import entropy_of_logits

PEER = "openrlhf"
TESTED = "0.11.2"

# What `patch` adds where OpenRLHF does not find a package that its models import.
WITHOUT = {
    "flash_attn": " --no-build-isolation, which needs CUDA; without it call rlhf_fast.integrations.openrlhf's functions"
}

IGNORED_LABEL = -100
KL_BOUND = 10.0  # of an estimate, in nats
KL_WEIGHT_BOUND = 10.0  # of the importance weight in the gradient of an estimate


def replacements() -> dict[str, Any]:
    """What `rlhf_fast.patch("openrlhf")` replaces. Its experience maker needs vLLM, and is left alone without it."""
    losses = (aggregate_loss, GPTLMLoss, SFTLoss, PolicyLoss, ValueLoss, PairWiseLoss, LogExpLoss, DPOLoss)
    utils = (compute_approx_kl, compute_reward, log_probs_from_logits, compute_entropy, masked_mean, masked_normalize)
    methods = (get_advantages_and_returns, get_cumulative_returns) if find_spec("vllm") else ()
    places = {
        "openrlhf.models.loss": losses,
        "openrlhf.models.utils": utils,
        "openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker": methods,
    }
    return {f"{place}.{x.__name__}": x for place, objects in places.items() for x in objects}


# --- Losses over pairs -----------------------------------------------------------------------------------------------


class DPOLoss(nn.Module):
    """DPO, its label_smoothing in [0, 0.5), or IPO of sums of log-probabilities."""

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.ipo = ipo
        if ipo:
            self.objective = PreferenceObjective("ipo", beta)
        else:
            self.objective = PreferenceObjective("sigmoid", beta, label_smoothing)

    def forward(
        self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(loss 0-d, chosen_rewards (B,), rejected_rewards (B,)) of log-probabilities (B,), in nats."""
        logps = policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
        ones = torch.ones_like(policy_chosen_logps) if self.ipo else None  # our ipo averages over tokens
        loss, _ = preference_loss(*logps, objective=self.objective, chosen_lengths=ones, rejected_lengths=ones)
        chosen, rejected = (self.beta * (logps[i] - logps[i + 2]).detach() for i in (0, 1))
        return loss.to(result_type(True, *logps)), chosen, rejected


class PairWiseLoss(nn.Module):
    """The mean of -log sigmoid(chosen - rejected - margin)."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """0-d. All inputs (B,)."""
        if margin is not None:
            margin = margin.to(torch.promote_types(margin.dtype, chosen_reward.dtype))  # integers are margins too
        loss, _ = reward_loss(chosen_reward, reject_reward, margin=margin)
        return loss.to(result_type(True, chosen_reward, reject_reward, margin))


class LogExpLoss(nn.Module):
    """The mean of log(1 + exp(rejected - chosen)), which does not overflow here; `margin` is not looked at."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """0-d. All inputs (B,)."""
        loss, _ = reward_loss(chosen_reward, reject_reward)
        return loss.to(result_type(True, chosen_reward, reject_reward))


# --- KL, rewards, advantages -----------------------------------------------------------------------------------------


def compute_approx_kl(
    log_probs: Tensor, log_probs_base: Tensor, log_probs_old: Tensor | None = None, kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:  # fmt: skip
    """k1, k2 or k3 per token of (B, T), within +-10 nats, in float32.

    unbiased_gradient: with the gradient of the KL itself, that of k2, weighted with min(exp(log_probs - log_probs_old),
    10) where the samples are those of an older policy.
    """
    gradient = "k2" if unbiased_gradient else None
    kl = kl_estimate(log_probs, log_probs_base, variant=kl_estimator, gradient=gradient, value_clip=KL_BOUND)
    if unbiased_gradient and log_probs_old is not None:  # the weight is the gradient's alone
        weight = (log_probs.float() - log_probs_old.float()).exp().clamp(max=KL_WEIGHT_BOUND).detach()
        kl = kl.detach() + weight * (kl - kl.detach())
    return kl.float()


def compute_reward(
    r: Tensor, kl_coef: float, kl: Tensor, action_mask: Tensor | None = None,
    reward_clip_range: tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """-kl_coef * kl per token (B, T), also behind the mask, and the score of (B,) at the last token that counts.

    reward_clip_range: (lowest, highest) score. A kl_coef below 0 is 0. The result is detached, in the type of kl. A
    sequence without a token has no score, where OpenRLHF's has it at the last position.
    """
    if action_mask is None:
        raise ValueError("action_mask must be given, got None")
    scores = r.clamp(*reward_clip_range) if reward_clip_range else r
    kl_coef = max(float(kl_coef), 0.0)
    rewards = shaped_rewards(scores, kl, mask=action_mask, kl_coef=kl_coef).to(kl.dtype)
    return torch.where(action_mask != 0, rewards, -kl_coef * kl.detach())


@torch.no_grad()
def get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """A method of RemoteExperienceMaker: generalised advantages and returns, (B, T) each.

    Steps behind the mask have reward 0 and value 0 and discount like every other; gae(mask=...) would skip them.
    """
    values, rewards = counted(values, action_mask), counted(rewards, action_mask)
    advantages, returns = gae(rewards, values, gamma=gamma, lam=lambd)
    dtype = result_type(True, values, rewards)
    return advantages.to(dtype), returns.to(dtype)


@torch.no_grad()
def get_cumulative_returns(self: Any, rewards: Tensor, action_mask: Tensor | None, gamma: float) -> Tensor:
    """A method of RemoteExperienceMaker: discounted rewards to go (B, T), steps behind the mask as above."""
    return discounted_returns(counted(rewards, action_mask), gamma=gamma).to(rewards.dtype)


# --- From logits -----------------------------------------------------------------------------------------------------


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (...) of `labels` under softmax(logits / temperature), in the type of the logits.

    Divides the logits by the temperature in place, as OpenRLHF's. A label of -100 gives 0, as it does there with
    flash-attn. Exact for confident tokens, also where the logits are bfloat16.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    return token_logprobs(logits, labels, mask=labels != IGNORED_LABEL).to(logits.dtype)


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy (...) of softmax(logits), in nats, in the type of the logits."""
    return entropy_of_logits(logits).to(logits.dtype)
