"""The rows of a call on a head, in tiles: which rows, in which order, and the places for their logits.

Of all the logits a call holds those of one tile, in one buffer, and on a GPU their gradient in one of the head's type;
on the CPU the gradient is written over the logits.

Source: tiling over tokens as in Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models"
(arXiv 2411.09009).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import device_type, prefer_huge_pages
from rlhf_fast.ops.core import check
from rlhf_fast.ops.head import _products
from rlhf_fast.ops.head.head import Head, row_stride
from rlhf_fast.ops.tokens.transform import Transform

# Scratch for one tile of float32 logits: enough rows for a matrix product at full speed, which reads (on the CPU also
# packs) all of the head's weight once per tile.
TILE_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
GPU_ROWS = 1024  # the rows of a product that fill whole waves of a GPU's multiprocessors, at the widths of models


class Rows(NamedTuple):
    """What a call takes through a head."""

    hidden: Tensor  # (N, D)
    targets: Tensor | None  # (N,) or (N, K) int64; None where no token is asked about
    mask: Tensor | None  # (N,) uint8
    mask_count: int | None  # an upper bound of how many rows count
    chunk_tokens: int  # the most rows of a tile

    def check_values(self, transform: Transform, vocabulary: int | None) -> None:
        """Raises where values are looked at; vocabulary: None where the targets are looked at elsewhere."""
        if self.targets is not None and vocabulary is not None:
            per_row = self.targets.shape[1] if self.targets.dim() > 1 else 1
            check.targets_inside(self.targets, self.mask, vocabulary, per_row)
        check.counted_within(self.mask, self.mask_count)
        check.positive_rows("temperature", transform.temperatures, self.mask)


def checked_rows(
    hidden: Tensor, weight: Tensor, targets: Tensor | None, mask: Tensor | None, mask_count: int | None,
    chunk_tokens: int | None, *, several_targets: bool = False,
) -> Rows:  # fmt: skip
    """The rows of hidden (..., D), with the chunk of TILE_BYTES where none is given. Raises ValueError or TypeError.

    several_targets: whether targets may be (..., K).
    """
    shape = hidden.shape[:-1]
    check.that(chunk_tokens is None or chunk_tokens >= 1, "chunk_tokens", ">= 1", chunk_tokens)
    check.mask_count(mask, mask_count)
    check.same_device(("hidden", hidden), ("targets", targets), ("mask", mask))
    ids = targets
    if targets is not None:
        several = several_targets and targets.dim() == hidden.dim() and targets.shape[-1] > 0
        if not several or targets.shape[:-1] != shape:
            check.shaped("targets", targets, shape, "hidden.shape[:-1]" + " (or that and K)" * several_targets)
        ids = check.ids("targets", targets).view(shape.numel(), *targets.shape[len(shape) :])
    counts = check.mask_bytes(mask, shape, "hidden.shape[:-1]")
    return Rows(
        check.rows(hidden), ids, None if counts is None else counts.view(-1), mask_count,
        chunk_tokens or default_chunk_tokens(weight),
    )  # fmt: skip


def default_chunk_tokens(weight: Tensor) -> int:
    """How many rows of logits fit TILE_BYTES, at least 16: a multiple of 16, on a GPU of GPU_ROWS where so many fit."""
    kind = device_type(weight)
    budget = TILE_BYTES.get(kind, TILE_BYTES["cuda"])
    fitting = budget // (row_stride(weight.shape[0], weight.device) * check.compute_dtype(weight.dtype).itemsize)
    step = GPU_ROWS if kind != "cpu" and fitting >= GPU_ROWS else 16
    return max(16, fitting // step * step)


class Scratch(NamedTuple):
    """Bytes that a call holds: of logits and their gradient, and of the tile's hidden states and their gradient."""

    logits: int
    hidden: int


