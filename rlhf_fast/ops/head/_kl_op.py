"""The registered op behind linear_kl, whose docstring has the formulas and the costs.

Forward goes once over the tiles of logits, of which each row has two, the policy's and the reference's, and saves both
U (N, D), or the logits (2 N, V), or nothing for the backward pass; backward reads the logits, or makes the tiles again.
(With U it is two row scales, and no op of its own.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import prefer_huge_pages, without_autocast
from rlhf_fast.ops.core import check, registration
from rlhf_fast.ops.head._logprobs_op import kept_bytes
from rlhf_fast.ops.head.head import Head, RowGradients, empty_gradients, row_stride, summed_gradients
from rlhf_fast.ops.head.tiles import Rows, Tile, by_row, counted_tiles, zero_behind
from rlhf_fast.ops.tokens import token_kl, token_logprobs
from rlhf_fast.ops.tokens.token_kl import Divergence
from rlhf_fast.ops.tokens.token_logprobs import empty_stats
from rlhf_fast.ops.tokens.transform import Transform


class Reference(NamedTuple):
    """Where the divergence is from, a constant."""

    ref_hidden: Tensor  # (N, E)
    ref_weight: Tensor | None  # None: the reference uses the policy's head
    ref_bias: Tensor | None


class Options(NamedTuple):
    top_k: int | None  # the tokens of the divergence; None: all
    want_entropy: bool
    save: str  # what forward makes for the backward pass: "U", "logits" or nothing


class _ForBackward(NamedTuple):
    stats: list[Tensor]
    logits: Tensor | None  # None where the tiles are to be made again
    needs: list[bool]  # whether each of hidden and the head's parameters wants a gradient


class _Upstream(NamedTuple):
    grad_kl: Tensor | None
    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None


def what_to_save(head: Head, rows: Rows) -> str:
    """See Options.save."""
    if not torch.is_grad_enabled() or not (head.trained or rows.hidden.requires_grad):
        return ""
    if not head.trained:
        return "U"
    count, stride = _logits_shape(head, rows)
    size = count * stride * check.compute_dtype(head.weight.dtype).itemsize
    return "logits" if size <= kept_bytes(head.weight.device) else ""


def _logits_shape(head: Head, rows: Rows) -> tuple[int, int]:
    """Of all logits, padded to their row_stride."""
    return 2 * rows.hidden.shape[0], row_stride(head.weight.shape[0], head.weight.device)


class _Halves(NamedTuple):
    """A tile's two halves, (1, n, V) each. The gradients' places may be those of the logits: whoever writes one has no
    more need of the other."""

    logits: Tensor
    ref_logits: Tensor
    gradient: Tensor  # the place for that of what is made of the logits alone
    kl_gradient: Tensor  # the place for that of the divergence


def _halves(tile: Tile) -> _Halves:
    n = tile.hidden.shape[0]
    return _Halves(tile.logits[:, :n], tile.logits[:, n:], tile.gradient[:, :n], tile.gradient[:, n:])


def _make_logits(head: Head, reference: Reference, tile: Tile) -> None:
    """Writes tile.logits; one product where policy and reference have the same head."""
    n, out = tile.hidden.shape[0], tile.logits[0]
    ref_hidden = zero_behind(None if tile.mask is None else tile.mask[0], reference.ref_hidden[tile.where])
    if reference.ref_weight is None:
        head.logits(torch.cat([tile.hidden, ref_hidden]), out)
    else:
        head.logits(tile.hidden, out[:n])
        Head(reference.ref_weight, reference.ref_bias).logits(ref_hidden, out[n:])


class _TileDivergence:
    """The divergence of a tile, over the reference's top_k tokens where there are so many."""

    def __init__(self, tile: Tile, divergence: Divergence, top_k: int | None, backend: str) -> None:
        self.logits, self.ref_logits, _, self.place = _halves(tile)
        self.index: Tensor | None = None
        if top_k is not None:
            self.logits, self.ref_logits, self.index = token_kl.restricted(self.logits, self.ref_logits, top_k)
        self.of_rows, self.divergence, self.backend = (tile.mask, tile.transform), divergence, backend

    def forward(self, logsum: Tensor, ref_logsum: Tensor) -> list[Tensor]:
        """[kl, mean, logsum, ref_logsum], from the last two over the whole vocabulary."""
        if self.index is not None:
            logsum, ref_logsum = (
                token_kl.logsum(x, *self.of_rows, self.backend) for x in (self.logits, self.ref_logits)
            )
        stats = [torch.empty_like(logsum), torch.empty_like(logsum), logsum, ref_logsum]
        token_kl.IMPLS[self.backend].forward(self.logits, self.ref_logits, *self.of_rows, *self.divergence, stats)
        return stats

    def backward(self, stats: list[Tensor], grad_kl: Tensor) -> None:
        """Writes grad_kl * d kl / d logits to its place."""
        out = self.place if self.index is None else self.logits
        token_kl.IMPLS[self.backend].backward(
            self.logits, self.ref_logits, *self.of_rows, *self.divergence, stats, grad_kl, out
        )
        if self.index is not None:
            self.place.zero_().scatter_(-1, self.index, out.to(self.place.dtype))


