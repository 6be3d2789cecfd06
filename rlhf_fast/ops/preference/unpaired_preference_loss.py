"""unpaired_preference_loss: the KTO family, from log-probabilities of answers that are desirable or not.

With the implicit reward a = beta (log pi - log ref), lambda the weight of the answer's class, w its own weight, z the
variant's shift, and u = a - z for a desirable answer, z - a for an undesirable one:

    kto:                L = w lambda (1 - sigmoid(u)),   z = beta max(0, mean of log pi - log ref over mismatched pairs)
    apo_zero_unpaired:  L = w lambda (1 - sigmoid(u)),   z = 0
    bco:                L = w lambda softplus(-u),       z = reward_shift
    loss = sum of L / denominator

    d L / d u = -w lambda sigmoid(u) sigmoid(-u), for bco -w lambda sigmoid(-u);   d u / d log pi = +-beta

Metrics: the mean rewards of the desirable and of the undesirable answers (0 where there is none) and their difference.

Numerics. softplus and sigmoid are taken through exp(-|u|). Computed in float32 (float64 for float64).

Cost per answer: five numbers read (weight and shift: one for all), one gradient coefficient written; one launch and a
sum.

Sources: KTO, Ethayarajh et al. 2024 (arXiv 2402.01306, eq. 7 to 9); APO-zero, D'Oosterlinck et al. 2024 (arXiv
2408.06266), whose two halves are those of kto without a shift; BCO with its reward shift and the weights that match
the prompts of both classes ("underlying distribution matching"), Jung et al. 2024 (arXiv 2404.04656).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlhf_fast.backends import resolve
from rlhf_fast.ops.core import check, masked_loss
from rlhf_fast.ops.core.loss import Loss, Objective
from rlhf_fast.ops.core.masked_loss import IMPLS, Over

METRICS = ("desirable_reward", "undesirable_reward", "margin")
_SUMS = ("desirable", "desirable_reward", "undesirable", "undesirable_reward")  # the kernel's, over the denominator


class Variant(NamedTuple):
    """loss: of u, how far a reward lies on the right side of the shift. shift: the argument that it comes from.
    kernel: the name in the kernels' tables, None where there is the reference alone."""

    loss: Callable[[Tensor], Tensor]
    kernel: str | None
    shift: str | None


VARIANTS = {
    "kto": Variant(lambda u: torch.sigmoid(-u), "kto", "kl"),
    "apo_zero_unpaired": Variant(lambda u: torch.sigmoid(-u), "kto", None),
    "bco": Variant(lambda u: softplus(-u), "bco", "reward_shift"),
}


@dataclass(frozen=True)
class UnpairedPreferenceObjective(Objective):
    """Which loss of unpaired_preference_loss, with every number in it.

    variant: one of VARIANTS. beta > 0, per nat. desirable_weight, undesirable_weight: >= 0, of the two classes.
    Raises ValueError for what is outside these.
    """

    variant: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        check.fields(self)
        check.one_of("variant", self.variant, VARIANTS)
        check.positive("beta", self.beta)
        for name in ("desirable_weight", "undesirable_weight"):
            check.that(getattr(self, name) >= 0, name, ">= 0", getattr(self, name))


@check.takes_numbers
def unpaired_preference_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    *,
    objective: str | UnpairedPreferenceObjective = "kto",
    kl: Tensor | None = None,
    reward_shift: Tensor | None = None,
    weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
    backend: str | None = None,
) -> Loss:
    """The mean loss of B answers and its metrics; only `logprobs` gets a gradient.

    logprobs, ref_logprobs: (B,) sums of token log-probabilities, in nats; float32, bfloat16, float16 or float64.
    desirable: (B,) bool, whether the answer is a good one.
    objective: the name of a variant, or an UnpairedPreferenceObjective with its numbers.
    kl: () in nats, needed by kto: mismatched_kl of the batch, averaged over the ranks where there are several.
    reward_shift: () in units of reward, needed by bco: a running_reward_shift.
    weights: (B,) what an answer's loss is multiplied by (BCO: the odds that its prompt is one of a desirable answer).
    denominator: what the sum is divided by, a number or a 0-d tensor; B by default.

    Returns (loss, metrics): 0-d, float32 (float64 for float64), the metrics detached. No answer gives a loss of 0.
    Raises ValueError or TypeError for what does not fit.
    """
    objective = UnpairedPreferenceObjective.of(objective)
    shifts = {"kl": kl, "reward_shift": reward_shift}
    inputs = _inputs(logprobs, ref_logprobs, desirable, objective, shifts, weights)
    over, kernel = Over(None, masked_loss.denominator_tensor(denominator, logprobs)), VARIANTS[objective.variant].kernel
    impls = IMPLS if kernel else ()
    name = resolve(f"unpaired_preference_loss of {objective.variant}", impls, logprobs.device, backend)
    if name == "reference":
        return reference(inputs, objective, over)
    numbers = Numbers(
        str(kernel), objective.beta, objective.desirable_weight, objective.undesirable_weight, shift_scale(objective)
    )
    return _run(inputs, over, numbers, name)


