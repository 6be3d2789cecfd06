"""policy_loss: the policy losses of preference learning, with every term, weight and metric, from one kernel.

With x = logprob - old_logprob, r = exp(x), A the advantage, clip(r) = r held within [1 - clip_eps_low,
1 + clip_eps_high], sg(.) a constant to the gradient, and sum and mean over the counted tokens of a sequence:

    ppo_clip    L = -min(r A, clip(r) A); with dual clip c, for A < 0:  -max(min(r A, clip(r) A), c A)
    cispo       L = -sg(clip(r)) A logprob
    sapo        L = -4 / tau sigmoid(tau (r - 1)) A               tau by the sign of A
    dppo_*      L = -min(r, dual_clip) A, with the slope of r itself scaled down to the cap beyond it,
                0 where D > max_divergence and A leads further away (A > 0 and r > 1, or A < 0 and r < 1);
                with p, q the token's new and old probability, tv: D = |p - q|,
                kl: D = q log(q / p) + (1 - q) log((1 - q) / (1 - p))
    clip_cov    ppo_clip, 0 for selected tokens, of those that no bound holds
    kl_cov      L = -r A + kl_cov_coef |x| if selected
    gpg, reinforce, a2c    L = -A logprob
    gspo        ppo_clip of s = exp(mean x) and mean A            luspo: the same, summed over tokens
    gspo_token  ppo_clip of sg(s) r / sg(r)
    gmpo        L = -exp(mean x') mean A,  x' = min(x, clip_eps_high) for A > 0, max(x, -clip_eps_low) for A < 0
    vespo       L = -sg(w^k exp(lambda (1 - w))) A logprob,  w = exp(sum x) times the correction of the sequence,
                which is not applied once more
    dro         L = -mean(A) X + dro_beta / 2 X^2,  X = sum x     old_logprobs: the reference's

    loss = sum over the mask of w (c L + kl_coef KL - entropy_coef entropy)

w is the weight of the aggregation; c that of the sampler's correction (exp(old_logprob - sampler_logprob) of the token,
its sequence, or their geometric mean, truncated or masked outside its bounds), 0 for tokens dropped by the entropy or
the off-policy mask; KL the estimate k1, k2 or k3 of kl_estimate against ref_logprobs, or `kl`, the exact one of each
prediction, which linear_kl and token_kl make. Selected are the largest covariances (logprob - mean)(A - mean) of the
call. d L / d logprob follows term by term, e.g. ppo_clip: -r A where the first term is the active one, else 0;
kl_unbiased takes r KL with d KL = r (logprob - ref_logprob), which is the gradient of r k3 and of the KL itself.

Numerics. Log-ratios are clamped to +-20 before exp (gradient 0 outside), so that one token cannot make the loss
infinite; so is that of k3 to the reference, and with kl_unbiased of every estimate. A weight of 0 (a coefficient, an
advantage, a correction, the mask) takes out what it multiplies, infinities included. approx_kl = (r - 1) - log r uses
the log-ratio as it is, by a series where it is small: exp(x) - 1 - x cancels. Where logprobs are old_logprobs bit for
bit, r is exactly 1, approx_kl and clip_fraction exactly 0. Computed in float32 (float64 for float64), behind the mask
nothing is read. Sums are made in a fixed order.

Cost per token: three inputs of s bytes (one more per optional input) and the mask read, 4 bytes (the gradient
coefficient) written, about 40 FLOPs; losses made from sequences read the first inputs once more. Backward reads the
coefficient and writes the gradient.

Sources: PPO, arXiv 1707.06347, eq. 7; dual clip, 1912.09729, eq. 5, which for a delta >= 1 + clip_eps_high is also the
two-sided clip of INTELLECT-2, 2505.07291; GRPO 2402.03300; DAPO (separate bounds, token mean) 2503.14476; Dr. GRPO
(fixed length) 2503.20783; GSPO 2507.18071; LUSPO 2602.05261; GMPO 2507.20673; CISPO (MiniMax-M1) 2506.13585, default
bound of ScaleRL, 2510.13786; SAPO 2511.20347; VESPO 2602.10693; DPPO 2602.04879, with the value of the paper's ratio
and the cap of verl, which takes -sg(min(r, 20)) A logprob, the same gradient; Clip-Cov and KL-Cov 2505.22617, whose
Clip-Cov draws its tokens at random (here the largest are taken) and whose code has |x| for the KL; DRO 2405.19107, its
square over 2 dro_beta without the constant; GPG 2504.02546; REINFORCE, Williams 1992; A2C 1602.01783; entropy mask
2506.01939; off-policy mask, DeepSeek-V3.2, 2512.02556; KL estimates, Schulman 2020, "Approximating KL divergence". The
defaults of each: VARIANTS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import native, packed, plane, resolve, threads, triton_kernels
from rlhf_fast.ops.core import check, masked_loss, registration
from rlhf_fast.ops.core.loss import Loss, once
from rlhf_fast.ops.core.sequences import sequence_ids
from rlhf_fast.ops.policy.batch import DROPPED, SELECTED, Inputs, Plan, select
from rlhf_fast.ops.policy.objective import (
    EXACT_KL,
    FUNCTIONS,
    MAX_LOG_RATIO,
    VARIANTS,
    PolicyObjective,
    Tokens,
    bounded_exp,
    slope_alone,
)
from rlhf_fast.ops.tokens.kl_estimate import VARIANTS as KL_VARIANTS
from rlhf_fast.ops.tokens.kl_estimate import k3

__all__ = ["METRICS", "OPS", "VARIANTS", "Inputs", "Plan", "PolicyObjective", "evaluate", "policy_loss"]

METRICS = (
    "clip_fraction", "clip_fraction_low", "clip_fraction_high", "approx_kl", "ratio_mean", "ratio_max", "ratio_min",
    "kl_to_ref", "entropy", "correction_mean", "correction_fraction", "sampler_kl", "dropped_fraction",
)  # fmt: skip
ALWAYS = METRICS[:7]


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    objective: str | PolicyObjective = "ppo_clip",
    mask: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    kl: Tensor | None = None,
    overlong: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    denominator: Tensor | float | None = None,
    sequences: Tensor | float | None = None,
    backend: str | None = None,
) -> Loss:
    """The policy loss `objective` and its metrics; only `logprobs`, `entropy` and `kl` get a gradient.

    logprobs, old_logprobs: (B, T), or (N,) packed, in nats; float32, bfloat16, float16 or float64, any strides.
    old_logprobs None: on policy. They are logprobs without the gradient, as in the first update after a rollout.
    advantages: the same shape, or (B, 1) or (B,) for one per sequence, which is broadcast without a copy.
    objective: a name of VARIANTS, with the numbers of its paper, or a PolicyObjective with any others.
    mask: the shape of logprobs, nonzero counts. Nothing counted gives a loss of 0 with gradient 0.
    ref_logprobs: the reference's, where kl_coef > 0 or to measure it. kl: in their place where kl_variant is exact or
    exact_forward, token_kl's `reverse` or `forward`, nats per token. sampler_logprobs: those of the sampler, where it
    is not the policy that made old_logprobs. entropy: nats per token, where entropy_coef > 0 or entropy_fraction < 1,
    or to measure it. All of the shape of logprobs. overlong: (B,) or, packed, (S,): nonzero leaves the sequence out.
    cu_seqlens: (S + 1,) int64 or int32, the packed sequences, wherever sequences matter; tokens after the last one
    do not count.
    denominator, sequences: what token means and sequence means divide by, numbers or 0-d tensors: the counted tokens,
    and the sequences with a counted token, of the whole batch, where this call is a part of it (micro-batches, ranks).
    Default: those of this call.

    Returns (loss, metrics), 0-d each, float32 (float64 for float64 logprobs). Metrics are detached sums over tokens /
    denominator: clip_fraction (tokens held by a bound, or selected by clip_cov or kl_cov), _low and _high of it,
    approx_kl (nats), ratio_mean, and ratio_max, ratio_min (0 where nothing counts); kl_to_ref and entropy where given;
    with sampler_logprobs correction_mean (the weight applied), correction_fraction (tokens outside the bounds) and
    sampler_kl (k3 from the sampler, nats); dropped_fraction with an entropy or off-policy mask.
    Raises ValueError or TypeError for shapes, types and values that do not fit.
    """
    objective = PolicyObjective.of(objective)
    shape = masked_loss.per_token_shape("logprobs", logprobs)
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    if objective.kl_variant in EXACT_KL:
        ref_logprobs = None
    inputs = Inputs(logprobs, old_logprobs, per_token(advantages, shape), ref_logprobs, sampler_logprobs, entropy)
    inputs.check(objective)
    check_exact_kl(objective, logprobs, kl)
    plan = Plan.of(
        objective, logprobs, mask=mask, overlong=overlong, cu_seqlens=cu_seqlens, denominator=denominator,
        sequences=sequences,
    )  # fmt: skip
    loss = evaluate(objective, inputs.planes(), plan, backend=backend)
    return loss if kl is None else with_exact_kl(objective, loss, masked_loss.plane(kl), plan)


def check_exact_kl(objective: PolicyObjective, logprobs: Tensor, kl: Tensor | None) -> None:
    masked_loss.floats(logprobs.shape, "the shape of logprobs", logprobs=logprobs, kl=kl)
    if kl is None and objective.exact_kl is not None:
        raise ValueError(f"kl must be given for kl_variant {objective.kl_variant} with kl_coef {objective.kl_coef}")
    if kl is not None and objective.kl_variant not in EXACT_KL:
        raise ValueError(f"kl is of kl_variant {' or '.join(EXACT_KL)}, got {objective.kl_variant}")


def with_exact_kl(objective: PolicyObjective, loss: Loss, kl: Tensor, plan: Plan) -> Loss:
    """`loss` with kl_coef times the KL of every counted token, (rows, columns), by the aggregation's weights."""
    kl = torch.where(plan.counts(kl), kl.to(check.compute_dtype(kl.dtype)), 0.0)
    tokens = plan.tokens(kl)
    weights = 1 / tokens if plan.weights is None else plan.weights
    total = masked_loss.product(objective.kl_coef, (weights * kl).sum())
    return Loss(loss.loss + total, {**loss.metrics, "kl_to_ref": kl.detach().sum() / tokens})


