"""The steps of lora_linear on the CPU, with the signatures of rlhf_fast/kernels/lora_linear.py.

Native kernels where they win, PyTorch's products otherwise. A span is (adapter, first row, end row).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.backends import DTYPE_CODES, native, packed, plane, strided, threads
from rlhf_fast.ops.core import check

Spans = list[tuple[int, int, int]]
Dropout = tuple[int, Tensor] | None  # (threshold, seed)
NativeBank = list[tuple[tuple[int, int, int, int], int, float]]  # (address, type, strides), rank, scale

# (rank, rows) up to which the native kernels run, PyTorch's products past either. Measured on one thread of a CPU with
# AVX-512 and its bfloat16 products, layers of 576 and 1536, shrink and expand together: PyTorch's time is, of the
# native one, in float32 1.0 to 4.0 at rank 8 and 32 to 4096 rows, 0.7 to 1.1 at rank 16; in bfloat16 at rank 8
# 1.7 to 2.4 at 32 rows, 0.9 to 1.5 at 128, 0.5 to 0.7 at 1024; in float64 0.7 to 2.3 at ranks 8 and 16; in float16 4
# to 16 at ranks 8 and 64.
NATIVE_LIMITS = {
    torch.float32: (8, math.inf),
    torch.float64: (16, math.inf),
    torch.bfloat16: (8, 128),
    torch.float16: (math.inf, math.inf),
}
# Up to so many rows the native product with weight and adapters together runs, up to rank FEW_ROWS_RANK (at most those
# of FewRows in csrc/cpu/few_rows.h). CPU time of one thread, 576 x 576, rank 8: F.linear, shrink and expand take, of
# it, 1.5, 1.3, 1.2, 1.1 in float32 at 1, 8, 32, 64 rows; 2.0, 1.3, 0.6, 0.5 in bfloat16. float16 is not timed.
FEW_ROWS_LIMITS = {torch.float32: 64, torch.bfloat16: 8, torch.float16: 64}
FEW_ROWS_RANK = 64
_NORM_BLOCK = 1024  # rows of weight + delta that are made at a time


def shrink(x: Tensor, downs: list[Tensor], spans: Spans, dropout: Dropout, h: Tensor) -> None:
    """h[rows] = x[rows] @ down^T for every span; downs (R, in)."""
    x = _dropped(x, dropout)
    if _is_native(h):
        x = check.unit_stride(x)
        native().lora_shrink(*_native_arguments(x, h), _native_downs(downs), spans, threads())
        return
    for i, start, stop in spans:  # not `out=`: torch 2.9 takes the stride of a bfloat16 column (rank 1) for 1
        h[start:stop, : downs[i].shape[0]] = x[start:stop] @ downs[i].to(x.dtype).t()


def expand(h: Tensor, ups: list[Tensor], scales: list[float], spans: Spans, dropout: Dropout, y: Tensor,
           factors: Tensor | None = None, bias: Tensor | None = None,
           unscaled: Tensor | None = None) -> None:  # fmt: skip
    """y[rows] += scale * h[rows] @ up^T for every span; ups (out, R). Then, with factors (adapters, out), u = y - bias
    goes to `unscaled` where that is given, and y = u * factors + bias."""
    if dropout is not None:
        delta = torch.zeros_like(y)
        expand(h, ups, scales, spans, None, delta)
        y += _dropped(delta, dropout)
        return
    if _is_native(h):
        native().lora_expand(*_native_arguments(y, h), _native_ups(ups, scales), spans, threads())
    else:
        for i, start, stop in spans:
            y[start:stop].addmm_(h[start:stop, : ups[i].shape[1]], ups[i].to(y.dtype).t(), alpha=scales[i])
    if factors is None:
        return
    for i, start, stop in spans:
        part = y[start:stop]
        if bias is not None:
            part -= bias
        if unscaled is not None:
            unscaled[start:stop] = part
        part *= factors[i]
        if bias is not None:
            part += bias


@cache
def few_rows_are_fast() -> bool:
    """Whether this machine has the registers that the native product for few rows is written for."""
    return native().few_rows_is_fast()


def few_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, downs: list[Tensor], ups: list[Tensor], scales: list[float],
    segments: Spans, shape: Sequence[int],
) -> FewRowsProduct | None:  # fmt: skip
    """f(x) -> y, of a shape of N x out elements, every term in one pass over the weight.

    None where it does not run. For all contiguous x of N x in elements of this type while weight, bias and adapters
    stay where they are. segments: spans that cover the rows in their order, with adapter -1 for none.
    """
    (rows, width), outer = x.shape, weight.shape[0]
    types = (x.dtype, torch.float32)
    if (
        not 0 < rows <= FEW_ROWS_LIMITS.get(x.dtype, 0)
        or not few_rows_are_fast()
        or not outer
        or weight.stride(1) != 1
        or any(a.dtype not in types or a.stride(1) != 1 or a.shape[0] > FEW_ROWS_RANK for a in downs)
    ):
        return None
    bank = [(plane(a), plane(b), a.shape[0], scale) for a, b, scale in zip(downs, ups, scales, strict=True)]
    product = native().FewRows(DTYPE_CODES[x.dtype], (width, outer, weight.stride(0)), bank, segments)
    return FewRowsProduct(product, weight, None if bias is None else bias.contiguous(), shape)


class FewRowsProduct:
    """What `few_rows` gives."""

    def __init__(self, product: Any, weight: Tensor, bias: Tensor | None, shape: Sequence[int]) -> None:
        """product: the native one. shape: of y."""
        self.product, self.shape, self.held = product, shape, (weight, bias)
        self.weight_at, self.bias_at = strided(weight)[0], packed(bias)

    def __call__(self, x: Tensor) -> Tensor:
        y = x.new_empty(self.shape)
        self.product(packed(x), self.weight_at, self.bias_at, packed(y), threads())
        return y


def prepare(
    x: Tensor, outer: int, downs: list[Tensor], ups: list[Tensor], scales: list[float], spans: Spans
) -> Callable[[Tensor, Tensor], None] | None:
    """f(x, y): shrink x (..., in), then expand into y (..., outer), both contiguous, without dropout; None where the
    native kernels do not run. For any x of this shape and type while the adapters stay where they are."""
    rows, rank = x.shape[:-1].numel(), max((down.shape[0] for down in downs), default=0)
    if not _is_native(x.new_empty(rows, rank)):
        return None
    code, lora_shrink, lora_expand = DTYPE_CODES[x.dtype], native().lora_shrink, native().lora_expand
    down_sizes, up_sizes = (x.shape[-1], x.shape[-1], rank), (outer, outer, rank)
    down_bank, up_bank = _native_downs(downs), _native_ups(ups, scales)

    def add(x: Tensor, y: Tensor) -> None:
        h = x.new_empty(rows, rank)
        lora_shrink(packed(x), packed(h), code, down_sizes, down_bank, spans, threads())
        lora_expand(packed(y), packed(h), code, up_sizes, up_bank, spans, threads())

    return add


def gradients(narrow: Tensor, wide: Tensor, ranks: list[int], scales: list[float], spans: Spans, dropout: Dropout,
              rank_first: bool, out: Tensor) -> None:  # fmt: skip
    """out = scale * narrow^T wide over the adapter's rows, (R, width) or transposed, one adapter after the other."""
    wide = _dropped(wide, dropout)
    parts = out.zero_().split([rank * wide.shape[1] for rank in ranks])
    for i, start, stop in spans:
        left, right = narrow[start:stop, : ranks[i]].contiguous(), wide[start:stop]  # contiguous: see shrink
        left, right = (left, right) if rank_first else (right, left)
        product = left.t() @ right
        parts[i].view(product.shape).add_(product, alpha=scales[i])


