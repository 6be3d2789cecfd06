"""What the scans over time share: their arguments, padded (B, T) or packed (N,), and the walk of their references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import packed, strided
from rlhf_fast.ops.core import check, registration
from rlhf_fast.ops.core.sequences import check_bounds, checked_cu_seqlens, sequence_ids


class Advantages(NamedTuple):
    """What a policy and a critic are trained with, of the shape of rewards, detached."""

    advantages: Tensor
    returns: Tensor  # the values' targets


class Sequences(NamedTuple):
    """Which steps count, and how they make sequences."""

    mask: Tensor | None  # the shape of the steps, uint8
    cu_seqlens: Tensor | None  # (S + 1,) int64; None: the rows are the sequences
    bootstrap: Tensor | None  # of every sequence, in the type of the results, contiguous

    def count(self, steps: Tensor) -> int:
        """How many sequences there are."""
        return steps.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def empty(self, steps: Tensor, number: int) -> list[Tensor]:
        """`number` unwritten results of the shape of steps; zeros where packed, for steps of no sequence."""
        new = steps.new_empty if self.cu_seqlens is None else steps.new_zeros
        return [new(steps.shape, dtype=check.compute_dtype(steps.dtype)) for _ in range(number)]

    def native(self, steps: Tensor) -> tuple[int, int, int, int, int]:
        return self.count(steps), steps.shape[-1], packed(self.mask), packed(self.cu_seqlens), packed(self.bootstrap)


def checked(
    inputs: dict[str, Tensor], mask: Tensor | None, cu_seqlens: Tensor | None, bootstrap: Tensor | None
) -> tuple[list[Tensor], Sequences]:
    """(steps, sequences) as the kernels take them, detached: the steps in one type with unit last stride.

    Raises ValueError or TypeError where they do not fit the first of the inputs.
    """
    (first, steps), *_ = inputs.items()
    dimensions, meaning = (2, "(B, T) without cu_seqlens") if cu_seqlens is None else (1, "(N,) with cu_seqlens")
    check.that(steps.dim() == dimensions, first, meaning, steps)
    for name, x in inputs.items():
        check.floating(name, x)
        check.shaped(name, x, steps.shape, f"{first}.shape")
    if cu_seqlens is not None:
        cu_seqlens = checked_cu_seqlens(cu_seqlens, first, steps.shape)
    check.same_device((first, steps), *inputs.items(), ("mask", mask), ("cu_seqlens", cu_seqlens))
    sequences = Sequences(check.mask_bytes(mask, steps.shape, f"{first}.shape"), cu_seqlens, None)
    dtype = _common_dtype(list(inputs.values()))
    if bootstrap is not None:
        check_per_sequence("bootstrap", bootstrap, (first, steps), sequences)
        bootstrap = bootstrap.detach().to(check.compute_dtype(dtype)).contiguous()
    tensors = [check.unit_stride(x.detach().to(dtype)) for x in inputs.values()]
    return tensors, sequences._replace(bootstrap=bootstrap)


def check_per_sequence(name: str, x: Tensor, steps: tuple[str, Tensor], sequences: Sequences) -> None:
    """ValueError or TypeError where x is not one number for each sequence."""
    check.floating(name, x)
    check.shaped(name, x, (sequences.count(steps[1]),), "(B,)" if sequences.cu_seqlens is None else "(S,)")
    check.same_device(steps, (name, x))


def _common_dtype(tensors: list[Tensor]) -> torch.dtype:
    """The dtype of all of them, or, where they differ, that in which they are computed."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        if x.dtype != dtype:
            dtype = check.compute_dtype(torch.promote_types(dtype, x.dtype))
    return dtype


def native_steps(steps: Tensor | None) -> tuple[int, int]:
    """(address, row stride) of padded or packed steps, zeros for None; packed, nobody looks at the stride."""
    if steps is None:
        return 0, 0
    at, _, sizes = strided(steps)
    return at, sizes[-1] if sizes else 0


def register(
    op: str, takes: Sequence[type], impls: Mapping[str, Callable[..., None]],
    check_rates: Callable[[Any], None] = lambda rates: None,
) -> Callable[..., list[Tensor]]:  # fmt: skip
    """Registers ``rlhf_fast::<op>``: (steps, sequences, rates, backend) -> [advantages, returns]; without values
    [returns]. impls: (steps, sequences, rates, outputs)."""

    def empty(steps: Any, sequences: Sequences, *_: Any) -> list[Tensor]:
        return sequences.empty(steps.rewards, 1 if steps.values is None else 2)

    def compute(steps: Any, sequences: Sequences, rates: Any, backend: str) -> list[Tensor]:
        check_bounds(sequences.cu_seqlens, steps.rewards.shape[-1])
        check_rates(rates)
        outputs = empty(steps, sequences)
        impls[backend](steps, sequences, rates, outputs)
        return outputs

    return registration.op_without_gradient(op, takes, compute, fake=empty)


class Walk(NamedTuple):
    """What a plain loop over time needs to know of every step; all of the shape of the steps."""

    counts: Tensor  # bool
    sequence: Tensor  # the number of its sequence
    last: Tensor  # bool: its sequence ends with it
    after: Tensor  # the bootstrap value of its sequence

    def back(self, values: Tensor, step: Callable[[int, Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(states, next values, next states), each of the shape of values: state_t = step(t, next value, next state).

        Steps behind the mask hand both on unchanged; after the last step stand the bootstrap value and the state 0.
        """
        value = state = values.new_zeros(values.shape[:-1])
        steps = []
        for t in reversed(range(values.shape[-1])):
            value = torch.where(self.last[..., t], self.after[..., t], value)
            state = torch.where(self.last[..., t], torch.zeros_like(state), state)
            new = step(t, value, state)
            steps.append((new, value, state))
            value = torch.where(self.counts[..., t], values[..., t], value)
            state = torch.where(self.counts[..., t], new, state)
        if not steps:
            return values, values, values
        states, next_values, next_states = (torch.stack(x, -1) for x in zip(*reversed(steps), strict=True))
        return states, next_values, next_states


def walk(steps: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, bootstrap: Tensor | None) -> Walk:
    check_bounds(cu_seqlens, steps.shape[-1])
    counts = torch.ones_like(steps, dtype=torch.bool) if mask is None else mask != 0
    place = torch.arange(steps.shape[-1], device=steps.device)
    sequence = sequence_ids(steps, cu_seqlens).expand(steps.shape)
    if cu_seqlens is None:
        last = (place == steps.shape[-1] - 1).expand(steps.shape)
    else:
        counts, last = counts & (place < cu_seqlens[-1]), place + 1 == cu_seqlens[1:][sequence]
    dtype = check.compute_dtype(steps.dtype)
    after = steps.new_zeros(steps.shape, dtype=dtype) if bootstrap is None else bootstrap.to(dtype)[sequence]
    return Walk(counts, sequence, last, after)
