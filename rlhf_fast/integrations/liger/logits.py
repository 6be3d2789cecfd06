"""Liger's functions of logits: triton_grpo_loss, the autograd function that it calls, and fused_selective_log_softmax;
they run on the CPU as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_fast import token_logprobs
from rlhf_fast.integrations._tensors import wide
from rlhf_fast.integrations.liger.grpo import TOKEN_ONLY, Batch, LigerFusedLinearGRPOLoss, correction


def triton_grpo_loss(
    logits: Tensor, old_logp: Tensor | None, ref_logp: Tensor | None, completion_ids: Tensor, advantages: Tensor,
    completion_mask: Tensor | None = None, temperature: float = 0.9, beta: float = 0.04, eps_low: float = 0.2,
    eps_high: float = 0.4, inplace: bool = True, loss_type: str = "dapo", max_completion_length: int | None = None,
    importance_sampling_level: str = "token", reduce: bool = False, sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05, vllm_is_ratio: Tensor | None = None, delta: float | None = None,
    use_bias_correction_kl: bool = False, num_items_in_batch: Tensor | float | None = None, vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0, vespo_k_neg: float = 3.0, vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, Tensor | None, Tensor] | tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The GRPO losses from logits (B, L + 1, V), whose last row is not looked at; runs on the CPU as well.

    old_logp, ref_logp, completion_mask: (B, L) or None (ref_logp: where beta is 0); completion_ids: (B, L);
    advantages: (B,). inplace: the gradient is written over the logits.
    Returns (losses, KL or None, clipped), (B, L) float32 and 0 behind the mask; with reduce (loss, [kl?, clip ratio]).
    Raises ValueError for values and combinations that do not fit.
    """
    given = logits, old_logp, ref_logp, completion_ids, advantages, completion_mask, vllm_is_ratio
    value, kl, clipped = _results(
        _FromLogits, given, inplace, reduce, num_items_in_batch, max_completion_length, beta=beta, epsilon_low=eps_low,
        epsilon_high=eps_high, loss_type=loss_type, importance_sampling_level=importance_sampling_level,
        sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg, delta=delta,
        use_bias_correction_kl=use_bias_correction_kl, vespo_k_pos=vespo_k_pos, vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg, vespo_lambda_neg=vespo_lambda_neg, temperature=temperature,
    )  # fmt: skip
    if not reduce:
        return value, kl, clipped
    return value, [clipped] if kl is None else [kl, clipped]


class GrpoLossFunction:
    """What triton_grpo_loss calls, under the name of the peer's autograd function: `apply` alone."""

    @staticmethod
    def apply(
        logits: Tensor, old_logp: Tensor | None, ref_logp: Tensor | None, completion_ids: Tensor, advantages: Tensor,
        completion_mask: Tensor | None, temperature: float, beta: float, eps_low: float, eps_high: float, inplace: bool,
        loss_type: str = "grpo", max_completion_length: int | None = None, reduce: bool = True,
        importance_sampling_level: str = "token", sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05,
        vllm_is_ratio: Tensor | None = None, delta: float | None = None, use_bias_correction_kl: bool = False,
        num_items_in_batch: Tensor | float | None = None, phi_seq: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        """As triton_grpo_loss; with reduce (loss, KL or None, clip ratio). phi_seq: (B,) or (B, 1), vespo's weights."""
        if loss_type == "vespo" and phi_seq is None:
            raise ValueError("phi_seq must be given for loss_type vespo, got None: triton_grpo_loss makes it")
        given = logits, old_logp, ref_logp, completion_ids, advantages, completion_mask, vllm_is_ratio
        return _results(
            _WeighedSequences, given, inplace, reduce, num_items_in_batch, max_completion_length, beta=beta,
            epsilon_low=eps_low, epsilon_high=eps_high, loss_type=loss_type,
            importance_sampling_level=importance_sampling_level, sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg, delta=delta, use_bias_correction_kl=use_bias_correction_kl,
            temperature=temperature, phi=None if phi_seq is None else phi_seq.detach().reshape(-1, 1),
        )  # fmt: skip


class _FromLogits(LigerFusedLinearGRPOLoss):
    """The loss that is 0 behind the mask, for luspo as well, whose other form averages over padding."""

    def _counted(self, mask: Tensor) -> Tensor:
        return mask

    def reduced(self, losses: Tensor, mask: Tensor, denominator: Tensor | float | None) -> Tensor:
        return super().reduced(torch.where(mask != 0, losses, 0.0), mask, denominator)


@dataclass(eq=False, repr=False)
class _WeighedSequences(_FromLogits):
    """The loss whose weights of vespo the caller has made."""

    phi: Tensor | None = None  # (B, 1)

    def _vespo_weight(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        assert self.phi is not None
        return self.phi


def _results(
    kind: type[_FromLogits], given: tuple[Any, ...], inplace: bool, reduce: bool,
    num_items_in_batch: Tensor | float | None, max_completion_length: int | None, **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """(loss, KL or None, clipped) of every token, or with reduce of all of them."""
    logits, old_logp, ref_logp, completion_ids, advantages, completion_mask, vllm_is_ratio = given
    length = completion_ids.shape[1] if max_completion_length is None else max_completion_length
    loss = kind(max_completion_length=length, **options)
    if loss.delta is not None and loss.loss_type in TOKEN_ONLY:
        raise ValueError(f"delta must be None for loss_type {loss.loss_type}, got {loss.delta}")
    if loss.beta != 0 and ref_logp is None:
        raise ValueError(f"ref_logp must be given for beta {loss.beta}, got None")
    loss.check()
    mask = logits.new_ones(completion_ids.shape, dtype=torch.float32)
    if completion_mask is not None:
        mask = completion_mask.float()
    # The last row goes with the others, masked: a slice of the logits would cost a copy in the backward pass.
    ids, counted = (pad(x, (0, 1)) for x in (completion_ids, mask))
    scored = token_logprobs(logits, ids, temperature=loss.temperature, mask=counted, inplace_backward=inplace)
    old, reference = (None if x is None else wide(x) for x in (old_logp, ref_logp))
    batch = Batch(mask, wide(advantages), old, reference, correction(vllm_is_ratio, mask))
    terms = loss.terms(scored[:, :-1], batch)
    if not reduce:
        losses = torch.where(mask != 0, terms.losses, 0.0)
        return losses, None if terms.kl is None else terms.kl.detach() * mask, terms.clipped * mask
    value = loss.reduced(terms.losses, mask, loss.denominator(mask, num_items_in_batch))
    *kl, clipped = loss.metrics(terms, mask)
    return value, kl[0] if kl else None, clipped


@torch.no_grad()
def fused_selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """(B, L) float32 log-probabilities of the last L ids under logits (B, L + 1, V) without their last row.

    input_ids, mask: (B, >= L); 0 behind the mask. No gradient, as in the peer.
    """
    columns = logits.shape[1] - 1
    mask = None if mask is None else mask[:, -columns:]
    return token_logprobs(logits[:, :-1], input_ids[:, -columns:], temperature=temperature, mask=mask)
