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
their tangents beyond exp(20); orpo takes an average
log-probability above -1e-6 for -1e-6 in the odds. Computed in float32 (float64 for float64).

Cost per pair: nine numbers read (those that are not given: one for all pairs), two coefficients written; one launch
and a sum. A weighted sum of losses costs one launch each.

Sources: the papers in the table; where a peer's loss is another, the paper's is taken and the difference named there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops.core import check, masked_loss
from rlhf_fast.ops.preference.objective import VARIANTS, Pairs, PreferenceObjective, Scored, reward_shift, scored

METRICS = ("accuracy", "margin", "chosen_reward", "rejected_reward")
_objective = lru_cache(PreferenceObjective)  # a loop asks for the same one at every step


@check.takes_numbers
def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    variant: str | Mapping[str, float] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
    reference_free: bool = False,
    gamma: float = 0.5,
    discopop_tau: float = 0.05,
    nll_weight: float = 1.0,
    auxiliary_weight: float = 1.0,
    auxiliary_temperature: float = 1.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reward_shift: Tensor | None = None,
    chosen_advantages: Tensor | None = None,
    rejected_advantages: Tensor | None = None,
    denominator: Tensor | float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean preference loss of B pairs and its metrics; only `chosen` and `rejected` get a gradient.

    chosen, rejected, ref_chosen, ref_rejected: (B,) sums of token log-probabilities, in nats; float32, bfloat16,
    float16 or float64, any strides. The reference's may be None for reference-free variants and with reference_free,
    which takes 0 for them.
    variant: one of VARIANTS, or weights of several, {"sigmoid": 0.8, "sft": 0.2}; the metrics are the first one's.
    beta > 0: per nat; for ipo the paper's tau, for orpo its lambda. label_smoothing: the chance in [0, 0.5) that a
    label is flipped. divergence: reverse_kl, forward_kl, alpha (with divergence_alpha > 0) or js. gamma: simpo's
    target margin. discopop_tau > 0. nll_weight >= 0: cpo's. auxiliary_weight >= 0, auxiliary_temperature > 0: hpo's.
    chosen_lengths, rejected_lengths: (B,) tokens that the sums run over, any number type, one below 1 counts as 1;
    needed by the variants that average.
    weights: (B,) what a pair's loss is multiplied by (wpo_weights); not for aot.
    reward_shift: () bco_pair's delta, in units of reward; by default the mean of a and b over this call.
    chosen_advantages, rejected_advantages: (B,) of hpo's auxiliary reward.
    denominator: what the sum is divided by, a number or a 0-d tensor; the number of pairs by default.

    Returns (loss, metrics): 0-d, float32 (float64 for float64), the metrics detached; see the module for each.
    No pair gives a loss of 0. Raises ValueError or TypeError for what does not fit.
    """
    plain = isinstance(variant, str) and not torch.compiler.is_compiling()
    objective = (_objective if plain else PreferenceObjective)(
        variant, beta, label_smoothing, divergence, divergence_alpha, reference_free, gamma, discopop_tau, nll_weight,
        auxiliary_weight, auxiliary_temperature,
    )  # fmt: skip
    pairs = checked(
        Pairs(
            chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, weights, reward_shift,
            chosen_advantages, rejected_advantages,
        ),
        objective,
    )  # fmt: skip
    return evaluate(pairs, objective, masked_loss.denominator_tensor(denominator, chosen), backend=backend)


def evaluate(
    pairs: Pairs, objective: PreferenceObjective, denominator: Tensor | None, *, backend: str | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """preference_loss of pairs that `checked` has seen."""
    name = resolve("preference_loss", IMPLS, pairs.chosen.device, backend)
    if name == "reference":
        return reference(pairs, objective, denominator=denominator)
    terms = [_term(pairs, objective, term, denominator, name) for term, _ in objective.terms]
    losses, metrics = zip(*terms, strict=True)
    return _weighted(losses, objective), metrics[0]


def checked(pairs: Pairs, objective: PreferenceObjective) -> Pairs:
    """`pairs` with what `objective` does not look at left out. Raises for what is missing or does not fit."""
    if pairs.chosen.dim() != 1:
        raise ValueError(f"chosen must be (B,), got {tuple(pairs.chosen.shape)}")
    wanted = {
        "ref_chosen": not objective.reference_free and objective.looks_at("reference"),
        "chosen_lengths": objective.looks_at("averaged"),
        "chosen_advantages": objective.looks_at("advantages"),
    }
    given = pairs._asdict()
    for first, needed in wanted.items():
        for name in (first, first.replace("chosen", "rejected")):
            if needed and given[name] is None:
                raise ValueError(f"{name} must be given for {' + '.join(name for name, _ in objective.terms)}")
            given[name] = given[name] if needed else None
    if pairs.weights is not None:
        for name, _ in objective.terms:
            if VARIANTS[name].kernel.startswith("aot"):
                raise ValueError(f"weights are not of {name}, which takes its pairs apart")
    shape, first_pair = tuple(pairs.chosen.shape), ("chosen", pairs.chosen)
    for name, tensor in given.items():
        if tensor is None:
            continue
        expected, meaning = ((), "a 0-d tensor") if name == "reward_shift" else (shape, "(B,)")
        check.shaped(name, tensor, expected, meaning)
        if not name.endswith("lengths"):
            check.floating(name, tensor)
        check.same_device(first_pair, (name, tensor))
        if name not in ("chosen", "rejected"):
            given[name] = masked_loss.constant(tensor)
    return Pairs(**given)


def reference(
    pairs: Pairs, objective: PreferenceObjective, *, denominator: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) by definition, differentiable any number of times; aot where no two ranks are tied."""
    views = [scored(pairs, objective, name) for name, _ in objective.terms]
    counted = (
        views
        if pairs.weights is None
        else [scored(_counted(pairs, views[0]), objective, n) for n, _ in objective.terms]
    )
    losses = [VARIANTS[name].loss(view, objective) for (name, _), view in zip(objective.terms, counted, strict=True)]
    if pairs.weights is not None:
        losses = [masked_loss.product(pairs.weights.to(loss.dtype), loss) for loss in losses]
    won, lost = views[0].chosen_reward.detach(), views[0].rejected_reward.detach()
    means = [masked_loss.mean(x, None, denominator) for x in ((won > lost).to(won.dtype), won - lost, won, lost)]
    totals = [masked_loss.mean(loss, None, denominator) for loss in losses]
    return _weighted(totals, objective), dict(zip(METRICS, means, strict=True))


