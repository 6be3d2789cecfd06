"""reward_loss: Bradley-Terry, the loss of a reward model on pairs, and ensemble_scores of several such models.

With h = chosen_reward - rejected_reward - margin, s the label smoothing and c the centring coefficient:

    L = (1 - s) softplus(-h) + s softplus(h) + c (chosen_reward + rejected_reward)^2,   softplus(t) = log(1 + exp(t))
    loss = sum over the pairs of L / denominator

    d L / d chosen_reward = s sigmoid(h) - (1 - s) sigmoid(-h) + 2 c (chosen_reward + rejected_reward);
    d L / d rejected_reward: the same with the sign of the first two terms changed

With soft labels, p the chance that chosen is the better one, s + (1 - p)(1 - 2s) takes the place of s: as softplus(h) =
softplus(-h) + h, that adds (1 - p)(1 - 2s) h to L.

softplus(-h) = -log sigmoid(h) is the "log-exp" loss log(1 + exp(rejected - chosen)) too, without its overflow. All the
pairs of a prompt's K answers as one element of the batch: ranking_loss with variant "pairwise".

Numerics. Both are taken through exp(-|h|): no overflow, and no loss of the gradient of a pair that is told apart with
confidence. Computed in float32 (float64 for float64).

Cost per pair: three numbers read, two gradient coefficients written; one launch and a sum.

Sources: InstructGPT, Ouyang et al. 2022 (arXiv 2203.02155, eq. 1); the margin, Llama 2, Touvron et al. 2023
(arXiv 2307.09288, eq. 2); label smoothing, Wang et al. 2024 (arXiv 2401.06080); centring, Eisenstein et al. 2023
(arXiv 2312.09244, section 3); ensembles, Coste et al. 2023 (arXiv 2310.02743).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fast.backends import resolve
from rlhf_fast.ops.core import check, masked_loss
from rlhf_fast.ops.core.loss import Loss
from rlhf_fast.ops.core.masked_loss import ABSENT, IMPLS, Over, PairInputs, PairNumbers


@check.takes_numbers
def reward_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: float | Tensor | None = None,
    preferences: Tensor | None = None,
    label_smoothing: float = 0.0,
    centring: float = 0.0,
    denominator: Tensor | float | None = None,
    backend: str | None = None,
) -> Loss:
    """The mean Bradley-Terry loss of B pairs and its metrics; both rewards get a gradient.

    chosen_rewards, rejected_rewards: (B,) float32, bfloat16, float16 or float64, any strides.
    margin: by how much chosen must lead, one number or (B,), in units of the rewards; none by default.
    preferences: (B,) in [0, 1], soft labels: the chance that chosen is the better one; 1 by default.
    label_smoothing: the chance in [0, 0.5) that a label is flipped. centring: >= 0, pulls the rewards' sum to 0.
    denominator: what the sum is divided by, a number or a 0-d tensor; the number of pairs by default.

    Returns (loss, metrics): 0-d, float32 (float64 for float64), the metrics detached: accuracy (share of the pairs
    whose chosen reward is the greater one) and margin (mean of chosen - rejected), both without the `margin`.
    No pair gives a loss of 0. Raises ValueError or TypeError for what does not fit.
    """
    if chosen_rewards.dim() != 1 or not (0 <= label_smoothing < 0.5 and 0 <= centring < math.inf):
        check.that(chosen_rewards.dim() == 1, "chosen_rewards", "(B,)", chosen_rewards)
        check.that(0 <= label_smoothing < 0.5, "label_smoothing", "in [0, 0.5)", label_smoothing)
        check.that(0 <= centring < math.inf, "centring", ">= 0 and finite", centring)
    if not isinstance(margin, Tensor):
        margin = masked_loss.constant_plane(chosen_rewards, margin) if margin else None
    masked_loss.floats(
        chosen_rewards.shape, "(B,)", chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards,
        margin=margin, preferences=preferences,
    )  # fmt: skip
    margin = None if margin is None else margin.detach()
    over = Over(None, masked_loss.denominator_tensor(denominator, chosen_rewards))
    name = resolve("reward_loss", IMPLS, chosen_rewards.device, backend)
    if name == "reference":
        hard = reference(
            chosen_rewards, rejected_rewards, margin, over, label_smoothing=label_smoothing, centring=centring
        )
    else:
        inputs = PairInputs(chosen_rewards, rejected_rewards, chosen_shifts=margin)
        hard = _run(inputs, over, PairNumbers("bradley_terry", 1.0, label_smoothing, centring), name)
    if preferences is None:
        return hard
    dtype = check.compute_dtype(chosen_rewards.dtype)
    h = _gap(chosen_rewards.to(dtype) - rejected_rewards.to(dtype), margin)
    flipped = (1 - preferences.detach().to(dtype)) * (1 - 2 * label_smoothing)
    return Loss(hard.loss + masked_loss.mean(masked_loss.product(flipped, h), over), hard.metrics)


def _gap(lead: Tensor, margin: Tensor | None) -> Tensor:
    return lead if margin is None else lead - margin.to(lead.dtype)


def reference(
    chosen_rewards: Tensor, rejected_rewards: Tensor, margin: Tensor | None, over: Over, *,
    label_smoothing: float = 0.0, centring: float = 0.0,
) -> Loss:  # fmt: skip
    """By definition, differentiable any number of times."""
    dtype = check.compute_dtype(chosen_rewards.dtype)
    chosen, rejected = chosen_rewards.to(dtype), rejected_rewards.to(dtype)
    lead = chosen - rejected
    h = _gap(lead, margin)
    losses = -(1 - label_smoothing) * logsigmoid(h) - masked_loss.product(label_smoothing, logsigmoid(-h))
    losses = losses + masked_loss.product(centring, (chosen + rejected).square())
    return masked_loss.means(losses, over, accuracy=(lead > 0).to(dtype), margin=lead)


OPS = {"reward_loss": tuple(IMPLS)}
_run = masked_loss.register(
    "reward_loss", PairInputs, PairNumbers, differentiable=("chosen", "rejected"), metrics=("accuracy", "margin"),
    absent=ABSENT,
)  # fmt: skip  # chosen_shifts are the margins


def _deviation(variance: Tensor) -> Tensor:
    return torch.where(variance > 0, torch.where(variance > 0, variance, 1).sqrt(), 0)


# (scores (M, B), mean (B,), squared deviations (M, B), coef) -> (B,)
ENSEMBLES = {
    "mean": lambda scores, mean, squares, coef: mean,
    "min": lambda scores, mean, squares, coef: scores.amin(0),
    "uwo": lambda scores, mean, squares, coef: mean - coef * squares.sum(0) / max(len(scores) - 1, 1),
    "pessimistic": lambda scores, mean, squares, coef: mean - coef * _deviation(squares.mean(0)),
    "optimistic": lambda scores, mean, squares, coef: mean + coef * _deviation(squares.mean(0)),
}


@check.takes_numbers
def ensemble_scores(scores: Tensor, *, variant: str = "mean", coef: float = 1.0) -> Tensor:
    """One score out of those of M reward models, by variant:

    mean; min (worst-case optimisation); uwo: mean - coef variance (uncertainty-weighted optimisation), the variance
    unbiased; pessimistic: mean - coef std; optimistic: mean + coef std. This standard deviation is that of the M scores
    (divided by M), with a gradient of 0 where they are equal; of one model both spreads are 0.

    scores: (M, B) float32, bfloat16, float16 or float64, M >= 1, on one scale. coef >= 0. Returns (B,) float32 (float64
    for float64). Raises ValueError or TypeError for what does not fit. Plain PyTorch: M numbers read per score.

    Source: ensembles as a guard against over-optimisation, Coste et al. 2023 (arXiv 2310.02743), with coef of uwo 0.5
    for best of n and 0.1 for PPO; the standard deviation has the scores' unit.
    """
    check.floating("scores", scores)
    check.that(scores.dim() == 2 and scores.shape[0] >= 1, "scores", "(M, B) with M >= 1", scores)
    check.one_of("variant", variant, ENSEMBLES)
    check.that(coef >= 0, "coef", ">= 0", coef)
    scores = scores.to(check.compute_dtype(scores.dtype))
    mean = scores.mean(0)
    return ENSEMBLES[variant](scores, mean, (scores - mean).square(), coef)
