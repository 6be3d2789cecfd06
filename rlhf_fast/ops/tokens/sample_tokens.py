"""sample_tokens: one token per row of logits, with its log-probability under what it was sampled from and in full.

With z = softcap(logit_scale * logits) / temperature, m = max z, and e_j = exp(z_j - m), tokens are kept in this order:

    top_k:  the k greatest z
    top_p:  of those, the smallest set of greatest z whose share of their sum of e is at least top_p
    min_p:  of those, the ones with e_j >= min_p, that is p_j >= min_p p_max
    id = the first j, in the order of the ids, whose sum of kept e_0 .. e_j exceeds u (sum of kept e)
    logprob = log(e_id / sum of kept e),    full_logprob = log(e_id / sum of all e)

Each rule is a threshold on z, so that tokens with equal logits stay or go together: ties with the last one are kept.

An importance ratio to the distribution that a trainer models, softmax(z), needs full_logprob; logprob is that of the
sampler, and the two differ wherever something was truncated.

The uniform u has 53 bits of Philox4x32-10 with the counter (row, step) under the key `seed`: the draw of a row depends
on these three and its logits alone, not on the size or order of the batch, the number of threads, or the backend (up
to rounding where u falls between two tokens).

A draw has no derivative: results are detached.

Numerics: z and e in float32 (float64 for float64); sums of e, which decide the draw and give both results, in float64.

Cost per row: V s bytes read once on the CPU; on a GPU one sweep for each of maximum, sum, draw and rule, and about ten
more that find each of the thresholds of top_k and top_p exactly (from the second-level cache; fewer where logits of 16
bits take few values). Nothing is sorted or written but three numbers.

Sources: top-k, Fan et al. 2018 (arXiv 1805.04833); nucleus sampling (top-p), Holtzman et al. 2020 (arXiv 1904.09751,
eq. 2); min-p, Nguyen et al. 2024 (arXiv 2407.01082); Philox, Salmon et al. 2011 (SC11, section 3.3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import native, packed, resolve, strided, threads, triton_kernels
from rlhf_fast.ops.core import check, registration
from rlhf_fast.ops.core.philox import philox
from rlhf_fast.ops.tokens.transform import Transform, checked_transform, transformed


class Samples(NamedTuple):
    """What was sampled, (B,) each."""

    ids: Tensor  # int64
    logprobs: Tensor  # nats, under the truncated distribution
    full_logprobs: Tensor  # nats, under softmax(z)


@check.takes_numbers
def sample_tokens(
    logits: Tensor,
    *,
    seed: int | Tensor,
    row_ids: Tensor | None = None,
    step: int | Tensor = 0,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    backend: str | None = None,
) -> Samples:
    """One token per row, sampled from the truncated softmax(softcap(logit_scale * logits) / temperature).

    logits: (B, V) float32, bfloat16, float16 or float64; rows may be strided. -inf forbids a token.
    seed, step: a number or a 0-d int64 tensor (which a captured CUDA graph reads anew): of the run, and of the position
    in the sequence. row_ids: (B,) int64 or int32, the identity of each row; default 0 .. B - 1.
    temperature: > 0, one number or (B,). logit_scale: > 0. softcap: > 0 or None. For the greatest logit: top_k=1.
    top_k: >= 1 or None for all. top_p: in (0, 1]. min_p: in [0, 1].

    Returns Samples, without gradients; the log-probabilities are float32 (float64 for float64 logits). A row with NaN
    or without a finite logit gives id 0 and NaN. Raises ValueError or TypeError for what does not fit.
    """
    check.that(logits.dim() == 2 and logits.shape[1] >= 1, "logits", "(B, V) with V >= 1", logits)
    check.floating("logits", logits)
    check.that(top_k is None or top_k >= 1, "top_k", ">= 1 or None", top_k)
    check.that(0 < top_p <= 1, "top_p", "in (0, 1]", top_p)
    check.that(0 <= min_p <= 1, "min_p", "in [0, 1]", min_p)
    count, vocabulary = logits.shape
    transform = checked_transform(temperature, logit_scale, softcap, logits.shape[:1], ("logits", logits))
    if row_ids is None:
        row_ids = torch.arange(count, device=logits.device)
    check.shaped("row_ids", row_ids, (count,), "(B,)")
    check.same_device(("logits", logits), ("row_ids", row_ids))
    counters = [_number(name, value, logits) for name, value in (("seed", seed), ("step", step))]
    name = resolve("sample_tokens", IMPLS, logits.device, backend)
    draw = Draw(check.ids("row_ids", row_ids), *counters)
    rule = Rule(vocabulary if top_k is None else min(top_k, vocabulary), float(top_p), float(min_p))
    return Samples(*_run(Logits(check.unit_stride(logits.detach())), transform, draw, rule, name))


class Logits(NamedTuple):
    logits: Tensor  # (B, V) with unit last stride


class Draw(NamedTuple):
    """What the random numbers are made of, int64."""

    row_ids: Tensor  # (B,)
    seed: Tensor  # ()
    step: Tensor  # ()


class Rule(NamedTuple):
    """Which tokens are kept."""

    top_k: int  # at most V
    top_p: float
    min_p: float


def _number(name: str, value: int | Tensor, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.int64, device=like.device)
    check.shaped(name, value, (), "a number or a 0-d tensor")
    check.same_device(("logits", like), (name, value))
    return check.ids(name, value)


def reference(rows: Logits, transform: Transform, draw: Draw, rule: Rule, outputs: list[Tensor]) -> None:
    """Fills outputs = [ids, logprobs, full_logprobs] by definition, with a sort."""
    (logits,), (row_ids, seed, step), (top_k, top_p, min_p) = rows, draw, rule
    temperature, temperatures, logit_scale, softcap = transform
    capped = transformed(logits, logit_scale=logit_scale, softcap=softcap or None)
    row_max = capped.amax(-1, keepdim=True)
    divisor = temperature if temperatures is None else temperatures[:, None].to(capped.dtype)
    # z - max z: only differences meet a tiny temperature; + 0: -0. is no other number than 0.
    z = torch.where(capped == row_max, 0.0, (capped - row_max) / divisor + 0.0)
    weights = z.exp().double()
    order = z.sort(-1, descending=True)
    lowest = order.values[:, top_k - 1 : top_k]
    if top_p < 1:
        mass = torch.where(order.values >= lowest, weights.gather(-1, order.indices), 0.0).cumsum(-1)
        enough = (mass < top_p * mass[:, -1:]).sum(-1, keepdim=True).clamp_max(z.shape[1] - 1)
        lowest = torch.maximum(lowest, order.values.gather(-1, enough))
    if min_p > 0:
        lowest = torch.maximum(lowest, torch.full_like(row_max, min_p).log())
    remaining = torch.where(z >= lowest, weights, 0.0)
    cumulative, total = remaining.cumsum(-1), remaining.sum(-1, keepdim=True)
    a, b, _, _ = philox(seed, row_ids, row_ids >> 32, step, step >> 32)
    uniform = ((a >> 5) * 2.0**26 + (b >> 6)).double() / 2.0**53
    reached = (remaining > 0) & (cumulative > uniform[:, None] * total)
    positions = torch.arange(z.shape[1], device=z.device)
    first = torch.where(reached, positions, z.shape[1]).amin(-1)
    chosen = torch.minimum(first, torch.where(remaining > 0, positions, 0).amax(-1))
    below = z.gather(-1, chosen[:, None]).double()
    valid = torch.isfinite(row_max[:, 0])  # the maximum of a row with NaN is NaN
    outputs[0].copy_(torch.where(valid, chosen, 0))
    for out, sum_of in zip(outputs[1:], (total, weights.sum(-1, keepdim=True)), strict=True):
        out.copy_(torch.where(valid, (below - torch.log1p(sum_of - 1))[:, 0], torch.nan))


def _cpu(rows: Logits, transform: Transform, draw: Draw, rule: Rule, outputs: list[Tensor]) -> None:
    temperature, temperatures, logit_scale, softcap = transform
    at, code, (count, stride) = strided(rows.logits)
    native().sample_tokens(
        at, code, (count, rows.logits.shape[1], stride), (temperature, packed(temperatures), logit_scale, softcap),
        *[packed(x) for x in draw], *rule, [packed(x) for x in outputs], threads(),
    )  # fmt: skip


def _triton(rows: Logits, transform: Transform, draw: Draw, rule: Rule, outputs: list[Tensor]) -> None:
    triton_kernels("sample_tokens").sample(rows.logits, transform, *draw, *rule, outputs)


# impl(rows, transform, draw, rule, outputs = [ids, logprobs, full_logprobs])
IMPLS = {"cpu": _cpu, "triton": _triton}
OPS = {"sample_tokens": tuple(IMPLS)}


def _empty(rows: Logits, transform: Transform, draw: Draw, rule: Rule, backend: str) -> list[Tensor]:
    new, shape, dtype = rows.logits.new_empty, rows.logits.shape[:1], check.compute_dtype(rows.logits.dtype)
    return [new(shape, dtype=torch.int64), new(shape, dtype=dtype), new(shape, dtype=dtype)]


def _compute(rows: Logits, transform: Transform, draw: Draw, rule: Rule, backend: str) -> list[Tensor]:
    check.positive_rows("temperature", transform.temperatures, None)
    outputs = _empty(rows, transform, draw, rule, backend)
    (reference if backend == "reference" else IMPLS[backend])(rows, transform, draw, rule, outputs)
    return outputs


_run = registration.op_without_gradient(
    "sample_tokens", (Logits, Transform, Draw, Rule), _compute, fake=_empty,
    instead_of_vmap="its rows are a batch: give it all of them",
)  # fmt: skip
