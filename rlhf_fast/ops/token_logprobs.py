"""token_logprobs: log-probabilities (and entropies) of given tokens from logits, in one read of the logits.

With z = logits / temperature, y = target, p = softmax(z), lse = log sum_j exp(z_j):

    logprob = z_y - lse = -softplus(lse_{j != y} - z_y)
    entropy = -sum_j p_j log p_j

    d logprob / d logits_j = (1[j = y] - p_j) / temperature          with 1 - p_y = -expm1(logprob)
    d entropy / d logits_j = -p_j (log p_j + entropy) / temperature

Numerics. The softplus form, with the target left out of the sum, keeps a confident token's value and gradient
(z_y - lse is 15 % off at a margin of 14 nats and exactly 0 from 16 in float32). The entropy is summed as
log1p(r) + t / (1 + r) with m the maximal logit, r = sum over the others of exp(z - m), t = sum exp(z - m) (m - z):
all terms are positive, so a low entropy does not cancel. Everything is computed in float32 (float64 for float64).
The row statistics are kept as (m, log1p(r)) apart, so that p is exact also for logits of +-1e4.

Cost per row of V logits of s bytes: forward V s bytes read and about 10 V FLOPs; backward V s bytes read and
V s written (in place: into the logits themselves).

Sources: online softmax, Milakov & Gimelshein 2018 (arXiv 1805.02867, alg. 3); per-token log-probabilities as in
PPO, Schulman et al. 2017 (arXiv 1707.06347).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.backends import DTYPE_CODES, address, native, resolve, row_sizes, stream, threads
from rlhf_fast.ops import _check


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` under softmax(logits / temperature), in nats.

    logits: (..., V) float32, bfloat16, float16 or float64; leading dimensions may be strided (`logits[:, :-1]` is not
    copied). targets: (...) int64 or int32 ids in [0, V); what stands behind the mask is never looked at.
    mask: (...) any dtype, nonzero counts; elsewhere the results and the gradient are 0 and the logits are not read.
    return_entropy: also the entropy of the distribution, differentiable.
    inplace_backward: write the gradient over the logits, which must not be used after the backward pass.

    Returns (...) float32 (float64 for float64 logits), or the pair (logprobs, entropy).
    Raises ValueError or TypeError for shapes, types and values that do not fit, IndexError on the CPU for a target
    outside [0, V) that counts.
    """
    _check.floating("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must be (..., V) with V >= 1, got {tuple(logits.shape)}")
    shape = logits.shape[:-1]
    _check.shaped("targets", targets, shape, "logits.shape[:-1]")
    _check.same_device(("logits", logits), ("targets", targets), ("mask", mask))
    temperature = _check.positive("temperature", temperature)
    ids = _check.ids("targets", targets)
    mask = _check.mask_bytes(mask, shape, "logits.shape[:-1]")
    name = resolve("token_logprobs", IMPLS, logits.device, backend)
    if name == "reference":
        logprobs, entropy = reference(logits, ids, temperature=temperature, mask=mask)
    else:
        # (outer, inner, V): a view of up to three dimensions, whatever the strides of the leading ones.
        rows = logits.reshape(-1, *logits.shape[-2:]) if logits.dim() > 3 else logits[(None,) * (3 - logits.dim())]
        if rows.stride(-1) != 1 and rows.shape[-1] > 1:
            rows = rows.contiguous()
        flat = rows.shape[:-1]
        results = torch.ops.rlhf_fast.token_logprobs(
            rows, ids.view(flat), None if mask is None else mask.view(flat), temperature, return_entropy,
            inplace_backward, name,
        )  # fmt: skip
        logprobs, entropy = results[0].view(shape), results[1].view(shape if return_entropy else -1)
    return (logprobs, entropy) if return_entropy else logprobs