def shift_scale(objective: UnpairedPreferenceObjective) -> float:
    """From the units of the given shift to those of rewards."""
    return objective.beta if VARIANTS[objective.variant].shift == "kl" else 1.0


def _inputs(
    logprobs: Tensor, ref_logprobs: Tensor, desirable: Tensor, objective: UnpairedPreferenceObjective,
    shifts: dict[str, Tensor | None], weights: Tensor | None,
) -> Inputs:  # fmt: skip
    check.that(logprobs.dim() == 1, "logprobs", "(B,)", logprobs)
    shape, dtype = tuple(logprobs.shape), check.compute_dtype(logprobs.dtype)
    if desirable.dtype != torch.bool:
        raise TypeError(f"desirable must be bool, got {desirable.dtype}")
    check.shaped("desirable", desirable, shape, "(B,)")
    shift = None
    masked_loss.floats(shape, "(B,)", logprobs=logprobs, ref_logprobs=ref_logprobs, weights=weights)
    source = VARIANTS[objective.variant].shift
    if source is not None:
        given = shifts[source]
        if given is None:
            raise ValueError(f"{source} must be given for {objective.variant}")
        check.shaped(source, check.floating(source, given), (), "a 0-d tensor")
        shift = masked_loss.constant(given)
    check.same_device(("logprobs", logprobs), ("desirable", desirable), (str(source), shift))
    weights = None if weights is None else masked_loss.constant(weights)
    return Inputs(logprobs, masked_loss.constant(ref_logprobs), desirable.to(dtype), weights, shift)


def mismatched_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """kto's estimate of KL(policy || reference), () in nats: of answers under prompts that are not theirs.

    logprobs, ref_logprobs: (B,) sums of token log-probabilities of each answer under another answer's prompt, floats.
    max(0, mean of their difference), detached; 0 for no answer. Source: KTO (arXiv 2402.01306, section 4.1).
    """
    masked_loss.floats(tuple(logprobs.shape), "(B,)", logprobs=logprobs, ref_logprobs=ref_logprobs)
    dtype = check.compute_dtype(logprobs.dtype)
    difference = logprobs.detach().to(dtype) - ref_logprobs.detach().to(dtype)
    return masked_loss.mean(difference, Over()).clamp_min(0)


@check.takes_numbers
def running_reward_shift(reward_shift: Tensor, metrics: dict[str, Tensor], *, decay: float = 0.99) -> Tensor:
    """bco's next delta, (): the moving average of the mean of both classes' mean rewards.

    reward_shift: () the last one, a float tensor (0 before the first step). metrics: of unpaired_preference_loss on a
    batch that has both classes. decay: in [0, 1). Raises ValueError for one outside. Source: BCO (arXiv 2404.04656).
    """
    check.that(0 <= decay < 1, "decay", "in [0, 1)", decay)
    return decay * reward_shift + (1 - decay) * 0.5 * (metrics["desirable_reward"] + metrics["undesirable_reward"])


def reference(inputs: Inputs, objective: UnpairedPreferenceObjective, over: Over) -> Loss:
    """By definition, differentiable any number of times."""
    dtype = check.compute_dtype(inputs.logprobs.dtype)
    logprobs, ref_logprobs, desirable, weights, shifts = (
        x.to(dtype)
        for x in masked_loss.present(inputs, ABSENT)  # type: ignore[arg-type]
    )
    reward, good, shifts = objective.beta * (logprobs - ref_logprobs), desirable > 0, shift_scale(objective) * shifts
    losses = VARIANTS[objective.variant].loss(torch.where(good, reward - shifts, shifts - reward))
    of_class = torch.where(good, objective.desirable_weight * weights, objective.undesirable_weight * weights)
    reward = reward.detach()
    sums = (desirable, torch.where(good, reward, 0.0), 1 - desirable, torch.where(good, 0.0, reward))
    loss, means = masked_loss.means(masked_loss.product(of_class, losses), over, **dict(zip(_SUMS, sums, strict=True)))
    return Loss(loss, _metrics(**means))


def _metrics(
    desirable: Tensor, desirable_reward: Tensor, undesirable: Tensor, undesirable_reward: Tensor
) -> dict[str, Tensor]:
    """From the shares of both classes and the sums of their rewards."""
    good = desirable_reward / torch.where(desirable == 0, 1, desirable)
    bad = undesirable_reward / torch.where(undesirable == 0, 1, undesirable)
    return dict(zip(METRICS, (good, bad, good - bad), strict=True))


class Inputs(NamedTuple):
    """(B,) each."""

    logprobs: Tensor
    ref_logprobs: Tensor
    desirable: Tensor  # 1 or 0
    weights: Tensor | None
    shifts: Tensor | None  # (), in the units that it was given in


ABSENT = (1.0, 0.0)  # weights and shifts where they are None


class Numbers(NamedTuple):
    kernel: str
    beta: float
    desirable_weight: float
    undesirable_weight: float
    shift_scale: float


OPS = {"unpaired_preference_loss": tuple(IMPLS)}
_run = masked_loss.register(
    "unpaired_preference_loss", Inputs, Numbers, differentiable=("logprobs",), metrics=METRICS, absent=ABSENT
)
