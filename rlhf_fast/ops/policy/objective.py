"""The policy losses by definition, their table, and the objective that names one of them with its numbers.

A loss is a function of the tokens (`Tokens`) and the objective that gives (loss, held low, held high) per token;
autograd gives its gradient. Its twins are a functor of csrc/math/policy_losses.h and a function of
rlhf_fast/kernels/policy_losses.py. Formulas and sources: rlhf_fast/ops/policy/policy_loss.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops.core import check
from rlhf_fast.ops.core.loss import Objective
from rlhf_fast.ops.core.masked_loss import product
from rlhf_fast.ops.tokens.kl_estimate import VARIANTS as KL_VARIANTS

MAX_LOG_RATIO = 20.0
EXACT_KL = {"exact": "reverse", "exact_forward": "forward"}  # kl_variant of a loss: variant of token_kl and linear_kl
AGGREGATIONS = (
    "token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm",
)  # fmt: skip
KERNELS = ("cpu", "triton")
CORRECTION_LEVELS = ("token", "sequence", "geometric")
CORRECTION_MODES = ("truncate", "mask")


@dataclass(frozen=True)
class PolicyObjective(Objective):
    """Which policy loss, with every number in it; what is None takes the default of the variant (VARIANTS).

    variant: one of VARIANTS. aggregation: one of AGGREGATIONS; fixed_length: the length, in tokens, by which
    seq_mean_token_sum_norm divides.
    clip_eps_low in [0, 1], clip_eps_high >= 0: the ratio is held within [1 - clip_eps_low, 1 + clip_eps_high] (gmpo:
    the log-ratio within [-clip_eps_low, clip_eps_high]). dual_clip > 1: bound on the ratio where the advantage is
    negative (ppo_clip and its relatives, gspo), the delta of INTELLECT-2; dppo_*: what the ratio is capped at.
    sapo_temperature_pos, sapo_temperature_neg > 0. vespo_k_*, vespo_lambda_* >= 0. dro_beta > 0.
    max_divergence >= 0: the delta of dppo_tv (a probability) and dppo_kl (nats).
    cov_fraction in (0, 1]: how many of the call's tokens clip_cov and kl_cov select; cov_low, cov_high: the covariances
    that clip_cov selects from; kl_cov_coef >= 0: the weight of kl_cov's penalty.
    kl_coef >= 0: weight of the KL to the reference in the loss, by kl_variant: an estimate, or one of EXACT_KL, with
    which policy_loss is given the KL; kl_unbiased: the estimate times the ratio, with the gradient of the KL itself
    instead of the estimator's. entropy_coef >= 0: weight of the entropy bonus.
    entropy_fraction in (0, 1]: the share of the call's tokens, those of highest entropy, that the policy term keeps.
    correction_level, correction_mode, correction_low, correction_high: how the policy term is weighted for samples of
    another sampler. off_policy_max_kl > 0: sequences with a negative advantage further than that from the sampler, in
    nats per token, are dropped from the policy term.
    Raises ValueError for what is outside these.
    """

    variant: str = "ppo_clip"
    aggregation: str | None = None
    fixed_length: float | None = None
    clip_eps_low: float | None = None
    clip_eps_high: float | None = None
    dual_clip: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    dro_beta: float = 0.05
    max_divergence: float | None = None
    cov_fraction: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    kl_cov_coef: float = 1.0
    kl_coef: float = 0.0
    kl_variant: str = "k3"
    kl_unbiased: bool = False
    entropy_coef: float = 0.0
    entropy_fraction: float = 1.0
    correction_level: str = "token"
    correction_mode: str = "truncate"
    correction_low: float = 0.0
    correction_high: float = 2.0
    off_policy_max_kl: float | None = None

    def __post_init__(self) -> None:
        check.fields(self)
        check.one_of("variant", self.variant, VARIANTS)
        for name, value in VARIANTS[self.variant].defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check.one_of("aggregation", self.aggregation, AGGREGATIONS)
        check.one_of("kl_variant", self.kl_variant, (*KL_VARIANTS, *EXACT_KL))
        if self.kl_unbiased and self.kl_variant in EXACT_KL:
            raise ValueError(f"kl_unbiased is of an estimate, got kl_variant {self.kl_variant}")
        check.one_of("correction_level", self.correction_level, CORRECTION_LEVELS)
        check.one_of("correction_mode", self.correction_mode, CORRECTION_MODES)
        for name, (meaning, holds) in _RANGES.items():
            value = getattr(self, name)
            check.that(value is None or holds(value), name, meaning, value)
        for low, high in (("cov_low", "cov_high"), ("correction_low", "correction_high")):
            if not getattr(self, low) < getattr(self, high):
                raise ValueError(f"{low} must be < {high}, got {getattr(self, low)} and {getattr(self, high)}")
        if self.aggregation == "seq_mean_token_sum_norm" and self.fixed_length is None:
            raise ValueError(f"fixed_length must be given for seq_mean_token_sum_norm ({self.variant}), got None")

    @property
    def function(self) -> str:
        """The loss function, a key of FUNCTIONS and of the kernels' tables."""
        return VARIANTS[self.variant].function

    @property
    def kernels(self) -> tuple[str, ...]:
        """The backends that have the loss beside "reference"."""
        return FUNCTIONS[self.function].kernels

    @property
    def exact_kl(self) -> str | None:
        """Which divergence over the vocabulary is in the loss, a variant of token_kl; None: none."""
        return EXACT_KL.get(self.kl_variant) if self.kl_coef > 0 else None

    @property
    def needs_sequences(self) -> bool:
        """Whether the loss is made from sums over whole sequences, apart from its aggregation."""
        return (
            FUNCTIONS[self.function].per_sequence
            or self.correction_level != "token"
            or self.off_policy_max_kl is not None
        )

    @property
    def weighs_sequences(self) -> bool:
        """Whether the weight of a token in the loss depends on its sequence."""
        return self.aggregation is not None and self.aggregation.startswith("seq")

    @property
    def marks_tokens(self) -> bool:
        """Whether tokens are dropped or selected by what they are among those of the whole call."""
        return self.function in ("clip_cov", "kl_cov") or self.entropy_fraction < 1

    @property
    def compares_rows(self) -> bool:
        """Whether the loss of a row depends on the other rows of the call."""
        return self.marks_tokens