def reference(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy) by definition, differentiable any number of times."""
    z = logits.to(_check.compute_dtype(logits.dtype)) / temperature
    if mask is not None:  # a masked row is replaced before the softmax, so that nothing behind the mask gets through
        z = torch.where((mask != 0)[..., None], z, torch.zeros_like(z))
        targets = torch.where(mask != 0, targets, torch.zeros_like(targets))
    z = z - z.amax(-1, keepdim=True).detach()  # changes nothing but the rounding, which matters for logits of 1e4
    is_target = torch.arange(z.shape[-1], device=z.device) == targets[..., None]
    finite = z.clamp_min(torch.finfo(z.dtype).min / 2)  # forbidden tokens: probability 0, gradient 0 and not NaN
    others = torch.logsumexp(finite.masked_fill(is_target, -torch.inf), -1)
    target = z.gather(-1, targets[..., None])[..., 0]
    logprobs = torch.nn.functional.logsigmoid(target - others)  # -softplus, without overflow
    log_p = torch.log_softmax(finite, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    if mask is not None:
        logprobs, entropy = (torch.where(mask != 0, x, torch.zeros_like(x)) for x in (logprobs, entropy))
    return logprobs, entropy


def _cpu_forward(logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, want_entropy: bool,
                 stats: list[Tensor], gradient: Tensor | None) -> None:  # fmt: skip
    native().token_logprobs_forward(
        address(logits), DTYPE_CODES[logits.dtype], row_sizes(logits), logits.shape[-1], address(targets),
        address(mask), temperature, want_entropy, [address(s) for s in stats], address(gradient), threads(),
    )  # fmt: skip


def _cpu_backward(logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, stats: list[Tensor],
                  grad_logprobs: Tensor | None, grad_entropy: Tensor | None, gradient: Tensor) -> None:  # fmt: skip
    native().token_logprobs_backward(
        address(logits), DTYPE_CODES[logits.dtype], row_sizes(logits), logits.shape[-1], address(targets),
        address(mask), temperature, [address(s) if s.numel() else 0 for s in stats], address(grad_logprobs),
        address(grad_entropy), address(gradient), row_sizes(gradient), threads(),
    )  # fmt: skip


def _triton_forward(*args: Any) -> None:
    from rlhf_fast.kernels import token_logprobs as kernels

    kernels.forward(*args)


def _triton_backward(*args: Any) -> None:
    from rlhf_fast.kernels import token_logprobs as kernels

    kernels.backward(*args)


def _cuda_forward(logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, want_entropy: bool,
                  stats: list[Tensor], gradient: Tensor | None) -> None:  # fmt: skip
    native().token_logprobs_forward_cuda(
        address(logits), DTYPE_CODES[logits.dtype], row_sizes(logits), logits.shape[-1], address(targets),
        address(mask), temperature, want_entropy, [address(s) for s in stats], address(gradient),
        logits.get_device(), stream(logits.device),
    )  # fmt: skip


def _cuda_backward(logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, stats: list[Tensor],
                   grad_logprobs: Tensor | None, grad_entropy: Tensor | None, gradient: Tensor) -> None:  # fmt: skip
    native().token_logprobs_backward_cuda(
        address(logits), DTYPE_CODES[logits.dtype], row_sizes(logits), logits.shape[-1], address(targets),
        address(mask), temperature, [address(s) if s.numel() else 0 for s in stats], address(grad_logprobs),
        address(grad_entropy), address(gradient), row_sizes(gradient), logits.get_device(), stream(logits.device),
    )  # fmt: skip


# forward(logits, targets, mask, temperature, want_entropy, stats, gradient | None)
# backward(logits, targets, mask, temperature, stats, grad_logprobs | None, grad_entropy | None, gradient)
# with logits (outer, inner, V), stats = [logprobs, entropy, row_max, row_logsum] each (outer, inner), or empty.
IMPLS = {
    "cpu": (_cpu_forward, _cpu_backward),
    "triton": (_triton_forward, _triton_backward),
    "cuda": (_cuda_forward, _cuda_backward),
}
OPS = {"token_logprobs": tuple(IMPLS)}


def empty_stats(logits: Tensor, want_entropy: bool) -> list[Tensor]:
    """Unwritten [logprobs, entropy (empty where not wanted), row_max, row_logsum] for logits (outer, inner, V)."""
    new = logits.new_empty
    dtype, shape = _check.compute_dtype(logits.dtype), logits.shape[:-1]
    return [new(shape if wanted else (0,), dtype=dtype) for wanted in (True, want_entropy, True, True)]


@torch.library.custom_op("rlhf_fast::token_logprobs", mutates_args=())
def _forward(logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, want_entropy: bool,
             inplace_backward: bool, backend: str) -> list[Tensor]:  # fmt: skip
    _check.targets_inside(targets, mask, logits.shape[-1])
    stats = empty_stats(logits, want_entropy)
    IMPLS[backend][0](logits, targets, mask, temperature, want_entropy, stats, None)
    return stats


@_forward.register_fake
def _(logits, targets, mask, temperature, want_entropy, inplace_backward, backend):
    return empty_stats(logits, want_entropy)


@torch.library.custom_op("rlhf_fast::token_logprobs_backward", mutates_args=())
def _backward(logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, stats: list[Tensor],
              grad_logprobs: Tensor | None, grad_entropy: Tensor | None, backend: str) -> Tensor:  # fmt: skip
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    IMPLS[backend][1](logits, targets, mask, temperature, stats, grad_logprobs, grad_entropy, gradient)
    return gradient


@_backward.register_fake
def _(logits, targets, mask, temperature, stats, grad_logprobs, grad_entropy, backend):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("rlhf_fast::token_logprobs_backward_", mutates_args={"logits"})
def _backward_inplace(logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, stats: list[Tensor],
                      grad_logprobs: Tensor | None, grad_entropy: Tensor | None, backend: str) -> None:  # fmt: skip
    IMPLS[backend][1](logits, targets, mask, temperature, stats, grad_logprobs, grad_entropy, logits)


def _setup_context(ctx, inputs, output):
    logits, targets, mask, ctx.temperature, ctx.want_entropy, ctx.inplace, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, mask, *output)


def _autograd(ctx, grads):
    logits, targets, mask, *stats = ctx.saved_tensors
    grad_logprobs, grad_entropy = (None if g is None else g.contiguous() for g in grads[:2])
    if not ctx.want_entropy:  # an empty output, not a result
        grad_entropy = None
    run = _backward_inplace if ctx.inplace else _backward
    gradient = run(logits, targets, mask, ctx.temperature, stats, grad_logprobs, grad_entropy, ctx.backend)
    return logits if ctx.inplace else gradient, None, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
