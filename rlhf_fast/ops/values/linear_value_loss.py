"""linear_value_loss: the critic's loss straight from hidden states, its values and gradients from one read of them.

With v = hidden . weight + bias the value of a token,

    loss = sum over the mask of L(v, v_old, R) / denominator,    L as in value_loss, clipped or not

and with c = d L / d v (made in the forward pass, as in value_loss)

    d loss / d hidden = c weight / denominator
    d loss / d weight = sum of c hidden / denominator,    d loss / d bias = sum of c / denominator

The sums over c are made in the same sweep over hidden as the values, so the backward pass reads none of the inputs: it
writes c weight. Computed in float32 (float64 for float64); behind the mask nothing is read.

Cost for N tokens of width D, elements of s bytes: N D s bytes read and 4 N D FLOPs in the forward pass, N D s bytes
written in the backward pass. Kept between them: c (N) and the gradient of the head (D).

Sources: those of value_loss: PPO, Schulman et al. 2017 (arXiv 1707.06347, eq. 9), clipped as in Andrychowicz et al.
2020 (arXiv 2006.05990). The head is a linear one on the last hidden state, as in Stiennon et al. 2020
(arXiv 2009.01325).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.backends import native, packed, resolve, strided, threads, without_autocast
from rlhf_fast.ops.core import check, masked_loss
from rlhf_fast.ops.core import registration_by_schema as registration
from rlhf_fast.ops.values import value_loss as values_of


@check.takes_numbers
def linear_value_loss(
    hidden: Tensor,
    weight: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    clip_eps: float | None = None,
    denominator: Tensor | float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The value loss of a linear head, its values and metrics; hidden, weight and bias get gradients.

    hidden: (B, T, D), or (N, D) packed; float32, bfloat16, float16 or float64, any strides.
    weight: (D,) or (1, D), bias: () or (1,) or None, of any float type: they are used in float32 (float64 beside
    float64 hidden states), and their gradients come in their own type.
    old_values, returns, mask: hidden.shape[:-1]; clip_eps, denominator: all as in value_loss.

    Returns (loss, values, {"clip_fraction": ...}): the loss () as in value_loss; values hidden.shape[:-1], detached, 0
    behind the mask; float32 (float64 for float64 hidden states).
    Raises ValueError or TypeError for what does not fit.
    """
    shape = _checked(hidden, weight, bias, old_values, returns, clip_eps)
    check.same_device(("hidden", hidden), ("weight", weight), ("bias", bias), ("returns", returns), ("mask", mask))
    mask = check.mask_bytes(mask, shape, "hidden.shape[:-1]")
    total = masked_loss.denominator_tensor(denominator, hidden)
    old_values = None if clip_eps is None else old_values
    name = resolve("linear_value_loss", IMPLS, hidden.device, backend)
    if name == "reference":
        return reference(hidden, weight, old_values, returns, bias=bias, mask=mask, clip_eps=clip_eps,
                         denominator=total)  # fmt: skip
    dtype = check.compute_dtype(hidden.dtype)
    flat = check.rows(hidden)
    old, target = (None if x is None else check.flat(x.detach().to(dtype)) for x in (old_values, returns))
    loss, means, values, *_ = _run(
        check.unit_stride(flat), check.flat(weight.to(dtype)), None if bias is None else bias.reshape(()).to(dtype),
        old, target, None if mask is None else mask.view(-1),
        total, clip_eps or 0.0, weight.requires_grad and torch.is_grad_enabled(), name,
    )  # fmt: skip
    return loss, values.detach().view(shape), {"clip_fraction": means.detach()[0]}


