"""kl_estimate: estimates of KL(pi || ref) per token from the log-probabilities of the sampled tokens.

With log r = ref_logprob - logprob, for tokens sampled from pi:

    k1 = -log r                  unbiased, high variance, may be negative      d k1 / d logprob = 1
    k2 = (log r)^2 / 2           biased, low variance                          d k2 / d logprob = -log r
    k3 = r - 1 - log r           unbiased, low variance, never negative        d k3 / d logprob = 1 - r

and the derivative by ref_logprob is the negative one. The gradients in a loss, in expectation over pi: that of k2 is
the gradient of KL(pi || ref), that of k1 is zero, and that of k3 is the gradient of KL(ref || pi). Two options make
the gradient of k1 and k3 that of KL(pi || ref):

    gradient="k2"     the value of k1 or k3 with the derivative of k2 ("straight through")
    old_logprobs      w k with w = exp(logprob - old_logprob), for tokens sampled from the policy behind old_logprobs;
                      d (w k) / d logprob = w (k + d k / d logprob), which for k3 is -w log r, k2's derivative times w

With both, the value is w k and the derivative by logprob -w log r. By ref_logprob the factor w is a constant.

Numerics. r - 1 - log r cancels near r = 1, where it is (log r)^2 / 2: the kernels take a series there, and 1 - r
through expm1. Nothing is clamped by default, and r overflows float32 from log r = 88.8: `log_ratio_clip`, `value_clip`
and `weight_clip` bound log r, the estimate and w. Computed in float32 (float64 for float64).

Cost per token: two or three numbers of s bytes read, two of 4 bytes (value and derivative) written, about 40 FLOPs;
backward reads the derivative and the upstream gradient and writes the gradient.

Sources: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html); the weighted k3 as the unbiased
estimate of DeepSeek-V3.2 (arXiv 2512.02556).
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import native, packed, plane, resolve, threads, triton_kernels
from rlhf_fast.ops.core import check, masked_loss, registration


@check.takes_numbers
def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    variant: str = "k1",
    gradient: str | None = None,
    old_logprobs: Tensor | None = None,
    log_ratio_clip: float | None = None,
    value_clip: float | None = None,
    weight_clip: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The estimate of every token, in nats; logprobs and ref_logprobs get a gradient.

    logprobs, ref_logprobs: (B, T), or (N,) packed, in nats; float32, bfloat16, float16 or float64, any strides.
    variant: one of VARIANTS. gradient: the one whose derivative is taken instead of the variant's own, at the
    log-ratio before any clip. old_logprobs: the shape of logprobs; those of the policy that sampled the tokens, a
    constant: estimates are weighted with w = exp(logprob - old_logprob).
    log_ratio_clip, value_clip: bounds > 0 on |log r| and on |estimate|, beyond which the own derivative is 0.
    weight_clip: upper bound > 0 on w, beyond which w is a constant. None: no bound.
    Returns the shape of logprobs, float32 (float64 for float64 logprobs).
    What stands behind a mask is the caller's: every element is computed on its own.
    Raises ValueError or TypeError for shapes, types and values that do not fit.
    """
    shape = masked_loss.per_token_shape("logprobs", logprobs)
    old = {} if old_logprobs is None else {"old_logprobs": old_logprobs}
    masked_loss.floats(shape, "the shape of logprobs", logprobs=logprobs, ref_logprobs=ref_logprobs, **old)
    check.one_of("variant", variant, VARIANTS)
    if gradient is not None:
        check.one_of("gradient", gradient, VARIANTS)
    bounds = {"log_ratio_clip": log_ratio_clip, "value_clip": value_clip, "weight_clip": weight_clip}
    clips = {name: math.inf if x is None else check.positive(name, x) for name, x in bounds.items()}
    name = resolve("kl_estimate", IMPLS, logprobs.device, backend)
    if name == "reference":
        return reference(logprobs, ref_logprobs, variant=variant, gradient=gradient, old_logprobs=old_logprobs, **clips)
    tokens = Tokens(
        masked_loss.plane(logprobs), masked_loss.plane(ref_logprobs),
        None if old_logprobs is None else masked_loss.plane(old_logprobs),
    )  # fmt: skip
    by_ref = torch.is_grad_enabled() and ref_logprobs.requires_grad
    return _run(tokens, Estimate(variant, gradient or "own", list(clips.values()), by_ref), name)[0].view(shape)


def k1(log_ratio: Tensor) -> Tensor:
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    return torch.expm1(log_ratio) - log_ratio


VARIANTS = {"k1": k1, "k2": k2, "k3": k3}  # of log r; the order is that of csrc/math/kl_estimate.h


def reference(
    logprobs: Tensor, ref_logprobs: Tensor, *, variant: str = "k1", gradient: str | None = None,
    old_logprobs: Tensor | None = None, log_ratio_clip: float = math.inf, value_clip: float = math.inf,
    weight_clip: float = math.inf,
) -> Tensor:  # fmt: skip
    """The estimates by definition, differentiable any number of times."""
    dtype = check.compute_dtype(logprobs.dtype)
    logprobs, log_ratio = logprobs.to(dtype), ref_logprobs.to(dtype) - logprobs.to(dtype)
    if value_clip < math.inf:  # where exp overflows the estimate is clipped, and inf * 0 would be its derivative
        log_ratio_clip = min(log_ratio_clip, math.log(torch.finfo(dtype).max))
    estimate = VARIANTS[variant](log_ratio.clamp(-log_ratio_clip, log_ratio_clip)).clamp(-value_clip, value_clip)
    weight = torch.ones_like(logprobs)
    if old_logprobs is not None:
        weight = (logprobs - old_logprobs.detach().to(dtype)).exp().clamp(max=weight_clip)
    if gradient is None:
        # The weight follows logprobs alone; differentiating it by ref_logprobs would be 0 anyway.
        return masked_loss.product(weight, estimate)
    slope = VARIANTS[gradient](log_ratio)
    return masked_loss.product(weight.detach(), estimate.detach() + (slope - slope.detach()))


class Tokens(NamedTuple):
    """(rows, columns)"""

    logprobs: Tensor
    ref_logprobs: Tensor
    old_logprobs: Tensor | None


class Estimate(NamedTuple):
    variant: str
    gradient: str  # "own" or one of VARIANTS
    clips: list[float]  # of log r, the estimate and w; infinity for no bound
    by_ref: bool  # whether ref_logprobs get a gradient


def _cpu(tokens: Tokens, estimate: Estimate, results: list[Tensor]) -> None:
    value = results[0]
    native().kl_estimate(
        estimate.variant, estimate.gradient, [plane(x) for x in tokens], *value.shape, estimate.clips,
        value.dtype == torch.float64, [packed(x) for x in results], threads(),
    )  # fmt: skip


def _triton(tokens: Tokens, estimate: Estimate, results: list[Tensor]) -> None:
    triton_kernels("kl_estimate").forward(*tokens, estimate.variant, estimate.gradient, estimate.clips, *results)


# impl(tokens, estimate, results of _empty)
IMPLS = {"cpu": _cpu, "triton": _triton}
OPS = {"kl_estimate": tuple(IMPLS)}


def _empty(tokens: Tokens, estimate: Estimate, backend: str, *, by_logprob: bool = True) -> list[Tensor]:
    """[estimates, their derivatives by logprobs and by ref_logprobs, empty where not wanted]"""
    logprobs, dtype = tokens.logprobs, check.compute_dtype(tokens.logprobs.dtype)
    shapes = [logprobs.shape if wanted else (0,) for wanted in (True, by_logprob, estimate.by_ref)]
    return [logprobs.new_empty(shape, dtype=dtype) for shape in shapes]


def _compute(tokens: Tokens, estimate: Estimate, backend: str, *, by_logprob: bool = True) -> list[Tensor]:
    results = _empty(tokens, estimate, backend, by_logprob=by_logprob)
    IMPLS[backend](tokens, estimate, results)
    return results


_run = registration.op(
    "kl_estimate",
    (Tokens, Estimate),
    _compute,
    fake=_empty,
    differentiable=("logprobs", "ref_logprobs"),
    saves_results=slice(1, None),
    backward=masked_loss.scaled_gradients(("logprobs", "ref_logprobs")),
    returned=1,
    without_gradient=partial(_compute, by_logprob=False),  # and without by_ref: ref_logprobs requires none
)
