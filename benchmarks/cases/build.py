"""Cases from a job: a function of named tensors in plain PyTorch, as our op, and as other libraries have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases.sizes import backends_of, ragged_rows, results, with_gradient
from benchmarks.harness import CHECKED_ROWS, Bar, Case, Contender, Inputs

Function = Callable[..., Any]


@dataclass(frozen=True)
class Job:
    """All functions take the drawn tensors by name and return a tensor, several, or a loss with its metrics.

    op: a key of the table of costs, or several with " + " between them. ours: with the keyword `backend`.
    leaves: what gets a gradient. name: of its case, where that is not the op, the label and the pass.
    peers: a key of benchmarks.peers.JOBS. exact: the eager function for float64 inputs, where it is another.
    compiles: False for a loop over time, which torch.compile would unroll. fits: False where the whole of eager is too
    large for the machine. sampled: rows after which eager has been timed for long enough, 0 for all of them.
    first: the inputs of the first rows, for oracles and for what cannot do all rows.
    bars: those of backends that the device does not have are left out.
    """

    op: str
    shape: str
    sizes: Mapping[str, int]
    draw: Callable[[], Inputs]
    eager: Function
    ours: Function
    leaves: tuple[str, ...] = ()
    label: str = ""
    name: str = ""
    peers: str = ""
    exact: Function | None = None
    compiles: bool = True
    fits: bool = True
    sampled: int = 0
    first: Callable[[Inputs, int], Inputs] = lambda inputs, rows: inputs
    compared: Callable[[Inputs, list[Tensor]], list[Tensor]] = lambda inputs, returned: returned
    bars: tuple[Bar, ...] = ()
    floors: Mapping[str, Contender] = field(default_factory=dict)
    scratch: int = 0
    group: str = "ops"


def first_rows(inputs: Inputs, rows: int) -> Inputs:
    """Of inputs whose rows have nothing to do with each other; a head has none."""
    return {name: x if name == "weight" else x[:rows] for name, x in inputs.items()}


def partly_valid(job: Job, tokens: int, valid: float, device: str) -> Job:
    """The job of rows of which a part counts."""

    def masked(function: Function) -> Function:
        return lambda mask, **inputs: function(**inputs) * mask

    mask = ragged_rows(tokens, valid, device)
    return replace(
        job, shape=f"{job.shape}, {valid:.0%} valid", sizes={**job.sizes, "N": int(mask.sum())}, peers="",
        draw=lambda: job.draw() | {"mask": ragged_rows(tokens, valid, device)}, eager=masked(job.eager),
        exact=masked(job.exact) if job.exact else None, group="ragged",
    )  # fmt: skip


def forward(job: Job, device: str) -> Case:
    """Without gradients."""
    return case(job, device, "forward", results)


def backward(job: Job, device: str) -> Case:
    """Forward and backward."""
    passes = "trained head" if "weight" in job.leaves else "backward"
    return case(job, device, passes, lambda function: with_gradient(function, *job.leaves))


def both(job: Job, device: str) -> list[Case]:
    return [forward(job, device), *([backward(job, device)] if job.leaves else [])]


def case(job: Job, device: str, passes: str, ready: Callable[[Function], Contender]) -> Case:
    def sample(inputs: Inputs) -> Inputs:
        return job.first(inputs, job.sampled)

    def oracle(inputs: Inputs, rows: int) -> list[Tensor]:
        # A head's gradient is that of all rows.
        given = inputs if passes == "trained head" else job.first(inputs, rows)
        double = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
        exact = job.compared(double, ready(job.exact or job.eager)(double))
        return [x[:rows] if x.dim() else x for x in exact]

    whole = ready(job.eager)
    contenders = {"eager": (lambda inputs: whole(sample(inputs))) if job.sampled else whole} if job.fits else {}
    for backend in backends_of(job.op.split(" + ")[0], device):
        contenders[backend] = ready(lambda backend=backend, **inputs: job.ours(**inputs, backend=backend))
    others = {"torch.compile": torch.compile(job.eager)} if job.compiles and job.fits else {}
    if job.peers:
        others |= peers.find(job.peers)
    pass_name = "forward" if passes == "forward" else "forward + backward"
    return Case(
        job.name or ", ".join(filter(None, (job.op, job.label, pass_name))), job.shape, job.draw, oracle, contenders,
        peers={name: ready(function) for name, function in others.items()}, floors=dict(job.floors),
        bars=tuple(bar for bar in job.bars if bar.ours in contenders), scratch=job.scratch,
        op=job.op, passes=passes, sizes=job.sizes, group=job.group, compared=job.compared,
        yardstick=None if job.fits else lambda inputs: whole(job.first(inputs, CHECKED_ROWS)),
        timed_share={"eager": lambda inputs: length(sample(inputs)) / length(inputs)} if job.sampled else {},
    )  # fmt: skip


def length(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())))
