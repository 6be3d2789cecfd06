"""How a loss from hidden states gets its gradient while the logits are there.

The loss names groups of rows, each of which holds every row that the loss's derivatives within it depend on (_plan). A
sweep takes one group after the other:

    1. makes the logits of its rows, and their log-probabilities and entropies;
    2. asks the loss for its derivatives by them;
    3. turns the logits in place into d loss / d logits, and multiplies these into the gradients of hidden and head.

The loss is asked about all rows of the call each time, although only the derivatives of this group are used: some 100
FLOPs a row are nothing beside 6 D V, and so loss, metrics and derivatives are those of the loss's own op.

Cost, with P = one N x D x V product (2 N D V FLOPs):

    no gradient                                       P
    a group whose logits fit the scratch budget       3P, 2P where the weight is frozen
    a group that does not fit                         up to 4P: step 3 makes the logits again, but for the last tile's
    the same where it is summed                       3P, 2P

Summed are sequences in each of which all rows have one derivative c, where the budget has room for the gradients of the
head of each: step 3 comes first, with d logprob / d logits, and its sums are multiplied by c once that is known.

On the CPU rows behind the mask cost nothing, on a GPU those beyond `mask_count`; on the CPU rows whose derivatives are
0 (clipped tokens, advantages of 0) cost P. Scratch is the logits of one tile (Tiles) and some numbers per row. The
gradients are results, those of the head in float32 (float64): rounded once, after the upstream scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_fast.ops.core import check
from rlhf_fast.ops.head._plan import Plan
from rlhf_fast.ops.head.head import Head, HeadGradients
from rlhf_fast.ops.head.tiles import Tile, Tiles, by_row
from rlhf_fast.ops.tokens.token_logprobs import IMPLS, empty_stats

# (logprobs (N,), entropy (N,) or None)
#   -> [loss (), metrics, d loss / d logprobs (N,), and d loss / d entropy (N,) where it has a weight]
Loss = Callable[[Tensor, Tensor | None], list[Tensor]]


def empty(
    head: Head, hidden: Tensor, want_entropy: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, HeadGradients]:
    """Log-probabilities and entropies (N,), the gradients of hidden and of the head; what is not wanted is empty.

    needs: whether each of hidden and the head's parameters wants a gradient.
    """
    count, dtype = hidden.shape[0], check.compute_dtype(hidden.dtype)
    return (
        hidden.new_zeros(count, dtype=dtype),
        hidden.new_zeros(count if want_entropy else 0, dtype=dtype),
        hidden.new_zeros(hidden.shape if needs[0] else (0,), dtype=gradient_dtype(hidden)),
        HeadGradients(head, needs[1:]),
    )


def gradient_dtype(hidden: Tensor) -> torch.dtype:
    """Of grad_hidden before the upstream scale: a loss's 1 / N is no float16, a loss scaler's product with it is."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


