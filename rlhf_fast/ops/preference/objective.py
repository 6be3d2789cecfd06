"""The variants of preference_loss: the objective, what each variant looks at, and its loss by definition.

Formulas and sources: rlhf_fast/ops/preference/preference_loss.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu, softplus

from rlhf_fast.ops.core import check
from rlhf_fast.ops.core.loss import Objective
from rlhf_fast.ops.core.masked_loss import IMPLS, PairNumbers, product

KERNELS = tuple(IMPLS)
MAX_EXPONENT = 20.0  # beyond it an exponential goes on along its tangent: one pair cannot end a run
MAX_MEAN_LOGPROB = -1e-6  # orpo: the odds of an all but certain sequence stay finite
# The kernels' code, and the exponent alpha (None: the objective's own).
DIVERGENCES: dict[str, tuple[float, float | None]] = {
    "reverse_kl": (0.0, 0.0),
    "forward_kl": (1.0, 1.0),
    "alpha": (1.0, None),
    "js": (2.0, 0.0),
}


@dataclass(frozen=True)
class PreferenceObjective(Objective):
    """Which loss of preference_loss, with every number in it.

    variant: one of VARIANTS, or weights of several, {"sigmoid": 0.8, "sft": 0.2}.
    beta > 0: per nat; for ipo the paper's tau, for orpo its lambda. label_smoothing: the chance in [0, 0.5) that a
    label is flipped. divergence_variant: reverse_kl, forward_kl, alpha (with divergence_alpha > 0) or js.
    reference_free: 0 for the reference's log-probabilities. gamma: simpo's target margin. discopop_tau > 0.
    nll_weight >= 0: cpo's. auxiliary_weight >= 0, auxiliary_temperature > 0: hpo's.
    Raises ValueError for what is outside these.
    """

    variant: str | Mapping[str, float] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    divergence_variant: str = "reverse_kl"
    divergence_alpha: float = 0.5
    reference_free: bool = False
    gamma: float = 0.5
    discopop_tau: float = 0.05
    nll_weight: float = 1.0
    auxiliary_weight: float = 1.0
    auxiliary_temperature: float = 1.0

    if TYPE_CHECKING:  # made of the fields above; no cached_property, whose lock torch.compile refuses
        terms: ClassVar[tuple[tuple[str, float], ...]]  # (variant, weight) of every loss in the sum
        name: ClassVar[str]  # the losses of the sum
        flags: ClassVar[frozenset[str]]  # of all variants of the sum
        kernels: ClassVar[tuple[str, ...]]  # the backends that have every loss of the sum beside "reference"
        needs: ClassVar[
            dict[str, bool]
        ]  # which constants of the pairs the loss must have, and whether it looks at them
        numbers: ClassVar[dict[str, PairNumbers]]  # what the kernel of each variant takes

    def __post_init__(self) -> None:
        check.fields(self)
        if not isinstance(self.variant, (str, Mapping)):
            raise ValueError(f"variant must be a name or weights of several, got {self.variant!r}")
        terms = tuple(self.variant.items()) if isinstance(self.variant, Mapping) else ((self.variant, 1.0),)
        self._keep(terms=terms, name=" + ".join([str(name) for name, _ in terms]))
        for name, weight in self.terms:
            check.one_of("variant", name, VARIANTS)
            if not math.isfinite(weight):
                raise ValueError(f"the weight of variant {name} must be finite, got {weight}")
        if not self.terms:
            raise ValueError(f"variant must name at least one loss, got {self.variant!r}")
        for name in ("beta", "divergence_alpha", "discopop_tau", "auxiliary_temperature"):
            check.positive(name, getattr(self, name))
        for name in ("nll_weight", "auxiliary_weight"):
            check.that(getattr(self, name) >= 0, name, ">= 0", getattr(self, name))
        variants = [VARIANTS[name] for name, _ in terms]
        flags = [flag for variant in variants for flag, is_set in variant._asdict().items() if is_set]
        self._keep(flags=frozenset(flags))
        self._check_smoothing()
        self._check_divergence()
        self._keep(**self._derived())

    def _keep(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def looks_at(self, what: str) -> bool:
        """Whether some variant of the sum has the flag `what`: "reference", "averaged", "smooths", ..."""
        return what in self.flags

    @property
    def compares_rows(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of the call."""
        return self.looks_at("ranks") or "bco_pair" in dict(self.terms)

    def _derived(self) -> dict[str, Any]:
        """What every call asks for."""
        of_halves = {
            "ref_{}": self.looks_at("reference") and not self.reference_free,
            "{}_lengths": self.looks_at("averaged"),
            "{}_advantages": self.looks_at("advantages"),
        }
        return {
            "kernels": () if any([VARIANTS[name].kernel is None for name, _ in self.terms]) else KERNELS,
            "needs": {
                name.format(half): wanted for name, wanted in of_halves.items() for half in ("chosen", "rejected")
            },
            "numbers": {name: self._numbers(VARIANTS[name]) for name, _ in self.terms},
        }

    def _numbers(self, variant: Variant) -> PairNumbers:
        code, alpha = DIVERGENCES[self.divergence_variant if variant.reference else "reverse_kl"]
        return PairNumbers(
            str(variant.kernel), self.beta, self.label_smoothing,
            getattr(self, variant.parameter) if variant.parameter else 0.0, code,
            self.divergence_alpha if alpha is None else alpha,
        )  # fmt: skip

    def _check_smoothing(self) -> None:
        check.that(0 <= self.label_smoothing < 0.5, "label_smoothing", "in [0, 0.5)", self.label_smoothing)
        if self.label_smoothing and not self.looks_at("smooths"):
            of = ", ".join(name for name, variant in VARIANTS.items() if variant.smooths)
            raise ValueError(f"label_smoothing is of {of}; got {self.label_smoothing} with {self.name}")
        if self.label_smoothing == 0 and "exo_pair" in dict(self.terms):
            raise ValueError("label_smoothing must be > 0 for exo_pair, whose loss is infinite without, got 0.0")

    def _check_divergence(self) -> None:
        check.one_of("divergence_variant", self.divergence_variant, DIVERGENCES)
        fixed = [name for name, _ in self.terms if not VARIANTS[name].diverges]
        if self.divergence_variant != "reverse_kl" and fixed:
            raise ValueError(f"divergence_variant must be reverse_kl for {fixed[0]}, got {self.divergence_variant!r}")


