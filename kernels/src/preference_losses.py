"""The losses of a chosen and a rejected answer, and of one answer that is desirable or not; one element each.

Formulas in rlhf_fast/ops/{preference_loss,reward_loss,unpaired_preference_loss}.py. The kernel is that of losses.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from rlhf_fast.kernels.scalar import divide, expm1, log1p, product, sigmoid, softplus

# --- What every loss of pairs begins and ends with --------------------------------------------------------------------


@triton.jit
def _tamed_expm1(x):
    """(value, slope): beyond exp(20) the exponential goes on along its tangent."""
    bounded = tl.where(x > 20.0, 20.0, x)
    e = tl.exp(bounded)
    return expm1(bounded) + tl.where(x > 20.0, e * (x - 20.0), 0.0), e


@triton.jit
def _score(log_ratio, divergence, alpha):
    """(score, slope): divergence 0 reverse KL, 1 alpha, 2 Jensen-Shannon."""
    tamed, e = _tamed_expm1(-alpha * log_ratio)
    tamed = -tamed / tl.where(divergence == 1, alpha, 1.0)
    js = 0.6931471805599453 - softplus(-log_ratio)
    value = tl.where(divergence == 0, log_ratio, tl.where(divergence == 1, tamed, js))
    return value, tl.where(divergence == 0, 1.0, tl.where(divergence == 1, e, sigmoid(-log_ratio)))


@triton.jit
def _length(x):
    return tl.where(x < 1, 1.0, x)


@triton.jit
def _rewards(x, p):
    """Implicit rewards of chosen and rejected."""
    chosen, _slope = _score(x[0] - x[2], p[3], p[4])
    rejected, _slope = _score(x[1] - x[3], p[3], p[4])
    return p[0] * (chosen / _length(x[4])), p[0] * (rejected / _length(x[5]))


@triton.jit
def _pair(x, p, loss, by_chosen, by_rejected):
    """The kernel's terms, from the loss and its derivatives in the two rewards."""
    chosen, chosen_slope = _score(x[0] - x[2], p[3], p[4])
    rejected, rejected_slope = _score(x[1] - x[3], p[3], p[4])
    chosen, rejected = p[0] * (chosen / _length(x[4])), p[0] * (rejected / _length(x[5]))
    by_chosen = product(x[6], p[0] * chosen_slope / _length(x[4]) * by_chosen)
    by_rejected = product(x[6], p[0] * rejected_slope / _length(x[5]) * by_rejected)
    accuracy = tl.where(chosen > rejected, 1.0, 0.0)
    return product(x[6], loss), by_chosen, by_rejected, accuracy, chosen - rejected, chosen, rejected


@triton.jit
def _logistic(gap, label_smoothing):
    """(value, slope)"""
    value = (1 - label_smoothing) * softplus(-gap) + product(label_smoothing, softplus(gap))
    return value, label_smoothing * sigmoid(gap) - (1 - label_smoothing) * sigmoid(-gap)


# --- x: log-probabilities of chosen and rejected, of the reference for both, lengths of both, weight, shifts of both
# --- p: beta, label_smoothing, the variant's own parameter, divergence, alpha


@triton.jit
def sigmoid_loss(x, p):
    a, b = _rewards(x, p)
    loss, slope = _logistic(a - b - p[2], p[1])
    return _pair(x, p, loss, slope, -slope)


@triton.jit
def robust(x, p):
    a, b = _rewards(x, p)
    h = a - b
    scale = 1.0 / (1 - 2 * p[1])
    loss = scale * ((1 - p[1]) * softplus(-h) - product(p[1], softplus(h)))
    slope = -scale * ((1 - p[1]) * sigmoid(-h) + p[1] * sigmoid(h))
    return _pair(x, p, loss, slope, -slope)


@triton.jit
def hinge(x, p):
    a, b = _rewards(x, p)
    short_of = 1 - (a - b)
    slope = tl.where(short_of <= 0, 0.0, -1.0)
    return _pair(x, p, tl.where(short_of <= 0, 0.0, short_of), slope, -slope)


