"""The matrix products of an LM head over tiles of tokens, for every op that never holds all the logits.

    logits = hidden @ weight^T + lora_scale * (hidden @ lora_a^T) @ lora_b^T + bias

With G = d loss / d logits of a tile:

    d loss / d hidden = G @ weight + lora_scale * (G @ lora_b) @ lora_a
    d loss / d weight = G^T @ hidden,                      d loss / d bias = G^T @ 1
    d loss / d lora_a = lora_scale * (G @ lora_b)^T @ hidden
    d loss / d lora_b = lora_scale * G^T @ (hidden @ lora_a^T)

Each of the three large products is 2 n D V FLOPs for a tile of n rows (P, when summed over all N rows); LoRA of rank R
adds R / D of that. Logits are accumulated and kept in float32 (float64 for float64). On a GPU G is of the weight's
type, on the CPU of the logits'; gradients of parameters are accumulated in float32 across tiles. No atomics.

Source: tiling over tokens as in Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models"
(arXiv 2411.09009); LoRA, Hu et al. 2021 (arXiv 2106.09685), eq. 3.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast import backends
from rlhf_fast.backends import prefer_huge_pages
from rlhf_fast.ops.core import check
from rlhf_fast.ops.head import _products

# Scratch for one tile of float32 logits: enough rows for a matrix product at full speed, which reads (on the CPU also
# packs) all of the head's weight once per tile.
TILE_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
VOCABULARY_BLOCK = 8192  # half-precision heads are widened to float32 in blocks of this many rows on the CPU


_kept = threading.local()


def operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, head_lora: tuple[Tensor, Tensor, float] | None
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor, float] | None]:
    """The same in the types of their products, see backends.operands."""
    lora_a, lora_b, scale = head_lora or (None, None, 1.0)
    hidden, weight, bias, lora_a, lora_b = backends.operands(hidden, weight, bias, lora_a, lora_b)
    return hidden, weight, bias, None if head_lora is None else (lora_a, lora_b, scale)


def tile_buffer(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns), unwritten, on the device of `like`: scratch of one call, which must be over before the next one.

    On the CPU a thread keeps the last buffer of at most TILE_BYTES for its next call: PyTorch would give it back to the
    system, and the first touch of fresh pages costs a tenth of the products.
    """
    size = rows * columns * dtype.itemsize
    if like.device.type != "cpu" or not 0 < size <= TILE_BYTES["cpu"]:
        return prefer_huge_pages(like.new_empty(rows, columns, dtype=dtype))
    buffer: Tensor | None = getattr(_kept, "buffer", None)
    if buffer is None or buffer.numel() < size:
        _kept.buffer = None  # frees the smaller one first
        buffer = _kept.buffer = prefer_huge_pages(torch.empty(size, dtype=torch.uint8))
    return buffer[:size].view(dtype).view(rows, columns)


def free_tile_buffer() -> None:
    """Gives this thread's kept buffer back."""
    _kept.buffer = None