def per_token(advantages: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B,) or (B, 1) as (B, T) by stride 0."""
    if len(shape) == 2 and advantages.shape == shape[:1]:
        advantages = advantages[:, None]
    return advantages.expand(shape) if len(shape) == 2 and advantages.shape == (shape[0], 1) else advantages


def evaluate(objective: PolicyObjective, inputs: Inputs, plan: Plan, *, backend: str | None = None) -> Loss:
    """policy_loss of planes by a plan that is already there."""
    name = resolve(f"policy_loss of {objective.variant}", objective.kernels, inputs.logprobs.device, backend)
    plan = select(objective, inputs, plan)
    if name == "reference":
        loss, values = reference(objective, inputs, plan)
    else:
        loss, values, *_ = _run(inputs, plan, numbers(objective), name)
    return Loss(loss, named_metrics(objective, inputs, values))


def named_metrics(objective: PolicyObjective, inputs: Inputs, values: Tensor) -> dict[str, Tensor]:
    """Those of the op's (13,) metrics whose inputs are there, by name."""
    drops = objective.entropy_fraction < 1 or objective.off_policy_max_kl is not None
    optional = (
        inputs.ref_logprobs is not None, inputs.entropy is not None, *[inputs.sampler_logprobs is not None] * 3, drops,
    )  # fmt: skip
    values = values.detach()
    if not any(optional):
        return dict(zip(ALWAYS, values[: len(ALWAYS)].unbind(0), strict=True))
    there = (*[True] * len(ALWAYS), *optional)
    return {name: value for name, value, is_there in zip(METRICS, values.unbind(0), there, strict=True) if is_there}


