"""value_loss: the critic's squared error, clipped around the old values or not.

With v the value, R the return and v_old the value when the samples were made:

    unclipped:  L = 0.5 (v - R)^2
    clipped:    L = 0.5 max((v - R)^2, (clip(v, v_old - eps, v_old + eps) - R)^2)
    loss = sum over the mask of L / denominator

    d L / d v = v - R, or 0 where the clipped term is the greater one

Computed in float32 (float64 for float64); behind the mask nothing is read.

Cost per token: two or three inputs of s bytes and the mask read, 4 bytes (the gradient coefficient) written, about 10
FLOPs; backward reads the coefficient and writes the gradient.

Sources: PPO's squared-error loss, Schulman et al. 2017 (arXiv 1707.06347, eq. 9); its clipped form, Andrychowicz et
al. 2020 (arXiv 2006.05990), after OpenAI baselines' ppo2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops.core import check, masked_loss
from rlhf_fast.ops.core.loss import Loss
from rlhf_fast.ops.core.masked_loss import IMPLS, Over


class LossAndValues(NamedTuple):
    """What the losses return that make the values themselves."""

    loss: Tensor  # 0-d
    metrics: dict[str, Tensor]  # by name: 0-d, detached
    values: Tensor  # per token, detached


@check.takes_numbers
def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    *,
    mask: Tensor | None = None,
    clip_eps: float | None = None,
    denominator: Tensor | float | None = None,
    backend: str | None = None,
) -> Loss:
    """The value loss and its metrics; only `values` gets a gradient.

    values, old_values, returns: (B, T), or (N,) packed; float32, bfloat16, float16 or float64, any strides.
    old_values may be None where clip_eps is None: it is not looked at then. clip_eps > 0, in units of the values.
    mask: the shape of values, nonzero counts. Nothing counted gives a loss of 0 with gradient 0.
    denominator: what the sums are divided by, a number or a 0-d tensor: the number of counted tokens of the whole
    batch, where this call is a part of it (micro-batches, ranks). Default: the tokens counted in this call.

    Returns (loss, {"clip_fraction": share of the tokens whose gradient the clip has stopped}): 0-d, float32 (float64
    for float64 values), the metric detached. Raises ValueError or TypeError for what does not fit.
    """
    shape, meaning = masked_loss.per_token_shape("values", values), "the shape of values"
    old_values = looked_at(old_values, clip_eps)
    masked_loss.floats(shape, meaning, values=values, returns=returns, old_values=old_values)
    over = masked_loss.over(("values", values), shape, meaning, mask, denominator)
    name = resolve("value_loss", IMPLS, values.device, backend)
    if name == "reference":
        return reference(values, old_values, returns, over, clip_eps=clip_eps)
    inputs = Inputs(values, returns.detach(), None if old_values is None else old_values.detach())
    numbers = Numbers("value", 0.0) if clip_eps is None else Numbers("value_clip", clip_eps)
    return _run(inputs, over, numbers, name)


def looked_at(old_values: Tensor | None, clip_eps: float | None) -> Tensor | None:
    """The old values where the loss is clipped around them, else None."""
    if clip_eps is None:
        return None
    check.positive("clip_eps", clip_eps)
    if old_values is None:
        raise ValueError(f"old_values must be given with clip_eps={clip_eps}, got None")
    return old_values


def reference(
    values: Tensor, old_values: Tensor | None, returns: Tensor, over: Over, *, clip_eps: float | None = None
) -> Loss:
    """By definition, differentiable any number of times."""
    dtype = check.compute_dtype(values.dtype)
    values, returns = (masked_loss.counted(x, over.mask, dtype) for x in (values, returns.detach()))
    squares = (values - returns).square()
    clipped = torch.zeros_like(squares, dtype=torch.bool)
    if clip_eps is not None and old_values is not None:
        old = masked_loss.counted(old_values.detach(), over.mask, dtype)
        bounded = (values.clamp(old - clip_eps, old + clip_eps) - returns).square()
        clipped = bounded > squares
        squares = torch.maximum(squares, bounded)
    return masked_loss.means(0.5 * squares, over, clip_fraction=clipped.to(dtype))


class Inputs(NamedTuple):
    values: Tensor
    returns: Tensor
    old_values: Tensor | None  # None without clipping


class Numbers(NamedTuple):
    kernel: str
    clip_eps: float


OPS = {"value_loss": tuple(IMPLS)}
_run = masked_loss.register("value_loss", Inputs, Numbers, differentiable=("values",), metrics=("clip_fraction",))
