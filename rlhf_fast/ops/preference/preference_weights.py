"""Weights that preference losses multiply in: of tokens (length desensitising) and of answers (WPO). Plain PyTorch.

    length_desensitized_weights:  1 for an answer's first min(n, m) tokens, alpha for those beyond; n, m: the tokens of
                                  the answer and of the other one of its pair
    wpo_weights:                  exp(s_chosen + s_rejected), at most 1, with
                                  s = mean over the answer's tokens of log p_t - log sum_v p_tv^2

Both are constants: no gradient. Cost: one read of their inputs.
Sources: LD-DPO, Liu et al. 2024 (arXiv 2409.06411); WPO, its sampled alignment, Zhou et al. 2024 (arXiv 2406.11827).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops.core import check

OPS: dict[str, tuple[str, ...]] = {}  # no kernels


@check.takes_numbers
def length_desensitized_weights(mask: Tensor, other_lengths: Tensor, *, alpha: float) -> Tensor:
    """(B, T) float32: what to multiply token log-probabilities by before they are summed for preference_loss.

    mask: (B, T), nonzero at the answer's tokens. other_lengths: (B,) tokens of the other answer of each pair.
    alpha: in [0, 1]; 1 changes nothing. Policy and reference take the same weights. Raises ValueError for what does not
    fit.
    """
    check.that(mask.dim() == 2, "mask", "(B, T)", mask)
    check.shaped("other_lengths", other_lengths, (mask.shape[0],), "(B,)")
    check.same_device(("mask", mask), ("other_lengths", other_lengths))
    check.that(0 <= alpha <= 1, "alpha", "in [0, 1]", alpha)
    counts = mask != 0
    beyond = counts.cumsum(1) > other_lengths[:, None]
    return torch.where(counts, torch.where(beyond, alpha, 1.0), 0.0)


def wpo_weights(logprobs: Tensor, sum_p_squared: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """(B,) float32 (float64 for float64): how likely the pairs are under the policy, as preference_loss's weights.

    Rows are the B chosen answers, then the B rejected ones. The product of both is bounded by 1, as in WPO's code, and
    not each of them. logprobs: (2 B, T) of the answers' tokens, in nats, floats. sum_p_squared: (2 B, T) sums over the
    vocabulary of the squared probabilities at those places (token_logprobs returns them). mask: (2 B, T), nonzero
    counts. An answer without tokens adds nothing. Raises ValueError or TypeError for what does not fit.
    """
    check.that(logprobs.dim() == 2 and logprobs.shape[0] % 2 == 0, "logprobs", "(2 B, T)", logprobs)
    for name, tensor in {"logprobs": logprobs, "sum_p_squared": sum_p_squared}.items():
        check.shaped(name, check.floating(name, tensor), tuple(logprobs.shape), "(2 B, T)")
        check.same_device(("logprobs", logprobs), (name, tensor), ("mask", mask))
    flags = check.mask_bytes(mask, tuple(logprobs.shape), "(2 B, T)")
    counts = torch.ones_like(logprobs, dtype=torch.bool) if flags is None else flags != 0
    dtype = check.compute_dtype(logprobs.dtype)
    aligned = torch.where(counts, logprobs.detach().to(dtype) - sum_p_squared.detach().to(dtype).log(), 0)
    chosen, rejected = (aligned.sum(1) / counts.sum(1).clamp_min(1)).chunk(2)
    return (chosen + rejected).exp().clamp_max(1)
