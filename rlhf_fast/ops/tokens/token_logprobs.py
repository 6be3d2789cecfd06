"""token_logprobs: log-probabilities (and entropies) of given tokens from logits, in one read of the logits.

With s = softcap(logit_scale * logits), z = s / temperature, y = target, p = softmax(z), lse = log sum_j exp(z_j),
softcap(u) = c tanh(u / c) (none: u):

    logprob = z_y - lse
    entropy = -sum_j p_j log p_j

    d logprob / d logits_j = (1[j = y] - p_j) d z_j / d logits_j           with 1 - p_y = -expm1(logprob)
    d entropy / d logits_j = -p_j (log p_j + entropy) d z_j / d logits_j
    d lse / d logits_j = p_j d z_j / d logits_j
    d z / d logits = logit_scale (1 - (s / c)^2) / temperature              (no softcap: logit_scale / temperature)

Numerics. With m the maximal z and rest = the sum of exp(z - m) over all but ONE maximal element, logprob is
(z_y - m) - log1p(rest), where z_y - m is exactly 0 for the maximal element: so a confident token keeps its value and,
through expm1, its gradient (z_y - lse is 15 % off at a margin of 14 nats and exactly 0 from 15 in float32). The entropy
is summed as log1p(rest) + t / (1 + rest) with t = sum exp(z - m) (m - z): all terms are positive, so a low entropy does
not cancel. Everything is computed in float32 (float64 for float64). The row statistics are kept as (m, log1p(rest))
apart, so that p is exact also for logits of +-1e4. A temperature below 1e-30 counts as 1e-30, except in float64.

Cost per row of V logits of s bytes: forward V s bytes read and about 10 V FLOPs; backward V s bytes read and
V s written (in place: into the logits themselves). K targets per row cost K reads, and K^2 comparisons in backward.

Sources: online softmax, Milakov & Gimelshein 2018 (arXiv 1805.02867, alg. 3); per-token log-probabilities as in
PPO, Schulman et al. 2017 (arXiv 1707.06347); softcap as in Gemma 2, 2024 (arXiv 2408.00118, section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from rlhf_fast.backends import native, packed, resolve, stream, strided, threads, triton_kernels
from rlhf_fast.ops.core import check, registration
from rlhf_fast.ops.tokens import results
from rlhf_fast.ops.tokens.results import RowStats, Scored, row_stats, scored
from rlhf_fast.ops.tokens.transform import Transform, checked_transform, transformed

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["IMPLS", "OPS", "RowStats", "Transform", "empty_stats", "token_logprobs"]

Yes = Literal[True]


class Options(TypedDict, total=False):
    """The options of token_logprobs that do not change what it returns."""

    temperature: float | Tensor
    logit_scale: float
    softcap: float | None
    mask: Tensor | None
    inplace_backward: bool
    backend: str | None


# fmt: off
@overload
def token_logprobs(logits: Tensor, targets: Tensor, **options: Unpack[Options]) -> Tensor: ...
@overload
def token_logprobs(logits: Tensor, targets: Tensor, *, return_entropy: Yes,
                   **options: Unpack[Options]) -> results.WithEntropy: ...
@overload
def token_logprobs(logits: Tensor, targets: Tensor, *, return_lse: Yes,
                   **options: Unpack[Options]) -> results.WithLse: ...
@overload
def token_logprobs(logits: Tensor, targets: Tensor, *, return_stats: Yes,
                   **options: Unpack[Options]) -> results.WithStats: ...
@overload
def token_logprobs(logits: Tensor, targets: Tensor, *, return_entropy: Yes, return_lse: Yes,
                   **options: Unpack[Options]) -> results.WithEntropyLse: ...
@overload
def token_logprobs(logits: Tensor, targets: Tensor, *, return_entropy: Yes, return_stats: Yes,
                   **options: Unpack[Options]) -> results.WithEntropyStats: ...
@overload
def token_logprobs(logits: Tensor, targets: Tensor, *, return_lse: Yes, return_stats: Yes,
                   **options: Unpack[Options]) -> results.WithLseStats: ...
@overload
def token_logprobs(logits: Tensor, targets: Tensor, *, return_entropy: Yes, return_lse: Yes, return_stats: Yes,
                   **options: Unpack[Options]) -> results.WithAll: ...
@overload
def token_logprobs(logits: Tensor, targets: Tensor, *, return_entropy: bool,
                   **options: Unpack[Options]) -> Tensor | results.WithEntropy: ...
@overload
def token_logprobs(logits: Tensor, targets: Tensor, *, return_entropy: bool = ..., return_lse: bool = ...,
                   return_stats: bool = ..., **options: Unpack[Options]) -> Scored: ...
# fmt: on
@check.takes_numbers
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    return_stats: bool = False,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Scored:
    """Log-probabilities of `targets` under softmax(softcap(logit_scale * logits) / temperature), in nats.

    logits: (..., V) float32, bfloat16, float16 or float64; leading dimensions may be strided (`logits[:, :-1]` is not
    copied). targets: (...) integer ids in [0, V), or (..., K) for several ids per row; what stands behind the
    mask is never looked at.
    temperature: > 0, one number or a tensor (...) of one per row, used in float32. logit_scale: > 0. softcap: the bound
    c of c tanh(u / c), > 0, or None. None of the three gets a gradient.
    mask: (...) any dtype, nonzero counts; elsewhere the results and the gradient are 0 and the logits are not read.
    return_entropy: also the entropy of the distribution, differentiable. return_lse: also log sum_j exp(z_j) in nats,
    differentiable (a z-loss is c * lse.square()). return_stats: also a RowStats, without gradient.
    inplace_backward: write the gradient over the logits, which must not be used after the backward pass. No two of
    their elements may be one in memory, as in an expanded tensor.

    Returns logprobs in the shape of `targets`, float32 (float64 for float64 logits); with return_entropy, return_lse
    or return_stats a NamedTuple of what was asked for, in the order (logprobs, entropy, lse, stats), each (...).
    Raises ValueError or TypeError for shapes, types and values that do not fit, IndexError on the CPU for a target
    outside [0, V) that counts. A GPU would have to wait for that: there such a target's result is NaN, and with
    RLHF_FAST_DEBUG=1 it raises as well.
    """
    check.floating("logits", logits)
    check.that(logits.dim() >= 1 and logits.shape[-1] >= 1, "logits", "(..., V) with V >= 1", logits)
    shape = logits.shape[:-1]
    if targets.dim() != logits.dim() or targets.shape[:-1] != shape or targets.shape[-1] == 0:
        check.shaped("targets", targets, shape, "logits.shape[:-1] (or that and K)")
    check.same_device(("logits", logits), ("targets", targets), ("mask", mask))
    transform = checked_transform(temperature, logit_scale, softcap, shape, ("logits", logits))
    if inplace_backward:
        check.apart("logits of inplace_backward", logits)
    ids = check.ids("targets", targets)
    mask = check.mask_bytes(mask, shape, "logits.shape[:-1]")
    name = resolve("token_logprobs", IMPLS, logits.device, backend)
    wanted = Wanted(return_entropy, return_stats, return_lse)
    if name == "reference":
        results = reference_results(logits, ids, mask, transform, wanted)
    else:
        rows = planes(logits)
        flat = rows.shape[:-1]
        ids, flat_mask = ids.view(*flat, *targets.shape[len(shape) :]), None if mask is None else mask.view(flat)
        results = _run(_Rows(rows, ids, flat_mask), transform, wanted, _Inplace(inplace_backward), name)
    return wanted.named(results, shape, targets.shape, mask)


def planes(logits: Tensor) -> Tensor:
    """(outer, inner, V) of logits (..., V): a view, whatever the strides of the leading dimensions; V is contiguous."""
    rows = logits.flatten(0, -3) if logits.dim() > 3 else logits[(None,) * (3 - logits.dim())]
    return check.unit_stride(rows)


def reference(
    logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0, logit_scale: float = 1.0,
    softcap: float | None = None, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(logprobs, entropy) by definition, differentiable any number of times; NaN for a target outside [0, V)."""
    z = transformed(logits, temperature=temperature, logit_scale=logit_scale, softcap=softcap, mask=mask)
    z = z - z.amax(-1, keepdim=True).detach()  # changes nothing but the rounding, which matters for logits of 1e4
    ids = targets if targets.dim() == logits.dim() else targets[..., None]
    inside = (ids >= 0) & (ids < z.shape[-1])
    is_target = torch.arange(z.shape[-1], device=z.device) == ids[..., None]
    finite = z.clamp_min(torch.finfo(z.dtype).min / 2)  # forbidden tokens: probability 0, gradient 0 and not NaN
    others = torch.logsumexp(finite[..., None, :].masked_fill(is_target, -torch.inf), -1)
    target = z.gather(-1, torch.where(inside, ids, torch.zeros_like(ids)))
    logprobs = torch.nn.functional.logsigmoid(target - others)  # -softplus(lse of the others - z_y), without overflow
    logprobs = torch.where(inside, logprobs, torch.full_like(logprobs, torch.nan))
    log_p = torch.log_softmax(finite, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    if mask is not None:
        entropy = torch.where(mask != 0, entropy, torch.zeros_like(entropy))
        logprobs = torch.where((mask != 0)[..., None], logprobs, torch.zeros_like(logprobs))
    return logprobs.view(targets.shape), entropy


def reference_lse(z: Tensor, mask: Tensor | None) -> Tensor:
    """log sum_j exp(z_j) of rows z (..., V), 0 behind the mask; tokens of -inf get gradient 0, not NaN."""
    top = z.amax(-1, keepdim=True).detach()
    shift = torch.where(top.isinf(), 0, top)
    finite = (z - shift).clamp_min(torch.finfo(z.dtype).min / 2)
    lse = torch.where(top == -torch.inf, -torch.inf, torch.logsumexp(finite, -1, keepdim=True) + shift)[..., 0]
    return lse if mask is None else torch.where(mask != 0, lse, torch.zeros_like(lse))


def reference_results(
    logits: Tensor, targets: Tensor, mask: Tensor | None, transform: Transform, wanted: Wanted
) -> list[Tensor]:
    """By definition what the op returns, see Wanted.and_lse."""
    if not torch.compiler.is_compiling():  # a graph cannot raise for a value
        _check_values(_Rows(logits, targets, mask), transform)
    options = transform.options()
    logprobs, entropy = reference(logits, targets, mask=mask, **options)
    nothing = logprobs.new_empty(0)
    stats, lse = [nothing] * 3, nothing
    if wanted.want_stats:
        z = transformed(logits.detach(), mask=mask, **options)
        top = z.amax(-1)
        stats = [top, torch.logsumexp(z - top[..., None], -1), torch.softmax(z, -1).square().sum(-1)]
        stats = stats if mask is None else [torch.where(mask != 0, s, torch.zeros_like(s)) for s in stats]
    if wanted.want_lse:
        lse = reference_lse(transformed(logits, mask=mask, **options), mask)
    return [logprobs, entropy, *stats, lse]


def _native_arguments(logits: Tensor, targets: Tensor, mask: Tensor | None, transform: Transform,
                      stats: list[Tensor]) -> tuple[Any, ...]:  # fmt: skip
    temperature, temperatures, logit_scale, softcap = transform
    return (
        *strided(logits), logits.shape[-1], packed(targets), _per_row(targets), packed(mask),
        (temperature, packed(temperatures), logit_scale, softcap), [packed(s) for s in stats],
    )  # fmt: skip


def _per_row(targets: Tensor) -> int:
    return targets.shape[2] if targets.dim() == 3 else 1


def _forward_arguments(logits: Tensor, targets: Tensor, mask: Tensor | None, transform: Transform, want_entropy: bool,
                       stats: list[Tensor], gradient: Tensor | None) -> tuple[Any, ...]:  # fmt: skip
    at = 0 if gradient is None else strided(gradient)[0]
    return *_native_arguments(logits, targets, mask, transform, stats), at


def _backward_arguments(logits: Tensor, targets: Tensor, mask: Tensor | None, transform: Transform,
                        stats: list[Tensor], *upstream_and_gradient: Any) -> tuple[Any, ...]:  # fmt: skip
    *upstream, gradient = upstream_and_gradient
    at, _, sizes = strided(gradient)
    return *_native_arguments(logits, targets, mask, transform, stats), *[packed(g) for g in upstream], at, sizes


def _cpu_forward(*args: Any) -> None:
    native().token_logprobs_forward(*_forward_arguments(*args), threads())


def _cpu_backward(*args: Any) -> None:
    native().token_logprobs_backward(*_backward_arguments(*args), threads())


def _cuda_forward(logits: Tensor, *others: Any) -> None:
    logits = _still_there(logits, *others)
    arguments = _forward_arguments(logits, *others)
    native().token_logprobs_forward_cuda(*arguments, logits.get_device(), stream(logits.device))


def _cuda_backward(logits: Tensor, *others: Any) -> None:
    logits = _still_there(logits, *others)
    arguments = _backward_arguments(logits, *others)
    native().token_logprobs_backward_cuda(*arguments, logits.get_device(), stream(logits.device))


KEPT_TARGETS = 256  # targets of a row whose slope the CUDA kernels keep while the logits are overwritten


def _still_there(logits: Tensor, targets: Tensor, mask: Tensor | None, transform: Transform, *others: Any) -> Tensor:
    """The logits, or a copy where a gradient written in their place needs them once more: the slopes of a softcap."""
    gradient = others[-1]
    if gradient is None or transform.softcap == 0 or _per_row(targets) <= KEPT_TARGETS:
        return logits
    return logits.clone() if gradient.is_set_to(logits) else logits


class RowKernels(NamedTuple):
    """The kernels on rows of logits, which every op on logits shares.

    forward(logits, targets, mask, transform, want_entropy, stats, gradient | None): fills `stats`; `gradient`, with the
        strides of the logits and possibly the logits themselves, receives d (sum of a row's logprobs) / d logits.
    backward(logits, targets, mask, transform, stats, *upstream, gradient)
    logits (outer, inner, V) with unit last stride; targets (outer, inner) or (outer, inner, K), contiguous int64;
    mask (outer, inner) contiguous uint8 or None; stats from empty_stats; upstream as in Upstream. A target outside
    [0, V) is none in this row: the statistics are complete, its logprob is NaN, and the backward pass is the softmax's
    term alone.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]

    @classmethod
    def triton(cls, module: str) -> RowKernels:
        """Those of a module of Triton kernels."""
        return cls(*[lambda *args, name=name: getattr(triton_kernels(module), name)(*args) for name in cls._fields])


IMPLS = {
    "cpu": RowKernels(_cpu_forward, _cpu_backward),
    "triton": RowKernels.triton("token_logprobs"),
    "cuda": RowKernels(_cuda_forward, _cuda_backward),
}
OPS = {"token_logprobs": tuple(IMPLS)}


def empty_stats(
    logits: Tensor, want_entropy: bool, want_squares: bool = False, ids: tuple[int, ...] = ()
) -> list[Tensor]:
    """Unwritten [logprobs, entropy, row_max, row_logsum, sum_p_squared], those not wanted empty.

    Each (outer, inner) of the logits (outer, inner, V), logprobs (outer, inner, *ids); lse = row_max + row_logsum.
    """
    new, rows = logits.new_empty, logits.shape[:-1]
    shapes = [(*rows, *ids), rows if want_entropy else (0,), rows, rows, rows if want_squares else (0,)]
    return [new(shape, dtype=check.compute_dtype(logits.dtype)) for shape in shapes]


class Wanted(NamedTuple):
    """What a call wants beside the log-probabilities."""

    want_entropy: bool
    want_stats: bool
    want_lse: bool

    def and_lse(self, stats: list[Tensor]) -> list[Tensor]:
        """`stats` and the rows' lse, empty where it is not wanted: the results of an op."""
        return [*stats, stats[2] + stats[3] if self.want_lse else stats[2].new_empty(0)]

    def upstream(self, gradients: Sequence[Tensor | None]) -> Upstream:
        """Out of the gradients of an op's results those of what it was asked for."""
        by_entropy, by_lse = gradients[1] if self.want_entropy else None, gradients[5] if self.want_lse else None
        return Upstream(*[None if g is None else g.contiguous() for g in (gradients[0], by_entropy, by_lse)])

    def named(self, results: Sequence[Tensor], shape: Sequence[int], ids: Sequence[int], mask: Tensor | None) -> Scored:
        """What a caller gets of an op's results: rows of `shape`, their targets of `ids`."""
        logprobs, entropy, row_max, row_logsum, squares, lse, *_ = results
        statistics = None
        if self.want_stats:
            row_max, row_logsum, squares = (s.detach().view(shape) for s in (row_max, row_logsum, squares))
            statistics = row_stats(row_max, row_logsum, squares, mask)
        return scored(
            logprobs.view(ids), entropy.view(shape) if self.want_entropy else None,
            lse.view(shape) if self.want_lse else None, statistics,
        )  # fmt: skip


class Upstream(NamedTuple):
    """d loss / d (logprobs, entropy, lse); None where there is none."""

    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None
    grad_lse: Tensor | None


class _Rows(NamedTuple):
    logits: Tensor  # (outer, inner, V)
    targets: Tensor
    mask: Tensor | None


class _Inplace(NamedTuple):
    inplace_backward: bool


class _Stats(NamedTuple):
    stats: list[Tensor]


def _check_values(rows: _Rows, transform: Transform) -> None:
    per_row = rows.targets.shape[-1] if rows.targets.dim() == rows.logits.dim() else 1
    check.targets_inside(rows.targets, rows.mask, rows.logits.shape[-1], per_row)
    check.positive_rows("temperature", transform.temperatures, rows.mask)


def _forward(rows: _Rows, transform: Transform, wanted: Wanted, inplace: _Inplace, backend: str) -> list[Tensor]:
    _check_values(rows, transform)
    stats = _empty_stats(rows, wanted)
    IMPLS[backend].forward(*rows, transform, wanted.want_entropy, stats, None)
    return wanted.and_lse(stats)


def _empty_stats(rows: _Rows, wanted: Wanted) -> list[Tensor]:
    return empty_stats(rows.logits, wanted.want_entropy, wanted.want_stats, rows.targets.shape[2:])


def _backward(rows: _Rows, transform: Transform, stats: _Stats, upstream: Upstream, backend: str) -> list[Tensor]:
    gradient = torch.empty_like(rows.logits, memory_format=torch.contiguous_format)
    IMPLS[backend].backward(*rows, transform, stats.stats, *upstream, gradient)
    return [gradient]


def _backward_inplace(rows: _Rows, transform: Transform, stats: _Stats, upstream: Upstream, backend: str) -> None:
    IMPLS[backend].backward(*rows, transform, stats.stats, *upstream, rows.logits)


_run_backward = registration.op_without_gradient(
    "token_logprobs_backward", (_Rows, Transform, _Stats, Upstream), _backward,
    fake=lambda rows, *_: [torch.empty_like(rows.logits, memory_format=torch.contiguous_format)],
)  # fmt: skip
_run_backward_inplace = registration.op_without_gradient(
    "token_logprobs_backward_", (_Rows, Transform, _Stats, Upstream), _backward_inplace, fake=lambda *_: None,
    mutates=("logits",),
)  # fmt: skip


def _gradients(saved: registration.Saved, gradients: Sequence[Tensor | None]) -> Mapping[str, Tensor]:
    rows, transform, wanted, inplace = saved.inputs
    arguments = rows, transform, _Stats(list(saved.results)), wanted.upstream(gradients), saved.backend
    if not inplace.inplace_backward:
        return {"logits": _run_backward(*arguments)[0]}
    _run_backward_inplace(*arguments)
    return {"logits": rows.logits}


_run = registration.op(
    "token_logprobs", (_Rows, Transform, Wanted, _Inplace), _forward,
    fake=lambda rows, transform, wanted, *_: wanted.and_lse(_empty_stats(rows, wanted)), differentiable=("logits",),
    saves=("logits", "targets", "mask", "temperatures"), saves_results=slice(5), backward=_gradients, returned=2,
)  # fmt: skip
