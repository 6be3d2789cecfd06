"""pytest benchmarks --benchmark-only: every contender of every case at small sizes, through pytest-benchmark.

What a call costs beside its arithmetic shows here; `python -m benchmarks` measures the sizes of training.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks.cases import selected
from benchmarks.harness import Case, check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = selected(["bars", "ops", "ragged"], DEVICE, quick=True)


@cache
def errors(i: int) -> dict[str, float]:
    greatest, failed = check(CASES[i])
    assert not failed, f"{CASES[i].name}: {failed}"
    return greatest


def named(case: Case, contender: str) -> str:
    return f"{case.name}, {case.shape}-{contender}".replace(" ", "_")


@pytest.mark.parametrize(
    ("i", "contender"),
    [pytest.param(i, name, id=named(case, name)) for i, case in enumerate(CASES) for name in case.everyone],
)
def test_time(i, contender, benchmark):
    case = CASES[i]
    benchmark.group = f"{case.name}, {case.shape}"
    benchmark.extra_info |= {"max_error": errors(i).get(contender), **case.cost._asdict()}
    inputs, run = case.draw(), case.everyone[contender]

    def once() -> None:
        run(inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(once)
