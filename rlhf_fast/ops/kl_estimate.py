"""kl_estimate: estimates of KL(pi || ref) per token from the log-probabilities of the sampled tokens.

With log r = ref_logprob - logprob, for tokens sampled from pi:

    k1 = -log r                  unbiased, high variance, may be negative      d k1 / d logprob = 1
    k2 = (log r)^2 / 2           biased, low variance                          d k2 / d logprob = -log r
    k3 = r - 1 - log r           unbiased, low variance, never negative        d k3 / d logprob = 1 - r

and the derivative by ref_logprob is the negative one. In a loss, k2 has the gradient of the KL itself in expectation
over pi; that of k1 is zero in expectation, and that of k3 is the gradient of KL(ref || pi).

Numerics. r - 1 - log r cancels near r = 1, where it is (log r)^2 / 2: the kernels take a series there, and 1 - r
through expm1. r is not clamped: it overflows float32 from log r = 88.8. Computed in float32 (float64 for float64).

Cost per token: two numbers of s bytes read, two of 4 bytes (value and derivative) written, about 40 FLOPs; backward
reads the derivative and the upstream gradient and writes the gradient.

Sources: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.backends import DTYPE_CODES, address, native, resolve, threads
from rlhf_fast.ops import _check, _losses


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k1", backend: str | None = None) -> Tensor:
    """The estimate of every token, in nats; both inputs get a gradient.

    logprobs, ref_logprobs: (B, T), or (N,) packed, in nats; float32, bfloat16, float16 or float64, any strides.
    estimator: one of ESTIMATORS. Returns the shape of logprobs, float32 (float64 for float64 logprobs).
    What stands behind a mask is the caller's: every element is computed on its own.
    Raises ValueError or TypeError for shapes, types and values that do not fit.
    """
    shape = _losses.per_token_shape("logprobs", logprobs)
    _losses.floats(shape, "the shape of logprobs", logprobs=logprobs, ref_logprobs=ref_logprobs)
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    name = resolve("kl_estimate", IMPLS, logprobs.device, backend)
    if name == "reference":
        return reference(logprobs, ref_logprobs, estimator=estimator)
    planes = _losses.plane(logprobs), _losses.plane(ref_logprobs)
    return torch.ops.rlhf_fast.kl_estimate(*planes, estimator, name)[0].view(shape)


# log r -> estimate
ESTIMATORS = {
    "k1": lambda log_ratio: -log_ratio,
    "k2": lambda log_ratio: 0.5 * log_ratio.square(),
    "k3": lambda log_ratio: torch.expm1(log_ratio) - log_ratio,
}


def reference(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k1") -> Tensor:
    """The estimates by definition, differentiable any number of times."""
    dtype = _check.compute_dtype(logprobs.dtype)
    return ESTIMATORS[estimator](ref_logprobs.to(dtype) - logprobs.to(dtype))


def _cpu(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, value: Tensor, derivative: Tensor) -> None:
    planes = [(address(x), DTYPE_CODES[x.dtype], *x.stride()) for x in (logprobs, ref_logprobs)]
    native().kl_estimate(
        estimator, *planes, *value.shape, value.dtype == torch.float64, address(value), address(derivative), threads()
    )


def _triton(*args: Any) -> None:
    from rlhf_fast.kernels import kl_estimate as kernels

    kernels.forward(*args)


# (logprobs, ref_logprobs, estimator, value, derivative by logprobs), all (rows, columns)
IMPLS = {"cpu": _cpu, "triton": _triton}
OPS = {"kl_estimate": tuple(IMPLS)}


def _empty(logprobs: Tensor) -> list[Tensor]:
    dtype = _check.compute_dtype(logprobs.dtype)
    return [logprobs.new_empty(logprobs.shape, dtype=dtype) for _ in range(2)]


@torch.library.custom_op("rlhf_fast::kl_estimate", mutates_args=())
def _forward(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, backend: str) -> list[Tensor]:
    results = _empty(logprobs)
    IMPLS[backend](logprobs, ref_logprobs, estimator, *results)
    return results


@_forward.register_fake
def _(logprobs, ref_logprobs, estimator, backend):
    return _empty(logprobs)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.dtypes = [x.dtype for x in inputs[:2]]
    ctx.save_for_backward(output[1])


def _autograd(ctx, grads):
    (derivative,) = ctx.saved_tensors
    if grads[0] is None:
        return None, None, None, None
    wanted = zip((grads[0], -grads[0]), ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
    results = [_losses.scaled_gradient(derivative, g, dtype) if needs else None for g, dtype, needs in wanted]
    return *results, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
