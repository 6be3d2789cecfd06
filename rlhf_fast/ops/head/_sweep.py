"""What the losses from hidden states share: one sweep over the logits that makes the gradient in forward.

The sweep takes groups of rows that hold every row their coefficients depend on (_linear_plan). For each group it makes
the logits and their statistics, asks the loss for its derivatives by all log-probabilities known so far, turns the
logits in place into their gradient, and multiplies that into grad_hidden and the gradients of the head. Backward is a
scale. With P = one N x D x V product (2 N D V FLOPs):

    no gradient                                     P
    a group whose logits fit the scratch budget     3P, 2P where the weight is frozen: nothing is made twice
    a unit that does not fit, summed                the same
    a unit that does not fit, otherwise             up to 4P, tile by tile; the logits of the last tile are still there

Summed is a unit of sequences in each of which all rows have one derivative c, where the scratch budget also holds a
gradient of the head per sequence: the products are made of d logprob / d logits, and multiplied by c once it is known.

On the CPU rows behind the mask cost nothing, on a GPU those beyond `mask_count`; on the CPU rows whose coefficients are
0 (clipped tokens, advantages of 0) cost P. The loss is asked about all rows for every group: what it says of rows that
are not known yet is not used, and some 100 FLOPs per row are nothing beside 6 D V. So loss, metrics and derivatives are
those of the loss's own op on these log-probabilities, whatever the tiles.

Scratch is the logits of one tile (on a GPU also their gradient in the head's type, on the CPU a widened block of a
half-precision head) and some numbers per row. The gradients are outputs, those of the head in float32 (float64):
rounded once, after the upstream scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_fast.ops.core import check
from rlhf_fast.ops.head._plan import Plan
from rlhf_fast.ops.head.tiles import Head, HeadGradients, by_row, tile_buffer
from rlhf_fast.ops.tokens import token_logprobs as rows

# (logprobs (N,), entropy (N,) or None)
#   -> [loss (), metrics, d loss / d logprobs (N,), and d loss / d entropy (N,) where it has a weight]
Loss = Callable[[Tensor, Tensor | None], list[Tensor]]


class Sweep:
    """The rows of a plan, and one buffer for the logits of a tile."""

    def __init__(self, head: Head, hidden: Tensor, targets: Tensor, mask: Tensor | None, transform: rows.Transform,
                 plan: Plan, want_entropy: bool, backend: str) -> None:  # fmt: skip
        self.head, self.hidden, self.targets, self.mask = head, hidden, targets, mask
        self.transform, self.plan, self.want_entropy = transform, plan, want_entropy
        self.forward, self.backward = rows.IMPLS[backend]
        dtype, weight = check.compute_dtype(hidden.dtype), head.weight
        self.buffer = tile_buffer(hidden, plan.height, weight.shape[0], dtype)
        narrow = weight.is_cuda and weight.dtype != dtype
        self.gradients = torch.empty_like(self.buffer, dtype=weight.dtype) if narrow else self.buffer
        self.held: slice | None = None  # the tile whose logits are in the buffer

    def statistics(self, tile: slice) -> list[Tensor]:
        """Statistics of the rows of `tile`, (1, n) each, see token_logprobs.empty_stats."""
        return self._visit(tile, None)

    def unit_gradient(self, tile: slice) -> tuple[list[Tensor], Tensor]:
        """(statistics, d logprob / d logits) of the rows of `tile`, in one visit."""
        gradient = self.gradients[None, : tile.stop - tile.start]
        stats, self.held = self._visit(tile, gradient), None
        return stats, gradient[0]

    def gradient(
        self, tile: slice, stats: list[Tensor], upstream: Sequence[Tensor]
    ) -> tuple[slice | Tensor, Tensor, Tensor]:
        """(which rows, d loss / d logits of them, the factors (n,) that it yet lacks) of `tile`.

        upstream: by logprob and by entropy, over all rows.
        """
        picked = self.plan.rows(tile)
        live = self._live(picked, upstream)
        if live is None:
            logits = self._logits(tile, picked)
        else:
            picked = live + tile.start if isinstance(picked, slice) else picked[live]
            logits = self._live_logits(tile, picked, live)
            stats = [s[:, live] if s.numel() else s for s in stats]
        self.held = None
        gradient = self.gradients[None, : logits.shape[1]]
        parts, scale = by_row(None, *(u[picked] for u in upstream))
        by_logprob, by_entropy, *_ = [*(None if part is None else part[None] for part in parts), None]
        self.backward(logits, *self._of_rows(picked), stats, by_logprob, by_entropy, None, gradient)
        return picked, gradient[0], scale

    def hidden_rows(self, picked: slice | Tensor) -> Tensor:
        """Some rows of hidden, 0 behind the mask: nothing there gets into a product."""
        hidden = self.hidden[picked]
        return hidden if self.mask is None else torch.where(self.mask[picked][:, None] != 0, hidden, 0)

    def _visit(self, tile: slice, gradient: Tensor | None) -> list[Tensor]:
        picked = self.plan.rows(tile)
        logits = self._logits(tile, picked)
        stats = rows.empty_stats(logits, self.want_entropy)
        self.forward(logits, *self._of_rows(picked), self.want_entropy, stats, gradient)
        return stats

    def _logits(self, tile: slice, picked: slice | Tensor) -> Tensor:
        logits = self.buffer[: tile.stop - tile.start]
        if self.held != tile:
            self.head.logits(self.hidden_rows(picked), logits)
            self.held = tile
        return logits[None]

    def _live(self, picked: slice | Tensor, upstream: Sequence[Tensor]) -> Tensor | None:
        """Where in a tile a coefficient is not 0; None for everywhere, and on a GPU, which would have to wait."""
        if self.hidden.device.type != "cpu":
            return None
        live = torch.stack([u[picked] != 0 for u in upstream]).any(0)
        return None if live.all() else live.nonzero()[:, 0]

    def _live_logits(self, tile: slice, picked: Tensor, live: Tensor) -> Tensor:
        """The logits of the rows `picked`, which stand at `live` in the tile."""
        logits = self.buffer[: live.shape[0]]
        if self.held == tile:
            for to, row in enumerate(live.tolist()):  # one by one, upwards: no second buffer
                if to != row:
                    logits[to] = self.buffer[row]
        else:
            self.head.logits(self.hidden_rows(picked), logits)
        return logits[None]

    def _of_rows(self, picked: slice | Tensor) -> tuple[Tensor, Tensor | None, rows.Transform]:
        """targets, mask and transform of some rows."""
        temperatures = self.transform.temperatures
        return (
            self.targets[picked][None],
            None if self.mask is None else self.mask[picked][None],
            self.transform._replace(temperatures=None if temperatures is None else temperatures[picked][None]),
        )


class Result:
    """What a sweep fills: log-probabilities and entropy of all rows, the gradients of (hidden, *head[:4])."""

    def __init__(self, sweep: Sweep, needs: list[bool]) -> None:
        hidden, dtype = sweep.hidden, check.compute_dtype(sweep.hidden.dtype)
        self.sweep, self.needs, self.count = sweep, needs, hidden.shape[0]
        self.logprobs = hidden.new_zeros(self.count, dtype=dtype)
        self.entropy = hidden.new_zeros(self.count if sweep.want_entropy else 0, dtype=dtype)
        self.grad_hidden = torch.zeros_like(hidden, dtype=gradient_dtype(hidden)) if needs[0] else hidden.new_empty(0)
        self.head_gradients = HeadGradients(sweep.head, needs[1:])

    @property
    def known(self) -> tuple[Tensor, Tensor | None]:
        return self.logprobs, self.entropy if self.sweep.want_entropy else None

    def record(self, tile: slice, stats: list[Tensor]) -> None:
        for whole, part in zip((self.logprobs, self.entropy), stats, strict=False):
            if part.numel():
                whole[self.sweep.plan.rows(tile)] = part[0]

    def add(self, picked: slice | Tensor, gradient: Tensor, to: HeadGradients, scale: Tensor | None = None) -> None:
        """The products of some rows: d loss / d hidden, and what they add `to` the gradients of the head."""
        if self.needs[0]:
            through = self.sweep.head.through(gradient, gradient_dtype(self.sweep.hidden))
            self.grad_hidden[picked] = through if scale is None else (through * scale[:, None]).to(through.dtype)
        if any(self.needs[1:]):
            to.add(gradient, self.sweep.hidden_rows(picked), scale)


def gradient_dtype(hidden: Tensor) -> torch.dtype:
    """Of grad_hidden before the upstream scale: a loss's 1 / N is no float16, a loss scaler's product with it is."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def differentiate(sweep: Sweep, loss: Loss, needs: list[bool]) -> list[Tensor]:
    """[loss, metrics, logprobs, entropy, and the gradients of (hidden, *head[:4])], those not wanted empty."""
    result = Result(sweep, needs)
    sums: list[HeadGradients] = []
    for group in sweep.plan.groups:
        _take_group(result, loss, group)
    for unit in sweep.plan.summed:
        _take_summed(result, loss, unit, sums)
    return [
        *loss(*result.known)[:2], result.logprobs, result.entropy, result.grad_hidden, *result.head_gradients.sums(),
    ]  # fmt: skip


