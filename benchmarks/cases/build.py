"""Cases from a job: a function of named tensors in plain PyTorch, as our op, and as other libraries have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases.sizes import backends_of, results, with_gradient
from benchmarks.harness import CHECKED_ROWS, Case, Contender, Inputs

Function = Callable[..., Any]


@dataclass(frozen=True)
class Job:
    """All functions take the drawn tensors by name; with `leaves` they return one tensor, else one or several.

    op: a key of the table of costs, or several with " + " between them; ours: with the keyword `backend`.
    leaves: what gets a gradient. trained: whether a head is among them. exact: the eager function for float64 inputs,
    where it is another. compiles: False for a loop over time, which torch.compile would unroll. peers: a key of
    benchmarks.peers.JOBS. fits: False where the whole of eager is too large for the machine; then `head` takes the
    inputs of the first rows.
    """

    op: str
    shape: str
    sizes: Mapping[str, int]
    draw: Callable[[], Inputs]
    eager: Function
    ours: Function
    leaves: tuple[str, ...] = ()
    trained: bool = False
    label: str = ""
    peers: str = ""
    exact: Function | None = None
    compiles: bool = True
    compared: Callable[[Inputs, list[Tensor]], list[Tensor]] = lambda inputs, found: found
    fits: bool = True
    head: Callable[[Inputs, int], Inputs] = lambda inputs, rows: inputs
    group: str = "ops"


def cases(job: Job, device: str) -> list[Case]:
    """The forward pass without gradients and, where there are leaves, forward and backward."""
    made = [case(job, device, "forward", results)]
    if job.leaves:
        passes = "trained head" if job.trained else "backward"
        made.append(case(job, device, passes, lambda function: with_gradient(function, *job.leaves)))
    return made


def case(job: Job, device: str, passes: str, ready: Callable[[Function], Contender]) -> Case:
    contenders = {"eager": ready(job.eager)} if job.fits else {}
    for name in backends_of(job.op.split(" + ")[0], device):
        contenders[name] = ready(lambda name=name, **inputs: job.ours(**inputs, backend=name))
    others = {"torch.compile": torch.compile(job.eager)} if job.compiles and job.fits else {}
    if job.peers:
        others |= peers.find(job.peers)

    def oracle(inputs: Inputs, rows: int) -> list[Tensor]:
        double = {n: x.double() if x.is_floating_point() else x for n, x in job.head(inputs, rows).items()}
        found = job.compared(double, ready(job.exact or job.eager)(double))
        return [x[:rows] if x.dim() else x for x in found]

    label = f", {job.label}" if job.label else ""
    return Case(
        f"{job.op}{label}, {'forward' if passes == 'forward' else 'forward + backward'}", job.shape, job.draw, oracle,
        contenders, peers={name: ready(function) for name, function in others.items()}, op=job.op, passes=passes,
        sizes=job.sizes, group=job.group, compared=job.compared,
        yardstick=None if job.fits else lambda inputs: ready(job.eager)(job.head(inputs, CHECKED_ROWS)),
    )  # fmt: skip
