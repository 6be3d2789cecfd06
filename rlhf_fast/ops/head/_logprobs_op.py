"""The registered op behind linear_logprobs, whose docstring has the formulas and the costs.

Forward goes once over the tiles of logits and saves U (N, D) or G (N, V) for the backward pass, or nothing; backward
reads G, or makes the tiles again. (With U it is a row scale, and no op of its own.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import prefer_huge_pages, without_autocast
from rlhf_fast.ops.core import registration
from rlhf_fast.ops.core.check import compute_dtype
from rlhf_fast.ops.head import _products
from rlhf_fast.ops.head._shards import Shards
from rlhf_fast.ops.head.head import Head, RowGradients, empty_gradients, row_stride, summed_gradients
from rlhf_fast.ops.head.tiles import Rows, by_row, chunks, counted_rows, counted_tiles, gradient_dtype, zero_behind
from rlhf_fast.ops.tokens.token_logprobs import IMPLS, Upstream, Wanted, empty_stats
from rlhf_fast.ops.tokens.transform import Transform

KEPT_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}  # the most that logits or their gradients of all rows may take


class Saves(NamedTuple):
    """What the forward pass makes for the backward pass: "U", "G" or nothing. Neither gives the gradient of lse."""

    save: str


class _ForBackward(NamedTuple):
    stats: list[Tensor]
    gradients: Tensor | None  # G; None where the tiles are to be made again
    needs: list[bool]  # whether each of hidden and the head's parameters wants a gradient


def kept_bytes(device: torch.device) -> int:
    return KEPT_BYTES.get(device.type, KEPT_BYTES["cuda"])


def what_to_save(head: Head, rows: Rows, wanted: Wanted, backend: str) -> Saves:
    ids = rows.targets
    several = ids is not None and ids.dim() > 1
    if not torch.is_grad_enabled() or not (head.trained or rows.hidden.requires_grad) or several or wanted.want_lse:
        return Saves("")
    if not head.trained:
        return Saves("U")
    return Saves("G" if bytes_of_gradients(head, rows, backend) <= kept_bytes(head.weight.device) else "")


def bytes_of_gradients(head: Head, rows: Rows, backend: str) -> int:
    """What G takes."""
    (count, stride), dtype = _gradients_like(head, rows, backend)
    return count * stride * dtype.itemsize


def _gradients_like(head: Head, rows: Rows, backend: str) -> tuple[tuple[int, int], torch.dtype]:
    """Shape and type of G, padded to its row_stride: a row for each of hidden, or of the at most mask_count taken."""
    count = rows.hidden.shape[0] if rows.mask_count is None else min(rows.mask_count, rows.hidden.shape[0])
    weight = head.weight
    return (count, row_stride(weight.shape[0], weight.device)), gradient_dtype(weight, backend)


def _empty_results(head: Head, rows: Rows, wanted: Wanted, saves: Saves, backend: str) -> list[Tensor]:
    """[logprobs (N,) or (N, K), entropy, row_max, row_logsum, sum_p_squared (N,), U or G], those not wanted empty."""
    assert rows.targets is not None
    stats = empty_stats(rows.hidden[None], wanted.want_entropy, wanted.want_stats, rows.targets.shape[1:])
    if saves.save == "G":
        shape, dtype = _gradients_like(head, rows, backend)
        saved = rows.hidden.new_empty(shape, dtype=dtype)
    else:
        saved = rows.hidden.new_empty(rows.hidden.shape if saves.save == "U" else (0,))
    return [*(s[0] if s.dim() > 1 else s for s in stats), saved]


def _fake(
    head: Head, rows: Rows, transform: Transform, shards: Shards, wanted: Wanted, saves: Saves, backend: str
) -> list[Tensor]:  # fmt: skip
    *stats, saved = _empty_results(head, rows, wanted, saves, backend)
    return [*wanted.and_lse(stats), saved]


@without_autocast
def _forward(
    head: Head, rows: Rows, transform: Transform, shards: Shards, wanted: Wanted, saves: Saves, backend: str
) -> list[Tensor]:  # fmt: skip
    """Wanted.and_lse of all rows, and U or G or nothing."""
    rows = _local(head, rows, transform, shards)
    *results, saved = _empty_results(head, rows, wanted, saves, backend)
    all_gradients = prefer_huge_pages(saved)[:, : head.weight.shape[0]] if saves.save == "G" else None
    tiles = counted_tiles(head, rows, transform, backend, all_gradients=all_gradients)
    if tiles.order.rows is not None:
        for x in (*results, saved[tiles.order.length :] if saves.save == "G" else saved):
            x.zero_()
    for tile in tiles:
        head.logits(tile.hidden, tile.logits[0])
        stats = empty_stats(tile.logits, wanted.want_entropy, wanted.want_stats, tile.targets.shape[2:])
        gradient = tile.gradient if saves.save and not shards.group else None
        IMPLS[backend].forward(*tile.of_kernels, wanted.want_entropy, stats, gradient)
        if shards.group:
            stats = shards.merged(stats, tile.mask)
            if saves.save:
                IMPLS[backend].backward(*tile.of_kernels, stats, torch.ones_like(stats[0]), None, None, tile.gradient)
        for whole, part in zip(results, stats, strict=True):
            if part.numel():
                whole[tile.where] = part[0]
        if saves.save == "U":
            through = shards.sum(head.through(tile.gradient[0], compute_dtype(head.weight.dtype)))
            saved[tile.where] = through.to(saved.dtype)
    return [*wanted.and_lse(results), saved]


def _local(head: Head, rows: Rows, transform: Transform, shards: Shards) -> Rows:
    """`rows` with the targets counted from this rank's first id, after the checks of values."""
    rows.check_values(transform, None)
    assert rows.targets is not None
    return rows._replace(targets=shards.local_ids(rows.targets, rows.mask, head.weight.shape[0]))


