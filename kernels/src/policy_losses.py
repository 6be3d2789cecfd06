"""One function per policy loss: the twins of csrc/math/policy_losses.h; formulas in ops/policy/policy_loss.py.

A loss is a function of a token, of what its sequence shares and of the numbers of the objective. Losses made from
sequences also have a statistic, which is averaged over the sequence, and a function of that mean.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from rlhf_fast.kernels.scalar import bounded, expm1, product

# --- What a loss reads and gives --------------------------------------------------------------------------------------


class Token(NamedTuple):
    logprob: tl.tensor
    old_logprob: tl.tensor
    advantage: tl.tensor
    log_ratio: tl.tensor
    ratio: tl.tensor  # exp(log_ratio), the latter within +-20
    selected: tl.tensor  # whether clip_cov, kl_cov chose it


class Shared(NamedTuple):
    """What the tokens of a sequence have in common."""

    loss: tl.tensor = 0.0  # of a loss of the sequence
    slope: tl.tensor = 0.0  # d loss / d mean
    low: tl.tensor = 0.0  # 1 where the lower bound holds it
    high: tl.tensor = 0.0
    positive: tl.tensor = 0.0  # weight of its tokens with a positive advantage
    negative: tl.tensor = 0.0


class Outcome(NamedTuple):
    loss: tl.tensor
    slope: tl.tensor  # d loss / d logprob; of a sequence: d loss / d mean
    low: tl.tensor = False  # whether the lower, the upper bound holds the token
    high: tl.tensor = False


class Numbers(NamedTuple):
    """The numbers of rlhf_fast.ops.policy.policy_loss.Numbers by the same names, in the type of the loss."""

    clip_eps_low: tl.tensor
    clip_eps_high: tl.tensor
    ratio_low: tl.tensor
    ratio_high: tl.tensor
    dual_clip: tl.tensor
    max_divergence: tl.tensor
    kl_cov_coef: tl.tensor
    sapo_temperature_pos: tl.tensor
    sapo_temperature_neg: tl.tensor
    vespo_k_pos: tl.tensor
    vespo_lambda_pos: tl.tensor
    vespo_k_neg: tl.tensor
    vespo_lambda_neg: tl.tensor
    dro_beta: tl.tensor
    kl_coef: tl.tensor
    entropy_coef: tl.tensor
    correction_low: tl.tensor
    correction_high: tl.tensor
    off_policy_max_kl: tl.tensor


@triton.jit
def in_type(numbers, acc: tl.constexpr):
    """The Numbers of a tuple in their order."""
    converted = ()
    for k in tl.static_range(len(numbers)):
        converted += (tl.full([], numbers[k], acc),)
    return Numbers(*converted)


# --- What several losses use ------------------------------------------------------------------------------------------


@triton.jit
def bounded_exp(log_ratio):
    return tl.exp(bounded(log_ratio, -20.0, 20.0))


@triton.jit
def unless_saturated(log_ratio, slope):
    """`slope` of what depends on the ratio, which is constant where the log-ratio is outside +-20."""
    return tl.where(tl.abs(log_ratio) > 20.0, 0.0, slope)


@triton.jit
def clipped_surrogate(ratio, advantage, p):
    low = (advantage < 0) & (ratio < p.ratio_low)
    dual = (advantage < 0) & (ratio > p.dual_clip)
    high = ((advantage > 0) & (ratio > p.ratio_high)) | dual
    inside = tl.where(low | high, bounded(ratio, p.ratio_low, p.ratio_high), ratio)
    loss = -tl.where(dual, p.dual_clip, inside) * advantage
    return Outcome(loss, tl.where(low | high, 0.0, -ratio * advantage), low, high)


@triton.jit
def within(divergence, t, p):
    """The slope beyond dual_clip, which caps the ratio, is that of the cap times the log-ratio."""
    far = divergence > p.max_divergence
    low = far & (t.advantage < 0) & (t.log_ratio < 0)
    high = far & (t.advantage > 0) & (t.log_ratio > 0)
    loss = tl.where(low | high, 0.0, -tl.where(t.ratio > p.dual_clip, p.dual_clip, t.ratio) * t.advantage)
    return Outcome(loss, tl.where(t.log_ratio < -20.0, 0.0, loss), low, high)


# --- Losses of a token ------------------------------------------------------------------------------------------------


@triton.jit
def ppo_clip(t, s, p):
    out = clipped_surrogate(t.ratio, t.advantage, p)
    return Outcome(out.loss, unless_saturated(t.log_ratio, out.slope), out.low, out.high)


@triton.jit
def clip_cov(t, s, p):
    out = ppo_clip(t, s, p)
    loss, slope = tl.where(t.selected, 0.0, out.loss), tl.where(t.selected, 0.0, out.slope)
    return Outcome(loss, slope, out.low & (t.selected == 0), out.high | t.selected)


@triton.jit
def kl_cov(t, s, p):
    weight = tl.where(t.selected, p.kl_cov_coef, 0.0)
    sign = tl.where(t.log_ratio > 0, 1.0, tl.where(t.log_ratio < 0, -1.0, 0.0))
    surrogate = t.ratio * t.advantage
    loss = product(weight, tl.abs(t.log_ratio)) - surrogate
    return Outcome(loss, weight * sign - unless_saturated(t.log_ratio, surrogate), high=t.selected)


@triton.jit
def policy_gradient(t, s, p):
    return Outcome(product(-t.advantage, t.logprob), -t.advantage)


@triton.jit
def cispo(t, s, p):
    slope = -bounded(t.ratio, p.ratio_low, p.ratio_high) * t.advantage
    return Outcome(product(slope, t.logprob), slope, t.ratio < p.ratio_low, t.ratio > p.ratio_high)


@triton.jit
def sapo(t, s, p):
    tau = tl.where(t.advantage > 0, p.sapo_temperature_pos, p.sapo_temperature_neg)
    z = tau * (t.ratio - 1)
    e = tl.exp(-tl.abs(z))
    gate, slope = tl.where(z < 0, e, 1.0) / (1 + e), e / ((1 + e) * (1 + e))  # sigmoid(z), its derivative
    loss = -4 / tau * gate * t.advantage
    return Outcome(loss, unless_saturated(t.log_ratio, -4 * slope * t.ratio * t.advantage))


@triton.jit
def dppo_tv(t, s, p):
    return within(tl.abs(tl.exp(t.logprob) - tl.exp(t.old_logprob)), t, p)


@triton.jit
def dppo_kl(t, s, p):
    old_rest = -expm1(t.old_logprob)
    has_rest = old_rest > 0
    old_rest, rest = tl.where(has_rest, old_rest, 1.0), tl.where(has_rest, -expm1(t.logprob), 1.0)
    others = tl.where(has_rest, old_rest * (tl.log(old_rest) - tl.log(rest)), 0.0)
    return within(product(tl.exp(t.old_logprob), t.old_logprob - t.logprob) + others, t, p)


# --- Losses made from a mean over the sequence: statistic -> its mean -> shared -> token ------------------------------
# statistic: (log-ratio, advantage, numbers); shared: (the mean, number of tokens, mean advantage, numbers)


@triton.jit
def log_ratio(x, advantage, p):
    return x


@triton.jit
def nothing_shared(mean, length, advantage, p):
    return Shared()


@triton.jit
def of_sequence(t, s, p):
    return Outcome(s.loss, s.slope, s.low > 0, s.high > 0)


@triton.jit
def gspo_shared(mean, length, advantage, p):
    out = clipped_surrogate(bounded_exp(mean), advantage, p)
    low, high = tl.where(out.low, 1.0, 0.0), tl.where(out.high, 1.0, 0.0)
    return Shared(out.loss, unless_saturated(mean, out.slope), low, high)


@triton.jit
def gspo_token(t, s, p):
    return clipped_surrogate(s.positive, t.advantage, p)


@triton.jit
def gspo_token_shared(mean, length, advantage, p):
    ratio = bounded_exp(mean)
    return Shared(positive=ratio, negative=ratio)


@triton.jit
def gmpo(t, s, p):
    low = (t.advantage < 0) & (t.log_ratio < -p.clip_eps_low)
    high = (t.advantage > 0) & (t.log_ratio > p.clip_eps_high)
    return Outcome(s.loss, tl.where(low | high, 0.0, s.slope), low, high)


@triton.jit
def gmpo_log_ratio(x, advantage, p):
    low, high = (advantage < 0) & (x < -p.clip_eps_low), (advantage > 0) & (x > p.clip_eps_high)
    return tl.where(low, -p.clip_eps_low, tl.where(high, p.clip_eps_high, x))


@triton.jit
def gmpo_shared(mean, length, advantage, p):
    loss = -bounded_exp(mean) * advantage
    return Shared(loss, unless_saturated(mean, loss))


@triton.jit
def vespo(t, s, p):
    slope = -tl.where(t.advantage >= 0, s.positive, s.negative) * t.advantage
    return Outcome(product(slope, t.logprob), slope)


@triton.jit
def vespo_shared(mean, length, advantage, p):
    log_weight = bounded(mean * length, -20.0, 20.0)
    above = expm1(log_weight)
    positive = tl.exp(p.vespo_k_pos * log_weight - p.vespo_lambda_pos * above)
    negative = tl.exp(p.vespo_k_neg * log_weight - p.vespo_lambda_neg * above)
    return Shared(positive=positive, negative=negative)


@triton.jit
def dro_shared(mean, length, advantage, p):
    total = mean * length
    loss = (0.5 * p.dro_beta * total - advantage) * total
    return Shared(loss, length * (p.dro_beta * total - advantage))


# --- The table --------------------------------------------------------------------------------------------------------


class Function(NamedTuple):
    token: triton.JITFunction
    statistic: triton.JITFunction = log_ratio
    shared: triton.JITFunction = nothing_shared
    of_sequence: bool = False  # the slope is d loss / d mean of the sequence
    folds_correction: bool = False  # into the sum of the log-ratios, in place of a weight


FUNCTIONS = {
    "ppo_clip": Function(ppo_clip),
    "clip_cov": Function(clip_cov),
    "kl_cov": Function(kl_cov),
    "policy_gradient": Function(policy_gradient),
    "cispo": Function(cispo),
    "sapo": Function(sapo),
    "dppo_tv": Function(dppo_tv),
    "dppo_kl": Function(dppo_kl),
    "gspo": Function(of_sequence, shared=gspo_shared, of_sequence=True),
    "gspo_token": Function(gspo_token, shared=gspo_token_shared),
    "gmpo": Function(gmpo, gmpo_log_ratio, gmpo_shared, of_sequence=True),
    "vespo": Function(vespo, shared=vespo_shared, folds_correction=True),
    "dro": Function(of_sequence, shared=dro_shared, of_sequence=True),
}
