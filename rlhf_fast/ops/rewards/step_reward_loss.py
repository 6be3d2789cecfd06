"""step_reward_loss: the loss of a process reward model, whose score after each step is told right or wrong.

With x the score at a step and y its label in [0, 1] (the share of right continuations where it is an estimate):

    bce:  L = y softplus(-x) + (1 - y) softplus(x),   x a logit,   softplus(t) = log(1 + exp(t))
          d L / d x = (1 - y) sigmoid(x) - y sigmoid(-x)
    mse:  L = (x - y)^2,   d L / d x = 2 (x - y)
    loss = sum over the mask of L / denominator

Two-class cross-entropy over the logits of a "right" and a "wrong" token is bce of their difference.

Numerics. softplus and sigmoid are taken through exp(-|x|). Computed in float32 (float64 for float64); behind the mask
nothing is read.

Cost per position: two inputs of s bytes and the mask read, 4 bytes (the gradient coefficient) written, about 20 FLOPs.

Sources: Lightman et al. 2023 (arXiv 2305.20050); labels from continuations, Math-Shepherd, Wang et al. 2023 (arXiv
2312.08935, eq. 2 for bce).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import softplus

from rlhf_fast.backends import resolve
from rlhf_fast.ops.core import check, masked_loss
from rlhf_fast.ops.core.loss import Loss
from rlhf_fast.ops.core.masked_loss import IMPLS, Over


class Variant(NamedTuple):
    """loss: (scores, labels) -> losses. threshold: the score from which on a step is taken for right."""

    loss: Callable[[Tensor, Tensor], Tensor]
    threshold: float
    kernel: str


VARIANTS = {
    "bce": Variant(
        lambda x, y: masked_loss.product(y, softplus(-x)) + masked_loss.product(1 - y, softplus(x)), 0.0, "step_bce"
    ),
    "mse": Variant(lambda x, y: (x - y).square(), 0.5, "step_mse"),
}


@check.takes_numbers
def step_reward_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    variant: str = "bce",
    denominator: Tensor | float | None = None,
    backend: str | None = None,
) -> Loss:
    """The mean loss over the steps and its metrics; only `scores` gets a gradient.

    scores, labels: (B, T), or (N,) packed; float32, bfloat16, float16 or float64, any strides. labels in [0, 1].
    mask: the shape of scores, nonzero at the last token of each step: what counts. Nothing counted gives a loss of 0.
    variant: one of VARIANTS. denominator: what the sums are divided by, a number or a 0-d tensor: the steps of the
    whole batch, where this call is a part of it. Default: the steps counted in this call.

    Returns (loss, {"accuracy": share of the steps on whose right side of a half the score is}): 0-d, float32 (float64
    for float64 scores), the metric detached. Raises ValueError or TypeError for what does not fit.
    """
    shape, meaning = masked_loss.per_token_shape("scores", scores), "the shape of scores"
    masked_loss.floats(shape, meaning, scores=scores, labels=labels)
    check.one_of("variant", variant, VARIANTS)
    over = masked_loss.over(("scores", scores), shape, meaning, mask, denominator)
    name = resolve("step_reward_loss", IMPLS, scores.device, backend)
    if name == "reference":
        return reference(scores, labels, over, variant=variant)
    inputs, numbers = Inputs(scores, labels.detach()), Numbers(VARIANTS[variant].kernel)
    return _run(inputs, over, numbers, name)


def reference(scores: Tensor, labels: Tensor, over: Over, *, variant: str) -> Loss:
    """By definition, differentiable any number of times."""
    dtype = check.compute_dtype(scores.dtype)
    scores, labels = (masked_loss.counted(x, over.mask, dtype) for x in (scores, labels.detach()))
    loss, threshold, _ = VARIANTS[variant]
    right = (scores > threshold) == (labels > 0.5)
    return masked_loss.means(loss(scores, labels), over, accuracy=right.to(dtype))


class Inputs(NamedTuple):
    scores: Tensor
    labels: Tensor


class Numbers(NamedTuple):
    kernel: str


OPS = {"step_reward_loss": tuple(IMPLS)}
_run = masked_loss.register("step_reward_loss", Inputs, Numbers, differentiable=("scores",), metrics=("accuracy",))