def reference(objective: PolicyObjective, inputs: Inputs, plan: Plan) -> tuple[Tensor, Tensor]:
    """(loss, (13,) metrics) by definition, differentiable any number of times; `plan` after select."""
    dtype = check.compute_dtype(inputs.logprobs.dtype)
    counts = plan.counts(inputs.logprobs)
    x = inputs.map(lambda y: torch.where(counts, y.to(dtype), 0))
    total, length = _sequence_sums(plan, x.logprobs)
    flags = plan.flags if objective.marks_tokens and plan.flags is not None else counts.to(torch.uint8)
    tokens = Tokens(
        x.logprobs, x.old_logprobs, x.advantages, x.logprobs - x.old_logprobs, (flags & SELECTED) != 0, total, length,
        torch.zeros_like(x.logprobs),
    )  # fmt: skip
    function = FUNCTIONS[objective.function]
    correction, outside, sampler_kl = _correction(objective, tokens, x.sampler_logprobs)
    if function.folds_correction:
        tokens = replace(tokens, log_correction=_folded(objective, tokens, torch.where(counts, correction, 1)))
    losses, held_low, held_high = function.loss(tokens, objective)
    dropped = (flags & DROPPED) != 0
    if objective.off_policy_max_kl is not None:
        sampler = x.old_logprobs if x.sampler_logprobs is None else x.sampler_logprobs
        far = tokens.mean(sampler - x.logprobs.detach()) > objective.off_policy_max_kl
        dropped = dropped | (far & (x.advantages < 0))
    weight = torch.ones_like(losses) if function.folds_correction else correction
    weight = torch.where(dropped, 0.0, weight)
    if function.per_sequence and objective.correction_level != "token" and x.sampler_logprobs is not None:
        # Infinities of a sequence without weight would come back as NaN in the gradient.
        log_ratio, logprobs = (torch.where(weight == 0, 0.0, y) for y in (tokens.log_ratio, tokens.logprobs))
        losses, _, _ = function.loss(replace(tokens, log_ratio=log_ratio, logprobs=logprobs), objective)
    losses = masked_loss.product(weight, losses)
    kl = torch.zeros_like(losses)
    if x.ref_logprobs is not None:
        kl = _kl_to_ref(objective, x.ref_logprobs - x.logprobs, tokens)
        if objective.kl_coef > 0:  # else it is measured: 0 times infinity is 0
            losses = losses + objective.kl_coef * kl
    entropy = torch.zeros_like(losses) if x.entropy is None else x.entropy
    if objective.entropy_coef > 0:
        losses = losses - objective.entropy_coef * entropy
    denominator = plan.tokens(inputs.logprobs)
    weights = 1 / denominator if plan.weights is None else plan.weights
    loss = torch.where(counts, losses * weights, 0.0).sum()
    log_ratio, ratio = tokens.log_ratio.detach(), tokens.ratio.detach()
    means = [held_low | held_high, held_low, held_high, k3(log_ratio), ratio, kl, entropy,
             correction, outside, sampler_kl, dropped]  # fmt: skip
    values = torch.stack([torch.where(counts, m.detach().to(dtype), 0).sum() / denominator for m in means])
    return loss, torch.cat([values[:5], _extremes(ratio, counts), values[5:]])


