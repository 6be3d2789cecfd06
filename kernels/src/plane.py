"""A (rows, columns) tensor of any strides, as a kernel gets it."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Plane(NamedTuple):
    data: Tensor
    row_stride: int  # in elements; 0 = broadcast
    column_stride: int


def is_short(count: int) -> bool:
    """Whether `count` elements, and what a last block reaches beyond them, can be counted in 32 bits."""
    return count < 1 << 30


def plane(x: Tensor | None) -> Plane | None:
    """The plane of a tensor (rows, columns), or (columns,) for one row."""
    if x is None:
        return None
    return Plane(x, 0, x.stride(0)) if x.dim() == 1 else Plane(x, *x.stride())


@triton.jit
def read(plane, row, column, counts, acc: tl.constexpr):
    """The elements in the type `acc`, 0 where they do not count."""
    return tl.load(
        plane.data + row * plane.row_stride + column * plane.column_stride, mask=counts, other=0.0
    ).to(acc)  # fmt: skip


@triton.jit
def place(i, columns, SHORT: tl.constexpr):
    """(row, column), int64, of the elements i of a plane; SHORT: they are below 2^31, where division is cheap."""
    if SHORT:
        i = i.to(tl.int32)
    return (i // columns).to(tl.int64), (i % columns).to(tl.int64)
