"""torchtune's RLHF losses, advantages and log-probabilities on our ops: `rlhf_fast.patch("torchtune")`.

Masks are True where a token counts, whatever torchtune's "padding" in their names says; what stands behind one is not
looked at, NaN included. Only what a recipe differentiates has a gradient: the policy's log-probabilities and values;
advantages, returns and whitened numbers are constants of the loss.

Source: torchtune 0.6.1, torchtune/rlhf/{rewards,sequence_processing}.py and torchtune/rlhf/loss/.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast import PolicyObjective, PreferenceObjective, gae, policy_loss, token_logprobs, value_loss
from rlhf_fast.integrations._tensors import moments
from rlhf_fast.ops.preference.objective import VARIANTS, Pairs, scored

PEER = "torchtune"
TESTED = "0.6.1"

EPS = 1e-8  # added to counts: the mean of nothing is 0


def replacements() -> dict[str, Any]:
    """What `rlhf_fast.patch("torchtune")` replaces, under the names that define it."""
    places = {
        "loss.ppo": (PPOLoss,),
        "loss.dpo": (DPOLoss, RSOLoss),
        "rewards": (estimate_advantages, get_rewards_ppo, whiten, masked_mean, masked_var),
        "sequence_processing": (logits_to_logprobs, get_batch_log_probs),
    }
    return {f"torchtune.rlhf.{place}.{x.__name__}": x for place, objects in places.items() for x in objects}


# --- Losses ----------------------------------------------------------------------------------------------------------


class PPOLoss(nn.Module):
    """The clipped loss of the policy and `value_coeff` times that of the values. Log-ratios are bounded by +-20."""

    def __init__(self, epsilon: float = 0.1, value_clip_range: float = 0.2, value_coeff: float = 0.1):
        super().__init__()
        self.epsilon = epsilon
        self.value_clip_range = value_clip_range
        self.value_coeff = value_coeff

    def forward(
        self, pi_old_logprobs: Tensor, pi_logprobs: Tensor, advantages: Tensor, phi_old_values: Tensor,
        phi_values: Tensor, returns: Tensor, padding_masks: Tensor | None = None,
        value_padding_masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """(loss, policy_loss, value_loss, ratios, clipfrac), 0-d each, all but the loss without gradient.

        All inputs (B, T), log-probabilities in nats. `ratios` is their mean over all tokens, those behind the mask too.
        """
        objective = PolicyObjective("ppo_clip", clip_eps_low=min(self.epsilon, 1.0), clip_eps_high=self.epsilon)
        by_policy, metrics = policy_loss(
            pi_logprobs, pi_old_logprobs, advantages, objective=objective, mask=padding_masks
        )
        by_values, _ = value_loss(
            phi_values, phi_old_values, returns, mask=value_padding_masks, clip_eps=self.value_clip_range
        )
        by_policy = by_policy.to(_reduced(padding_masks, pi_logprobs, pi_old_logprobs, advantages))
        by_values = by_values.to(_reduced(value_padding_masks, phi_values, phi_old_values, returns))
        ratios = (pi_logprobs.detach() - pi_old_logprobs).exp().mean()
        clipfrac = metrics["clip_fraction"].to(_reduced(padding_masks, pi_logprobs))
        loss = by_policy + by_values * self.value_coeff
        return loss, by_policy.detach(), by_values.detach(), ratios, clipfrac


class _PairLoss(nn.Module):
    """A loss of each pair by its definition: preference_loss has the mean alone, which torchtune's recipes take."""

    objective: PreferenceObjective

    def forward(
        self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(losses, chosen_rewards, rejected_rewards), (B,) each, of sums of log-probabilities (B,), in nats."""
        ((name, _),) = self.objective.terms
        logps = policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
        pairs = scored(Pairs(*logps), self.objective, name)
        losses = VARIANTS[name].loss(pairs, self.objective)
        rewards = pairs.chosen_reward.detach(), pairs.rejected_reward.detach()
        dtype = policy_chosen_logps.dtype
        return losses.to(dtype), rewards[0].to(dtype), rewards[1].to(dtype)


class DPOLoss(_PairLoss):
    """DPO, its label_smoothing in [0, 0.5)."""

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0):
        super().__init__()
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.objective = PreferenceObjective("sigmoid", beta, label_smoothing)


class RSOLoss(_PairLoss):
    """The hinge of RSO, gamma in the place of DPO's beta."""

    def __init__(self, gamma: float = 0.1):
        super().__init__()
        self.gamma = gamma
        self.objective = PreferenceObjective("rso", gamma)


# --- Advantages and rewards ------------------------------------------------------------------------------------------


def estimate_advantages(
    values: Tensor, rewards: Tensor, gamma: float, lmbda: float, masks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) (B, T): generalised advantages of all steps, then whitened over those that count.

    As in torchtune whitening keeps the mean. Advantages are 0 behind the mask, returns are not.
    """
    dtype = _floating(torch.promote_types(values.dtype, rewards.dtype))
    advantages, returns = gae(rewards.to(dtype), values.to(dtype), gamma=gamma, lam=lmbda)
    whitened = whiten(advantages, masks)
    return (whitened if masks is None else torch.where(masks, whitened, 0)).to(dtype), returns.to(dtype)


def get_rewards_ppo(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, kl_coeff: float, valid_score_idxs: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards, kl, -kl_coeff * kl) (B, T), kl by k1: the scores (B,) come at `valid_score_idxs` (B,) or at the end."""
    kl = logprobs - ref_logprobs
    penalty = -kl_coeff * kl
    at = torch.arange(kl.shape[1], device=kl.device)
    last = at[-1:] if valid_score_idxs is None else valid_score_idxs[:, None]
    score = torch.where(at == last, scores[:, None], torch.zeros_like(scores[:, None]))
    return penalty + score.to(penalty.dtype), kl, penalty


def whiten(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8), plus the mean with shift_mean, by the moments of what the mask counts.

    What it does not count is mapped alike. torchtune's shift_mean adds the mean again: the opposite of our `whiten`'s.
    Without a gradient. One counted number has variance 0, where torchtune's is NaN.
    """
    x = x.detach()
    mean, variance = moments(x, mask)
    whitened = (x - mean) * torch.rsqrt(variance + EPS)
    return (whitened + mean if shift_mean else whitened).to(_floating(x.dtype))


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over what counts of all of x or along `dim`; 0 where nothing does."""
    return torch.where(mask != 0, x, torch.zeros_like(x)).sum(dim=dim) / (mask.sum(dim=dim) + EPS)


def masked_var(centered_values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Mean of the squares over what counts, unbiased over n - 1."""
    count = mask.sum() + EPS
    variance = masked_mean(centered_values.square(), mask)
    return variance * (count / (count - 1)) if unbiased else variance


# --- From logits -----------------------------------------------------------------------------------------------------


def logits_to_logprobs(logits: Tensor, sequences: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (B, T) of `sequences` under softmax(logits / temperature), in the type of the logits.

    Computed in float32 also where the logits are bfloat16, and exact for confident tokens.
    """
    return token_logprobs(logits, sequences, temperature=temperature).to(logits.dtype)


def get_batch_log_probs(
    logits: Tensor, labels: Tensor, label_pad_token_id: int = -100, return_average_logprobs: bool = False
) -> Tensor:
    """The sum or average (B,) of the log-probabilities of labels[:, 1:] under logits[:, :-1], but for padding.

    logits (B, T, V), labels (B, T). Raises ValueError for other shapes.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels must be logits.shape[:-1] = {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
    targets = labels[:, 1:]
    counts = targets != label_pad_token_id
    sums = token_logprobs(logits[:, :-1], targets, mask=counts).sum(-1)
    if return_average_logprobs:
        return (sums / (counts.sum(-1) + EPS)).to(torch.promote_types(logits.dtype, torch.float32))
    return sums.to(logits.dtype)


def _floating(dtype: torch.dtype) -> torch.dtype:
    """The type of what PyTorch computes from `dtype` and a float."""
    return dtype if dtype.is_floating_point else torch.get_default_dtype()


def _reduced(mask: Tensor | None, *inputs: Tensor) -> torch.dtype:
    """The type of torchtune's mean of `inputs`, in which the count of a mask is float32."""
    dtype = inputs[0].dtype if mask is None else torch.float32
    for x in inputs:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype
