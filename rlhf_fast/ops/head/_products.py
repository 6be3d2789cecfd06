"""Products of half-precision matrices on a GPU whose result is float32, whatever this version of PyTorch can do of it.

    PyTorch           of half-precision a and b
    CUDA, 2.10        a @ b as float32; total + a @ b with a float32 total (pytorch/pytorch 167931)
    CUDA, 2.9         a @ b as float32; refuses a total of another type than a
    ROCm              refuses both (seen with 2.9): a and b are widened

Sums over the inner dimension are always accumulated in float32. What is made beside operands and result is made in
blocks of at most BLOCK_BYTES. A vocabulary that is no multiple of ALIGNED is multiplied in two parts: cuBLAS takes a
kernel of a seventh of the speed for all of it otherwise (benchmarks/results/gpu_trials.jsonl).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

BLOCK_BYTES = 64 << 20
ALIGNED = 8  # elements of half precision in 16 bytes
LONG = 1024  # a shorter dimension is left as it is


def takes(x: Tensor) -> bool:
    """Whether products of x are this module's."""
    return x.is_cuda and x.element_size() < 4


@cache
def capability() -> str:
    """The last of "widen", "multiply", "add" that this PyTorch can do."""
    if torch.version.hip is not None:
        return "widen"
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return "add" if (major, minor) >= (2, 10) else "multiply"


def scratch_bytes() -> int:
    """What a product may take beside its operands and result."""
    return 0 if capability() == "add" else 2 * BLOCK_BYTES


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a (m, k) @ b (k, n) as `dtype`, theirs or a wider one, in `out` of a wider one where that is given."""
    if dtype == a.dtype:  # two parts of a sum are rounded once
        return a @ b if a.shape[1] <= LONG or a.shape[1] % ALIGNED == 0 else multiply(a, b, torch.float32).to(dtype)
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1], dtype=dtype)
    if capability() == "widen":
        return _widened(out, a, b, 1.0, 0.0)
    for place, x, y, again in parts(out, a, b):
        if again:
            add(place, x, y)
        else:
            torch.ops.aten.mm.dtype_out(x, y, dtype, out=place)
    return out


def add(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, old: float = 1.0) -> None:
    """total (m, n) = old * total + scale * a (m, k) @ b (k, n), of a wider type; with old = 0 it may be unwritten."""
    if capability() == "add":
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, beta=old, alpha=scale, out=total)
    elif capability() == "multiply":
        for rows in _blocks(total.shape[0], total.shape[1] * total.element_size()):
            part, place = multiply(a[rows], b, total.dtype), total[rows]
            torch.mul(part, scale, out=place) if old == 0 else place.mul_(old).add_(part, alpha=scale)
    else:
        _widened(total, a, b, scale, old)


Part = tuple[Tensor, Tensor, Tensor, bool]  # total, a, b, and whether total has been written by an earlier part


def parts(total: Tensor, a: Tensor, b: Tensor) -> list[Part]:
    """total = a (m, k) @ b (k, n) in products of which no long dimension that lies in memory element by element is odd.

    Such a dimension has a multiple of ALIGNED elements in the first part; what is left of it is the second.
    """
    (m, k), n = a.shape, b.shape[1]
    if _splits(m, a.stride(0), total.stride(0)):
        return [(total[rows], a[rows], b, False) for rows in _split(m)]
    if _splits(n, b.stride(1), total.stride(1)):
        return [(total[:, columns], a, b[:, columns], False) for columns in _split(n)]
    if _splits(k, a.stride(1), b.stride(0)):
        return [(total, a[:, inner], b[inner], inner.start > 0) for inner in _split(k)]
    return [(total, a, b, False)]


def _splits(length: int, *strides: int) -> bool:
    return length % ALIGNED > 0 and length > LONG and 1 in strides


def _split(length: int) -> tuple[slice, slice]:
    most = length - length % ALIGNED
    return slice(0, most), slice(most, length)


def _widened(total: Tensor, a: Tensor, b: Tensor, scale: float, old: float) -> Tensor:
    """As `add`, with blocks of the longest of the three dimensions of a and b in the type of `total`."""
    size, (rows, inner), columns = total.element_size(), a.shape, b.shape[1]
    longest = max(rows, inner, columns)
    if inner == longest:
        for block in _blocks(inner, (rows + columns) * size):
            total.addmm_(a[:, block].to(total.dtype), b[block].to(total.dtype), beta=old, alpha=scale)
            old = 1.0
    elif rows == longest:
        wide = b.to(total.dtype)
        for block in _blocks(rows, inner * size):
            total[block].addmm_(a[block].to(total.dtype), wide, beta=old, alpha=scale)
    else:
        wide = a.to(total.dtype)
        for block in _blocks(columns, inner * size):
            total[:, block].addmm_(wide, b[:, block].to(total.dtype), beta=old, alpha=scale)
    return total


def _blocks(count: int, row_bytes: int) -> Iterator[slice]:
    """`count` rows of `row_bytes` in blocks of at most BLOCK_BYTES."""
    most = max(1, BLOCK_BYTES // max(row_bytes, 1))
    for start in range(0, count, most):
        yield slice(start, min(start + most, count))
