"""Token sequences, padded (B, T) or packed (N,) with cu_seqlens: what the ops that walk over time share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import packed, strided
from rlhf_fast.ops.core import check


def prepared(
    inputs: dict[str, Tensor], mask: Tensor | None, cu_seqlens: Tensor | None, bootstrap: Tensor | None
) -> tuple[list[Tensor], Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(inputs, mask, cu_seqlens, bootstrap), checked, detached, and as the kernels take them.

    inputs: the first gives the shape; they come back in one dtype with unit last stride. mask becomes uint8 bytes,
    cu_seqlens int64, bootstrap contiguous in the dtype of the results.
    """
    (first, steps), *_ = inputs.items()
    if steps.dim() != (2 if cu_seqlens is None else 1):
        meaning = "(B, T) without cu_seqlens" if cu_seqlens is None else "(N,) with cu_seqlens"
        raise ValueError(f"{first} must be {meaning}, got {tuple(steps.shape)}")
    for name, x in inputs.items():
        check.floating(name, x)
        check.shaped(name, x, steps.shape, f"{first}.shape")
    if cu_seqlens is not None:
        cu_seqlens = checked_cu_seqlens(cu_seqlens, first, steps.shape)
    if bootstrap is not None:
        check.floating("bootstrap", bootstrap)
        check.shaped("bootstrap", bootstrap, (count(steps, cu_seqlens),), "(B,)" if cu_seqlens is None else "(S,)")
    others = {**inputs, "mask": mask, "cu_seqlens": cu_seqlens, "bootstrap": bootstrap}
    check.same_device((first, steps), *others.items())
    mask = check.mask_bytes(mask, steps.shape, f"{first}.shape")
    dtype = _common_dtype(list(inputs.values()))
    tensors = [check.unit_stride(x.detach().to(dtype)) for x in inputs.values()]
    if bootstrap is not None:
        bootstrap = bootstrap.detach().to(check.compute_dtype(dtype)).contiguous()
    return tensors, mask, cu_seqlens, bootstrap


def _common_dtype(tensors: list[Tensor]) -> torch.dtype:
    """The dtype of all of them, or, where they differ, that in which they are computed."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        if x.dtype != dtype:
            dtype = check.compute_dtype(torch.promote_types(dtype, x.dtype))
    return dtype


def count(steps: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many sequences there are."""
    return steps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


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


def empty_outputs(steps: Tensor, cu_seqlens: Tensor | None, number: int) -> list[Tensor]:
    """`number` unwritten results of the shape of steps; zeros where packed, for steps of no sequence."""
    new = steps.new_empty if cu_seqlens is None else steps.new_zeros
    return [new(steps.shape, dtype=check.compute_dtype(steps.dtype)) for _ in range(number)]


def native_arguments(
    steps: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, bootstrap: Tensor | None
) -> tuple[int, int, int, int, int]:  # fmt: skip
    return count(steps, cu_seqlens), steps.shape[-1], packed(mask), packed(cu_seqlens), packed(bootstrap)


def native_steps(steps: Tensor | None) -> tuple[int, int]:
    """(address, row stride) of padded or packed steps, zeros for None; packed, nobody looks at the stride."""
    if steps is None:
        return 0, 0
    at, _, sizes = strided(steps)
    return at, sizes[-1] if sizes else 0


class Walk(NamedTuple):
    """What a plain loop over time needs to know of every step; all of the shape of the steps."""

    counts: Tensor  # bool
    sequence: Tensor  # the number of its sequence
    last: Tensor  # bool: its sequence ends with it
    after: Tensor  # the bootstrap value of its sequence


def walk(steps: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, bootstrap: Tensor | None) -> Walk:
    counts = torch.ones_like(steps, dtype=torch.bool) if mask is None else mask != 0
    at = torch.arange(steps.shape[-1], device=steps.device)
    sequence = sequence_ids(steps, cu_seqlens).expand(steps.shape)
    if cu_seqlens is None:
        last = (at == steps.shape[-1] - 1).expand(steps.shape)
    else:
        counts, last = counts & (at < cu_seqlens[-1]), at + 1 == cu_seqlens[1:][sequence]
    dtype = check.compute_dtype(steps.dtype)
    after = steps.new_zeros(steps.shape, dtype=dtype) if bootstrap is None else bootstrap.to(dtype)[sequence]
    return Walk(counts, sequence, last, after)


def backward(
    walk: Walk, values: Tensor, step: Callable[[int, Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """(states, next values, next states), each of the shape of values, with state_t = step(t, next value, next state).

    Steps behind the mask hand both on unchanged; after the last step stand the bootstrap value and the state 0.
    """
    value = state = values.new_zeros(values.shape[:-1])
    steps = []
    for t in reversed(range(values.shape[-1])):
        value = torch.where(walk.last[..., t], walk.after[..., t], value)
        state = torch.where(walk.last[..., t], torch.zeros_like(state), state)
        new = step(t, value, state)
        steps.append((new, value, state))
        value = torch.where(walk.counts[..., t], values[..., t], value)
        state = torch.where(walk.counts[..., t], new, state)
    if not steps:
        return values, values, values
    states, next_values, next_states = (torch.stack(x, -1) for x in zip(*reversed(steps), strict=True))
    return states, next_values, next_states
