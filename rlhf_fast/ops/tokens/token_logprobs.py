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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import native, packed, resolve, stream, strided, threads
from rlhf_fast.ops.core import check
from rlhf_fast.ops.core import registration_by_schema as registration

COLDEST = 1e-30  # a float32 temperature below it counts as this: logits of up to 1e8 over it are still numbers


class Transform(NamedTuple):
    """What is done to a row of logits before the softmax: z = softcap(logit_scale * logits) / temperature."""

    temperature: float = 1.0
    temperatures: Tensor | None = None  # one per row, contiguous float32, in place of `temperature`
    logit_scale: float = 1.0
    softcap: float = 0.0  # 0 for none


class RowStats(NamedTuple):
    """Statistics of softmax(z) per row, each (...) in the type of the log-probabilities, without gradient."""

    lse: Tensor  # log sum_j exp(z_j), nats
    max: Tensor  # the greatest z
    p_max: Tensor  # the greatest probability
    sum_p_squared: Tensor  # sum_j p_j^2: the collision probability, 1 / the effective number of tokens


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
) -> Any:
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
    or return_stats a tuple of those asked for, in the order (logprobs, entropy, lse, stats), entropy and lse (...).
    Raises ValueError or TypeError for shapes, types and values that do not fit, IndexError on the CPU for a target
    outside [0, V) that counts. A GPU would have to wait for that: there such a target's result is NaN, and with
    RLHF_FAST_DEBUG=1 it raises as well.
    """
    check.floating("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must be (..., V) with V >= 1, got {tuple(logits.shape)}")
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
    if name == "reference":
        if not torch.compiler.is_compiling():  # a graph cannot raise for a value
            _checked_values(logits, ids, transform, mask)
        given: dict[str, Any] = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
        results = list(reference(logits, ids, **given, mask=mask))
        lse = reference_lse(transformed(logits, **given, mask=mask), mask) if return_lse else results[1]
        if return_stats:
            results += _reference_stats(transformed(logits.detach(), **given, mask=mask), mask)
    else:
        # (outer, inner, V): a view of up to three dimensions, whatever the strides of the leading ones.
        rows = logits.flatten(0, -3) if logits.dim() > 3 else logits[(None,) * (3 - logits.dim())]
        rows = check.unit_stride(rows)
        flat = rows.shape[:-1]
        *results, lse = _run(
            rows, ids.view(*flat, *targets.shape[len(shape) :]), None if mask is None else mask.view(flat), *transform,
            return_entropy, return_stats, return_lse, inplace_backward, name,
        )  # fmt: skip
    logprobs, entropy, *stats = results
    wanted: list[Any] = [logprobs.view(targets.shape)]
    if return_entropy:
        wanted.append(entropy.view(shape))
    if return_lse:
        wanted.append(lse.view(shape))
    if return_stats:
        row_max, row_logsum, sum_p_squared = (s.detach().view(shape) for s in stats)
        wanted.append(row_stats(row_max, row_logsum, sum_p_squared, mask))
    return tuple(wanted) if len(wanted) > 1 else wanted[0]


def checked_transform(
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    shape: torch.Size,
    beside: tuple[str, Tensor],
) -> Transform:
    """The transform of rows of `shape`, for every op that has these three arguments; `beside` names the device."""
    rest = check.positive("logit_scale", logit_scale), 0.0 if softcap is None else check.positive("softcap", softcap)
    dtype = check.compute_dtype(beside[1].dtype)
    if not isinstance(temperature, Tensor):
        return Transform(_warm(check.positive("temperature", temperature), dtype), None, *rest)
    check.shaped("temperature", check.floating("temperature", temperature), shape, "one number or one per row")
    check.same_device(beside, ("temperature", temperature))
    return Transform(1.0, _warm(temperature.detach().to(torch.float32), dtype).contiguous(), *rest)


def _warm(temperature: Any, dtype: torch.dtype) -> Any:
    """A float32 temperature (a number or a tensor) of at least COLDEST, but no bad one."""
    if dtype == torch.float64:
        return temperature
    if isinstance(temperature, Tensor):
        return torch.where(temperature > 0, temperature.clamp_min(COLDEST), temperature)
    return max(temperature, COLDEST)


def row_stats(row_max: Tensor, row_logsum: Tensor, sum_p_squared: Tensor, mask: Tensor | None) -> RowStats:
    p_max = torch.exp(-row_logsum)
    if mask is not None:
        p_max = torch.where(mask != 0, p_max, torch.zeros_like(p_max))
    # The backward pass reads what is copied here: callers may write into their statistics.
    return RowStats(row_max + row_logsum, row_max.clone(), p_max, sum_p_squared.clone())


def reference(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
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


def transformed(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """z = softcap(logit_scale * logits) / temperature in the type of computation; 0 in masked rows: NaN ends there."""
    z = logits.to(check.compute_dtype(logits.dtype)) * logit_scale
    if mask is not None:
        z = torch.where((mask != 0)[..., None], z, torch.zeros_like(z))
    if softcap is not None:
        z = softcap * _tanh(z / softcap)
    temperature = _warm(temperature, z.dtype)
    if isinstance(temperature, Tensor):
        if mask is not None:
            temperature = torch.where(mask != 0, temperature, torch.ones_like(temperature))
        temperature = temperature.detach().to(z.dtype)[..., None]
    return z / temperature


def _tanh(x: Tensor) -> Tensor:
    """tanh(x), whose derivative away from 0 is 4 s (1 - s) of s = sigmoid(-2 |x|): 1 - tanh^2 would cancel."""
    return torch.where(x.abs() < 1, torch.tanh(x), x.sign() * (1 - 2 * torch.sigmoid(-2 * x.abs())))


def reference_lse(z: Tensor, mask: Tensor | None) -> Tensor:
    """log sum_j exp(z_j) of rows z (..., V), 0 behind the mask; tokens of -inf get gradient 0, not NaN."""
    top = z.amax(-1, keepdim=True).detach()
    shift = torch.where(top.isinf(), 0, top)
    finite = (z - shift).clamp_min(torch.finfo(z.dtype).min / 2)
    lse = torch.where(top == -torch.inf, -torch.inf, torch.logsumexp(finite, -1, keepdim=True) + shift)[..., 0]
    return lse if mask is None else torch.where(mask != 0, lse, torch.zeros_like(lse))


def _reference_stats(z: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The greatest z, lse - that, and the sum of p^2."""
    top = z.amax(-1)
    stats = [top, torch.logsumexp(z - top[..., None], -1), torch.softmax(z, -1).square().sum(-1)]
    return stats if mask is None else [torch.where(mask != 0, s, torch.zeros_like(s)) for s in stats]