@triton.jit
def ipo(x, p):
    a, b = _rewards(x, p)
    error = (a - b) / p[0] - 0.5 / p[0]
    slope = 2 * error / p[0]
    return _pair(x, p, error * error, slope, -slope)


@triton.jit
def exo_pair(x, p):
    a, b = _rewards(x, p)
    h = a - b
    log_chosen, log_rejected = log1p(-p[1]), tl.log(p[1])
    loss = -product(sigmoid(h), softplus(-h) + log_chosen) - product(sigmoid(-h), softplus(h) + log_rejected)
    slope = product(sigmoid(h) * sigmoid(-h), h - (log_chosen - log_rejected))
    return _pair(x, p, loss, slope, -slope)


@triton.jit
def nca_pair(x, p):
    a, b = _rewards(x, p)
    loss = softplus(-a) + 0.5 * softplus(a) + 0.5 * softplus(b)
    return _pair(x, p, loss, 0.5 * sigmoid(a) - sigmoid(-a), 0.5 * sigmoid(b))


@triton.jit
def bco_pair(x, p):
    a, b = _rewards(x, p)
    # An infinite reward, which makes the mean of the batch infinite, is still further away than that.
    a = tl.where(tl.abs(a) == float("inf"), a, a - x[7])
    b = tl.where(tl.abs(b) == float("inf"), b, b - x[8])
    return _pair(x, p, softplus(-a) + softplus(b), -sigmoid(-a), sigmoid(b))


@triton.jit
def sppo_hard(x, p):
    a, b = _rewards(x, p)
    chosen = (a - 0.5) / p[0]
    rejected = (b + 0.5) / p[0]
    return _pair(x, p, chosen * chosen + rejected * rejected, 2 * chosen / p[0], 2 * rejected / p[0])


@triton.jit
def aot(x, p):
    loss, slope = _logistic(p[0] * (x[0] - x[1]) - x[7], p[1])
    return _pair(x, p, loss, slope, -slope)


@triton.jit
def aot_unpaired(x, p):
    a, b = _rewards(x, p)
    by_chosen, slope = _logistic(a - x[7], p[1])
    by_rejected, rejected_slope = _logistic(x[8] - b, p[1])
    return _pair(x, p, 0.5 * (by_chosen + by_rejected), slope, -rejected_slope)


@triton.jit
def apo_zero(x, p):
    a, b = _rewards(x, p)
    return _pair(x, p, sigmoid(b) - sigmoid(a), -sigmoid(a) * sigmoid(-a), sigmoid(b) * sigmoid(-b))


@triton.jit
def apo_down(x, p):
    a, b = _rewards(x, p)
    slope = sigmoid(a - b) * sigmoid(b - a)
    return _pair(x, p, sigmoid(a) - sigmoid(a - b), sigmoid(a) * sigmoid(-a) - slope, slope)


@triton.jit
def discopop(x, p):
    a, b = _rewards(x, p)
    h, tau = a - b, p[2]
    logistic = sigmoid(-h / tau)
    # log(exp(-h) sigmoid(h / tau)) on the side where its terms do not cancel
    exponent = tl.where(h < 0, product(1 / tau - 1, h) - softplus(h / tau), -softplus(-h / tau) - h)
    _expm1, weighted = _tamed_expm1(exponent)
    loss = product(logistic, softplus(-h)) + weighted * (1 + tl.where(exponent > 20.0, exponent - 20.0, 0.0))
    slope = -logistic * (sigmoid(-h) + product(sigmoid(h / tau), softplus(-h)) / tau)
    slope += weighted * (logistic / tau - 1)
    return _pair(x, p, loss, slope, -slope)


@triton.jit
def sft(x, p):
    return _pair(x, p, -x[0] / _length(x[4]), -1 / p[0], 0.0)


@triton.jit
def cpo(x, p):
    a, b = _rewards(x, p)
    loss, slope = _logistic(a - b, p[1])
    return _pair(x, p, loss - product(p[2], x[0]), slope - p[2] / p[0], -slope)