def norms(weight: Tensor, downs: list[Tensor], ups: list[Tensor], scales: list[float], out: Tensor) -> None:
    """out[i] = row norms of weight + scale * up @ down, for every adapter i."""
    for i, (down, up) in enumerate(zip(downs, ups, strict=True)):
        for start in range(0, weight.shape[0], _NORM_BLOCK):
            rows = slice(start, start + _NORM_BLOCK)
            total = torch.addmm(weight[rows].to(out.dtype), up[rows].to(out.dtype), down.to(out.dtype), alpha=scales[i])
            torch.linalg.vector_norm(total, dim=1, out=out[i, rows])


def magnitude_backward(
    grad: Tensor, unscaled: Tensor | None, factors: Tensor, ranks: list[int], spans: Spans
) -> Tensor:
    """grad *= factors of its adapter, in place; returns the sums of grad * unscaled before that, (adapters, out)."""
    sums = torch.zeros_like(factors)
    for i, start, stop in spans:
        part = grad[start:stop]
        if unscaled is not None:
            sums[i] += (part.to(sums.dtype) * unscaled[start:stop].to(sums.dtype)).sum(0)
        part *= factors[i]
    return sums


def _is_native(h: Tensor) -> bool:
    rank, rows = NATIVE_LIMITS[h.dtype]
    return h.shape[1] <= rank and h.shape[0] <= rows


def _native_downs(downs: list[Tensor]) -> NativeBank:
    return [(plane(a), a.shape[0], 1.0) for a in downs]


def _native_ups(ups: list[Tensor], scales: list[float]) -> NativeBank:
    return [(plane(b.t()), b.shape[1], scale) for b, scale in zip(ups, scales, strict=True)]


def _native_arguments(wide: Tensor, h: Tensor) -> tuple[int, int, int, tuple[int, int, int]]:
    (wide_at, code, (_, wide_stride)), (h_at, _, (_, h_stride)) = strided(wide), strided(h)
    return wide_at, h_at, code, (wide.shape[1], wide_stride, h_stride)


def _dropped(x: Tensor, dropout: Dropout) -> Tensor:
    """A copy of x (N, width) with 0 in the place of what dropout does not keep; x itself without dropout."""
    if dropout is None:
        return x
    threshold, seed = dropout
    x = check.unit_stride(x)
    at, code, (count, stride) = strided(x)
    out = x.new_empty(x.shape)
    sizes = (count, x.shape[1], stride, x.shape[1])
    native().lora_dropout(at, packed(out), code, sizes, packed(seed), threshold, threads())
    return out
