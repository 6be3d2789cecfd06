"""preference_loss: the DPO family, from log-probabilities of chosen and rejected sequences.

For one pair, with log pi and log ref of the two answers (sums over their tokens; averages where marked avg; ref = 0
where marked free), s the label smoothing, softplus(t) = log(1 + exp(t)), sg = sigmoid and the implicit rewards

    a = beta score(log pi(chosen) - log ref(chosen)),   b the same of rejected,   h = a - b; where marked avg, score is
        of the sums and then averaged
    score(x) = x (reverse_kl), (1 - exp(-alpha x)) / alpha (alpha; forward_kl: alpha = 1), log 2 - softplus(-x) (js)
    logistic(h) = (1 - s) softplus(-h) + s softplus(h)

    variant       L                                                           source (arXiv)
    sigmoid       logistic(h)                                                 DPO 2305.18290 eq. 7; s > 0: Mitchell 2023
    sigmoid_norm  logistic(h), avg                                            Tulu 3, 2411.15124
    robust        ((1 - s) softplus(-h) - s softplus(h)) / (1 - 2 s)          2403.00409
    hinge, rso    max(0, 1 - h)                                               RSO 2309.06657 (hinge-norm)
    ipo           (h / beta - 1 / (2 beta))^2, avg                            2310.12036 eq. 17
    exo_pair      sg(h) log(sg(h) / (1 - s)) + sg(-h) log(sg(-h) / s)         2402.00856 eq. 16
    nca_pair      softplus(-a) + softplus(a) / 2 + softplus(b) / 2            2402.05369
    bco_pair      softplus(-(a - delta)) + softplus(b - delta)                2404.04656; delta: reward_shift
    sppo_hard     ((a - 1/2) / beta)^2 + ((b + 1/2) / beta)^2                 2405.00675 with P = 1, eta = 1 / beta
    aot           logistic(beta (i-th smallest log pi(chosen) - log pi(rejected)
                                 - i-th smallest of the same of ref))         2406.05882, paired
    aot_unpaired  logistic(i-th smallest a - i-th smallest b)                 2406.05882, unpaired
    apo_zero      sg(b) - sg(a)                                               2408.06266 (peers add 1)
    apo_down      sg(a) - sg(h)                                               2408.06266 (peers add 1)
    discopop      (1 - m) softplus(-h) + m exp(-h),  m = sg(h / tau)          2406.08414 eq. 5
    sft           -log pi(chosen), avg, free                                  the NLL of RPO, 2404.19733
    simpo         logistic(h - gamma), avg, free                              2405.14734 eq. 6
    cpo           logistic(h) - nll_weight log pi(chosen), free               2401.08417 (peers average the NLL)
    orpo          -log pi(chosen) + beta softplus(-log(odds(chosen) / odds(rejected))), avg, free
                  odds = p / (1 - p),  p = exp(log pi)                        2403.07691 eq. 6 and 7
    hpo           logistic(h) - auxiliary_weight (u log pi(chosen) + v log pi(rejected)),
                  u, v = exp(advantage in an auxiliary reward / auxiliary_temperature)    after 2405.17956

    loss = sum over the pairs of weight L / denominator

hpo joins DPO with the advantage-weighted likelihood of Hybrid Preference Optimization; that both answers of the pair
are weighted, with the batch's pairs as the samples, is this function's form and no equation of the paper. A divergence
other than reverse_kl is of losses of the gap h alone: a reward is known up to a number of the prompt, which differs
under another divergence and cancels in h only. ipo's log-ratios are averaged over the tokens as its authors advise. The
divergences are f-DPO's (2309.16240), score is f' less its value at an unchanged policy. Metrics are means over the
pairs of a, b, of h (margin) and of whether a > b (accuracy; a tie counts as wrong).

Derivative: the kernel makes d L / d a and d L / d b; the chain to a log-probability is beta score'(x), over the length
where averaged. aot and aot_unpaired have the derivative of a sum in a sorted order: each half of a pair needs only the
number of its own rank, sorted beforehand, so nothing is permuted back.

Numerics. softplus and sigmoid are taken through exp(-|h|): no overflow, and no loss of the gradient of a pair that is
told apart with confidence. A pair that is told apart infinitely has the limit of its loss, and a weight of 0 (of a
pair, a term, the label smoothing) takes out what it multiplies. exp(-alpha x) and discopop's m exp(-h) go on along
their tangents beyond exp(20); orpo takes an average log-probability above -1e-6 for -1e-6 in the odds. Computed in
float32 (float64 for float64).

Cost per pair: nine numbers read (those that are not given: one for all pairs), two coefficients written; one launch
and a sum. A weighted sum of losses costs one launch each.

Sources: the papers in the table; where a peer's loss is another, the paper's is taken and the difference named there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops.core import check, masked_loss
from rlhf_fast.ops.core.loss import Loss
from rlhf_fast.ops.core.masked_loss import ABSENT, IMPLS, Over, PairInputs, PairNumbers
from rlhf_fast.ops.preference.objective import (
    VARIANTS,
    PairConstants,
    Pairs,
    PreferenceObjective,
    Scored,
    reward_shift,
    scored,
)

METRICS = ("accuracy", "margin", "chosen_reward", "rejected_reward")


@check.takes_numbers
def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    objective: str | PreferenceObjective = "sigmoid",
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reward_shift: Tensor | None = None,
    chosen_advantages: Tensor | None = None,
    rejected_advantages: Tensor | None = None,
    denominator: Tensor | float | None = None,
    backend: str | None = None,
) -> Loss:
    """The mean preference loss of B pairs and its metrics; only `chosen` and `rejected` get a gradient.

    chosen, rejected, ref_chosen, ref_rejected: (B,) sums of token log-probabilities, in nats; float32, bfloat16,
    float16 or float64, any strides. The reference's may be None for reference-free variants and with reference_free,
    which takes 0 for them.
    objective: the name of a variant, or a PreferenceObjective with its numbers. The metrics of a sum of several losses
    are the first one's.
    chosen_lengths, rejected_lengths: (B,) tokens that the sums run over, any number type, one below 1 counts as 1;
    needed by the variants that average.
    weights: (B,) what a pair's loss is multiplied by (wpo_weights); not for aot.
    reward_shift: () bco_pair's delta, in units of reward; by default the mean of a and b over this call.
    chosen_advantages, rejected_advantages: (B,) of hpo's auxiliary reward.
    denominator: what the sum is divided by, a number or a 0-d tensor; the number of pairs by default.

    Returns (loss, metrics): 0-d, float32 (float64 for float64), the metrics detached; see the module for each.
    No pair gives a loss of 0. Raises ValueError or TypeError for what does not fit.
    """
    objective = PreferenceObjective.of(objective)
    pairs = Pairs(
        chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, weights, reward_shift,
        chosen_advantages, rejected_advantages,
    )  # fmt: skip
    total = masked_loss.denominator_tensor(denominator, chosen)
    return evaluate(checked(pairs, objective), objective, total, backend=backend)


def checked(pairs: Pairs, objective: PreferenceObjective) -> Pairs:
    """`pairs` with what `objective` does not look at left out. Raises for what is missing or does not fit."""
    chosen, rejected, *constants = pairs
    check.that(chosen.dim() == 1, "chosen", "(B,)", chosen)
    masked_loss.floats(chosen.shape, "(B,)", chosen=chosen, rejected=rejected)
    return Pairs(chosen, rejected, *checked_constants(PairConstants(*constants), ("chosen", chosen), objective))


def checked_constants(
    constants: PairConstants, like: tuple[str, Tensor], objective: PreferenceObjective
) -> PairConstants:
    """The same for the constants of pairs of which `like` has one number each."""
    tensors = constants._asdict()
    for name, needed in objective.needs.items():
        if needed and tensors[name] is None:
            raise ValueError(f"{name} must be given for {objective.name}")
        if not needed:
            tensors[name] = None
    if constants.weights is not None and objective.looks_at("ranks"):
        raise ValueError(f"weights are not of {objective.name}, which takes its pairs apart")
    shape, device = like[1].shape, like[1].device
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        expected, meaning = ((), "a 0-d tensor") if name == "reward_shift" else (shape, "(B,)")
        check.shaped(name, tensor, expected, meaning)
        if not name.endswith("lengths"):
            check.floating(name, tensor)
        if tensor.device != device:
            check.same_device(like, (name, tensor))
        if tensor.requires_grad:
            tensors[name] = tensor.detach()
    return PairConstants(**tensors)


def evaluate(
    pairs: Pairs, objective: PreferenceObjective, denominator: Tensor | None, *, backend: str | None = None
) -> Loss:
    """preference_loss of pairs that `checked` has seen."""
    name = resolve(f"preference_loss of {objective.name}", objective.kernels, pairs.chosen.device, backend)
    over = Over(None, denominator)
    if name == "reference":
        return reference(pairs, objective, over)
    if objective.terms == ((objective.variant, 1.0),):
        term = objective.terms[0][0]
        return _run(planes(pairs, objective, term), over, objective.numbers[term], name)
    terms = [_run(planes(pairs, objective, term), over, objective.numbers[term], name) for term, _ in objective.terms]
    return Loss(_weighted([term.loss for term in terms], objective), terms[0].metrics)


def coefficients(
    pairs: Pairs, objective: PreferenceObjective, denominator: Tensor | None, backend: str
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """(loss (), metrics, d loss / d chosen (B,), d loss / d rejected (B,)) for callers that go on by hand.

    `pairs` as `checked` returns them; backend: one of IMPLS. Nothing here is differentiable.
    """
    losses, metrics, by_chosen, by_rejected = [], [], [], []
    for term, _ in objective.terms:
        inputs = tuple([None if x is None else x.detach() for x in planes(pairs, objective, term)])
        loss, values, chosen, rejected, *divisor = masked_loss.computed(
            inputs, ABSENT, Over(None, denominator), objective.numbers[term], backend, len(METRICS), 2
        )
        losses.append(loss)
        metrics.append(dict(zip(METRICS, values.unbind(0), strict=True)))
        by_chosen.append(chosen / divisor[0] if divisor else chosen)
        by_rejected.append(rejected / divisor[0] if divisor else rejected)
    loss, chosen, rejected = (_weighted(terms, objective) for terms in (losses, by_chosen, by_rejected))
    return loss, metrics[0], chosen, rejected


def _weighted(terms: Sequence[Tensor], objective: PreferenceObjective) -> Tensor:
    weights = [weight for _, weight in objective.terms]
    if weights == [1]:
        return terms[0]
    first, *others = [masked_loss.product(weight, term) for weight, term in zip(weights, terms, strict=True)]
    return sum(others, first)


def planes(pairs: Pairs, objective: PreferenceObjective, name: str) -> PairInputs:
    """What the kernel of variant `name` reads."""
    variant = VARIANTS[name]
    references: tuple[Tensor | None, Tensor | None] = (None, None)
    lengths, shifts = references, references
    if variant.reference and not objective.reference_free:
        references = pairs.ref_chosen, pairs.ref_rejected
    if variant.averaged:
        dtype = check.compute_dtype(pairs.chosen.dtype)
        lengths = tuple(x.to(dtype) for x in (pairs.chosen_lengths, pairs.rejected_lengths))  # type: ignore
    if variant.shifts is not None:
        detached = pairs._replace(chosen=pairs.chosen.detach(), rejected=pairs.rejected.detach())
        shifts = variant.shifts(scored(detached, objective, name), objective)
    return PairInputs(pairs.chosen, pairs.rejected, *references, *lengths, pairs.weights, *shifts)


def reference(pairs: Pairs, objective: PreferenceObjective, over: Over) -> Loss:
    """By definition, differentiable any number of times; aot where no two ranks are tied."""
    names = [name for name, _ in objective.terms]
    views = [scored(pairs, objective, name) for name in names]
    first = views[0]
    if pairs.weights is not None:
        views = [scored(_counted(pairs, first), objective, name) for name in names]
    losses = [VARIANTS[name].loss(view, objective) for name, view in zip(names, views, strict=True)]
    if pairs.weights is not None:
        losses = [masked_loss.product(pairs.weights.to(loss.dtype), loss) for loss in losses]
    won, lost = first.chosen_reward.detach(), first.rejected_reward.detach()
    metrics = zip(METRICS, ((won > lost).to(won.dtype), won - lost, won, lost), strict=True)
    loss = _weighted([masked_loss.mean(loss, over) for loss in losses], objective)
    return Loss(loss, {name: masked_loss.mean(x, over) for name, x in metrics})


def _counted(pairs: Pairs, view: Scored) -> Pairs:
    """`pairs`, where those of weight 0 are replaced: infinities there would come back as NaN in the gradient."""
    assert pairs.weights is not None
    none = pairs.weights == 0
    logprobs = {
        name: torch.where(none, -1.0, x) for name, x in zip(pairs._fields[:4], pairs[:4], strict=True) if x is not None
    }
    return pairs._replace(**logprobs, reward_shift=reward_shift(view))


OPS = {"preference_loss": tuple(IMPLS)}
_run = masked_loss.register(
    "preference_loss", PairInputs, PairNumbers, differentiable=("chosen", "rejected"), metrics=METRICS, absent=ABSENT
)