def _take_group(result: Result, loss: Loss, group: list[slice]) -> None:
    sweep = result.sweep
    group_stats = [sweep.statistics(tile) for tile in group]
    for tile, stats in zip(group, group_stats, strict=True):
        result.record(tile, stats)
    if any(result.needs):
        upstream = loss(*result.known)[2:]
        for tile, stats in zip(reversed(group), reversed(group_stats), strict=True):
            picked, gradient, scale = sweep.gradient(tile, stats, upstream)
            result.add(picked, gradient, result.head_gradients, scale)


def _take_summed(result: Result, loss: Loss, unit: list[list[slice]], sums: list[HeadGradients]) -> None:
    """A unit by its sequences; `sums` are accumulators of the sequences, kept from unit to unit."""
    sweep = result.sweep
    if not any(result.needs):
        for tile in (tile for tiles in unit for tile in tiles):
            result.record(tile, sweep.statistics(tile))
        return
    sums.extend(HeadGradients(sweep.head, result.needs[1:]) for _ in unit[len(sums) :])
    for tiles, of_sequence in zip(unit, sums, strict=False):
        of_sequence.empty = True
        for tile in tiles:
            stats, gradient = sweep.unit_gradient(tile)
            result.record(tile, stats)
            result.add(sweep.plan.rows(tile), gradient, of_sequence)
    by_logprob = loss(*result.known)[2]
    for tiles, of_sequence in zip(unit, sums, strict=False):
        every = by_logprob[sweep.plan.rows(slice(tiles[0].start, tiles[-1].stop))]
        slope = every.gather(0, every.abs().argmax()[None])  # rows behind the mask may have 0
        result.head_gradients.add_sums(of_sequence, slope)
        if result.needs[0]:
            for picked in map(sweep.plan.rows, tiles):
                result.grad_hidden[picked] = (result.grad_hidden[picked] * slope).to(result.grad_hidden.dtype)


def empty_results(head: Head, hidden: Tensor, want_entropy: bool, needs: list[bool], metrics: int) -> list[Tensor]:
    """What `differentiate` returns, unwritten, with `metrics` metrics."""
    dtype, count = check.compute_dtype(hidden.dtype), hidden.shape[0]
    shapes = [(), (metrics,), (count,), (count if want_entropy else 0,)]
    numbers = [hidden.new_empty(shape, dtype=dtype) for shape in shapes]
    grad_hidden = hidden.new_empty(hidden.shape, dtype=gradient_dtype(hidden)) if needs[0] else hidden.new_empty(0)
    sums = [
        hidden.new_empty((0,) if p is None or not need else p.shape, dtype=dtype)
        for p, need in zip(head[:4], needs[1:], strict=True)
    ]
    return [*numbers, grad_hidden, *sums]