class _Stats(NamedTuple):
    """Of rows (n,), what is not wanted empty. The last three are the divergence's, see token_kl."""

    kl: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    row_max: Tensor
    row_logsum: Tensor
    mean: Tensor
    kl_logsum: Tensor
    kl_ref_logsum: Tensor

    def of(self, tile: Tile) -> _Stats:
        """Those of a tile, (1, n)."""
        return _Stats(*[x[tile.where][None] if x.numel() else x for x in self])


def _empty_results(head: Head, rows: Rows, options: Options) -> list[Tensor]:
    """[*_Stats of all rows, U of kl and of logprob (N, D), all logits, which are unwritten]"""
    targets, (count, width) = rows.targets is not None, rows.hidden.shape
    dtype, new = check.compute_dtype(rows.hidden.dtype), rows.hidden.new_zeros
    wanted = [True, targets, targets, options.want_entropy, *[True] * 5]
    stats = [new(count if w else 0, dtype=dtype) for w in wanted]
    through = [new((count, width) if options.save == "U" and w else (0,)) for w in (True, targets)]
    logits = _logits_shape(head, rows) if options.save == "logits" else (0,)
    return [*stats, *through, rows.hidden.new_empty(logits, dtype=dtype)]


@without_autocast
def _forward(
    head: Head, rows: Rows, transform: Transform, reference: Reference, divergence: Divergence, options: Options,
    backend: str,
) -> list[Tensor]:  # fmt: skip
    rows.check_values(transform, head.weight.shape[0])
    *results, logits = _empty_results(head, rows, options)
    kernels = token_logprobs.IMPLS[backend]
    all_logits = prefer_huge_pages(logits)[:, : head.weight.shape[0]] if options.save == "logits" else None
    tiles = counted_tiles(head, rows, transform, backend, depth=2, all_logits=all_logits)
    if options.save == "logits":
        logits[2 * tiles.order.length :].zero_()
    for tile in tiles:
        _make_logits(head, reference, tile)
        halves, of_rows = _halves(tile), (tile.targets, tile.mask, tile.transform)
        stats, ref_stats = empty_stats(halves.logits, options.want_entropy), empty_stats(halves.ref_logits, False)
        kernels.forward(halves.logits, *of_rows, options.want_entropy, stats, None)
        kernels.forward(halves.ref_logits, *of_rows, False, ref_stats, None)
        of_tile = _TileDivergence(tile, divergence, options.top_k, backend)
        kl, *centring = kl_stats = of_tile.forward(stats[3], ref_stats[3])
        parts = [kl, stats[0], ref_stats[0], *stats[1:4], *centring]
        if options.save == "U":
            ones = torch.ones_like(kl)
            of_tile.backward(kl_stats, ones)
            if rows.targets is None:
                parts.append(head.through(halves.kl_gradient[0])[None])
            else:
                kernels.backward(halves.logits, *of_rows, stats, ones, None, None, halves.gradient)
                u_logprob, u_kl = head.through(tile.gradient[0]).chunk(2)
                parts += [u_kl[None], u_logprob[None]]
        for whole, part in zip(results, parts, strict=False):
            if whole.numel():
                whole[tile.where] = part[0]
    return [*results, logits]


