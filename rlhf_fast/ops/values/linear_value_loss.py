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

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import native, packed, resolve, strided, threads, triton_kernels, without_autocast
from rlhf_fast.ops.core import check, masked_loss, registration
from rlhf_fast.ops.core.masked_loss import Over
from rlhf_fast.ops.values import value_loss
from rlhf_fast.ops.values.value_loss import LossAndValues


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
) -> LossAndValues:
    """The value loss of a linear head, its values and metrics; hidden, weight and bias get gradients.

    hidden: (B, T, D), or (N, D) packed; float32, bfloat16, float16 or float64, any strides.
    weight: (D,) or (1, D), bias: () or (1,) or None, of any float type: they are used in float32 (float64 beside
    float64 hidden states), and their gradients come in their own type.
    old_values, returns, mask: hidden.shape[:-1]; clip_eps, denominator: all as in value_loss.

    Returns (loss, metrics, values): loss and metrics as in value_loss; values hidden.shape[:-1], detached, 0 behind the
    mask; float32 (float64 for float64 hidden states).
    Raises ValueError or TypeError for what does not fit.
    """
    shape, meaning = _shape(hidden, weight, bias), "hidden.shape[:-1]"
    old_values = value_loss.looked_at(old_values, clip_eps)
    masked_loss.floats(shape, meaning, returns=returns, old_values=old_values)
    check.same_device(("hidden", hidden), ("weight", weight), ("bias", bias), ("returns", returns))
    over = masked_loss.over(("hidden", hidden), shape, meaning, mask, denominator)
    name = resolve("linear_value_loss", IMPLS, hidden.device, backend)
    if name == "reference":
        return reference(hidden, weight, old_values, returns, over, bias=bias, clip_eps=clip_eps)
    dtype = check.compute_dtype(hidden.dtype)
    inputs = Inputs(
        check.unit_stride(check.rows(hidden)), check.flat(weight.to(dtype)),
        None if bias is None else bias.reshape(()).to(dtype),
        None if old_values is None else check.flat(old_values.detach().to(dtype)),
        check.flat(returns.detach().to(dtype)),
    )  # fmt: skip
    if over.mask is not None:
        over = over._replace(mask=over.mask.view(-1))
    numbers = Numbers(clip_eps or 0.0, weight.requires_grad and torch.is_grad_enabled())
    loss, metric, values, *_ = _run(inputs, over, numbers, name)
    return LossAndValues(loss, {"clip_fraction": metric.detach()}, values.detach().view(shape))


def _shape(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.Size:
    """hidden.shape[:-1], once the head fits."""
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
    return hidden.shape[:-1]


@without_autocast
def reference(
    hidden: Tensor, weight: Tensor, old_values: Tensor | None, returns: Tensor, over: Over, *,
    bias: Tensor | None = None, clip_eps: float | None = None,
) -> LossAndValues:  # fmt: skip
    """By definition, differentiable any number of times."""
    dtype = check.compute_dtype(hidden.dtype)
    hidden = masked_loss.counted(hidden, None if over.mask is None else over.mask[..., None], dtype)
    values = hidden @ weight.reshape(-1).to(dtype)
    if bias is not None:
        values = masked_loss.counted(values + bias.to(dtype), over.mask, dtype)
    loss, metrics = value_loss.reference(values, old_values, returns, over, clip_eps=clip_eps)
    return LossAndValues(loss, metrics, values.detach())


class Inputs(NamedTuple):
    hidden: Tensor  # (N, D)
    weight: Tensor  # (D,)
    bias: Tensor | None  # ()
    old_values: Tensor | None  # (N,), None without clipping
    returns: Tensor  # (N,)


class Numbers(NamedTuple):
    clip_eps: float
    wants_weight: bool  # whether the weight gets a gradient


def _cpu(inputs: Inputs, over: Over, numbers: Numbers, outputs: list[Tensor]) -> None:
    hidden, *others = inputs
    at, code, (count, stride) = strided(hidden)
    native().linear_value_loss(
        at, code, (count, hidden.shape[1], stride), [packed(x) for x in (*others, *over)], numbers.clip_eps,
        [packed(x) for x in outputs], threads(),
    )  # fmt: skip


def _triton(inputs: Inputs, over: Over, numbers: Numbers, outputs: list[Tensor]) -> None:
    triton_kernels("linear_value_loss").linear_value_loss(*inputs, *over, numbers.clip_eps, outputs)


IMPLS = {"cpu": _cpu, "triton": _triton}
OPS = {"linear_value_loss": tuple(IMPLS)}


def _outputs(inputs: Inputs, over: Over, numbers: Numbers, backend: str) -> list[Tensor]:
    """[loss (), clip fraction (), values (N,), c (N,), sum of c hidden (D,), sum of c ()], and as in masked_loss the
    divisor of c and its sums."""
    rows, width = inputs.hidden.shape
    shapes = ((), (), (rows,), (rows,), (width if numbers.wants_weight else 0,), (), *[()] * (backend != "cpu"))
    dtype = check.compute_dtype(inputs.hidden.dtype)
    return [inputs.hidden.new_empty(shape, dtype=dtype) for shape in shapes]


def _backward(saved: registration.Saved, upstream: Sequence[Tensor | None]) -> Mapping[str, registration.Gradient]:
    if upstream[0] is None:
        return {}
    inputs, *_ = saved.inputs
    coefficients, weight_sums, bias_sum, *divisor = saved.results
    scale = upstream[0] / divisor[0] if divisor else upstream[0]
    as_it_is = registration.is_one(scale)
    gradients: dict[str, registration.Gradient] = {}
    if saved.needs["hidden"]:
        gradients["hidden"] = masked_loss.scaled_gradient(
            inputs.weight.expand(coefficients.shape[0], -1), (coefficients * scale)[:, None], saved.dtypes["hidden"]
        )
    for name, sums in (("weight", weight_sums), ("bias", bias_sum)):
        if saved.needs[name]:
            gradients[name] = masked_loss.scaled_gradient(sums, scale, sums.dtype, as_it_is)
    return gradients


_run = registration.op(
    "linear_value_loss", (Inputs, Over, Numbers), registration.filled(IMPLS, _outputs), fake=_outputs,
    differentiable=("hidden", "weight", "bias"), saves=("weight",), saves_results=slice(3, None), backward=_backward,
    returned=3,
)  # fmt: skip