def _native_arguments(logits: Tensor, targets: Tensor, mask: Tensor | None, transform: Transform,
                      stats: list[Tensor]) -> tuple[Any, ...]:  # fmt: skip
    temperature, temperatures, logit_scale, softcap = transform
    return (
        *strided(logits), logits.shape[-1], packed(targets), _per_row(targets), packed(mask),
        (temperature, packed(temperatures), logit_scale, softcap), [packed(s) for s in stats],
    )  # fmt: skip


def _place(gradient: Tensor) -> tuple[int, tuple[int, ...]]:
    at, _, sizes = strided(gradient)
    return at, sizes


def _per_row(targets: Tensor) -> int:
    return targets.shape[2] if targets.dim() == 3 else 1


def _cpu_forward(logits: Tensor, targets: Tensor, mask: Tensor | None, transform: Transform, want_entropy: bool,
                 stats: list[Tensor], gradient: Tensor | None) -> None:  # fmt: skip
    arguments = _native_arguments(logits, targets, mask, transform, stats)
    native().token_logprobs_forward(*arguments, packed(gradient), threads())


def _cpu_backward(logits: Tensor, targets: Tensor, mask: Tensor | None, transform: Transform, stats: list[Tensor],
                  grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None,
                  gradient: Tensor) -> None:  # fmt: skip
    native().token_logprobs_backward(
        *_native_arguments(logits, targets, mask, transform, stats), packed(grad_logprobs), packed(grad_entropy),
        packed(grad_lse), *_place(gradient), threads(),
    )  # fmt: skip


def _triton_forward(*args: Any) -> None:
    from rlhf_fast.kernels import token_logprobs as kernels

    kernels.forward(*args)


def _triton_backward(*args: Any) -> None:
    from rlhf_fast.kernels import token_logprobs as kernels

    kernels.backward(*args)


KEPT_TARGETS = 256  # targets of a row whose slope the CUDA kernels keep while the logits are overwritten


def _still_there(logits: Tensor, targets: Tensor, transform: Transform, gradient: Tensor | None) -> Tensor:
    """The logits, or a copy where a gradient written in their place needs them once more: the slopes of a softcap."""
    if gradient is None or transform.softcap == 0 or _per_row(targets) <= KEPT_TARGETS:
        return logits
    return logits.clone() if gradient.is_set_to(logits) else logits


def _cuda_forward(logits: Tensor, targets: Tensor, mask: Tensor | None, transform: Transform, want_entropy: bool,
                  stats: list[Tensor], gradient: Tensor | None) -> None:  # fmt: skip
    logits = _still_there(logits, targets, transform, gradient)
    arguments = _native_arguments(logits, targets, mask, transform, stats)
    native().token_logprobs_forward_cuda(*arguments, packed(gradient), logits.get_device(), stream(logits.device))


def _cuda_backward(logits: Tensor, targets: Tensor, mask: Tensor | None, transform: Transform, stats: list[Tensor],
                   grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None,
                   gradient: Tensor) -> None:  # fmt: skip
    logits = _still_there(logits, targets, transform, gradient)
    native().token_logprobs_backward_cuda(
        *_native_arguments(logits, targets, mask, transform, stats), packed(grad_logprobs), packed(grad_entropy),
        packed(grad_lse), *_place(gradient), logits.get_device(), stream(logits.device),
    )  # fmt: skip