class PairConstants(NamedTuple):
    """What a loss of B pairs takes beside their log-probabilities: (B,) each, reward_shift ()."""

    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    weights: Tensor | None = None
    reward_shift: Tensor | None = None
    chosen_advantages: Tensor | None = None
    rejected_advantages: Tensor | None = None


class Pairs(NamedTuple):
    """What the loss of B pairs may look at: (B,) each, reward_shift (); the constants are those of PairConstants."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    weights: Tensor | None = None
    reward_shift: Tensor | None = None
    chosen_advantages: Tensor | None = None
    rejected_advantages: Tensor | None = None


@dataclass(frozen=True)
class Scored:
    """B pairs as one variant sees them, (B,) each: implicit rewards, and log-probabilities, averaged or not."""

    chosen_reward: Tensor
    rejected_reward: Tensor
    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    pairs: Pairs

    @property
    def gap(self) -> Tensor:
        return self.chosen_reward - self.rejected_reward


def scored(pairs: Pairs, objective: PreferenceObjective, name: str) -> Scored:
    """`pairs` in the compute dtype, as variant `name` sees them."""
    variant, dtype = VARIANTS[name], check.compute_dtype(pairs.chosen.dtype)
    logprobs = [None if x is None else x.to(dtype) for x in pairs[:4]]
    if objective.reference_free or not variant.reference:
        logprobs[2:] = [torch.zeros_like(pairs.chosen, dtype=dtype)] * 2
    chosen, rejected, ref_chosen, ref_rejected = logprobs
    divergence = objective.divergence_variant if variant.reference else "reverse_kl"
    scores = [
        score(ratio, divergence, objective.divergence_alpha)
        for ratio in (chosen - ref_chosen, rejected - ref_rejected)  # type: ignore
    ]
    if variant.averaged:
        lengths = [n.to(dtype).clamp_min(1) for n in (pairs.chosen_lengths, pairs.rejected_lengths)]  # type: ignore
        logprobs = [x / n for x, n in zip(logprobs, lengths * 2, strict=True)]  # type: ignore
        scores = [x / n for x, n in zip(scores, lengths, strict=True)]
    rewards = [objective.beta * x for x in scores]
    return Scored(*rewards, *logprobs, pairs)  # type: ignore


def score(log_ratio: Tensor, divergence_variant: str, divergence_alpha: float) -> Tensor:
    """f'(ratio) - f'(1)."""
    if divergence_variant == "js":
        return math.log(2) - softplus(-log_ratio)
    alpha = DIVERGENCES[divergence_variant][1]
    alpha = divergence_alpha if alpha is None else alpha
    if alpha == 0:
        return log_ratio
    exponent = -alpha * log_ratio
    bounded, beyond = exponent.clamp(max=MAX_EXPONENT), relu(exponent - MAX_EXPONENT)
    return -(torch.expm1(bounded) + bounded.exp() * beyond) / alpha


def logistic(gap: Tensor, o: PreferenceObjective) -> Tensor:
    return -(1 - o.label_smoothing) * logsigmoid(gap) - product(o.label_smoothing, logsigmoid(-gap))


def sigmoid(s: Scored, o: PreferenceObjective) -> Tensor:
    return logistic(s.gap, o)


def simpo(s: Scored, o: PreferenceObjective) -> Tensor:
    return logistic(s.gap - o.gamma, o)


def robust(s: Scored, o: PreferenceObjective) -> Tensor:
    flipped = o.label_smoothing
    return (-(1 - flipped) * logsigmoid(s.gap) + product(flipped, logsigmoid(-s.gap))) / (1 - 2 * flipped)


def hinge(s: Scored, o: PreferenceObjective) -> Tensor:
    return relu(1 - s.gap)


def ipo(s: Scored, o: PreferenceObjective) -> Tensor:
    return (s.gap / o.beta - 0.5 / o.beta).square()


def exo_pair(s: Scored, o: PreferenceObjective) -> Tensor:
    log_p, log_q = logsigmoid(s.gap), logsigmoid(-s.gap)
    chosen = product(log_p.exp(), log_p - math.log1p(-o.label_smoothing))
    return chosen + product(log_q.exp(), log_q - math.log(o.label_smoothing))


def nca_pair(s: Scored, o: PreferenceObjective) -> Tensor:
    return -logsigmoid(s.chosen_reward) - 0.5 * (logsigmoid(-s.chosen_reward) + logsigmoid(-s.rejected_reward))


def bco_pair(s: Scored, o: PreferenceObjective) -> Tensor:
    shift = reward_shift(s)
    return -logsigmoid(_shifted(s.chosen_reward, shift)) - logsigmoid(-_shifted(s.rejected_reward, shift))


def _shifted(reward: Tensor, shift: Tensor) -> Tensor:
    """An infinite reward, which makes the mean of the batch infinite, is still further away than that."""
    return torch.where(reward.isinf(), reward, reward - shift)


def sppo_hard(s: Scored, o: PreferenceObjective) -> Tensor:
    return ((s.chosen_reward - 0.5) / o.beta).square() + ((s.rejected_reward + 0.5) / o.beta).square()


def aot(s: Scored, o: PreferenceObjective) -> Tensor:
    policy, reference = s.chosen - s.rejected, s.ref_chosen - s.ref_rejected
    return logistic(o.beta * (policy.sort(stable=True).values - reference.sort(stable=True).values), o)


def aot_unpaired(s: Scored, o: PreferenceObjective) -> Tensor:
    return logistic(s.chosen_reward.sort(stable=True).values - s.rejected_reward.sort(stable=True).values, o)


def apo_zero(s: Scored, o: PreferenceObjective) -> Tensor:
    return s.rejected_reward.sigmoid() - s.chosen_reward.sigmoid()


def apo_down(s: Scored, o: PreferenceObjective) -> Tensor:
    return s.chosen_reward.sigmoid() - s.gap.sigmoid()


def discopop(s: Scored, o: PreferenceObjective) -> Tensor:
    rate, far = 1 / o.discopop_tau - 1, s.gap.isinf()
    gap = torch.where(far, 0.0, s.gap)
    modulation, below = gap / o.discopop_tau, gap < 0
    # log(exp(-gap) sigmoid(modulation)), each half with the side on which its terms do not cancel
    negative, positive = torch.where(below, gap, 0.0), torch.where(below, 0.0, gap)
    falling = product(rate, negative) + logsigmoid(-negative / o.discopop_tau)
    exponent = torch.where(below, falling, logsigmoid(positive / o.discopop_tau) - positive)
    exponential = exponent.clamp(max=MAX_EXPONENT).exp() * (1 + relu(exponent - MAX_EXPONENT))
    steepest = 1 + max(-rate, 0.0) * math.exp(MAX_EXPONENT)  # towards minus infinity
    loss = product((-modulation).sigmoid(), -logsigmoid(gap)) + exponential
    return torch.where(far, relu(-s.gap) * steepest, loss)


def sft(s: Scored, o: PreferenceObjective) -> Tensor:
    return -s.chosen + torch.where(s.rejected.isnan(), s.rejected, 0.0)  # a gradient of 0, not none


def cpo(s: Scored, o: PreferenceObjective) -> Tensor:
    return logistic(s.gap, o) - product(o.nll_weight, s.chosen)


def orpo(s: Scored, o: PreferenceObjective) -> Tensor:
    chosen, rejected = (x.clamp(max=MAX_MEAN_LOGPROB) for x in (s.chosen, s.rejected))
    log_odds = (chosen - rejected) - torch.log(torch.expm1(chosen) / torch.expm1(rejected))
    return -s.chosen - o.beta * logsigmoid(log_odds)


def hpo(s: Scored, o: PreferenceObjective) -> Tensor:
    chosen, rejected = advantage_weights(s, o)
    return logistic(s.gap, o) - product(o.auxiliary_weight, product(chosen, s.chosen) + product(rejected, s.rejected))


def reward_shift(s: Scored) -> Tensor:
    """bco_pair's delta: the mean reward of the batch where none is given; without gradient."""
    if s.pairs.reward_shift is not None:
        return s.pairs.reward_shift.to(s.chosen_reward.dtype)
    return torch.cat([s.chosen_reward, s.rejected_reward]).detach().mean()


