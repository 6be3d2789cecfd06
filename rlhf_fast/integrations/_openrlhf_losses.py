"""OpenRLHF's losses over tokens: see rlhf_fast/integrations/openrlhf.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast import PolicyObjective, policy_loss, token_logprobs, value_loss
from rlhf_fast.integrations._tensors import wide

# --- Reductions ------------------------------------------------------------------------------------------------------

AGGREGATIONS = {True: "token_mean", False: "seq_mean_token_mean"}


def of_rank(total: float | None, dp_size: int) -> float | None:
    """A rank's denominator: what the ranks' means over `total` are averaged with, by data parallelism."""
    return None if total is None else total / dp_size


def result_type(token_level: bool, *tensors: Tensor | None) -> torch.dtype:
    """That of OpenRLHF's own arithmetic, in which a count of each sequence is float32."""
    dtypes = [x.dtype for x in tensors if x is not None] + ([] if token_level else [torch.float32])
    return reduce(torch.promote_types, dtypes)


def aggregate_loss(
    loss: Tensor, loss_mask: Tensor | None, token_level_loss: bool = True, dp_size: int = 1,
    batch_num_tokens: float | None = None, global_batch_size: float | None = None,
) -> Tensor:  # fmt: skip
    """The 0-d mean of losses (B, T) over the tokens that count, or over sequences of their means over tokens.

    batch_num_tokens, global_batch_size: the tokens or sequences of the whole batch, which `dp_size` ranks share: the
    sum is divided by them instead, and multiplied by dp_size. Sequences without a token do not count.
    """
    constant = loss.new_full((), -1).expand(loss.shape)  # the loss of "gpg" is -advantage * logprob
    total, _ = policy_loss(
        loss, loss.detach(), constant, objective=PolicyObjective("gpg", aggregation=AGGREGATIONS[token_level_loss]),
        mask=loss_mask, denominator=of_rank(batch_num_tokens, dp_size),
        sequences=of_rank(global_batch_size, dp_size),
    )  # fmt: skip
    return total.to(result_type(token_level_loss, loss, loss_mask))


class GPTLMLoss(nn.Module):
    """The mean of -log softmax(logits)[next label]; labels of -100 do not count, and 0 is the mean of none.

    ring_attn_group: the sequence is spread over its ranks, labels are the whole sequence's. As in OpenRLHF the loss is
    then the mean of the ranks' means, its gradient this rank's, and a rank's last token predicts nothing.
    """

    IGNORE_INDEX = -100

    def __init__(self, ring_attn_group: torch.distributed.ProcessGroup | None = None):
        super().__init__()
        self.ring_attn_group = ring_attn_group

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """0-d, in the type of the logits (..., T, V). labels: (..., T), with a group (..., ranks * T)."""
        group = self.ring_attn_group
        if group is not None:
            each = labels.shape[-1] // group.size()
            labels = labels[..., group.rank() * each : (group.rank() + 1) * each]
        targets = labels[..., 1:]
        counts = targets != self.IGNORE_INDEX
        losses = -token_logprobs(logits[..., :-1, :], targets, mask=counts)
        loss = losses.sum() / counts.sum().clamp(min=1)
        if group is not None:
            total = loss.detach().clone()
            torch.distributed.all_reduce(total, group=group)
            loss = (loss + (total - loss.detach())) / group.size()
        return loss.to(logits.dtype)