@without_autocast
def _backward(
    head: Head, rows: Rows, transform: Transform, reference: Reference, divergence: Divergence, options: Options,
    saved: _ForBackward, upstream: _Upstream, backend: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of hidden and the head's parameters, empty where not needed."""

    def each() -> Iterator[RowGradients]:
        all_logits = None if saved.logits is None else saved.logits[:, : head.weight.shape[0]]
        for tile in counted_tiles(head, rows, transform, backend, depth=2, all_logits=all_logits):
            if saved.logits is None:
                _make_logits(head, reference, tile)
            parts, scale = by_row(tile, *upstream)
            stats = _Stats(*saved.stats).of(tile)
            gradient = _gradient_of_tile(tile, stats, parts, divergence, options.top_k, backend)
            yield tile.where, tile.hidden, gradient, scale

    return summed_gradients(head, rows.hidden, saved.needs, each())


def _gradient_of_tile(
    tile: Tile, stats: _Stats, upstream: list[Tensor | None], divergence: Divergence, top_k: int | None, backend: str
) -> Tensor:  # fmt: skip
    """d loss / d logits (n, V)"""
    grad_kl, grad_logprobs, grad_entropy = upstream
    logits, _, gradient, kl_gradient = _halves(tile)
    if grad_kl is not None:
        kl_stats = [stats.kl, stats.mean, stats.kl_logsum, stats.kl_ref_logsum]
        _TileDivergence(tile, divergence, top_k, backend).backward(kl_stats, grad_kl)
        if grad_logprobs is None and grad_entropy is None:
            return kl_gradient[0]
    row_stats = [stats.logprobs, stats.entropy, stats.row_max, stats.row_logsum, stats.kl.new_empty(0)]
    _, *of_rows = tile.of_kernels
    upstream = [grad_logprobs, grad_entropy, None]
    token_logprobs.IMPLS[backend].backward(logits, *of_rows, row_stats, *upstream, gradient)
    return gradient[0] if grad_kl is None else gradient[0].add_(kl_gradient[0])


_CALL = (Head, Rows, Transform, Reference, Divergence, Options)
_run_backward = registration.op_without_gradient(
    "linear_kl_backward", (*_CALL, _ForBackward, _Upstream), _backward,
    fake=lambda head, rows, *others: empty_gradients(head, rows.hidden, others[-3].needs),
)  # fmt: skip


def _gradients(saved: registration.Saved, gradients: Sequence[Tensor | None]) -> Mapping[str, Tensor]:
    _, rows, *_, options = saved.inputs
    *stats, u_kl, u_logprob, logits = saved.results
    grad_kl, grad_logprobs, _, grad_entropy = (None if g is None else g.contiguous() for g in gradients[:4])
    upstream = _Upstream(
        grad_kl, None if rows.targets is None else grad_logprobs, grad_entropy if options.want_entropy else None
    )
    if all(g is None for g in upstream):
        return {}
    if upstream.grad_entropy is None and options.save == "U":
        total = torch.zeros_like(u_kl, dtype=stats[0].dtype)
        for g, u in ((upstream.grad_kl, u_kl), (upstream.grad_logprobs, u_logprob)):
            if g is not None:
                total += (g if rows.mask is None else torch.where(rows.mask != 0, g, 0))[:, None] * u
        return {"hidden": total.to(u_kl.dtype)}
    needs = [*(saved.needs[name] for name in DIFFERENTIABLE), False, False]
    for_backward = _ForBackward(stats, logits if options.save == "logits" else None, needs)
    each = _run_backward(*saved.inputs, for_backward, upstream, saved.backend)
    return dict(zip(DIFFERENTIABLE, each, strict=False))


DIFFERENTIABLE = ("hidden", "weight", "bias")

run = registration.op(
    "linear_kl", _CALL, _forward, fake=lambda head, rows, *others: _empty_results(head, rows, others[-2]),
    differentiable=DIFFERENTIABLE, saves=(*DIFFERENTIABLE, *Reference._fields, "targets", "mask", "temperatures"),
    backward=_gradients, returned=4,
)  # fmt: skip
