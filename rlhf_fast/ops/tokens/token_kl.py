"""token_kl: the exact divergence of two distributions over the vocabulary, per token, from their logits.

With p = softmax(z) of the policy, q = softmax(w) of the reference, both logits under the transform of token_logprobs:

    reverse   KL(p || q) = sum_j p_j (log p_j - log q_j)                        the penalty of RL; mode-seeking
    forward   KL(q || p) = sum_j q_j (log q_j - log p_j)                        the loss of distillation; mode-covering
    js        b KL(q || m) + (1 - b) KL(p || m),  m = b q + (1 - b) p           b = js_weight in (0, 1)

    d reverse / d z_j = p_j (log p_j - log q_j - reverse)
    d forward / d z_j = p_j - q_j
    d js / d z_j      = (1 - b) p_j (log p_j - log m_j - KL(p || m))

"Forward" and "reverse" are distillation's words, with the reference as the teacher; what RLHF calls the KL to the
reference, with samples from the policy, is `reverse`. The reference is a constant: it gets no gradient. `top_k` keeps
the reference's k most probable tokens and renormalises both p and q over them (among equal logits at the k-th place,
which are kept is torch.topk's choice).

Numerics. Every KL is summed as x log(x / y) - x + y, which is never negative, takes a series where x is near y, and to
which an error of a normaliser is of second order: a KL of 1e-12 keeps its digits in float32, where the plain sum is off
by 1e-7, and equal logits give exactly 0. The gradient of a token with more than half of p is taken from the others', as
a row's gradient sums to 0. A token forbidden (-inf) on both sides is left out; one that is forbidden only under q, or
only under p, makes `reverse`, or `forward`, infinite. Computed in float32 (float64 for float64).

Cost per row of V logits of s bytes: forward 6 V s bytes read, of which 2 V s from memory where two rows fit a cache,
and about 40 V FLOPs; backward the same without the log-sum-exp, and V s written.

Sources: Agarwal et al. 2024, "On-Policy Distillation of Language Models" (arXiv 2306.13649, section 2 and the
generalised Jensen-Shannon divergence with beta = b); Lin 1991, "Divergence measures based on the Shannon entropy".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import native, packed, resolve, strided, threads
from rlhf_fast.ops.core import check, registration
from rlhf_fast.ops.tokens import token_logprobs
from rlhf_fast.ops.tokens.token_logprobs import RowKernels, planes
from rlhf_fast.ops.tokens.transform import Transform, checked_transform, transformed


@check.takes_numbers
def token_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    variant: str = "reverse",
    js_weight: float = 0.5,
    top_k: int | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The divergence of softmax(z) from the reference's, per token, in nats, differentiable by `logits`.

    logits, ref_logits: (..., V) of one type, float32, bfloat16, float16 or float64; leading dimensions may be strided.
    variant: one of VARIANTS. js_weight: the reference's share of the mixture of `js`, in (0, 1).
    top_k: only the reference's k most probable tokens, 1 <= k <= V; None for all.
    temperature (one number or (...) one per row), logit_scale, softcap: as in token_logprobs, for both.
    mask: (...) any dtype, nonzero counts; elsewhere result and gradient are 0 and the logits are not read.

    Returns (...) float32 (float64 for float64 logits).
    Raises ValueError or TypeError for shapes, types and values that do not fit.
    """
    check.floating("logits", logits)
    check.that(logits.dim() >= 1 and logits.shape[-1] >= 1, "logits", "(..., V) with V >= 1", logits)
    check.shaped("ref_logits", ref_logits, logits.shape, "the shape of logits")
    if ref_logits.dtype != logits.dtype:
        raise TypeError(f"ref_logits must have the type of logits, {logits.dtype}, got {ref_logits.dtype}")
    check.same_device(("logits", logits), ("ref_logits", ref_logits), ("mask", mask))
    divergence = checked_divergence(variant, js_weight, top_k, logits.shape[-1])
    shape = logits.shape[:-1]
    transform = checked_transform(temperature, logit_scale, softcap, shape, ("logits", logits))
    mask = check.mask_bytes(mask, shape, "logits.shape[:-1]")
    ref_logits = ref_logits.detach()
    name = resolve("token_kl", IMPLS, logits.device, backend)
    if name == "reference":
        return reference(
            logits, ref_logits, variant=variant, js_weight=js_weight, top_k=top_k, temperature=temperature,
            logit_scale=logit_scale, softcap=softcap, mask=mask,
        )  # fmt: skip
    if top_k is not None:
        logits, ref_logits = restricted(logits, ref_logits, top_k)[:2]
    rows, ref_rows = planes(logits), planes(ref_logits)
    both = _Rows(rows, ref_rows, None if mask is None else mask.view(rows.shape[:-1]))
    return _run(both, transform, divergence, name)[0].view(shape)