_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(
        ("fixed_length", "sapo_temperature_pos", "sapo_temperature_neg", "dro_beta"),
        ("> 0", lambda x: 0 < x < math.inf),
    ),
    **dict.fromkeys(
        ("clip_eps_high", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "max_divergence",
         "kl_cov_coef", "kl_coef", "entropy_coef", "correction_low"), (">= 0", lambda x: 0 <= x < math.inf),
    ),
    **dict.fromkeys(("cov_fraction", "entropy_fraction"), ("in (0, 1]", lambda x: 0 < x <= 1)),
    "clip_eps_low": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "dual_clip": ("> 1 or None", lambda x: x > 1),
    "correction_high": ("> 0", lambda x: x > 0),
    "off_policy_max_kl": ("> 0 or None", lambda x: x > 0),
}  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """What a loss reads: (N,) each, in the compute dtype, 0 where a token does not count."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    log_ratio: Tensor  # logprobs - old_logprobs
    selected: Tensor  # bool, see clip_cov and kl_cov
    total: Callable[[Tensor], Tensor]  # per token, the sum over its sequence
    length: Tensor  # per token, the counted tokens of its sequence, at least 1
    log_correction: Tensor  # per token, the log of its sequence's correction, for losses that fold it into their weight

    @property
    def ratio(self) -> Tensor:
        return bounded_exp(self.log_ratio)

    def mean(self, x: Tensor) -> Tensor:
        """Per token, the mean over its sequence."""
        return self.total(x) / self.length


Losses = tuple[Tensor, Tensor, Tensor]  # loss, held by the lower bound, held by the upper bound


def bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def slope_alone(x: Tensor) -> Tensor:
    """0, with the derivative of x where x is finite."""
    return torch.where(x.isinf(), 0.0, x - x.detach())


def _either(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """One of two numbers per token, in the dtype of `like`."""
    return torch.full_like(like, yes).where(condition, no)


def _never(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.bool)


def _clipped_surrogate(ratio: Tensor, advantages: Tensor, o: PolicyObjective) -> Losses:
    low, high, dual_clip = clip_bounds(o)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    held_low, held_high = (advantages < 0) & (ratio < low), (advantages > 0) & (ratio > high)
    if dual_clip < math.inf:
        dual = (advantages < 0) & (ratio > dual_clip)
        surrogate, held_high = torch.where(dual, dual_clip * advantages, surrogate), held_high | dual
    return -surrogate, held_low, held_high


def ppo_clip(t: Tokens, o: PolicyObjective) -> Losses:
    return _clipped_surrogate(t.ratio, t.advantages, o)


def clip_cov(t: Tokens, o: PolicyObjective) -> Losses:
    loss, low, high = ppo_clip(t, o)
    return torch.where(t.selected, 0.0, loss), low & ~t.selected, high | t.selected


def kl_cov(t: Tokens, o: PolicyObjective) -> Losses:
    penalty = product(o.kl_cov_coef * t.selected.to(t.ratio.dtype), t.log_ratio.abs())
    return penalty - t.ratio * t.advantages, _never(t.ratio), t.selected


def policy_gradient(t: Tokens, o: PolicyObjective) -> Losses:
    return product(-t.advantages, t.logprobs), _never(t.ratio), _never(t.ratio)


def cispo(t: Tokens, o: PolicyObjective) -> Losses:
    low, high, _ = clip_bounds(o)
    weight = t.ratio.detach().clamp(low, high)
    return product(-weight * t.advantages, t.logprobs), t.ratio < low, t.ratio > high


def sapo(t: Tokens, o: PolicyObjective) -> Losses:
    temperature = _either(t.advantages > 0, o.sapo_temperature_pos, o.sapo_temperature_neg, t.advantages)
    gate = 4 / temperature * torch.sigmoid(temperature * (t.ratio - 1))
    return -gate * t.advantages, _never(t.ratio), _never(t.ratio)


def _within_divergence(t: Tokens, divergence: Tensor, o: PolicyObjective) -> Losses:
    far = divergence > not_none(o.max_divergence)
    low, high = far & (t.advantages < 0) & (t.log_ratio < 0), far & (t.advantages > 0) & (t.log_ratio > 0)
    # Beyond the cap the slope is that of the cap times the log-ratio, and not 0.
    beyond = not_none(o.dual_clip) * (1 + slope_alone(t.logprobs))
    ratio = torch.where(t.ratio > not_none(o.dual_clip), beyond, t.ratio)
    return torch.where(low | high, 0.0, -ratio * t.advantages), low, high


def dppo_tv(t: Tokens, o: PolicyObjective) -> Losses:
    return _within_divergence(t, (t.logprobs.detach().exp() - t.old_logprobs.exp()).abs(), o)


def dppo_kl(t: Tokens, o: PolicyObjective) -> Losses:
    logprobs, old, old_rest = t.logprobs.detach(), t.old_logprobs, -torch.expm1(t.old_logprobs)
    rest = torch.where(old_rest > 0, old_rest * (old_rest.log() - (-torch.expm1(logprobs)).log()), 0.0)
    return _within_divergence(t, product(old.exp(), old - logprobs) + rest, o)


def gspo(t: Tokens, o: PolicyObjective) -> Losses:
    return _clipped_surrogate(bounded_exp(t.mean(t.log_ratio)), t.mean(t.advantages), o)


def gspo_token(t: Tokens, o: PolicyObjective) -> Losses:
    ratio = bounded_exp(t.mean(t.log_ratio)).detach() * (1 + slope_alone(t.logprobs))
    return _clipped_surrogate(ratio, t.advantages, o)


def gmpo(t: Tokens, o: PolicyObjective) -> Losses:
    x, low, high = t.log_ratio, -not_none(o.clip_eps_low), not_none(o.clip_eps_high)
    held_low, held_high = (t.advantages < 0) & (x < low), (t.advantages > 0) & (x > high)
    bounded = torch.where(held_low, low, torch.where(held_high, high, x))
    return -bounded_exp(t.mean(bounded)) * t.mean(t.advantages), held_low, held_high


def vespo(t: Tokens, o: PolicyObjective) -> Losses:
    log_weight = (t.total(t.log_ratio) + t.log_correction).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    positive = t.advantages >= 0
    k = _either(positive, o.vespo_k_pos, o.vespo_k_neg, t.advantages)
    lam = _either(positive, o.vespo_lambda_pos, o.vespo_lambda_neg, t.advantages)
    weight = (k * log_weight - lam * torch.expm1(log_weight)).exp()
    return product(-weight * t.advantages, t.logprobs), _never(weight), _never(weight)


def dro(t: Tokens, o: PolicyObjective) -> Losses:
    log_ratio = t.total(t.log_ratio)
    return (0.5 * o.dro_beta * log_ratio - t.mean(t.advantages)) * log_ratio, _never(log_ratio), _never(log_ratio)


def not_none(value: float | None) -> float:
    """A number that its variant has a default for, or that __post_init__ has asked for."""
    assert value is not None
    return value


def clip_bounds(o: PolicyObjective) -> list[float]:
    """Lowest ratio, highest ratio, dual clip or inf."""
    dual_clip = math.inf if o.dual_clip is None else o.dual_clip
    return [1 - not_none(o.clip_eps_low), 1 + not_none(o.clip_eps_high), dual_clip]


class Function(NamedTuple):
    loss: Callable[[Tokens, PolicyObjective], Losses]
    per_sequence: bool = False  # reads Tokens.total
    folds_correction: bool = False  # reads Tokens.log_correction: the correction is in its weight already
    kernels: tuple[str, ...] = KERNELS  # the backends that have it; "reference" always does


FUNCTIONS = {
    **{f.__name__: Function(f) for f in (ppo_clip, clip_cov, kl_cov, policy_gradient, cispo, sapo, dppo_tv, dppo_kl)},
    **{f.__name__: Function(f, per_sequence=True) for f in (gspo, gspo_token, gmpo, dro)},
    "vespo": Function(vespo, per_sequence=True, folds_correction=True),
}


class Variant(NamedTuple):
    """A loss function with the defaults of its paper: a preset is data."""

    function: str
    defaults: Mapping[str, float | str]


def _variant(function: str, aggregation: str, low: float = 0.2, high: float = 0.2, **others: float) -> Variant:
    return Variant(function, {"aggregation": aggregation, "clip_eps_low": low, "clip_eps_high": high, **others})


VARIANTS = {
    "ppo_clip": _variant("ppo_clip", "token_mean"),
    "grpo": _variant("ppo_clip", "seq_mean_token_mean"),
    "dr_grpo": _variant("ppo_clip", "seq_mean_token_sum_norm"),
    "dapo": _variant("ppo_clip", "token_mean", high=0.28),
    "gspo": _variant("gspo", "seq_mean_token_mean", 3e-4, 4e-4),
    "gspo_token": _variant("gspo_token", "seq_mean_token_mean", 3e-4, 4e-4),
    "luspo": _variant("gspo", "seq_mean_token_sum", 2e-3, 2.5e-3),
    "gmpo": _variant("gmpo", "seq_mean_token_mean", 0.4, 0.4),
    "cispo": _variant("cispo", "token_mean", 1.0, 4.0),
    "sapo": _variant("sapo", "seq_mean_token_mean"),
    "vespo": _variant("vespo", "token_mean"),
    "dppo_tv": _variant("dppo_tv", "token_mean", max_divergence=0.15, dual_clip=20.0),
    "dppo_kl": _variant("dppo_kl", "token_mean", max_divergence=0.05, dual_clip=20.0),
    "clip_cov": _variant("clip_cov", "token_mean"),
    "kl_cov": _variant("kl_cov", "token_mean"),
    "dro": _variant("dro", "seq_mean_token_mean"),
    "gpg": _variant("policy_gradient", "token_mean"),
    "reinforce": _variant("policy_gradient", "seq_mean_token_sum"),
    "a2c": _variant("policy_gradient", "token_mean"),
}