def _kl_to_ref(o: PolicyObjective, log_ratio: Tensor, tokens: Tokens) -> Tensor:
    """The estimate per token from log_ratio = ref_logprob - logprob, with the gradient that the objective asks for."""
    if o.kl_variant == "k3" or o.kl_unbiased:
        log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    kl = KL_VARIANTS[o.kl_variant](log_ratio)
    if not o.kl_unbiased:
        return kl
    slope = (-tokens.ratio * log_ratio).detach()
    return (tokens.ratio * kl).detach() + slope * slope_alone(tokens.logprobs)


def _folded(o: PolicyObjective, tokens: Tokens, correction: Tensor) -> Tensor:
    """Per token, the log of the correction of its whole sequence; that of a token counts once for each."""
    logs = correction.clamp_min(math.exp(-MAX_LOG_RATIO)).log()
    return logs if o.correction_level == "sequence" else tokens.total(logs)


def _extremes(ratio: Tensor, counts: Tensor) -> Tensor:
    """(2,): the largest and the smallest counted ratio, 0 where nothing counts."""
    if ratio.numel() == 0:
        return ratio.new_zeros(2)
    highest = torch.where(counts, ratio, -math.inf).max()
    lowest = torch.where(counts, ratio, math.inf).min()
    return torch.where(counts.any(), torch.stack([highest, lowest]), 0.0)