@without_autocast
def _backward(
    head: Head, rows: Rows, transform: Transform, shards: Shards, saved: _ForBackward, upstream: Upstream, backend: str
) -> list[Tensor]:  # fmt: skip
    """Gradients of hidden and the head's parameters, empty where not needed."""
    if saved.gradients is None:
        each = _remade(head, _local(head, rows, transform, shards), transform, saved.stats, upstream, backend)
        return summed_gradients(head, rows.hidden, saved.needs, each, shards.sum)
    at_once = _products.takes(head.weight)
    gradients = saved.gradients[:, : head.weight.shape[0]]
    each = _remembered(rows, gradients, upstream, rows.hidden.shape[0] if at_once else rows.chunk_tokens)
    return summed_gradients(head, rows.hidden, saved.needs, each, shards.sum, at_once=at_once)


def _remade(
    head: Head, rows: Rows, transform: Transform, stats: list[Tensor], upstream: Upstream, backend: str
) -> Iterator[RowGradients]:
    """Makes the tiles of logits again, of the rows that count and have an upstream gradient."""
    rows = rows._replace(mask=_alive(rows.mask, *upstream))
    for tile in counted_tiles(head, rows, transform, backend):
        head.logits(tile.hidden, tile.logits[0])
        of_tile = [s[tile.where][None] if s.numel() else s for s in stats]
        parts, scale = by_row(tile, *upstream)
        IMPLS[backend].backward(*tile.of_kernels, of_tile, *parts, tile.gradient)
        yield tile.where, tile.hidden, tile.gradient[0], scale


def _remembered(rows: Rows, gradients: Tensor, upstream: Upstream, most: int) -> Iterator[RowGradients]:
    """Reads G, whose rows are those that forward took, in its order, at most so many at a time; leaves out the same
    rows as _remade."""
    alive = _alive(rows.mask, upstream.grad_logprobs)
    assert upstream.grad_logprobs is not None
    scale = torch.where(alive != 0, upstream.grad_logprobs, 0)
    taken = counted_rows(rows.hidden.shape[0], rows.mask, rows.mask_count)
    living = counted_rows(taken.length, alive[taken.pick(slice(None))], None)
    for places in chunks(living.length, max(1, most)):
        at = living.pick(places)
        where = taken.pick(at)
        yield where, zero_behind(alive[where], rows.hidden[where]), gradients[at], scale[where]


def _alive(mask: Tensor | None, *upstream: Tensor | None) -> Tensor:
    """(N,) uint8: the rows that count and have an upstream gradient other than 0."""
    nonzero = [(g != 0) if g.dim() == 1 else (g != 0).any(1) for g in upstream if g is not None]
    alive = torch.stack(nonzero).any(0)
    return (alive if mask is None else alive & (mask != 0)).to(torch.uint8)


_run_backward = registration.op_without_gradient(
    "linear_logprobs_backward", (Head, Rows, Transform, Shards, _ForBackward, Upstream), _backward,
    fake=lambda head, rows, _, shards, saved, *others: empty_gradients(head, rows.hidden, saved.needs),
)  # fmt: skip


def _gradients(saved: registration.Saved, gradients: Sequence[Tensor | None]) -> Mapping[str, Tensor]:
    head, rows, transform, shards, wanted, saves = saved.inputs
    *stats, _, kept = saved.results
    upstream = wanted.upstream(gradients)
    if all(g is None for g in upstream):
        return {}
    by_logprob_alone = upstream.grad_logprobs is not None and upstream.grad_entropy is None
    if by_logprob_alone and saves.save == "U":
        scale = upstream.grad_logprobs
        if rows.mask is not None:
            scale = torch.where(rows.mask != 0, scale, 0)
        return {"hidden": (scale[:, None] * kept).to(kept.dtype)}
    needs = [saved.needs[name] for name in DIFFERENTIABLE]
    for_backward = _ForBackward(stats, kept if by_logprob_alone and saves.save == "G" else None, needs)
    each = _run_backward(head, rows, transform, shards, for_backward, upstream, saved.backend)
    return dict(zip(DIFFERENTIABLE, each, strict=True))


TENSORS = ("hidden", "weight", "bias", "lora_a", "lora_b", "targets", "mask", "temperatures")
DIFFERENTIABLE = TENSORS[:5]

run = registration.op(
    "linear_logprobs", (Head, Rows, Transform, Shards, Wanted, Saves), _forward, fake=_fake,
    differentiable=DIFFERENTIABLE, saves=TENSORS, backward=_gradients, returned=2,
)  # fmt: skip