class Sweep:
    """One pass over the groups of a plan."""

    def __init__(
        self, head: Head, tiles: Tiles, loss: Loss, want_entropy: bool, needs: list[bool], backend: str
    ) -> None:
        self.head, self.tiles, self.loss, self.want_entropy, self.needs = head, tiles, loss, want_entropy, needs
        results = empty(head, tiles.rows.hidden, want_entropy, needs)
        self.logprobs, self.entropy, self.grad_hidden, self.head_gradients = results
        self.of_sequences: list[HeadGradients] = []  # of the sequences of a unit that is summed, from unit to unit
        self.held: slice | None = None  # the tile whose logits are in the buffer
        self.kernels = IMPLS[backend]

    def run(self, plan: Plan) -> list[Tensor]:
        """[loss, metrics, logprobs, entropy, and the gradients of hidden and the head's parameters]"""
        for group in plan.groups:
            self._take(group)
        for unit in plan.summed:
            self._take_summed(unit)
        loss, metrics, *_ = self._evaluated()
        return [loss, metrics, self.logprobs, self.entropy, self.grad_hidden, *self.head_gradients.sums()]

    def _evaluated(self) -> list[Tensor]:
        """The loss of the log-probabilities known so far."""
        return self.loss(self.logprobs, self.entropy if self.want_entropy else None)

    def _take(self, group: list[slice]) -> None:
        group_stats = [self._visit(places)[1] for places in group]
        if not any(self.needs):
            return
        upstream = self._evaluated()[2:]
        for places, stats in zip(reversed(group), reversed(group_stats), strict=True):
            tile, scale = self._differentiate(places, stats, upstream)
            self._multiply(tile, self.head_gradients, scale)

    def _take_summed(self, unit: list[list[slice]]) -> None:
        """A unit by its sequences."""
        if not any(self.needs):
            for places in (places for sequence in unit for places in sequence):
                self._visit(places)
            return
        self.of_sequences.extend(HeadGradients(self.head, self.needs[1:]) for _ in unit[len(self.of_sequences) :])
        for sequence, sums in zip(unit, self.of_sequences, strict=False):
            sums.empty = True
            for places in sequence:
                self._multiply(self._visit(places, of_logprobs=True)[0], sums)
        by_logprob = self._evaluated()[2]
        for sequence, sums in zip(unit, self.of_sequences, strict=False):
            pick = self.tiles.order.pick
            every = by_logprob[pick(slice(sequence[0].start, sequence[-1].stop))]
            slope = every.gather(0, every.abs().argmax()[None])  # rows behind the mask may have 0
            self.head_gradients.add_sums(sums, slope)
            if self.needs[0]:
                for where in map(pick, sequence):
                    self.grad_hidden[where] = (self.grad_hidden[where] * slope).to(self.grad_hidden.dtype)

    def _visit(self, places: slice, of_logprobs: bool = False) -> tuple[Tile, list[Tensor]]:
        """A tile with its statistics, which are recorded; of_logprobs: and d logprob / d logits in its place."""
        tile = self.tiles.tile(places)
        self.head.logits(tile.hidden, tile.logits[0])
        self.held = None if of_logprobs else places
        stats = empty_stats(tile.logits, self.want_entropy)
        self.kernels.forward(*tile.of_kernels, self.want_entropy, stats, tile.gradient if of_logprobs else None)
        for whole, part in zip((self.logprobs, self.entropy), stats, strict=False):
            if part.numel():
                whole[tile.where] = part[0]
        return tile, stats

    def _differentiate(self, places: slice, stats: list[Tensor], upstream: Sequence[Tensor]) -> tuple[Tile, Tensor]:
        """The rows of a tile that have a derivative, d loss / d logits in place, and the factors (n,) that it lacks."""
        live = self._live(self.tiles.order.pick(places), upstream)
        tile = self.tiles.tile(places, live)
        if live is not None:
            stats = [s[:, live] if s.numel() else s for s in stats]
        if self.held != places:
            self.head.logits(tile.hidden, tile.logits[0])
        elif live is not None:
            whole = self.tiles.tile(places).logits[0]
            for to, row in enumerate(live.tolist()):  # one by one, upwards: no second buffer
                if to != row:
                    tile.logits[0, to] = whole[row]
        self.held = None
        parts, scale = by_row(tile, *upstream)
        by_logprob, by_entropy, *_ = [*parts, None]
        self.kernels.backward(*tile.of_kernels, stats, by_logprob, by_entropy, None, tile.gradient)
        return tile, scale

    def _live(self, where: slice | Tensor, upstream: Sequence[Tensor]) -> Tensor | None:
        """Where in a tile a derivative is not 0; None for everywhere, and on a GPU, which would have to wait."""
        if self.tiles.rows.hidden.device.type != "cpu":
            return None
        live = torch.stack([u[where] != 0 for u in upstream]).any(0)
        return None if live.all() else live.nonzero()[:, 0]

    def _multiply(self, tile: Tile, sums: HeadGradients, scale: Tensor | None = None) -> None:
        """The products of a tile's gradient: d loss / d hidden, and what it adds to `sums`."""
        gradient = tile.gradient[0]
        if self.needs[0]:
            through = self.head.through(gradient, self.grad_hidden.dtype)
            self.grad_hidden[tile.where] = through if scale is None else (through * scale[:, None]).to(through.dtype)
        if any(self.needs[1:]):
            sums.add(gradient, tile.hidden, scale)
