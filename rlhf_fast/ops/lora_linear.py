"""placeholder docstring"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bank: Sequence[tuple[Tensor, Tensor, float]],
    segments: Sequence[tuple[int, int]],
    *,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    return reference(x, weight, bank, segments, bias=bias)


def reference(x, weight, bank, segments, *, bias=None):
    y = F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    deltas = []
    start = 0
    for index, count in segments:
        part = rows[start : start + count]
        start += count
        if index < 0:
            deltas.append(part.new_zeros(count, weight.shape[0]))
        else:
            a, b, scale = bank[index]
            deltas.append(scale * F.linear(F.linear(part, a.to(x.dtype)), b.to(x.dtype)))
    return y + torch.cat(deltas).view_as(y)

IMPLS: dict = {}
OPS = {"lora_linear": tuple(IMPLS)}
