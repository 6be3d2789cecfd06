"""Packed sequences: S of them one after the other in N steps, with the S + 1 places cu_seqlens between them."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops.core import check


def checked_cu_seqlens(cu_seqlens: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """cu_seqlens as int64. Raises ValueError where it is not (S + 1,), or the tensor `name` of `shape` not (N,)."""
    if len(shape) != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must be (S + 1,) with S >= 1 and {name} (N,), got {tuple(cu_seqlens.shape)} and {tuple(shape)}"
        )
    return check.ids("cu_seqlens", cu_seqlens)


def check_bounds(cu_seqlens: Tensor | None, steps: int, *, cover_all: bool = False) -> None:
    """ValueError for entries that bound no sequences of `steps` steps, which with cover_all end with the last step.

    Checked on the CPU; elsewhere entries are not read, which would wait for the device.
    """
    if cu_seqlens is None or cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > steps or (cover_all and bounds[-1] < steps):
        end = "N" if cover_all else "at most N"
        raise ValueError(f"cu_seqlens must be non-decreasing from 0 to {end} = {steps}, got {bounds}")


def sequence_ids(steps: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """int64: the sequence of every packed step (N,), the last one for steps after all; or that of every row, (B, 1)."""
    if cu_seqlens is None:
        return torch.arange(steps.shape[0], device=steps.device)[:, None]
    places = torch.arange(steps.shape[-1], device=steps.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True).clamp(max=cu_seqlens.shape[0] - 2)
