"""verl's policy losses: (loss, metrics as floats) of a (B, T) batch, every one a policy_loss with verl's weights.

The signature of all but `compute_policy_loss`, which verl keeps for old callers, is

    (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)

with verl's ActorConfig and weights (B, T) of the samples, or None. Only log_prob gets a gradient. Log-ratios are held
within +-20 in all of them; verl does so in vanilla, sapo, cispo and dppo_*. In clip_cov and kl_cov it leaves them free.
kl_cov takes the tokens whose covariance equals that of the last one selected as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import PolicyObjective
from rlhf_fast.integrations.verl.losses import aggregation_weights, masked_mean, result_dtype
from rlhf_fast.ops.policy.policy_loss import Inputs, Plan, evaluate

Loss = tuple[Tensor, dict[str, float]]
MAX_LOG_RATIO = 20.0
LOSSES: dict[str, Callable[..., Loss]] = {}  # by their names in verl's registry


class Batch(NamedTuple):
    """The arguments of a policy loss."""

    old_logprobs: Tensor
    logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    mode: str
    config: Any
    sample_weights: Tensor | None

    def loss(self, objective: PolicyObjective, *scales: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective's loss, its tokens weighted by aggregation, samples and `scales` (B, T); the op's metrics."""
        weights = aggregation_weights(self.mask, self.compute_dtype, self.mode, **self.config.global_batch_info)
        scales = (*scales, *([] if self.sample_weights is None else [self.sample_weights]))
        loss, metrics = self.evaluate(objective, reduce(torch.mul, scales, weights))
        dtype = result_dtype(self.mode, self.logprobs, self.old_logprobs, self.advantages, *scales)
        return loss.to(dtype), metrics

    def evaluate(self, objective: PolicyObjective, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the objective's loss by the weights (B, T) alone; the metrics are means over the mask.

        Where the objective has a KL, it is the one to the old policy.
        """
        ref_logprobs = self.old_logprobs if objective.kl_coef > 0 else None
        inputs = Inputs(self.logprobs, self.old_logprobs, self.advantages, ref_logprobs)
        inputs.check(objective)
        counts = self.mask.to(torch.bool).contiguous().view(torch.uint8)
        return evaluate(objective, inputs.planes(), Plan(counts, weights.to(self.compute_dtype), None, None))

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.promote_types(self.logprobs.dtype, torch.float32)

    def log_ratio(self) -> Tensor:
        return (self.logprobs - self.old_logprobs).detach()

    def bounded_log_ratio(self) -> Tensor:
        return self.log_ratio().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    def mean(self, values: Tensor) -> Tensor:
        return masked_mean(values, self.mask)

    def bounds(self) -> tuple[float, float]:
        """config.clip_ratio_low and _high, or clip_ratio for what is not set."""
        default, low, high = self.config.clip_ratio, self.config.clip_ratio_low, self.config.clip_ratio_high
        return default if low is None else low, default if high is None else high

    def clip_range(self) -> tuple[float, float]:
        """The bounds on a ratio's distance from 1: the lower is at most 1, as no ratio is below 0."""
        low, high = self.bounds()
        return min(low, 1.0), high


def _policy_loss(loss_agg_mode: str = "token-mean") -> Callable[[Callable[[Batch], Loss]], Callable[..., Loss]]:
    """Gives a function of a Batch verl's signature, with the default aggregation, and a place among LOSSES."""
    default = loss_agg_mode

    def decorator(function: Callable[[Batch], Loss]) -> Callable[..., Loss]:
        def loss(
            old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
            loss_agg_mode: str = default, config: Any = None, rollout_is_weights: Tensor | None = None,
        ) -> Loss:  # fmt: skip
            if config is None:
                raise ValueError(f"{function.__name__} needs a config, got None")
            weights = None if rollout_is_weights is None else rollout_is_weights.detach()
            batch = Batch(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, weights)
            return function(batch)

        loss.__name__, loss.__qualname__, loss.__doc__ = function.__name__, function.__qualname__, function.__doc__
        LOSSES[loss.__name__.removeprefix("compute_policy_loss_")] = loss
        return loss

    return decorator


def _floats(ppo_kl: Tensor, pg_clipfrac: Tensor | None = None, pg_clipfrac_lower: Tensor | None = None) -> dict:
    """verl's metrics, those given, read from the device at once."""
    given = {"pg_clipfrac": pg_clipfrac, "ppo_kl": ppo_kl, "pg_clipfrac_lower": pg_clipfrac_lower}
    metrics = {f"actor/{name}": value for name, value in given.items() if value is not None}
    return dict(zip(metrics, torch.stack([x.float() for x in metrics.values()]).tolist(), strict=True))


# --- The losses -------------------------------------------------------------------------------------------------------


@_policy_loss()
def compute_policy_loss_vanilla(batch: Batch) -> Loss:
    """PPO's clipped objective with the dual clip at config.clip_ratio_c."""
    loss, *metrics = _ppo_clip(batch, *batch.clip_range(), batch.config.get("clip_ratio_c", 3.0))
    return loss, _floats(*metrics)


def compute_policy_loss(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, cliprange: float | None = None,
    cliprange_low: float | None = None, cliprange_high: float | None = None, clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same by numbers instead of a config: (loss, clip fraction, KL, fraction held by the dual clip)."""
    low, high = (cliprange if x is None else x for x in (cliprange_low, cliprange_high))
    if low is None or high is None:
        raise ValueError(f"cliprange must be given, or both of its bounds, got {cliprange_low} and {cliprange_high}")
    batch = Batch(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, _NoConfig, None)
    loss, ppo_kl, clipped, lower = _ppo_clip(batch, min(low, 1.0), high, clip_ratio_c)
    return loss, clipped, ppo_kl, lower


class _NoConfig:
    global_batch_info: dict[str, Any] = {}  # noqa: RUF012


def _ppo_clip(batch: Batch, low: float, high: float, dual_clip: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, KL, fraction held by the two bounds, fraction held by the dual clip)"""
    objective = PolicyObjective("ppo_clip", clip_eps_low=low, clip_eps_high=high, dual_clip=dual_clip)
    loss, metrics = batch.loss(objective)
    log_ratio = batch.bounded_log_ratio()
    dual = batch.mean((batch.advantages < 0) & (log_ratio.exp() > dual_clip))
    return loss, -batch.mean(log_ratio), (metrics["clip_fraction"] - dual).clamp(min=0), dual


@_policy_loss()
def compute_policy_loss_dppo_tv(batch: Batch) -> Loss:
    """A policy gradient without the tokens whose probability has moved too far the way their advantage pushes."""
    moved = batch.logprobs.detach().exp() - batch.old_logprobs.exp()
    low, high = batch.bounds()
    return _dppo(batch, torch.where(batch.advantages > 0, moved <= high, moved >= -low))


@_policy_loss()
def compute_policy_loss_dppo_kl(batch: Batch) -> Loss:
    """The same by the KL of the token against all others."""
    logprobs, old = batch.logprobs.detach(), batch.old_logprobs
    p, q = logprobs.exp(), old.exp()
    divergence = q * (old - logprobs) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
    low, high = batch.bounds()
    rises = (divergence <= high) | (p <= q)
    falls = (divergence <= low) | (p >= q)
    return _dppo(batch, torch.where(batch.advantages > 0, rises, falls))


def _dppo(batch: Batch, valid: Tensor) -> Loss:
    """-A logprob, weighted by the ratio up to config.clip_ratio_c, of the valid tokens."""
    log_ratio, bound = batch.bounded_log_ratio(), batch.config.get("clip_ratio_c", 20.0)
    ratio = log_ratio.exp()
    loss, _ = batch.loss(PolicyObjective("gpg"), torch.where(valid, ratio.clamp(max=bound), 0).float())
    return loss, _floats(-batch.mean(log_ratio), batch.mean(~valid), batch.mean(valid & (ratio > bound)))


@_policy_loss("seq-mean-token-mean")
def compute_policy_loss_gspo(batch: Batch) -> Loss:
    """The clipped objective of the sequence's mean ratio, with the gradient of every token by its own advantage."""
    low, high = batch.clip_range()
    # verl holds the mean log-ratio below 10, which a dual clip does where no other bound holds it.
    objective = PolicyObjective("gspo_token", clip_eps_low=low, clip_eps_high=high, dual_clip=math.exp(10))
    loss, metrics = batch.loss(objective)
    log_ratio, counts = torch.where(batch.mask.bool(), batch.log_ratio(), 0), batch.mask.bool()
    far = log_ratio.sum(-1, keepdim=True) > 10 * counts.sum(-1, keepdim=True)  # which verl does not count as clipped
    clipped = metrics["clip_fraction"] - batch.mean(far & (batch.advantages < 0))
    return loss, _floats(-batch.mean(log_ratio), clipped.clamp(min=0), torch.zeros_like(loss.detach()))


@_policy_loss("seq-mean-token-mean")
def compute_policy_loss_sapo(batch: Batch) -> Loss:
    """The sigmoid gate with config.tau_pos and tau_neg. As in verl always seq-mean-token-mean."""
    batch = batch._replace(mode="seq-mean-token-mean")
    temperatures = {"sapo_temperature_pos": batch.config.tau_pos, "sapo_temperature_neg": batch.config.tau_neg}
    loss, _ = batch.loss(PolicyObjective("sapo", **temperatures))
    zero = torch.zeros_like(loss.detach())
    return loss, _floats(-batch.mean(batch.bounded_log_ratio()), zero, zero)


@_policy_loss()
def compute_policy_loss_gpg(batch: Batch) -> Loss:
    """-A logprob, without metrics."""
    return batch.loss(PolicyObjective("gpg"))[0], {}


@_policy_loss()
def compute_policy_loss_clip_cov(batch: Batch) -> Loss:
    """The clipped objective without tokens drawn from those of high covariance, from the same random numbers as verl's.

    Finding them waits for the device, as in verl.
    """
    numbers, (low, high) = batch.config.policy_loss, batch.clip_range()
    share, lowest, highest = (
        default if given is None else given
        for given, default in ((numbers.clip_cov_ratio, 2e-4), (numbers.clip_cov_lb, 1.0), (numbers.clip_cov_ub, 5.0))
    )
    advantages, counts, logprobs = batch.advantages, batch.mask > 0, batch.logprobs.detach()
    ratio = batch.log_ratio().exp()
    held = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    covariance = (advantages - batch.mean(advantages)) * (logprobs - batch.mean(logprobs))
    drawn_from = (counts & ~held & (covariance > lowest) & (covariance < highest)).nonzero()
    drawn = drawn_from[torch.randperm(len(drawn_from))[: max(int(share * batch.mask.sum().item()), 1)]]
    weights = torch.ones_like(advantages)
    weights[drawn[:, 0], drawn[:, 1]] = 0
    loss, _ = batch.loss(PolicyObjective("ppo_clip", clip_eps_low=low, clip_eps_high=high), weights)
    return loss, _floats(-batch.mean(batch.log_ratio()), batch.mean(weights == 0))


@_policy_loss()
def compute_policy_loss_kl_cov(batch: Batch) -> Loss:
    """-r A, with ppo_kl_coef |log r| more for the kl_cov_ratio of the tokens with the highest covariance."""
    numbers = batch.config.policy_loss
    share = 2e-4 if numbers.kl_cov_ratio is None else numbers.kl_cov_ratio
    coefficient = 1.0 if numbers.ppo_kl_coef is None else numbers.ppo_kl_coef
    loss, _ = batch.loss(PolicyObjective("kl_cov", cov_fraction=share, kl_cov_coef=coefficient))
    return loss, _floats(batch.mean(batch.log_ratio().abs()))


@_policy_loss()
def compute_policy_loss_geo_mean(batch: Batch) -> Loss:
    """The ratio's geometric mean over a sequence, its log clipped per token. As in verl always the mean over B."""
    mask, (low, high) = batch.mask, batch.bounds()
    lengths = mask.float().sum(-1, keepdim=True).clamp(min=1)
    weights = mask.float() / (lengths * mask.shape[0])
    if batch.sample_weights is not None:
        logs = torch.where(mask.bool(), (batch.sample_weights + 1e-10).log(), 0)
        weights = weights * (logs.sum(-1, keepdim=True) / lengths).exp()
    # A token without advantage has no part in its sequence's ratio.
    with_advantage = torch.where(batch.advantages == 0, batch.old_logprobs, batch.logprobs)
    objective = PolicyObjective("gmpo", clip_eps_low=low, clip_eps_high=high)
    loss, _ = batch._replace(logprobs=with_advantage).evaluate(objective, weights)
    log_ratio = batch.log_ratio()
    clipped = (log_ratio < -low) | (log_ratio > high)
    over, under = (batch.mean(clipped & sign) for sign in (batch.advantages > 0, batch.advantages < 0))
    return loss, _floats(-batch.mean(log_ratio), over, under)


@_policy_loss()
def compute_policy_loss_dro(batch: Batch) -> Loss:
    """-A logprob + dro_beta / 2 (log r)^2 per token, which is a policy gradient with the k2 penalty."""
    beta = batch.config.policy_loss.dro_beta
    if beta is None or beta <= 0:
        raise ValueError(f"policy_loss.dro_beta must be > 0 for DRO, got {beta}")
    loss, _ = batch.loss(PolicyObjective("gpg", kl_coef=beta, kl_variant="k2"))
    return loss, _floats(-batch.mean(batch.log_ratio()))


@_policy_loss()
def compute_policy_loss_cispo(batch: Batch) -> Loss:
    """-A logprob, weighted by the clipped ratio."""
    low, high = batch.clip_range()
    loss, metrics = batch.loss(PolicyObjective("cispo", clip_eps_low=low, clip_eps_high=high))
    zero = torch.zeros_like(loss.detach())
    return loss, _floats(-batch.mean(batch.bounded_log_ratio()), metrics["clip_fraction"], zero)


def compute_policy_loss_reinforce(
    rollout_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-sum", config: Any = None, rollout_is_weights: Tensor | None = None,
) -> Loss:  # fmt: skip
    """-A logprob, weighted by rollout_is_weights; the KL is the one to the rollout's policy."""
    loss, _ = compute_policy_loss_gpg(
        rollout_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
    )
    return loss, _floats(masked_mean((rollout_log_prob - log_prob).detach(), response_mask))


FUNCTIONS: tuple[Callable[..., Any], ...] = (compute_policy_loss, compute_policy_loss_reinforce, *LOSSES.values())
