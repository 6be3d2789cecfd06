"""policy_loss: the clipped surrogate of PPO and its relatives, per token, with its metrics from the same pass.

With r = exp(logprob - old_logprob), A the advantage, and the bounds l = 1 - clip_eps_low, u = 1 + clip_eps_high:

    ppo_clip:  L = -min(r A, clip(r, l, u) A)                           and, with dual clip c, for A < 0:
               L = -max(min(r A, clip(r, l, u) A), c A)
    loss = sum over the mask of L / denominator

    d L / d logprob = -r A where the first term is the active one, else 0

Numerics. The log-ratio is clamped to +-20 before exp (gradient 0 outside), so that one token cannot make the loss
infinite. approx_kl = (r - 1) - log r uses the log-ratio as it is, by a series where it is small: exp(x) - 1 - x
cancels. Where logprobs are old_logprobs bit for bit, r is exactly 1, approx_kl and clip_fraction exactly 0.
Computed in float32 (float64 for float64), behind the mask nothing is read.

Cost per token: three inputs of s bytes and the mask read, 4 bytes (the gradient coefficient) written, about 40 FLOPs;
backward reads the coefficient and writes the gradient.

Sources: PPO, Schulman et al. 2017 (arXiv 1707.06347, eq. 7); dual clip, Ye et al. 2020 (arXiv 1912.09729, eq. 5);
separate bounds ("clip-higher"), DAPO, Yu et al. 2025 (arXiv 2503.14476, section 3.1); approx_kl, Schulman 2020,
"Approximating KL divergence" (k3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops import _check, _losses

MAX_LOG_RATIO = 20.0
METRICS = ("clip_fraction", "approx_kl", "ratio_mean", "ratio_max")


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    variant: str = "ppo_clip",
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    dual_clip: float | None = None,
    denominator: Tensor | float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy loss and its metrics; only `logprobs` gets a gradient.

    logprobs, old_logprobs: (B, T), or (N,) packed, in nats; float32, bfloat16, float16 or float64, any strides.
    advantages: the same shape, or (B, 1) or (B,) for one per sequence, which is broadcast without a copy.
    mask: the shape of logprobs, nonzero counts. Nothing counted gives a loss of 0 with gradient 0.
    variant: one of VARIANTS. clip_eps_low in [0, 1], clip_eps_high >= 0; dual_clip > 1 or None.
    denominator: what the sums are divided by, a number or a 0-d tensor: the number of counted tokens of the whole
    batch, where this call is a part of it (micro-batches, ranks). Default: the tokens counted in this call.

    Returns (loss, metrics): 0-d, float32 (float64 for float64 logprobs). Metrics are detached: clip_fraction (tokens
    whose gradient a clip has stopped), approx_kl (nats) and ratio_mean, all sums / denominator, and ratio_max (0
    where nothing counts). Raises ValueError or TypeError for shapes, types and values that do not fit.
    """
    shape = _losses.per_token_shape("logprobs", logprobs)
    advantages = _per_token(advantages, shape)
    _losses.floats(shape, "the shape of logprobs", logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    _check.same_device(("logprobs", logprobs), ("mask", mask))
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    if not 0 <= clip_eps_low <= 1:
        raise ValueError(f"clip_eps_low must be in [0, 1], got {clip_eps_low}")
    if not clip_eps_high >= 0:
        raise ValueError(f"clip_eps_high must be >= 0, got {clip_eps_high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1 or None, got {dual_clip}")
    bounds = (1 - clip_eps_low, 1 + clip_eps_high, math.inf if dual_clip is None else dual_clip)
    mask = _check.mask_bytes(mask, shape, "the shape of logprobs")
    total = _losses.denominator_tensor(denominator, logprobs)
    name = resolve("policy_loss", IMPLS, logprobs.device, backend)
    if name == "reference":
        return reference(
            logprobs, old_logprobs, advantages, bounds=bounds, mask=mask, variant=variant, denominator=total
        )
    inputs = [logprobs, old_logprobs.detach(), advantages.detach()]
    return _losses.call("policy_loss", inputs, mask, total, variant, bounds, name, METRICS)


def _per_token(advantages: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B,) or (B, 1) as (B, T) by stride 0."""
    if len(shape) == 2 and tuple(advantages.shape) in ((shape[0],), (shape[0], 1)):
        return advantages.reshape(shape[0], 1).expand(shape)
    return advantages


def ppo_clip(ratio: Tensor, advantages: Tensor, bounds: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
    """(loss, whether a clip is active) per token; bounds = (lowest ratio, highest ratio, dual clip or inf)."""
    low, high, dual_clip = bounds
    unclipped, clipped = ratio * advantages, ratio.clamp(low, high) * advantages
    surrogate, active = torch.minimum(unclipped, clipped), clipped < unclipped
    if dual_clip < math.inf:
        dual = (advantages < 0) & (ratio > dual_clip)
        surrogate, active = torch.where(dual, dual_clip * advantages, surrogate), active | dual
    return -surrogate, active


VARIANTS = {"ppo_clip": ppo_clip}


def reference(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    bounds: tuple[float, float, float],
    mask: Tensor | None = None,
    variant: str = "ppo_clip",
    denominator: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) by definition, differentiable any number of times; advantages of the shape of logprobs."""
    dtype = _check.compute_dtype(logprobs.dtype)
    logprobs, old_logprobs, advantages = (
        _losses.counted(x, mask, dtype) for x in (logprobs, old_logprobs.detach(), advantages.detach())
    )
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    losses, clipped = VARIANTS[variant](ratio, advantages, bounds)
    with torch.no_grad():
        means = [
            _losses.mean(x, mask, denominator) for x in (clipped.to(dtype), torch.expm1(log_ratio) - log_ratio, ratio)
        ]
        highest = _losses.counted(ratio, mask, dtype).max() if ratio.numel() else ratio.new_zeros(())
    return _losses.mean(losses, mask, denominator), dict(zip(METRICS, (*means, highest), strict=True))


# (variant, [logprobs, old_logprobs, advantages], mask, denominator, bounds, outputs), see _losses.register
IMPLS = {"cpu": _losses.cpu, "triton": _losses.triton}
OPS = {"policy_loss": tuple(IMPLS)}
_losses.register("policy_loss", IMPLS, gradients=1)