class Head(NamedTuple):
    """weight (V, D); bias (V,) or None; lora_a (R, D) and lora_b (V, R), or both None."""

    weight: Tensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    lora_scale: float = 1.0

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """out (n, V) float32 (float64) = the logits of hidden (n, D)."""
        weight = self.weight
        if weight.dtype == out.dtype:
            torch.mm(hidden, weight.t(), out=out)
        elif weight.is_cuda:
            _products.multiply(hidden, weight.t(), out.dtype, out)
        else:
            wide = hidden.to(out.dtype)
            for block in _vocabulary_blocks(weight):
                out[:, block] = wide @ weight[block].to(out.dtype).t()
        if self.lora_b is not None:
            _accumulate(out, self.lora_hidden(hidden), self.lora_b.t(), self.lora_scale)
        if self.bias is not None:
            out += self.bias

    def lora_hidden(self, hidden: Tensor) -> Tensor:
        """hidden @ lora_a^T (n, R)."""
        assert self.lora_a is not None
        return _product(hidden, self.lora_a.t())

    def through(self, gradient: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """d loss / d hidden (n, D) in `dtype` (default: the weight's), of d loss / d logits (n, V)."""
        weight, dtype = self.weight, dtype or self.weight.dtype
        if weight.is_cuda:
            gradient = gradient.to(weight.dtype)
        if gradient.dtype == weight.dtype == dtype:
            result = gradient @ weight
        elif weight.is_cuda:
            result = _products.multiply(gradient, weight, dtype)
        else:
            result = gradient.new_zeros(gradient.shape[0], weight.shape[1])
            for block in _vocabulary_blocks(weight):
                result.addmm_(gradient[:, block], weight[block].to(gradient.dtype))
        if self.lora_a is not None and self.lora_b is not None:
            _accumulate(result, _product(gradient, self.lora_b), self.lora_a, self.lora_scale)
        return result.to(dtype)


class HeadGradients:
    """Sums over tiles of the gradients of (weight, bias, lora_a, lora_b), those that are needed."""

    def __init__(self, head: Head, needs: list[bool]) -> None:
        """needs: whether each of (weight, bias, lora_a, lora_b) wants a gradient."""
        self.head, self.empty = head, True
        self.unit: Tensor | None = None  # what the totals are yet to be multiplied by, for float16, see `add`
        self.totals = [
            None if p is None or not need else p.new_empty(p.shape, dtype=check.compute_dtype(p.dtype))
            for p, need in zip(head[:4], needs, strict=True)
        ]

    def add(self, gradient: Tensor, hidden: Tensor, scale: Tensor | None = None) -> None:
        """Add what d loss / d logits = scale (n,) * gradient (n, V) of the rows `hidden` (n, D) gives."""
        head = self.head
        weight, bias, lora_a, lora_b = self.totals
        if head.weight.is_cuda:
            gradient = gradient.to(head.weight.dtype)
        if scale is None:
            scale = gradient.new_ones(gradient.shape[0])
        else:
            scale = self._in_units(scale) if head.weight.dtype == torch.float16 and scale.numel() else scale
            hidden = (hidden * scale[:, None]).to(hidden.dtype)  # (n, D) numbers to scale instead of (n, V)
        old, self.empty = (0.0 if self.empty else 1.0), False
        if weight is not None:
            _accumulate(weight, gradient.t(), hidden, old=old)
        if bias is not None:
            _accumulate(bias[:, None], gradient.t(), scale[:, None], old=old)
        if lora_a is not None and head.lora_b is not None:
            _accumulate(lora_a, _product(gradient, head.lora_b).t(), hidden, head.lora_scale, old)
        if lora_b is not None:
            _accumulate(lora_b, gradient.t(), head.lora_hidden(hidden), head.lora_scale, old)

    def _in_units(self, scale: Tensor) -> Tensor:
        """`scale` over the greatest one so far, which the totals are brought to: 1 / N and less are no float16."""
        greatest = scale.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        unit = greatest if self.unit is None or self.empty else torch.maximum(greatest, self.unit)
        if self.unit is not None and not self.empty:
            for total in self.totals:
                if total is not None:
                    total *= self.unit / unit
        self.unit = unit
        return scale / unit

    def _settle(self) -> None:
        """Brings the totals to their own unit."""
        if self.unit is not None and not self.empty:
            for total in self.totals:
                if total is not None:
                    total *= self.unit
        self.unit = None

    def add_sums(self, other: HeadGradients, scale: Tensor) -> None:
        """Add scale (1,) times what was added to `other`, of the same head."""
        if other.empty:
            return
        self._settle()
        other._settle()
        for total, part in zip(self.totals, other.totals, strict=True):
            if total is not None and part is not None:
                torch.mul(part, scale, out=total) if self.empty else total.addcmul_(part, scale)
        self.empty = False

    def sums(self) -> list[Tensor]:
        """The four gradients as they were accumulated, in float32 (float64), empty where not needed."""
        self._settle()
        if self.empty:
            for total in self.totals:
                if total is not None:
                    total.zero_()
        dtype = check.compute_dtype(self.head.weight.dtype)
        return [self.head.weight.new_empty(0, dtype=dtype) if total is None else total for total in self.totals]

    def results(self) -> list[Tensor]:
        """The four gradients in their parameters' types, empty where not needed."""
        types = [self.head.weight.dtype if p is None else p.dtype for p in self.head[:4]]
        return [total.to(dtype) for total, dtype in zip(self.sums(), types, strict=True)]


class Tiles:
    """Tiles of logits over the rows that count, in one buffer; on a GPU their gradients in one of the head's type.

    mask: (N,) uint8 or None. On the CPU the rows with mask 0 are left out. On a GPU finding them would wait for it:
    they are left out where `mask_count`, an upper bound of how many rows count, is given; else all rows are taken.
    narrow: False where the row kernels write gradients only in the type of the logits.
    kept: a place for the gradients of all the rows that are taken, in place of the one buffer.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        mask: Tensor | None,
        chunk: int,
        mask_count: int | None = None,
        *,
        narrow: bool = True,
        kept: Tensor | None = None,
    ) -> None:
        self.hidden, self.head, self.mask, self.kept = hidden, head, mask, kept
        self.index = counted_rows(mask, mask_count)
        self.chunks = chunks(hidden.shape[0] if self.index is None else self.index.shape[0], chunk)
        height = self.chunks[0].stop if self.chunks else 0
        dtype = check.compute_dtype(head.weight.dtype)
        if kept is not None and kept.dtype == dtype:
            self.logits = kept
        else:
            self.logits = tile_buffer(hidden, height, head.weight.shape[0], dtype)
        if kept is not None:
            self.gradient = kept
        elif narrow and head.weight.is_cuda and head.weight.dtype != dtype:
            self.gradient = torch.empty_like(self.logits, dtype=head.weight.dtype)
        else:
            self.gradient = self.logits

    def take(self, x: Tensor, chunk: slice) -> Tensor:
        """The rows of x that `chunk` stands for, contiguous."""
        return x[chunk] if self.index is None else x[self.index[chunk]]

    def put(self, x: Tensor, chunk: slice, value: Tensor) -> None:
        x[chunk if self.index is None else self.index[chunk]] = value

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor | None]]:
        """chunk, its rows of hidden (n, D), logits (1, n, V), the place for their gradient, mask (1, n) or None.

        Rows behind the mask, where they are taken at all, have hidden states 0: nothing there gets into a product.
        """
        for chunk in self.chunks:
            hidden, mask = self.take(self.hidden, chunk), None
            if self.mask is not None:
                mask = self.take(self.mask, chunk)
                hidden = torch.where(mask[:, None] != 0, hidden, torch.zeros_like(hidden))
            first = slice(0, chunk.stop - chunk.start)
            logits = self.logits[chunk if self.logits is self.kept else first]
            gradient = self.gradient[chunk if self.gradient is self.kept else first]
            self.head.logits(hidden, logits)
            yield chunk, hidden, logits[None], gradient[None], None if mask is None else mask[None]


def by_row(mask: Tensor | None, *upstream: Tensor | None) -> tuple[list[Tensor | None], Tensor]:
    """Upstream gradients (n,) or (n, K) of the same rows over the greatest of each row, and that one, (n,).

    mask: (1, n) or None; behind it that is 1.

    So G = d loss / d logits of a row is of the size of a probability, whatever the loss divides by: 1 / N times a
    probability is no float16. The products of G are multiplied by row afterwards.
    """
    sizes = [g.abs() if g.dim() == 1 else g.abs().amax(1) for g in upstream if g is not None]
    scale = torch.stack(sizes).amax(0)
    scale = torch.where(scale == 0 if mask is None else (scale == 0) | (mask[0] == 0), 1, scale)
    parts = [None if g is None else g / (scale if g.dim() == 1 else scale[:, None]) for g in upstream]
    return parts, scale


def chunks(count: int, most: int) -> list[slice]:
    """`count` rows in as few chunks of at most `most` as possible, of equal height (the last may be lower)."""
    number = -(-count // most)
    height = -(-count // number) if number else 1
    return [slice(i, min(i + height, count)) for i in range(0, count, height)]


def chunk_tokens(weight: Tensor) -> int:
    """How many rows of logits fit TILE_BYTES, a multiple of 16 and at least 16."""
    budget = TILE_BYTES.get(weight.device.type, TILE_BYTES["cuda"])
    fitting = budget // (weight.shape[0] * check.compute_dtype(weight.dtype).itemsize)
    return max(16, fitting // 16 * 16)


def counted_rows(mask: Tensor | None, mask_count: int | None) -> Tensor | None:
    """Indices of the rows that count, in order, None for all rows; on a GPU `mask_count` rows with these first."""
    if mask is None:
        return None
    if mask.device.type == "cpu":
        index = mask.nonzero()[:, 0]
        return index if index.shape[0] < mask.shape[0] else None
    if mask_count is None:
        return None
    return torch.argsort(mask, descending=True, stable=True)[:mask_count]


def _vocabulary_blocks(weight: Tensor) -> Iterator[slice]:
    for start in range(0, weight.shape[0], VOCABULARY_BLOCK):
        yield slice(start, start + VOCABULARY_BLOCK)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in a's type on a GPU; widened to float32 (float64) on the CPU."""
    dtype = a.dtype if a.is_cuda else check.compute_dtype(a.dtype)
    return a.to(dtype) @ b.to(dtype)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, old: float = 1.0) -> None:
    """total = old * total + scale * a @ b, accumulated in the total's type; with old = 0 it may be unwritten."""
    if a.is_cuda and a.dtype != total.dtype:
        _products.add(total, a, b.to(a.dtype), scale, old)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=old, alpha=scale)
