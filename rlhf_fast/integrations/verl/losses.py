"""verl's aggregation of a loss, its value and entropy losses and its KL penalties."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from rlhf_fast import kl_estimate, token_kl, value_loss
from rlhf_fast.integrations.verl.logprobs import entropy_from_logits


def agg_loss(
    loss_mat: Tensor, loss_mask: Tensor, loss_agg_mode: str, dp_size: int = 1, batch_num_tokens: int | None = None,
    global_batch_size: int | None = None, loss_scale_factor: int | None = None,
) -> Tensor:  # fmt: skip
    """The loss of a micro-batch, (), from those of its tokens, (B, T), so that ranks and micro-batches add up.

    loss_agg_mode: token-mean, token-sum, seq-mean-token-sum, seq-mean-token-sum-norm (over loss_scale_factor, default
    T) or seq-mean-token-mean. dp_size: ranks whose gradients are averaged. batch_num_tokens, global_batch_size: tokens
    and sequences of the whole batch, needed where dp_size > 1; default: those that the mask counts here.
    A mask that counts nothing gives 0, where verl's means are 0 / 0.
    """
    dtype = torch.promote_types(loss_mat.dtype, torch.float32)
    weights = aggregation_weights(
        loss_mask, dtype, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    total = (torch.where(loss_mask.bool(), loss_mat, 0).to(dtype) * weights).sum()
    return total.to(result_dtype(loss_agg_mode, loss_mat, loss_mask))


def aggregation_weights(
    mask: Tensor, dtype: torch.dtype, mode: str, dp_size: int = 1, batch_num_tokens: int | None = None,
    global_batch_size: int | None = None, loss_scale_factor: int | None = None,
) -> Tensor:  # fmt: skip
    """(B, T) of `dtype`: what agg_loss multiplies every token's loss with; 0 behind the mask."""
    counts = mask.to(dtype)
    lengths = counts.sum(-1, keepdim=True)
    if mode == "token-mean":
        return counts * (dp_size / _total(batch_num_tokens, "batch_num_tokens", lengths.sum(), dp_size))
    if mode == "token-sum":
        return counts * dp_size
    if mode not in ("seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        raise ValueError(f"loss_agg_mode must be one of {', '.join(MODES)}, got {mode!r}")
    share = dp_size / _total(global_batch_size, "global_batch_size", (lengths > 0).to(dtype).sum(), dp_size)
    if mode == "seq-mean-token-sum-norm":
        share = share / (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    if mode == "seq-mean-token-mean":
        share = share / torch.where(lengths == 0, 1, lengths)
    return counts * share


MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def _total(given: int | None, name: str, here: Tensor, dp_size: int) -> Tensor | int:
    """What a mean divides by."""
    if given is not None:
        return given
    if dp_size > 1:
        raise ValueError(f"{name} of the whole batch must be given for dp_size {dp_size}")
    return here.clamp(min=1)


def result_dtype(mode: str, *tensors: Tensor) -> torch.dtype:
    """The type of verl's loss: that of its tensors together, float32 at least for means over sequences."""
    dtypes = [x.dtype for x in tensors] + ([torch.float32] if mode.startswith("seq") else [])
    return reduce(torch.promote_types, dtypes)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean, (), of what the mask counts; 0 where that is nothing."""
    counted = torch.where(mask.bool(), values, 0)
    return counted.to(torch.promote_types(counted.dtype, torch.float32)).sum() / mask.sum().clamp(min=1)


def compute_entropy_loss(logits: Tensor, response_mask: Tensor, loss_agg_mode: str = "token-mean") -> Tensor:
    """The entropies of logits (B, T, V), aggregated."""
    return agg_loss(entropy_from_logits(logits), response_mask, loss_agg_mode)


def compute_value_loss(
    vpreds: Tensor, returns: Tensor, values: Tensor, response_mask: Tensor, cliprange_value: float,
    loss_agg_mode: str = "token-mean", dp_size: int = 1, batch_num_tokens: int | None = None,
    global_batch_size: int | None = None, loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(half the clipped squared error, aggregated as by agg_loss; the share of tokens whose clipped term is greater).

    All (B, T); values: the old ones; cliprange_value > 0. Only vpreds gets a gradient.
    """
    total = response_mask.sum().clamp(min=1)
    loss, metrics = value_loss(
        vpreds, values, returns, mask=response_mask, clip_eps=cliprange_value, denominator=total
    )  # fmt: skip
    if loss_agg_mode == "token-mean":
        loss = loss * total / _total(batch_num_tokens, "batch_num_tokens", total, dp_size) * dp_size
    elif loss_agg_mode == "token-sum":
        loss = loss * total * dp_size
    else:  # the op has one weight for all tokens
        clipped = torch.clamp(vpreds, values - cliprange_value, values + cliprange_value)
        squares = torch.maximum((vpreds - returns).square(), (clipped - returns).square())
        loss = 0.5 * agg_loss(
            squares, response_mask, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
        )
    return loss.to(result_dtype(loss_agg_mode, vpreds, returns, values)), metrics["clip_fraction"].float()


# --- KL penalties -----------------------------------------------------------------------------------------------------


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """The estimate of kl_penalty_forward; a `+` after its name gives it the gradient of k2, which is that of the KL.

    "full" and "full+" are the KL itself, from logits.
    """
    name = kl_penalty.removesuffix("+")
    if name == kl_penalty or name == "full":
        return kl_penalty_forward(logprob, ref_logprob, name)
    if name == "abs":
        slope = _estimate(logprob, ref_logprob, "k2")
        return kl_penalty_forward(logprob, ref_logprob, name).detach() + (slope - slope.detach())
    return _estimate(logprob, ref_logprob, _estimator(name), gradient="k2")


def kl_penalty_forward(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """An estimate of KL(policy || reference) per token, in nats, in the type and shape of the log-probabilities.

    kl_penalty: kl or k1; mse or k2; low_var_kl or k3, its log-ratio held within +-20 and its value within +-10; abs,
    |k1|; full, which verl names and does not have: the KL over the vocabulary, (...), where logprob and ref_logprob
    are the two models' logits, (..., V). It has no gradient by the reference.
    Raises NotImplementedError for other names.
    """
    if kl_penalty == "full":
        return token_kl(logprob, ref_logprob).to(logprob.dtype)
    if kl_penalty == "abs":
        return (logprob - ref_logprob).abs()
    return _estimate(logprob, ref_logprob, _estimator(kl_penalty))


_ESTIMATORS = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def _estimator(name: str) -> str:
    if name not in _ESTIMATORS:
        raise NotImplementedError(f"kl_penalty must be one of {', '.join(_ESTIMATORS)}, abs, full, got {name!r}")
    return _ESTIMATORS[name]


def _estimate(logprob: Tensor, ref_logprob: Tensor, estimator: str, gradient: str | None = None) -> Tensor:
    clips = (20.0, 10.0) if estimator == "k3" else (None, None)
    estimate = kl_estimate(
        logprob.reshape(-1), ref_logprob.reshape(-1), variant=estimator, gradient=gradient, log_ratio_clip=clips[0],
        value_clip=clips[1],
    )  # fmt: skip
    return estimate.view(logprob.shape).to(torch.promote_types(logprob.dtype, ref_logprob.dtype))


FUNCTIONS = (agg_loss, compute_entropy_loss, compute_value_loss, kl_penalty, kl_penalty_forward)