def scratch_of(op: str, given: Mapping[str, Any], device: str) -> Scratch:
    """Of a call of an op on a head, 0 of another op, on a device of this type. given: its arguments by name; all rows
    count, or mask_count of them."""
    if "chunk_tokens" not in given:
        return Scratch(0, 0)
    hidden, weight, count = given["hidden"], given["weight"], given["mask_count"]
    rows = min(hidden.shape[0] if count is None else count, hidden.shape[0], given["chunk_tokens"])
    rows *= 2 if op.startswith("linear_kl") else 1
    wide, narrow = check.compute_dtype(weight.dtype).itemsize, weight.dtype.itemsize
    gradient = narrow if device != "cpu" and narrow < wide else 0
    logits = rows * row_stride(weight.shape[0], torch.device(device)) * (wide + gradient)
    return Scratch(logits, rows * weight.shape[1] * (wide + (0 if count is None else narrow)))


class Order(NamedTuple):
    """Which rows of a call are taken, in which order."""

    rows: Tensor | None  # None: all of them, as they stand
    length: int
    masked: bool  # whether rows behind the mask may be among them

    def pick(self, places: slice | Tensor) -> slice | Tensor:
        """What picks the rows at some places of the order out of a tensor over all rows."""
        return places if self.rows is None else self.rows[places]


def counted_rows(count: int, mask: Tensor | None, mask_count: int | None) -> Order:
    """Those of `count` rows that the mask counts.

    On a GPU finding them would wait for it: they are `mask_count` rows, those that count first, or all of them.
    """
    if mask is None:
        return Order(None, count, masked=False)
    if mask.device.type == "cpu":
        index = mask.nonzero()[:, 0]
        return Order(index if index.shape[0] < count else None, index.shape[0], masked=False)
    if mask_count is None:
        return Order(None, count, masked=True)
    return Order(torch.argsort(mask, descending=True, stable=True)[:mask_count], min(mask_count, count), masked=True)