@triton.jit
def orpo(x, p):
    logprob = x[0] / _length(x[4])
    rejected_logprob = x[1] / _length(x[5])
    certain = logprob > -1e-6
    rejected_certain = rejected_logprob > -1e-6
    chosen = tl.where(certain, -1e-6, logprob)
    rejected = tl.where(rejected_certain, -1e-6, rejected_logprob)
    chosen_rest = expm1(chosen)  # p - 1
    rejected_rest = expm1(rejected)
    log_odds = (chosen - rejected) - tl.log(chosen_rest / rejected_rest)
    slope = sigmoid(-log_odds)
    by_chosen = tl.where(certain, 0.0, slope / chosen_rest) - 1 / p[0]
    by_rejected = tl.where(rejected_certain, 0.0, -slope / rejected_rest)
    return _pair(x, p, p[0] * softplus(-log_odds) - logprob, by_chosen, by_rejected)


@triton.jit
def hpo(x, p):
    a, b = _rewards(x, p)
    loss, slope = _logistic(a - b, p[1])
    chosen = p[2] * x[7]
    rejected = p[2] * x[8]
    loss -= product(chosen, x[0]) + product(rejected, x[1])
    return _pair(x, p, loss, slope - chosen / p[0], -slope - rejected / p[0])


@triton.jit
def bradley_terry(x, p):
    a, b = _rewards(x, p)
    loss, slope = _logistic(a - b - x[7], p[1])
    centring = product(p[2], a + b)
    return _pair(x, p, loss + product(centring, a + b), slope + 2 * centring, 2 * centring - slope)


# --- x: logprob, ref_logprob, 1 for desirable or 0, weight, shift; p: beta, both weights, the shift's scale


@triton.jit
def _unpaired(x, p, reward, loss, slope):
    """The kernel's terms, from the loss and its slope in how far the reward lies on the right side of the shift."""
    desirable = x[2] > 0
    weight = x[3] * tl.where(desirable, p[1], p[2])
    by_logprob = product(weight, p[0] * tl.where(desirable, slope, -slope))
    share = tl.where(desirable, 1.0, 0.0)
    return (
        product(weight, loss), by_logprob, 0.0,
        share, tl.where(desirable, reward, 0.0), 1 - share, tl.where(desirable, 0.0, reward),
    )  # fmt: skip


@triton.jit
def kto(x, p):
    reward = p[0] * (x[0] - x[1])
    u = tl.where(x[2] > 0, reward - p[3] * x[4], p[3] * x[4] - reward)
    return _unpaired(x, p, reward, sigmoid(-u), -sigmoid(u) * sigmoid(-u))


@triton.jit
def bco(x, p):
    reward = p[0] * (x[0] - x[1])
    u = tl.where(x[2] > 0, reward - p[3] * x[4], p[3] * x[4] - reward)
    return _unpaired(x, p, reward, softplus(-u), -sigmoid(-u))


@triton.jit
def of_classes(share, reward, other_share, other_reward):
    """The mean rewards of desirable and undesirable answers, 0 of none, and their difference."""
    good = divide(reward, tl.where(share == 0, 1.0, share))
    bad = divide(other_reward, tl.where(other_share == 0, 1.0, other_share))
    return good, bad, good - bad, 0.0


# name -> (function, number of inputs, what makes the metrics of their means)
PAIRED = {
    name: (function, 9)
    for name, function in {
        "sigmoid": sigmoid_loss, "robust": robust, "hinge": hinge, "ipo": ipo, "exo_pair": exo_pair,
        "nca_pair": nca_pair, "bco_pair": bco_pair, "sppo_hard": sppo_hard, "aot": aot, "aot_unpaired": aot_unpaired,
        "apo_zero": apo_zero,
        "apo_down": apo_down, "discopop": discopop, "sft": sft, "cpo": cpo, "orpo": orpo, "hpo": hpo,
        "bradley_terry": bradley_terry,
    }.items()
}  # fmt: skip
UNPAIRED = {"kto": (kto, 5, of_classes), "bco": (bco, 5, of_classes)}
