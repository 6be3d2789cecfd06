"""What is timed: our ops beside the plain PyTorch that they replace, other libraries' functions, and bare floors."""

from __future__ import annotations

from benchmarks.cases import advantages, linear, logprobs, losses
from benchmarks.cases.sizes import Sizes
from benchmarks.harness import Case

__all__ = ["Sizes", "cases"]


def cases(sizes: Sizes, device: str) -> list[Case]:
    return [case for family in (logprobs, linear, losses, advantages) for case in family.cases(sizes, device)]