def _sequence_sums(plan: Plan, like: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(values -> per token, their sum over its sequence; per token, the length of its sequence, at least 1)"""
    ids = sequence_ids(like, plan.cu_seqlens)
    length = plan.lengths(like).clamp(min=1)[ids].to(like.dtype)

    def total(x: Tensor) -> Tensor:
        if plan.cu_seqlens is None:
            return x.sum(1, keepdim=True).expand_as(x)
        return x.new_zeros(plan.cu_seqlens.shape[0] - 1).index_add(0, ids, x[0])[ids][None]

    return total, length


def _correction(o: PolicyObjective, tokens: Tokens, sampler_logprobs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, whether outside the bounds, k3 from the sampler) per token."""
    if sampler_logprobs is None:
        ones = torch.ones_like(tokens.logprobs)
        return ones, ones != 1, torch.zeros_like(ones)
    apart = tokens.old_logprobs - sampler_logprobs
    level = {"token": lambda x: x, "sequence": tokens.total, "geometric": tokens.mean}[o.correction_level]
    weight = bounded_exp(level(apart))
    outside = (weight < o.correction_low) | (weight > o.correction_high)
    if o.correction_mode == "mask":
        bounded = torch.where(outside, 0.0, weight)
    else:
        bounded = weight.clamp(o.correction_low, o.correction_high)
    return bounded, outside, k3(apart)


class Numbers(NamedTuple):
    """What the kernels take of an objective, by these names in every language; infinity where it has no such bound."""

    function: str
    needs_sequences: bool
    marks_tokens: bool
    kl_variant: str
    kl_unbiased: bool
    correction_level: str
    correction_mode: str
    clip_eps_low: float
    clip_eps_high: float
    ratio_low: float  # 1 - clip_eps_low
    ratio_high: float  # 1 + clip_eps_high
    dual_clip: float
    max_divergence: float
    kl_cov_coef: float
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    dro_beta: float
    kl_coef: float
    entropy_coef: float
    correction_low: float
    correction_high: float
    off_policy_max_kl: float


@once
def numbers(objective: PolicyObjective) -> Numbers:
    values = {name: math.inf if value is None else value for name, value in vars(objective).items()}
    values |= {
        "function": objective.function, "needs_sequences": objective.needs_sequences,
        "marks_tokens": objective.marks_tokens,
        "kl_variant": "k1" if objective.kl_variant in EXACT_KL else objective.kl_variant,  # exact: not theirs
        "ratio_low": 1 - values["clip_eps_low"],
        "ratio_high": 1 + values["clip_eps_high"],
    }  # fmt: skip
    return Numbers._make([values[name] for name in Numbers._fields])


def _cpu(inputs: Inputs, plan: Plan, numbers: Numbers, outputs: list[Tensor]) -> None:
    sequences = 0 if plan.cu_seqlens is None else plan.cu_seqlens.shape[0] - 1
    native().policy_loss(
        [plane(x) for x in (*inputs, plan.weights)], packed(plan.flags), packed(plan.cu_seqlens),
        packed(plan.denominator), [*inputs.logprobs.shape, sequences], numbers, outputs[0].dtype == torch.float64,
        [packed(x) for x in outputs], threads(),
    )  # fmt: skip


def _triton(inputs: Inputs, plan: Plan, numbers: Numbers, outputs: list[Tensor]) -> None:
    triton_kernels("policy_loss").policy_loss(
        inputs, plan._replace(denominator=plan.tokens(inputs.logprobs)), numbers, outputs
    )


# Planes are (rows, columns), flags contiguous.
IMPLS: dict[str, Callable[[Inputs, Plan, Numbers, list[Tensor]], None]] = {"cpu": _cpu, "triton": _triton}
OPS = {"policy_loss": tuple(IMPLS)}


def _outputs(inputs: Inputs, plan: Plan, numbers: Numbers, backend: str) -> list[Tensor]:
    """[loss (), metrics (13,), d loss / d logprob (rows, columns), and d loss / d entropy where it has a weight]"""
    like, dtype = inputs.logprobs, check.compute_dtype(inputs.logprobs.dtype)
    coefficients = 1 if inputs.entropy is None or numbers.entropy_coef == 0 else 2
    shapes = [(), (len(METRICS),), *[tuple(like.shape)] * coefficients]
    return [like.new_empty(shape, dtype=dtype) for shape in shapes]


def _compute(inputs: Inputs, plan: Plan, numbers: Numbers, backend: str) -> list[Tensor]:
    outputs = _outputs(inputs, plan, numbers, backend)
    if plan.flags is not None and not plan.flags.is_contiguous():
        plan = plan._replace(flags=plan.flags.contiguous())
    IMPLS[backend](inputs, plan, numbers, outputs)
    return outputs


_run = registration.op(
    "policy_loss", (Inputs, Plan, Numbers), _compute, fake=_outputs, differentiable=("logprobs", "entropy"),
    saves_results=slice(2, None), backward=masked_loss.scaled_gradients(("logprobs", "entropy")), returned=2,
)  # fmt: skip