def advantage_weights(s: Scored, o: PreferenceObjective) -> tuple[Tensor, Tensor]:
    """hpo's weights of the log-likelihoods."""
    chosen, rejected = (
        (x.to(s.chosen.dtype) / o.auxiliary_temperature).clamp(max=MAX_EXPONENT).exp()  # type: ignore[union-attr]
        for x in (s.pairs.chosen_advantages, s.pairs.rejected_advantages)
    )
    return chosen, rejected


def paired_quantiles(s: Scored, o: PreferenceObjective) -> tuple[Tensor, Tensor]:
    """aot: the reference's gap of the same rank."""
    reference = of_same_rank(s.chosen - s.rejected, o.beta * (s.ref_chosen - s.ref_rejected))
    return reference, reference


def unpaired_quantiles(s: Scored, o: PreferenceObjective) -> tuple[Tensor, Tensor]:
    """aot_unpaired: the rejected reward of chosen's rank, and the chosen reward of rejected's."""
    rejected = of_same_rank(s.chosen_reward, s.rejected_reward)
    return rejected, of_same_rank(s.rejected_reward, s.chosen_reward)


def of_same_rank(x: Tensor, y: Tensor) -> Tensor:
    """For every element of x, the element of y that has its rank."""
    return torch.empty_like(y).scatter(0, x.argsort(stable=True), y.sort().values)