class SFTLoss(nn.Module):
    """The mean of -logprob, reduced like `aggregate_loss`."""

    def __init__(self, token_level_loss: bool = True):
        super().__init__()
        self.token_level_loss = token_level_loss

    def forward(
        self, per_token_logps: Tensor, loss_mask: Tensor, dp_size: int = 1, batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:  # fmt: skip
        losses = -per_token_logps
        return aggregate_loss(losses, loss_mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)


def masked_mean(tensor: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """Mean over what counts of all of `tensor` or along `dim`; NaN where nothing does."""
    if mask is None:
        return tensor.mean(dim=dim)
    return counted(tensor, mask).sum(dim=dim) / mask.sum(dim=dim)


def masked_normalize(tensor: Tensor, mask: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 along `dim` over what counts, 0 elsewhere; the variance, over n, is at least eps."""
    count = mask.sum(dim=dim, keepdim=True).clamp(min=1)
    mean = counted(tensor, mask).sum(dim=dim, keepdim=True) / count
    centred = counted(tensor - mean, mask)
    return centred * (centred.square().sum(dim=dim, keepdim=True) / count).clamp(min=eps).rsqrt()


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """x, 0 behind the mask, in the type of their product."""
    if mask is None:
        return x
    return torch.where(mask != 0, x, torch.zeros_like(x)).to(torch.promote_types(x.dtype, mask.dtype))


# --- Policy and values -----------------------------------------------------------------------------------------------

_CHOICES = {
    "policy_loss_type": ("ppo", "gspo"),
    "is_correction_level": ("off", "token", "seq"),
    "is_correction_mode": ("mask", "clip"),
    "is_correction_gating": ("ratio", "binary_kl", "tv"),
}


@dataclass(eq=False, repr=False)
class PolicyLoss(nn.Module):
    """The loss of PPO or GSPO, and its correction for samples of another engine.

    is_correction_level: "off", "token" or "seq". is_correction_gating: what must lie within is_correction_threshold:
    "ratio", the weight exp(old - rollout), or "binary_kl" or "tv", a divergence of the sampled token; of a sequence
    its (for the ratio geometric) mean. is_correction_mode: "mask" drops what lies outside, "clip" bounds the weight.
    GSPO's mean log-ratio is bounded by +-20, like every log-ratio; OpenRLHF's is not.
    Raises ValueError for a combination that OpenRLHF does not have.
    """

    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    dual_clip: float | None = None
    token_level_loss: bool = True
    policy_loss_type: str = "ppo"
    is_correction_level: str = "off"
    is_correction_mode: str = "mask"
    is_correction_gating: str = "ratio"
    is_correction_threshold: tuple[float, float] | list[float] = (0.5, 5.0)

    def __post_init__(self) -> None:
        super().__init__()
        self.token_level_loss = self.token_level_loss and self.policy_loss_type != "gspo"
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        level, gating = self.is_correction_level, self.is_correction_gating
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be > 1 or None, got {self.dual_clip}")
        if self.is_correction_mode == "clip" and (level == "seq" or gating != "ratio"):
            message = "is_correction_mode 'clip' is of level 'token', gating 'ratio'"
            raise ValueError(f"{message}, got {level!r}, {gating!r}")
        if level != "off" and gating != "ratio" and self.is_correction_threshold[0] > 0:
            raise ValueError(
                f"is_correction_gating={gating} takes an upper bound only, (0, bound) as is_correction_threshold, "
                f"got {self.is_correction_threshold}"
            )

    def forward(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None, dp_size: int = 1, batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """(loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio), 0-d each, the last two None without a correction.

        All inputs (B, T), log-probabilities in nats. Only the loss has a gradient; the KLs are k1, in nats. The last
        three arguments as in `aggregate_loss`; metrics are means over the tokens of this call.
        """
        if self.is_correction_level == "off":
            rollout_log_probs = None
        elif rollout_log_probs is None:
            raise ValueError(f"rollout_log_probs must be given for level {self.is_correction_level!r}, got None")
        new, old, weighted, filtered = log_probs, old_log_probs, advantages, None
        sampler: Tensor | None = None
        correction: dict[str, Any] = {}
        if self.policy_loss_type == "gspo":
            behaviour = old_log_probs if rollout_log_probs is None else rollout_log_probs
            new = _sequence_log_ratios(log_probs, behaviour, action_mask)
            old = torch.zeros_like(new)
        elif rollout_log_probs is not None:
            sampler = rollout_log_probs
            weighted, correction, filtered = self._corrected(old_log_probs, sampler, advantages, action_mask)
        low = min(self.clip_eps_low, 1.0)  # a ratio is never below 0
        clip = PolicyObjective("ppo_clip", clip_eps_low=low, clip_eps_high=self.clip_eps_high)
        aggregation = AGGREGATIONS[self.token_level_loss]
        objective = replace(clip, aggregation=aggregation, dual_clip=self.dual_clip, **correction)
        loss, metrics = policy_loss(
            new, old, weighted, objective=objective, mask=action_mask, sampler_logprobs=sampler,
            sequences=of_rank(global_batch_size, dp_size),
        )  # fmt: skip
        if self.token_level_loss and batch_num_tokens is not None:  # the op's metrics would follow its denominator
            count = log_probs.numel() if action_mask is None else action_mask.sum()
            loss = loss * (count * dp_size / batch_num_tokens)
        if self.dual_clip is not None or weighted is not advantages:  # neither belongs to the clip
            _, clipped = policy_loss(new.detach(), old, advantages, objective=clip, mask=action_mask)
        else:
            clipped = metrics
        loss = loss.to(result_type(self.token_level_loss, log_probs, old_log_probs, advantages, action_mask))
        clip_ratio = clipped["clip_fraction"].float()
        ppo_kl = masked_mean(old_log_probs - log_probs.detach(), action_mask)
        if rollout_log_probs is None or self.policy_loss_type == "gspo":
            return loss, clip_ratio, ppo_kl, None, None
        vllm_kl = masked_mean(rollout_log_probs - old_log_probs, action_mask)
        filtered = metrics["correction_fraction"].float() if filtered is None else filtered
        return loss, clip_ratio, ppo_kl, vllm_kl, filtered

    def _corrected(
        self, old: Tensor, rollout: Tensor, advantages: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Any], Tensor | None]:
        """(advantages, 0 where dropped; the objective's numbers; the dropped share, None where policy_loss gives it)"""
        low, high = self.is_correction_threshold
        seq_level = self.is_correction_level == "seq"
        if self.is_correction_gating == "ratio" and not seq_level:
            mode = "truncate" if self.is_correction_mode == "clip" else "mask"
            bounds = {"correction_mode": mode, "correction_low": low, "correction_high": high}
            return advantages, bounds, None
        gap = _gap(self.is_correction_gating, wide(old), wide(rollout))
        if seq_level:
            gap = masked_mean(gap, mask, dim=-1)[:, None]
        gap = gap.exp() if self.is_correction_gating == "ratio" else gap
        inside = (gap >= low) & (gap <= high)
        outside = (~inside).float()
        dropped = outside.mean() if seq_level else masked_mean(outside, mask)
        return torch.where(inside, advantages, torch.zeros_like(advantages)), {"correction_high": math.inf}, dropped


def _sequence_log_ratios(new: Tensor, behaviour: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T): the mean of new - behaviour over the sequence of a token."""
    log_ratio = counted(wide(new) - behaviour, mask)
    count = new.shape[-1] if mask is None else mask.sum(-1, keepdim=True).clamp(min=1)
    return (log_ratio.sum(-1, keepdim=True) / count).expand_as(new)


def _gap(gating: str, old: Tensor, rollout: Tensor) -> Tensor:
    """What is held against the threshold, of the sampled token; of the ratio the logarithm."""
    if gating == "ratio":
        return old - rollout
    p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))  # away from 0 and 1, where logarithms end
    if gating == "tv":
        return (p - q).abs()
    return p * (p.log() - q.log()) + (1 - p) * (torch.log1p(-p) - torch.log1p(-q))


class ValueLoss(nn.Module):
    """Half the squared error of the values, clipped around the old ones or not, reduced like `aggregate_loss`."""

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        self.clip_eps = clip_eps
        self.token_level_loss = token_level_loss

    def forward(
        self, values: Tensor, old_values: Tensor, returns: Tensor, action_mask: Tensor | None = None, dp_size: int = 1,
        batch_num_tokens: float | None = None, global_batch_size: float | None = None,
    ) -> Tensor:  # fmt: skip
        """0-d. All inputs (B, T)."""
        if not self.token_level_loss:
            losses = 0.5 * _squares(values, old_values, returns, self.clip_eps)
            return aggregate_loss(losses, action_mask, False, dp_size, None, global_batch_size)
        loss, _ = value_loss(
            values, old_values, returns, mask=action_mask, clip_eps=self.clip_eps,
            denominator=of_rank(batch_num_tokens, dp_size),
        )  # fmt: skip
        old = None if self.clip_eps is None else old_values
        return loss.to(result_type(True, values, returns, old, action_mask))


def _squares(values: Tensor, old_values: Tensor, returns: Tensor, clip_eps: float | None) -> Tensor:
    values = wide(values)
    squares = (values - returns).square()
    if clip_eps is None:
        return squares
    old = wide(old_values)
    return torch.maximum(squares, (values.clamp(old - clip_eps, old + clip_eps) - returns).square())
