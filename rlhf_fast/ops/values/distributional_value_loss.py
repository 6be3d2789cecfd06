"""distributional_value_loss: a value as a distribution over bins, trained by cross-entropy with a Gaussian histogram.

K bins of equal width between v_min and v_max, with edges e_i and centres c_i; q = softmax(logits) is the distribution,
its mean the value. A return R, moved into [v_min, v_max], becomes the histogram of a Gaussian around it (HL-Gauss),

    p_i = (F(e_{i+1}) - F(e_i)) / (F(e_K) - F(e_0)),    F(e) = erf((e - R) / (sqrt(2) sigma))
    loss = sum over the mask of -sum_i p_i log q_i / denominator,    value = sum_i q_i c_i

    d loss / d logits = (q - p) / denominator

The classes are ordered, the scale of the returns does not reach the gradient, and v_min and v_max bound the value.
Computed in float32 (float64 for float64), relative to the maximal logit; behind the mask nothing is read.

Cost per token: K s bytes read, 4 K written (the gradient, which backward scales; on the CPU it is the result where the
upstream gradient is 1), about 30 K FLOPs, most of them in erf.

Sources: HL-Gauss, Imani & White 2018 (arXiv 1806.04613, section 3.1); for values in reinforcement learning, with
sigma = 0.75 bins, Farebrother et al. 2024, "Stop Regressing" (arXiv 2403.03950, eq. 1 and section 3.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.backends import native, packed, resolve, strided, threads
from rlhf_fast.ops.core import check, masked_loss
from rlhf_fast.ops.core import registration_by_schema as registration


@check.takes_numbers
def distributional_value_loss(
    logits: Tensor,
    returns: Tensor,
    *,
    v_min: float,
    v_max: float,
    sigma: float | None = None,
    mask: Tensor | None = None,
    denominator: Tensor | float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The HL-Gauss loss, the expected values and metrics; only `logits` gets a gradient.

    logits: (B, T, K), or (N, K) packed, K >= 2 bins; float32, bfloat16, float16 or float64, any strides.
    returns, mask: logits.shape[:-1]; denominator: as in value_loss.
    v_min < v_max: outer edges of the first and the last bin, in units of the returns. sigma > 0: standard deviation of
    the target, in the same units; default 0.75 of a bin's width.

    Returns (loss, values, {"outside_fraction": share of the returns outside of [v_min, v_max]}): the loss (), in nats;
    values logits.shape[:-1], detached, 0 behind the mask; float32 (float64 for float64 logits).
    Raises ValueError or TypeError for what does not fit.
    """
    check.floating("logits", logits)
    if logits.dim() not in (2, 3) or logits.shape[-1] < 2:
        raise ValueError(f"logits must be (B, T, K) or (N, K) with K >= 2, got {tuple(logits.shape)}")
    if not v_min < v_max:
        raise ValueError(f"v_min must be below v_max, got {v_min} and {v_max}")
    sigma = 0.75 * (v_max - v_min) / logits.shape[-1] if sigma is None else check.positive("sigma", sigma)
    shape = logits.shape[:-1]
    masked_loss.floats(shape, "logits.shape[:-1]", returns=returns)
    check.same_device(("logits", logits), ("returns", returns), ("mask", mask))
    mask = check.mask_bytes(mask, shape, "logits.shape[:-1]")
    total = masked_loss.denominator_tensor(denominator, logits)
    name = resolve("distributional_value_loss", IMPLS, logits.device, backend)
    if name == "reference":
        return reference(logits, returns, v_min=v_min, v_max=v_max, sigma=sigma, mask=mask, denominator=total)
    flat = check.rows(logits)
    loss, means, values, _ = _run(
        check.unit_stride(flat), check.flat(returns.detach().to(check.compute_dtype(logits.dtype))),
        None if mask is None else mask.view(-1), total, float(v_min), float(v_max), sigma, name,
    )  # fmt: skip
    return loss, values.detach().view(shape), {"outside_fraction": means.detach()[0]}


