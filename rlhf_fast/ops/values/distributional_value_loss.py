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

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import native, packed, resolve, strided, threads, triton_kernels
from rlhf_fast.ops.core import check, masked_loss, registration
from rlhf_fast.ops.core.masked_loss import Over
from rlhf_fast.ops.values.value_loss import LossAndValues


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
) -> LossAndValues:
    """The HL-Gauss loss, the expected values and metrics; only `logits` gets a gradient.

    logits: (B, T, K), or (N, K) packed, K >= 2 bins; float32, bfloat16, float16 or float64, any strides.
    returns, mask: logits.shape[:-1]; denominator: as in value_loss.
    v_min < v_max: outer edges of the first and the last bin, in units of the returns. sigma > 0: standard deviation of
    the target, in the same units; default 0.75 of a bin's width.

    Returns (loss, {"outside_fraction": share of the returns outside of [v_min, v_max]}, values): the loss (), in nats;
    values logits.shape[:-1], detached, 0 behind the mask; float32 (float64 for float64 logits).
    Raises ValueError or TypeError for what does not fit.
    """
    check.floating("logits", logits)
    check.that(logits.dim() in (2, 3) and logits.shape[-1] >= 2, "logits", "(B, T, K) or (N, K) with K >= 2", logits)
    if not v_min < v_max:
        raise ValueError(f"v_min must be below v_max, got {v_min} and {v_max}")
    sigma = 0.75 * (v_max - v_min) / logits.shape[-1] if sigma is None else check.positive("sigma", sigma)
    numbers = Numbers(float(v_min), float(v_max), sigma)
    shape, meaning = logits.shape[:-1], "logits.shape[:-1]"
    masked_loss.floats(shape, meaning, returns=returns)
    check.same_device(("logits", logits), ("returns", returns))
    over = masked_loss.over(("logits", logits), shape, meaning, mask, denominator)
    name = resolve("distributional_value_loss", IMPLS, logits.device, backend)
    if name == "reference":
        return reference(logits, returns, over, numbers)
    flat_returns = check.flat(returns.detach().to(check.compute_dtype(logits.dtype)))
    inputs = Inputs(check.unit_stride(check.rows(logits)), flat_returns)
    if over.mask is not None:
        over = over._replace(mask=over.mask.view(-1))
    loss, metric, values, *_ = _run(inputs, over, numbers, name)
    return LossAndValues(loss, {"outside_fraction": metric.detach()}, values.detach().view(shape))


class Inputs(NamedTuple):
    logits: Tensor  # (N, K)
    returns: Tensor  # (N,)


class Numbers(NamedTuple):
    v_min: float
    v_max: float
    sigma: float


def reference(logits: Tensor, returns: Tensor, over: Over, numbers: Numbers) -> LossAndValues:
    """By definition, differentiable any number of times."""
    v_min, v_max, sigma = numbers
    dtype, bins = check.compute_dtype(logits.dtype), logits.shape[-1]
    z = masked_loss.counted(logits, None if over.mask is None else over.mask[..., None], dtype)
    returns = masked_loss.counted(returns.detach(), over.mask, dtype)
    edges = torch.linspace(v_min, v_max, bins + 1, dtype=torch.float64, device=logits.device).to(dtype)
    cumulative = torch.erf((edges - returns.clamp(v_min, v_max)[..., None]) / (2**0.5 * sigma))
    target = cumulative.diff(dim=-1) / (cumulative[..., -1:] - cumulative[..., :1])
    log_q = torch.log_softmax(z, -1)
    # A bin that the target never meets may be forbidden: 0 * inf is 0 there.
    losses = -torch.where(target == 0, 0, target * log_q).sum(-1)
    values = masked_loss.counted((log_q.exp() * (edges[1:] + edges[:-1]) / 2).sum(-1).detach(), over.mask, dtype)
    outside = (returns < v_min) | (returns > v_max)
    return LossAndValues(*masked_loss.means(losses, over, outside_fraction=outside.to(dtype)), values)


def _cpu(inputs: Inputs, over: Over, numbers: Numbers, outputs: list[Tensor]) -> None:
    at, code, (count, stride) = strided(inputs.logits)
    native().distributional_value_loss(
        at, code, (count, inputs.logits.shape[1], stride), [packed(x) for x in (inputs.returns, *over)], numbers,
        [packed(x) for x in outputs], threads(),
    )  # fmt: skip


def _triton(inputs: Inputs, over: Over, numbers: Numbers, outputs: list[Tensor]) -> None:
    triton_kernels("distributional_value_loss").distributional_value_loss(*inputs, *over, *numbers, outputs)


IMPLS = {"cpu": _cpu, "triton": _triton}
OPS = {"distributional_value_loss": tuple(IMPLS)}


def _outputs(inputs: Inputs, over: Over, numbers: Numbers, backend: str) -> list[Tensor]:
    """[loss (), outside fraction (), values (N,), q - p (N, K)], and as in masked_loss the divisor of the last."""
    logits = inputs.logits
    shapes = ((), (), logits.shape[:1], logits.shape, *[()] * (backend != "cpu"))
    return [logits.new_empty(shape, dtype=check.compute_dtype(logits.dtype)) for shape in shapes]


_run = registration.op(
    "distributional_value_loss", (Inputs, Over, Numbers), registration.filled(IMPLS, _outputs), fake=_outputs,
    differentiable=("logits",), saves_results=slice(3, None),
    backward=masked_loss.scaled_gradients(("logits",)), returned=3,
)  # fmt: skip