def chunks(count: int, most: int, start: int = 0) -> list[slice]:
    """`count` places from `start` on in slices of at most `most`, of equal height but the last.

    The height is a multiple of 128 or 16 where `most` is large: products want that of a dimension.
    """
    step = 128 if most >= 1024 else 16 if most >= 128 else 1
    most = most // step * step
    number = -(-count // most)
    height = -(-count // (number * step)) * step if number else 1
    return [slice(start + i, start + min(i + height, count)) for i in range(0, count, height)]


class Tile(NamedTuple):
    """n rows as the products and the row kernels take them."""

    where: slice | Tensor  # picks them out of a tensor over all rows
    hidden: Tensor  # (n, D), 0 behind the mask
    targets: Tensor  # (1, n) or (1, n, K), zeros where no token is asked about
    mask: Tensor | None  # (1, n)
    transform: Transform
    logits: Tensor  # (1, depth n, V): the place for them
    gradient: Tensor  # the same for their gradient, possibly the same place

    @property
    def of_kernels(self) -> tuple[Tensor, Tensor, Tensor | None, Transform]:
        """The first arguments of the row kernels."""
        return self.logits, self.targets, self.mask, self.transform


class Tiles:
    """The rows of `order` in tiles, each some of its places, with the places for their logits.

    backend: of the row kernels. depth: 2 where every row has two rows of logits, its own and a reference's.
    all_logits, all_gradients: (depth order.length, V), what keeps those of all tiles, in place of a buffer for one,
    with the row_stride of V.
    """

    def __init__(
        self, head: Head, rows: Rows, transform: Transform, order: Order, slices: Sequence[slice], backend: str, *,
        depth: int = 1, all_logits: Tensor | None = None, all_gradients: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.rows, self.transform, self.order, self.slices, self.depth = rows, transform, order, slices, depth
        self.whole = (all_logits, all_gradients)
        weight, dtype = head.weight, check.compute_dtype(head.weight.dtype)
        size = depth * max((tile.stop - tile.start for tile in slices), default=0)
        logits, gradients = all_logits, all_gradients
        if logits is None and gradients is not None and gradients.dtype == dtype:
            logits = gradients
        if logits is None:
            logits = tile_buffer(weight, size, dtype)
            if gradients is None and gradient_dtype(weight, backend) == dtype:
                gradients = logits
        if gradients is None:
            gradients = tile_buffer(weight, size, gradient_dtype(weight, backend))
        self.logits, self.gradients = logits, gradients

    def __iter__(self) -> Iterator[Tile]:
        return map(self.tile, self.slices)

    def tile(self, places: slice, among: Tensor | None = None) -> Tile:
        """The rows at `places` of the order, or those `among` them."""
        where = self.order.pick(places)
        if among is not None:
            where = among + places.start if isinstance(where, slice) else where[among]
        n = places.stop - places.start if among is None else among.shape[0]
        mask = self.rows.mask[where] if self.rows.mask is not None and self.order.masked else None
        ids = self.rows.targets
        targets = self.rows.hidden.new_zeros(n, dtype=torch.int64) if ids is None else ids[where]
        return Tile(
            where, zero_behind(mask, self.rows.hidden[where]), targets[None], None if mask is None else mask[None],
            self.transform.at(where), self._place(self.logits, places.start, n),
            self._place(self.gradients, places.start, n),
        )  # fmt: skip

    def _place(self, buffer: Tensor, start: int, n: int) -> Tensor:
        first = self.depth * start if any(buffer is whole for whole in self.whole) else 0
        return buffer[None, first : first + self.depth * n]


def by_row(tile: Tile, *upstream: Tensor | None) -> tuple[list[Tensor | None], Tensor]:
    """Of upstream gradients (N,) or (N, K) those of a tile over the greatest of each row, (1, n, ...), and that, (n,).

    So G = d loss / d logits of a row is of the size of a probability, whatever the loss divides by: 1 / N times a
    probability is no float16. The products of G are multiplied by row afterwards. Behind the mask the greatest is 1.
    """
    of_tile = [None if g is None else g[tile.where] for g in upstream]
    sizes = [g.abs() if g.dim() == 1 else g.abs().amax(1) for g in of_tile if g is not None]
    scale = torch.stack(sizes).amax(0)
    scale = torch.where(scale == 0 if tile.mask is None else (scale == 0) | (tile.mask[0] == 0), 1, scale)
    parts = [None if g is None else (g / (scale if g.dim() == 1 else scale[:, None]))[None] for g in of_tile]
    return parts, scale


def counted_tiles(
    head: Head, rows: Rows, transform: Transform, backend: str, *, depth: int = 1, all_logits: Tensor | None = None,
    all_gradients: Tensor | None = None,
) -> Tiles:  # fmt: skip
    """Tiles of equal height of the rows that count."""
    order = counted_rows(rows.hidden.shape[0], rows.mask, rows.mask_count)
    places = {"depth": depth, "all_logits": all_logits, "all_gradients": all_gradients}
    return Tiles(head, rows, transform, order, chunks(order.length, rows.chunk_tokens), backend, **places)  # type: ignore[arg-type]


def zero_behind(mask: Tensor | None, x: Tensor) -> Tensor:
    """Rows x (n, D), 0 behind the mask (n,): nothing there gets into a product."""
    return x if mask is None else torch.where(mask[:, None] != 0, x, 0)


def gradient_dtype(weight: Tensor, backend: str) -> torch.dtype:
    """Of d / d logits: on a GPU the weight's, but the row kernels of CUDA write it in the logits'."""
    narrow = _products.takes(weight) and backend != "cuda"
    return weight.dtype if narrow else check.compute_dtype(weight.dtype)


_last = threading.local()


def tile_buffer(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, V), unwritten, with the row_stride of V: scratch of one call, which must be over before the next one.

    On the CPU a thread keeps the last buffer of at most TILE_BYTES for its next call: PyTorch would give it back to the
    system, and the first touch of fresh pages costs a tenth of the products.
    """
    columns = weight.shape[0]
    shape = rows, row_stride(columns, weight.device)
    size = shape[0] * shape[1] * dtype.itemsize
    if weight.device.type != "cpu" or not 0 < size <= TILE_BYTES["cpu"]:
        return prefer_huge_pages(weight.new_empty(shape, dtype=dtype))[:, :columns]
    buffer: Tensor | None = getattr(_last, "buffer", None)
    if buffer is None or buffer.numel() < size:
        _last.buffer = None  # frees the smaller one first
        buffer = _last.buffer = prefer_huge_pages(torch.empty(size, dtype=torch.uint8))
    return buffer[:size].view(dtype).view(shape)[:, :columns]


def free_tile_buffer() -> None:
    """Gives this thread's buffer back."""
    _last.buffer = None