class Variant(NamedTuple):
    """loss: (B,) by definition. kernel: the name of its function in the kernels' tables, None where there is the
    reference alone. The other fields say what the variant looks at.

    diverges: takes divergence_variant, as a loss of differences of rewards, in which the part of a reward that only the
    prompt knows cancels, or of no reward.
    """

    loss: Callable[[Scored, PreferenceObjective], Tensor]
    kernel: str | None
    reference: bool = True  # the reference's log-probabilities
    averaged: bool = False  # averages over the tokens instead of sums
    smooths: bool = False  # label_smoothing
    diverges: bool = False
    advantages: bool = False  # advantages of an auxiliary reward
    ranks: bool = False  # the order of the pairs of the call
    parameter: str | None = None  # the field of the objective that its kernel takes
    shifts: Callable[[Scored, PreferenceObjective], tuple[Tensor, Tensor]] | None = None


VARIANTS = {
    "sigmoid": Variant(sigmoid, "sigmoid", smooths=True, diverges=True),
    "sigmoid_norm": Variant(sigmoid, "sigmoid", averaged=True, smooths=True, diverges=True),
    "robust": Variant(robust, "robust", smooths=True, diverges=True),
    "hinge": Variant(hinge, "hinge", diverges=True),
    "rso": Variant(hinge, "hinge", diverges=True),
    "ipo": Variant(ipo, "ipo", averaged=True, diverges=True),
    "exo_pair": Variant(exo_pair, "exo_pair", smooths=True, diverges=True),
    "nca_pair": Variant(nca_pair, "nca_pair"),
    "bco_pair": Variant(bco_pair, "bco_pair", shifts=lambda s, o: (reward_shift(s).expand_as(s.chosen),) * 2),
    "sppo_hard": Variant(sppo_hard, "sppo_hard"),
    "aot": Variant(aot, "aot", smooths=True, ranks=True, shifts=paired_quantiles),
    "aot_unpaired": Variant(aot_unpaired, "aot_unpaired", smooths=True, ranks=True, shifts=unpaired_quantiles),
    "apo_zero": Variant(apo_zero, "apo_zero"),
    "apo_down": Variant(apo_down, "apo_down"),
    "discopop": Variant(discopop, "discopop", diverges=True, parameter="discopop_tau"),
    "sft": Variant(sft, "sft", reference=False, averaged=True, diverges=True),
    "simpo": Variant(simpo, "sigmoid", reference=False, averaged=True, smooths=True, parameter="gamma"),
    "cpo": Variant(cpo, "cpo", reference=False, smooths=True, parameter="nll_weight"),
    "orpo": Variant(orpo, "orpo", reference=False, averaged=True),
    "hpo": Variant(hpo, "hpo", smooths=True, advantages=True, parameter="auxiliary_weight", shifts=advantage_weights),
}