@without_autocast
def reference(
    hidden: Tensor,
    weight: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    clip_eps: float | None = None,
    denominator: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, values, metrics) by definition, differentiable any number of times."""
    dtype = check.compute_dtype(hidden.dtype)
    hidden = masked_loss.counted(hidden, None if mask is None else mask[..., None], dtype)
    values = hidden @ weight.reshape(-1).to(dtype)
    if bias is not None:
        values = masked_loss.counted(values + bias.to(dtype), mask, dtype)
    loss, metrics = values_of.reference(
        values, old_values, returns, mask=mask, clip_eps=clip_eps, denominator=denominator
    )
    return loss, values.detach(), metrics


def _checked(hidden: Tensor, weight: Tensor, bias: Tensor | None, old_values: Tensor | None, returns: Tensor,
             clip_eps: float | None) -> torch.Size:  # fmt: skip
    """hidden.shape[:-1], once everything fits."""
    check.floating("hidden", hidden)
    check.floating("weight", weight)
    width = hidden.shape[-1] if hidden.dim() in (2, 3) else 0
    if width < 1 or weight.shape not in ((width,), (1, width)):
        raise ValueError(
            "hidden must be (B, T, D) or (N, D) and weight (D,) or (1, D) with D >= 1, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and (check.floating("bias", bias).shape not in ((), (1,))):
        raise ValueError(f"bias must be () or (1,), got {tuple(bias.shape)}")
    shape = hidden.shape[:-1]
    tensors = {"returns": returns}
    if clip_eps is not None:
        check.positive("clip_eps", clip_eps)
        if old_values is None:
            raise ValueError(f"old_values must be given with clip_eps={clip_eps}, got None")
        tensors["old_values"] = old_values
    masked_loss.floats(shape, "hidden.shape[:-1]", **tensors)
    return shape


def _cpu(hidden: Tensor, weight: Tensor, bias: Tensor | None, old_values: Tensor | None, returns: Tensor,
         mask: Tensor | None, denominator: Tensor | None, clip_eps: float, outputs: list[Tensor]) -> None:  # fmt: skip
    at, code, (count, stride) = strided(hidden)
    native().linear_value_loss(
        at, code, (count, hidden.shape[1], stride),
        [packed(x) for x in (weight, bias, old_values, returns, mask, denominator)], clip_eps,
        [packed(x) for x in outputs], threads(),
    )  # fmt: skip


def _triton(*args: Any) -> None:
    from rlhf_fast.kernels import linear_value_loss as kernels

    kernels.linear_value_loss(*args)


# (hidden (N, D), weight (D,), bias () | None, old_values (N,) | None, returns (N,), mask | None, denominator | None,
#  clip_eps, outputs as in _empty_outputs)
IMPLS = {"cpu": _cpu, "triton": _triton}
OPS = {"linear_value_loss": tuple(IMPLS)}


# --- The registered op -----------------------------------------------------------------------------------------------


def _empty_outputs(hidden: Tensor, wants_weight: bool) -> list[Tensor]:
    """[loss (), means (2,), values (N,), c (N,), sum of c hidden (D,), sum of c ()].

    means: the clip fraction, and what c and its sums have yet to be divided by.
    """
    rows, width = hidden.shape
    shapes = ((), (2,), (rows,), (rows,), (width if wants_weight else 0,), ())
    return [hidden.new_empty(shape, dtype=check.compute_dtype(hidden.dtype)) for shape in shapes]


def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, old_values: Tensor | None, returns: Tensor,
             mask: Tensor | None, denominator: Tensor | None, clip_eps: float, wants_weight: bool,
             backend: str) -> list[Tensor]:  # fmt: skip
    outputs = _empty_outputs(hidden, wants_weight)
    IMPLS[backend](hidden, weight, bias, old_values, returns, mask, denominator, clip_eps, outputs)
    return outputs


def _setup_context(ctx, inputs, output):
    _, means, _, *sums = output
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(means, inputs[1], *sums)


def _autograd(ctx, grads):
    means, weight, coefficients, weight_sums, bias_sum = ctx.saved_tensors
    if grads[0] is None:
        return None, None, None
    scale, (wants_hidden, wants_weight, wants_bias) = grads[0] / means[1], ctx.needs_input_grad[:3]
    return (
        masked_loss.scaled_gradient(
            weight.expand(coefficients.shape[0], -1), (coefficients * scale)[:, None], ctx.dtype
        )
        if wants_hidden
        else None,
        masked_loss.scaled_gradient(weight_sums, scale, weight_sums.dtype) if wants_weight else None,
        masked_loss.scaled_gradient(bias_sum, scale, bias_sum.dtype) if wants_bias else None,
    )


_run = registration.op(
    "linear_value_loss",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? old_values, Tensor returns, Tensor? mask, "
    "Tensor? denominator, float clip_eps, bool wants_weight, str backend) -> Tensor[]",
    _forward,
    fake=lambda hidden, *others: _empty_outputs(hidden, others[-2]),
    differentiable=(0, 1, 2),
    setup_context=_setup_context,
    backward=_autograd,
    returned=3,
)