def reference(
    logits: Tensor,
    returns: Tensor,
    *,
    v_min: float,
    v_max: float,
    sigma: float,
    mask: Tensor | None = None,
    denominator: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, values, metrics) by definition, differentiable any number of times."""
    dtype, bins = check.compute_dtype(logits.dtype), logits.shape[-1]
    z = masked_loss.counted(logits, None if mask is None else mask[..., None], dtype)
    returns = masked_loss.counted(returns.detach(), mask, dtype)
    edges = torch.linspace(v_min, v_max, bins + 1, dtype=torch.float64, device=logits.device).to(dtype)
    cumulative = torch.erf((edges - returns.clamp(v_min, v_max)[..., None]) / (2**0.5 * sigma))
    target = cumulative.diff(dim=-1) / (cumulative[..., -1:] - cumulative[..., :1])
    log_q = torch.log_softmax(z, -1)
    # A bin that the target never meets may be forbidden: 0 * inf is 0 there.
    losses = -torch.where(target == 0, 0, target * log_q).sum(-1)
    values = masked_loss.counted((log_q.exp() * (edges[1:] + edges[:-1]) / 2).sum(-1).detach(), mask, dtype)
    outside = ((returns < v_min) | (returns > v_max)).to(dtype)
    metric = masked_loss.mean(outside, mask, denominator)
    return masked_loss.mean(losses, mask, denominator), values, {"outside_fraction": metric}


def _cpu(logits: Tensor, returns: Tensor, mask: Tensor | None, denominator: Tensor | None, v_min: float, v_max: float,
         sigma: float, outputs: list[Tensor]) -> None:  # fmt: skip
    at, code, (count, stride) = strided(logits)
    native().distributional_value_loss(
        at, code, (count, logits.shape[1], stride),
        [packed(x) for x in (returns, mask, denominator)], [v_min, v_max, sigma], [packed(x) for x in outputs],
        threads(),
    )  # fmt: skip


def _triton(*args: Any) -> None:
    from rlhf_fast.kernels import distributional_value_loss as kernels

    kernels.distributional_value_loss(*args)


# (logits (N, K), returns (N,), mask | None, denominator | None, v_min, v_max, sigma, outputs as in _empty_outputs)
IMPLS = {"cpu": _cpu, "triton": _triton}
OPS = {"distributional_value_loss": tuple(IMPLS)}


# --- The registered op -----------------------------------------------------------------------------------------------


def _empty_outputs(logits: Tensor) -> list[Tensor]:
    """[loss (), means (2,), values (N,), q - p (N, K)].

    means: the outside fraction, and what q - p has yet to be divided by.
    """
    shapes = ((), (2,), logits.shape[:1], logits.shape)
    return [logits.new_empty(shape, dtype=check.compute_dtype(logits.dtype)) for shape in shapes]


def _forward(logits: Tensor, returns: Tensor, mask: Tensor | None, denominator: Tensor | None, v_min: float,
             v_max: float, sigma: float, backend: str) -> list[Tensor]:  # fmt: skip
    outputs = _empty_outputs(logits)
    IMPLS[backend](logits, returns, mask, denominator, v_min, v_max, sigma, outputs)
    return outputs


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1], output[3])


def _autograd(ctx, grads):
    means, coefficients = ctx.saved_tensors
    gradient = None if grads[0] is None else masked_loss.scaled_gradient(coefficients, grads[0] / means[1], ctx.dtype)
    return (gradient,)


_run = registration.op(
    "distributional_value_loss",
    "(Tensor logits, Tensor returns, Tensor? mask, Tensor? denominator, float v_min, float v_max, float sigma, "
    "str backend) -> Tensor[]",
    _forward,
    fake=lambda logits, *_: _empty_outputs(logits),
    differentiable=(0,),
    setup_context=_setup_context,
    backward=_autograd,
    returned=3,
)
