"""Liger's GRPO losses by definition, and LigerFusedLinearGRPOLoss, which takes them from hidden states.

With r = exp(x), x = logprob - old logprob (its mean over the sequence for importance_sampling_level "sequence"), A the
advantage, w the ratio of an inference engine's correction and k3 the estimate of the KL to the reference:

    grpo, bnpo, dr_grpo, dapo, luspo    L = -min(min(r, delta) A, clip(r) A) w
    cispo                               L = -sg(min(r, epsilon_high)) A logprob w
    sapo                                L = -4 / tau sigmoid(tau (r - 1)) A w
    vespo                               L = -sg(phi) A logprob,  log phi = k log W + lambda (1 - W),
                                        log W = sum x + sum log w
    per token: L + beta k3, with use_bias_correction_kl L + beta r k3

Sources: those of policy_loss; use_bias_correction_kl is DeepSeek-V3.2's, arXiv 2512.02556.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast import PolicyObjective, kl_estimate, linear_policy_loss
from rlhf_fast.integrations._tensors import wide
from rlhf_fast.integrations.liger._head import Head

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
TOKEN_ONLY = ("cispo", "sapo", "vespo")
LOWEST, HIGHEST = math.log(1e-8), 20.0  # vespo's bounds on a logarithm


@dataclass(eq=False, repr=False)
class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """A policy loss from hidden states: forward returns (loss, metrics), both float32.

    The options are those of the module; max_completion_length is dr_grpo's. Raises ValueError for values that do not
    fit, as forward does for combinations and shapes. luspo averages over padding too, as the peer does.
    """

    beta: float = 0.04
    compiled: bool = True
    use_ref_model: bool = True
    chunk_size: int = 1
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    loss_type: str = "dapo"
    max_completion_length: int | None = None
    importance_sampling_level: str = "token"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    temperature: float = 1.0
    delta: float | None = None
    use_bias_correction_kl: bool = False
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        super().__init__()
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "delta"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def forward(
        self, _input: Tensor, lin_weight: Tensor, selected_token_ids: Tensor, attention_mask: Tensor,
        advantages: Tensor, bias: Tensor | None = None, ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None, ref_input: Tensor | None = None, ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None, vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """(loss, (kl where beta is not 0, clip ratio)), the metrics means over the mask.

        _input: (B, T, D); lin_weight: (V, D); bias: (V,) or None. selected_token_ids, attention_mask: (B, T);
        advantages: (B,). ref_per_token_logps, old_per_token_logps: (B, T); ref_input: (B, T, E) with ref_weight (V, E)
        and ref_bias, in the place of the first. vllm_is_ratio >= 0: (B,), (B, 1) or (B, T). num_items_in_batch: the
        tokens of all micro-batches and ranks, for dapo, cispo and vespo.
        """
        self.check()
        ratio = correction(vllm_is_ratio, attention_mask)
        head, mask = Head.of(_input, lin_weight, bias), attention_mask.float()
        reference = self._reference(mask, selected_token_ids, ref_per_token_logps, ref_input, ref_weight, ref_bias)
        old = None if old_per_token_logps is None else wide(old_per_token_logps)
        batch = Batch(mask, wide(advantages), old, reference, ratio)
        denominator = self.denominator(mask, num_items_in_batch)
        objective = self._same_gradient(batch)
        if objective is None:
            logprobs = head.logprobs(selected_token_ids, self._counted(mask), self.temperature)
            terms = self.terms(logprobs, batch)
            return self.reduced(terms.losses, mask, denominator), self.metrics(terms, mask)
        old, token_advantages = self._folded(batch)
        surrogate, _, logprobs = linear_policy_loss(  # type: ignore[misc]  # return_logprobs makes it three
            *head[:2], selected_token_ids, old, token_advantages, objective=objective, bias=head.bias, mask=mask,
            ref_logprobs=None if objective.kl_coef == 0 else reference, denominator=denominator,
            sequences=mask.shape[0], temperature=float(self.temperature), return_logprobs=True,
        )  # fmt: skip
        terms = self.terms(logprobs, batch)
        value = self.reduced(terms.losses, mask, denominator)
        return value + (surrogate - surrogate.detach()), self.metrics(terms, mask)

    def _reference(
        self, mask: Tensor, ids: Tensor, logprobs: Tensor | None, hidden: Tensor | None, weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """(B, T) of the reference, given or made here; None where the loss has none."""
        if not self.use_ref_model:
            return None
        if logprobs is not None:
            if hidden is not None:
                message = "Both ref_per_token_logps and ref_input are given. Using ref_per_token_logps."
                warnings.warn(message, stacklevel=3)
            return wide(logprobs)
        if hidden is None or weight is None:
            raise ValueError("use_ref_model needs ref_per_token_logps, or ref_input and ref_weight")
        if self.beta == 0:
            return None
        with torch.no_grad():
            return Head.of(hidden, weight, bias).logprobs(ids, self._counted(mask), self.temperature)

    def check(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"Unsupported loss_type {self.loss_type!r}: must be one of {', '.join(LOSS_TYPES)}")
        if self.importance_sampling_level not in ("token", "sequence"):
            level = self.importance_sampling_level
            raise ValueError(f"importance_sampling_level must be token or sequence, got {level!r}")
        if self._per_sequence and self.loss_type in TOKEN_ONLY:
            message = "Sequence-level importance sampling is not supported: importance_sampling_level must be token"
            raise ValueError(f"{message} for loss_type {self.loss_type}, got sequence")
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("max_completion_length must be given for loss_type dr_grpo, got None")

    @property
    def _per_sequence(self) -> bool:
        return self.importance_sampling_level == "sequence"

    def _counted(self, mask: Tensor) -> Tensor | None:
        """The rows whose log-probabilities are looked at."""
        return None if self.loss_type == "luspo" else mask

    def denominator(self, mask: Tensor, num_items_in_batch: Tensor | float | None) -> Tensor | float | None:
        """What the sum over tokens is divided by; None: the loss is a mean of its own."""
        if self.loss_type in ("grpo", "sapo", "luspo"):
            return None
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1)
        if self.loss_type == "dr_grpo":
            assert self.max_completion_length is not None
            return float(mask.shape[0] * self.max_completion_length)
        return tokens_per_rank(mask, num_items_in_batch)

    def reduced(self, losses: Tensor, mask: Tensor, denominator: Tensor | float | None) -> Tensor:
        if self.loss_type == "luspo":
            return (losses * mask.sum(1, keepdim=True)).mean()
        total = torch.where(mask != 0, losses, 0.0)
        if denominator is None:
            return (total.sum(1) / mask.sum(1).clamp(min=1)).mean()
        return total.sum() / denominator

    def metrics(self, terms: Terms, mask: Tensor) -> tuple[Tensor, ...]:
        count = mask.sum().clamp(min=1)
        kl = () if terms.kl is None else (torch.where(mask != 0, terms.kl.detach(), 0.0).sum() / count,)
        return (*kl, (terms.clipped * mask).sum() / count)

    # --- The loss by definition ---------------------------------------------------------------------------------------

    def terms(self, logprobs: Tensor, batch: Batch) -> Terms:
        mask, advantages, old, reference, ratio = batch
        log_ratio = logprobs - (logprobs.detach() if old is None else self._visible(old, mask))
        if self._per_sequence:
            log_ratio = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        losses, clipped = self._policy_terms(logprobs, log_ratio, advantages[:, None], batch)
        if ratio is not None and self.loss_type != "vespo":
            losses = losses * ratio
        if self.beta == 0:
            return Terms(losses, None, clipped)
        reference = logprobs.detach() if reference is None else self._visible(reference, mask)
        kl = kl_estimate(logprobs, reference, variant="k3")
        if self.use_bias_correction_kl:
            kl = kl * log_ratio.exp()
        return Terms(losses + self.beta * kl, kl, clipped)

    def _visible(self, x: Tensor, mask: Tensor) -> Tensor:
        """x, 0 where the log-probabilities are."""
        return x if self._counted(mask) is None else torch.where(mask != 0, x, 0.0)

    def _policy_terms(
        self, logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """(L before the correction, whether a bound holds it)"""
        ratio, none_held = log_ratio.exp(), torch.zeros_like(log_ratio, dtype=torch.bool)
        if self.loss_type == "cispo":
            bounded = ratio.detach().clamp(max=self.epsilon_high)
            return -bounded * advantages * logprobs, (ratio > self.epsilon_high) & (advantages > 0)
        if self.loss_type == "sapo":
            tau = torch.where(advantages > 0, self.sapo_temperature_pos, self.sapo_temperature_neg)
            return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages, none_held
        if self.loss_type == "vespo":
            return -self._vespo_weight(log_ratio.detach(), batch) * advantages * logprobs, none_held
        low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
        clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
        bounded = ratio if self.delta is None else ratio.clamp(max=self.delta)
        return -torch.minimum(bounded * advantages, ratio.clamp(low, high) * advantages), clipped

    def _vespo_weight(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        """phi, (B, 1)"""
        total = (log_ratio.clamp(-HIGHEST, HIGHEST) * batch.mask).sum(1, keepdim=True) + batch.log_correction()
        log_weight = total.clamp(LOWEST, HIGHEST)
        good = batch.advantages[:, None] >= 0
        k = torch.where(good, self.vespo_k_pos, self.vespo_k_neg)
        rate = torch.where(good, self.vespo_lambda_pos, self.vespo_lambda_neg).clamp(min=1e-4)
        return (k * log_weight - rate * torch.expm1(log_weight)).exp()

    # --- The same gradient from linear_policy_loss --------------------------------------------------------------------

    def _same_gradient(self, batch: Batch) -> PolicyObjective | None:
        """The objective whose gradient at `_folded` inputs is that of this loss; None where there is none."""
        function = self.loss_type if self.loss_type in TOKEN_ONLY else "clip"
        bounded_below = function == "clip" and self.delta is not None and self.delta <= max(1, 1 + self.epsilon_high)
        if (
            self.loss_type == "luspo"
            or bounded_below
            or (function == "cispo" and self.epsilon_high < 1)
            or (self._per_sequence and self.use_bias_correction_kl)
        ):
            return None
        low, high = min(self.epsilon_low, 1.0), self.epsilon_high
        variant = "gspo" if self._per_sequence else "ppo_clip"
        if function == "cispo":
            low, high = 1.0, self.epsilon_high - 1
        if batch.on_policy:
            variant = "gpg"
        elif function != "clip":
            variant = function
        unbiased = self.use_bias_correction_kl
        return PolicyObjective(
            variant=variant, clip_eps_low=low, clip_eps_high=high, dual_clip=self.delta if function == "clip" else None,
            aggregation="seq_mean_token_mean" if self.loss_type in ("grpo", "sapo") else "token_mean",
            sapo_temperature_pos=self.sapo_temperature_pos, sapo_temperature_neg=self.sapo_temperature_neg,
            vespo_k_pos=self.vespo_k_pos, vespo_lambda_pos=max(self.vespo_lambda_pos, 1e-4),
            vespo_k_neg=self.vespo_k_neg, vespo_lambda_neg=max(self.vespo_lambda_neg, 1e-4),
            kl_coef=0.0 if batch.reference is None else self.beta,
            # d (r k3) is that of the unbiased estimate, r (logprob - ref logprob): with r = 1 the derivative of k2
            kl_variant="k2" if unbiased and batch.on_policy else "k3", kl_unbiased=unbiased and not batch.on_policy,
        )  # fmt: skip

    def _folded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(old logprobs, advantages), (B, T) each, that carry the correction.

        A ratio w >= 0 that multiplies the loss multiplies the advantage as well. On policy r is 1, where the
        derivative of every loss is that of -A logprob.
        """
        mask, advantages, old, _, ratio = batch
        each = advantages[:, None].expand(mask.shape)
        if self.loss_type == "vespo":
            if old is None:
                return torch.zeros_like(mask), each * self._vespo_weight(torch.zeros_like(mask), batch)
            return old - batch.log_correction() / mask.sum(1, keepdim=True).clamp(min=1), each
        if ratio is not None:
            each = each * ratio
        if self._per_sequence and old is None:
            each = torch.where(mask != 0, each, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
            each = each.expand(mask.shape)
        return torch.zeros_like(mask) if old is None else old, each


class Terms(NamedTuple):
    """(B, T) each, or (B, 1) where all tokens of a sequence have the same; the mask is not applied."""

    losses: Tensor
    kl: Tensor | None
    clipped: Tensor


class Batch(NamedTuple):
    """What a loss reads beside the log-probabilities; old: None on policy."""

    mask: Tensor  # (B, T) float32
    advantages: Tensor  # (B,)
    old: Tensor | None  # (B, T)
    reference: Tensor | None  # (B, T)
    ratio: Tensor | None  # (B, 1) or (B, T)

    @property
    def on_policy(self) -> bool:
        return self.old is None

    def log_correction(self) -> Tensor:
        """(B, 1): the sum of log w, which runs over padding too, as the peer's does."""
        if self.ratio is None:
            return self.mask.new_zeros(self.mask.shape[0], 1)
        return self.ratio.float().log().clamp(LOWEST, HIGHEST).sum(1, keepdim=True)


def correction(ratio: Tensor | None, mask: Tensor) -> Tensor | None:
    """vllm_is_ratio as (B, 1) or (B, T)."""
    rows, columns = mask.shape
    if ratio is None or tuple(ratio.shape) in ((rows, 1), (rows, columns)):
        return ratio
    if tuple(ratio.shape) != (rows,):
        expected = f"({rows},), ({rows}, 1) or ({rows}, {columns})"
        raise ValueError(f"vllm_is_ratio must be {expected}, got {tuple(ratio.shape)}")
    return ratio[:, None]


def tokens_per_rank(mask: Tensor, num_items_in_batch: Tensor | float | None) -> Tensor:
    """(): the tokens of all ranks, or num_items_in_batch, over the number of ranks; at least 1."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if num_items_in_batch is not None:
        total = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
    else:
        total = mask.sum(dtype=torch.float32)
        if distributed:
            torch.distributed.all_reduce(total)
    return (total / (torch.distributed.get_world_size() if distributed else 1)).clamp(min=1)
