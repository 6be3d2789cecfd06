"""What is timed: our ops beside the plain PyTorch that they replace, other libraries' functions, and bare floors."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cases import advantages, linear, logprobs, losses, op_advantages, op_linear, op_losses
from benchmarks.cases.ragged import ragged_cases
from benchmarks.cases.scaling import scaling_cases
from benchmarks.cases.sizes import Sizes
from benchmarks.harness import Case

__all__ = ["GROUPS", "Sizes", "cases"]


def cases(sizes: Sizes, device: str) -> list[Case]:
    """The cases with bars, which `make bench` and `make gpu` time."""
    return [case for family in (logprobs, linear, losses, advantages) for case in family.cases(sizes, device)]


def op_cases(sizes: Sizes, device: str) -> list[Case]:
    """Every op that has no case with a bar, and every pass that those leave out."""
    return [case for family in (op_advantages, op_losses, op_linear) for case in family.op_cases(sizes, device)]


GROUPS: dict[str, Callable[[Sizes, str], list[Case]]] = {
    "bars": cases,
    "ops": op_cases,
    "ragged": ragged_cases,
    "scaling": scaling_cases,
}