def _counted(pairs: Pairs, view: Scored) -> Pairs:
    """`pairs`, where those of weight 0 are replaced: infinities there would come back as NaN in the gradient."""
    assert pairs.weights is not None
    none = pairs.weights == 0
    of_reference = [None if x is None else torch.where(none, -1.0, x) for x in pairs[2:4]]
    return pairs._replace(
        chosen=torch.where(none, -1.0, pairs.chosen), rejected=torch.where(none, -1.0, pairs.rejected),
        ref_chosen=of_reference[0], ref_rejected=of_reference[1],
        reward_shift=reward_shift(view),
    )  # fmt: skip


def planes(pairs: Pairs, objective: PreferenceObjective, name: str) -> list[Tensor]:
    """What the kernel of variant `name` reads, (B,) each: chosen, rejected, ref_chosen, ref_rejected, both lengths,
    weights, and a shift for each half of a pair. What is not given has stride 0."""
    variant, like = VARIANTS[name], pairs.chosen
    dtype, expand = check.compute_dtype(like.dtype), like.shape
    zero, one = (like.new_full((), value, dtype=dtype).expand(expand) for value in (0.0, 1.0))
    with_reference = variant.reference and not objective.reference_free
    inputs = [pairs.chosen, pairs.rejected, *(pairs[2:4] if with_reference else (zero, zero))]
    inputs += [x.to(dtype) for x in pairs[4:6]] if variant.averaged else [one, one]  # type: ignore[union-attr]
    inputs.append(one if pairs.weights is None else pairs.weights)
    if variant.shifts is None:
        return [*inputs, zero, zero]  # type: ignore[list-item]
    detached = pairs._replace(chosen=pairs.chosen.detach(), rejected=pairs.rejected.detach())
    return [*inputs, *variant.shifts(scored(detached, objective, name), objective)]  # type: ignore[list-item]


def coefficients(
    pairs: Pairs, objective: PreferenceObjective, denominator: Tensor | None, backend: str
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """(loss (), metrics, d loss / d chosen (B,), d loss / d rejected (B,)) for callers that go on by hand.

    `pairs` as `checked` returns them; backend: one of IMPLS. Nothing here is differentiable.
    """
    found = []
    for name, _ in objective.terms:
        inputs = [x.detach() for x in planes(pairs, objective, name)]
        outputs = masked_loss.empty_outputs(inputs, 2)
        kernel = VARIANTS[name].kernel
        IMPLS[backend](kernel, inputs, None, denominator, objective.parameters(name), outputs)
        loss, means, by_chosen, by_rejected = outputs
        found.append((loss, means, by_chosen / means[4], by_rejected / means[4]))
    losses, all_means, chosen, rejected = zip(*found, strict=True)
    metrics = {name: all_means[0][k] for k, name in enumerate(METRICS)}
    return _weighted(losses, objective), metrics, _weighted(chosen, objective), _weighted(rejected, objective)


def _term(pairs: Pairs, objective: PreferenceObjective, name: str, denominator: Tensor | None, backend: str):  # type: ignore[no-untyped-def]
    return masked_loss.call(
        _run, planes(pairs, objective, name), None, denominator, VARIANTS[name].kernel,
        objective.parameters(name), backend, METRICS,
    )  # fmt: skip


def _weighted(terms, objective: PreferenceObjective) -> Tensor:  # type: ignore[no-untyped-def]
    if len(terms) == 1 and objective.terms[0][1] == 1:
        return terms[0]
    return sum(masked_loss.product(weight, term) for (_, weight), term in zip(objective.terms, terms, strict=True))  # type: ignore


# (kernel, planes, None, denominator, parameters, outputs)
IMPLS = {"cpu": masked_loss.cpu, "triton": masked_loss.triton}
OPS = {"preference_loss": tuple(IMPLS)}
_run = masked_loss.register("preference_loss", IMPLS, inputs=9, gradients=2)