# The row kernels, which every op on logits shares.
# forward(logits, targets, mask, transform, want_entropy, stats, gradient | None): fills `stats`; `gradient`, with the
#   strides of the logits and possibly the logits themselves, receives d (sum of a row's logprobs) / d logits.
# backward(logits, targets, mask, transform, stats, grad_logprobs | None, grad_entropy | None, grad_lse | None,
#   gradient)
# logits (outer, inner, V) with unit last stride; targets (outer, inner) or (outer, inner, K), contiguous int64;
# mask (outer, inner) contiguous uint8 or None; stats from empty_stats. A target outside [0, V) is none in this row:
# the statistics are complete, its logprob is NaN, and the backward pass is the softmax's term alone.
IMPLS = {
    "cpu": (_cpu_forward, _cpu_backward),
    "triton": (_triton_forward, _triton_backward),
    "cuda": (_cuda_forward, _cuda_backward),
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


def with_lse(stats: list[Tensor], want_lse: bool) -> list[Tensor]:
    """`stats` and the rows' lse, empty where it is not wanted."""
    return [*stats, stats[2] + stats[3] if want_lse else stats[2].new_empty(0)]


def upstream(grads: Sequence[Tensor | None], want_entropy: bool, want_lse: bool) -> list[Tensor | None]:
    """Gradients of (logprobs, entropy, lse), out of those of what `with_lse` gives; None of what is empty there."""
    chosen = grads[0], grads[1] if want_entropy else None, grads[5] if want_lse else None
    return [None if g is None else g.contiguous() for g in chosen]


def _checked_values(logits: Tensor, targets: Tensor, transform: Transform, mask: Tensor | None) -> None:
    per_row = targets.shape[-1] if targets.dim() == logits.dim() else 1
    check.targets_inside(targets, mask, logits.shape[-1], per_row)
    check.positive_rows("temperature", transform.temperatures, mask)


def _forward(logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None,
             logit_scale: float, softcap: float, want_entropy: bool, want_squares: bool, want_lse: bool,
             inplace_backward: bool, backend: str) -> list[Tensor]:  # fmt: skip
    transform = Transform(temperature, temperatures, logit_scale, softcap)
    _checked_values(logits, targets, transform, mask)
    stats = empty_stats(logits, want_entropy, want_squares, targets.shape[2:])
    IMPLS[backend][0](logits, targets, mask, transform, want_entropy, stats, None)
    return with_lse(stats, want_lse)


def _fake(logits, targets, mask, temperature, temperatures, logit_scale, softcap, want_entropy, want_squares, want_lse,
          inplace_backward, backend):  # fmt: skip
    return with_lse(empty_stats(logits, want_entropy, want_squares, targets.shape[2:]), want_lse)


@torch.library.custom_op("rlhf_fast::token_logprobs_backward", mutates_args=())
def _backward(logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None,
              logit_scale: float, softcap: float, stats: list[Tensor], grad_logprobs: Tensor | None,
              grad_entropy: Tensor | None, grad_lse: Tensor | None, backend: str) -> Tensor:  # fmt: skip
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    transform = Transform(temperature, temperatures, logit_scale, softcap)
    IMPLS[backend][1](logits, targets, mask, transform, stats, grad_logprobs, grad_entropy, grad_lse, gradient)
    return gradient


@_backward.register_fake
def _(logits, targets, mask, temperature, temperatures, logit_scale, softcap, stats, grad_logprobs, grad_entropy,
      grad_lse, backend):  # fmt: skip
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("rlhf_fast::token_logprobs_backward_", mutates_args={"logits"})
def _backward_inplace(logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float,
                      temperatures: Tensor | None, logit_scale: float, softcap: float, stats: list[Tensor],
                      grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None,
                      backend: str) -> None:  # fmt: skip
    transform = Transform(temperature, temperatures, logit_scale, softcap)
    IMPLS[backend][1](logits, targets, mask, transform, stats, grad_logprobs, grad_entropy, grad_lse, logits)


def _setup_context(ctx, inputs, output):
    logits, targets, mask, ctx.temperature, temperatures, ctx.logit_scale, ctx.softcap, *rest = inputs
    ctx.want_entropy, _, ctx.want_lse, ctx.inplace, ctx.backend = rest
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, mask, temperatures, *output[:-1])


def _autograd(ctx, grads):
    logits, targets, mask, temperatures, *stats = ctx.saved_tensors
    gradients = upstream(grads, ctx.want_entropy, ctx.want_lse)
    run = _backward_inplace if ctx.inplace else _backward
    gradient = run(
        logits, targets, mask, ctx.temperature, temperatures, ctx.logit_scale, ctx.softcap, stats, *gradients,
        ctx.backend,
    )  # fmt: skip
    return (logits if ctx.inplace else gradient,)


_run = registration.op(
    "token_logprobs",
    None,
    _forward,
    fake=_fake,
    differentiable=(0,),
    setup_context=_setup_context,
    backward=_autograd,
    returned=2,
)