class Divergence(NamedTuple):
    """Which divergence, as the kernels take it."""

    variant: str
    js_weight: float


def checked_divergence(variant: str, js_weight: float, top_k: int | None, vocabulary: int) -> Divergence:
    """Raises ValueError for what is outside its bounds."""
    check.one_of("variant", variant, VARIANTS)
    check.that(0 < js_weight < 1, "js_weight", "in (0, 1)", js_weight)
    if top_k is not None and not 1 <= top_k <= vocabulary:
        raise ValueError(f"top_k must be in [1, V] = [1, {vocabulary}], got {top_k}")
    return Divergence(variant, js_weight)


def restricted(logits: Tensor, ref_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both logits (..., top_k) at the reference's most probable tokens, and which these are (..., top_k)."""
    values, index = ref_logits.topk(top_k, dim=-1)
    return logits.gather(-1, index), values, index


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_j p_j (log p_j - log q_j), without the tokens whose p_j is 0."""
    none = log_p == -torch.inf
    return (log_p.exp() * (log_p.masked_fill(none, 0.0) - log_q.masked_fill(none, 0.0))).sum(-1)


def _jensen_shannon(log_p: Tensor, log_q: Tensor, js_weight: float) -> Tensor:
    none = (log_p == -torch.inf) & (log_q == -torch.inf)
    from_q, from_p = log_q.masked_fill(none, 0.0), log_p.masked_fill(none, 0.0)
    log_m = torch.logaddexp(from_q + math.log(js_weight), from_p + math.log1p(-js_weight))
    return js_weight * _kl(log_q, log_m) + (1 - js_weight) * _kl(log_p, log_m)


# (log p, log q, js_weight) -> divergence per row
VARIANTS = {
    "reverse": lambda log_p, log_q, js_weight: _kl(log_p, log_q),
    "forward": lambda log_p, log_q, js_weight: _kl(log_q, log_p),
    "js": _jensen_shannon,
}


def reference(
    logits: Tensor, ref_logits: Tensor, *, variant: str = "reverse", js_weight: float = 0.5, top_k: int | None = None,
    temperature: float | Tensor = 1.0, logit_scale: float = 1.0, softcap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The divergence by definition, differentiable any number of times."""
    both = [
        transformed(x, temperature=temperature, logit_scale=logit_scale, softcap=softcap, mask=mask)
        for x in (logits, ref_logits.detach())
    ]
    if top_k is not None:
        both = list(restricted(both[0], both[1], top_k)[:2])
    log_p, log_q = (torch.log_softmax(z, -1) for z in both)
    kl = VARIANTS[variant](log_p, log_q, js_weight)
    return kl if mask is None else torch.where(mask != 0, kl, torch.zeros_like(kl))


def _native_arguments(logits: Tensor, ref_logits: Tensor, mask: Tensor | None, transform: Transform, js_weight: float,
                      stats: list[Tensor]) -> tuple[Any, ...]:  # fmt: skip
    temperature, temperatures, logit_scale, softcap = transform
    (at, code, sizes), (ref_at, _, ref_sizes) = strided(logits), strided(ref_logits)
    return (
        at, ref_at, code, sizes, ref_sizes, logits.shape[-1], packed(mask),
        (temperature, packed(temperatures), logit_scale, softcap), js_weight, [packed(s) for s in stats],
    )  # fmt: skip


def _cpu_forward(logits: Tensor, ref_logits: Tensor, mask: Tensor | None, transform: Transform, variant: str,
                 js_weight: float, stats: list[Tensor]) -> None:  # fmt: skip
    arguments = _native_arguments(logits, ref_logits, mask, transform, js_weight, stats)
    native().token_kl_forward(variant, *arguments, threads())


def _cpu_backward(logits: Tensor, ref_logits: Tensor, mask: Tensor | None, transform: Transform, variant: str,
                  js_weight: float, stats: list[Tensor], grad_kl: Tensor, gradient: Tensor) -> None:  # fmt: skip
    arguments = _native_arguments(logits, ref_logits, mask, transform, js_weight, stats)
    at, _, sizes = strided(gradient)
    native().token_kl_backward(variant, *arguments, packed(grad_kl), at, sizes, threads())


# On rows of logits and ref_logits (outer, inner, V) with unit last stride, which linear_kl shares:
# forward(logits, ref_logits, mask, transform, *divergence, stats): fills kl and mean of
#     stats = [kl, mean, logsum, ref_logsum], each (outer, inner); mean is what the gradient is centred by, and the two
#     logsums are those of token_logprobs.
# backward(logits, ref_logits, mask, transform, *divergence, stats, grad_kl, gradient): `gradient` may be the logits or
#     the reference's.
IMPLS = {"cpu": RowKernels(_cpu_forward, _cpu_backward), "triton": RowKernels.triton("token_kl")}
OPS = {"token_kl": tuple(IMPLS)}


def logsum(logits: Tensor, mask: Tensor | None, transform: Transform, backend: str) -> Tensor:
    """(outer, inner): log-sum-exp of the transformed logits (outer, inner, V) less their maximum."""
    stats = token_logprobs.empty_stats(logits, False)
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    token_logprobs.IMPLS[backend].forward(logits, targets, mask, transform, False, stats, None)
    return stats[3]


class _Rows(NamedTuple):
    logits: Tensor  # (outer, inner, V)
    ref_logits: Tensor
    mask: Tensor | None


class _Upstream(NamedTuple):
    stats: list[Tensor]
    grad_kl: Tensor


def _empty_stats(rows: _Rows, *_: Any) -> list[Tensor]:
    shape, dtype = rows.logits.shape[:-1], check.compute_dtype(rows.logits.dtype)
    return [rows.logits.new_empty(shape, dtype=dtype) for _ in range(4)]


def _forward(rows: _Rows, transform: Transform, divergence: Divergence, backend: str) -> list[Tensor]:
    check.positive_rows("temperature", transform.temperatures, rows.mask)
    stats = _empty_stats(rows)[:2]
    stats += [logsum(x, rows.mask, transform, backend) for x in (rows.logits, rows.ref_logits)]
    IMPLS[backend].forward(*rows, transform, *divergence, stats)
    return stats


def _backward(rows: _Rows, transform: Transform, divergence: Divergence, upstream: _Upstream,
              backend: str) -> list[Tensor]:  # fmt: skip
    gradient = torch.empty_like(rows.logits, memory_format=torch.contiguous_format)
    IMPLS[backend].backward(*rows, transform, *divergence, *upstream, gradient)
    return [gradient]


_run_backward = registration.op_without_gradient(
    "token_kl_backward", (_Rows, Transform, Divergence, _Upstream), _backward,
    fake=lambda rows, *_: [torch.empty_like(rows.logits, memory_format=torch.contiguous_format)],
)  # fmt: skip


def _gradients(saved: registration.Saved, gradients: Sequence[Tensor | None]) -> Mapping[str, Tensor]:
    assert gradients[0] is not None
    upstream = _Upstream(list(saved.results), gradients[0].contiguous())
    return {"logits": _run_backward(*saved.inputs, upstream, saved.backend)[0]}


_run = registration.op(
    "token_kl", (_Rows, Transform, Divergence), _forward, fake=_empty_stats, differentiable=("logits",),
    saves=("logits", "ref_logits", "mask", "temperatures"), backward=_gradients, returned=1,
)  # fmt: skip
