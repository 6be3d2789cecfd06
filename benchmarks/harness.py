"""Timing side by side: contenders take turns, each is compared with float64 first, medians are written as JSON."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.numerics import assert_contract

ROOT = Path(__file__).parents[1]
CHECKED_ROWS = 16  # rows of every result that are compared with float64

Inputs = dict[str, Tensor]
Contender = Callable[[Inputs], list[Tensor]]  # results whose first dimension is the rows of the inputs


@dataclass(frozen=True)
class Case:
    """A comparison: `contenders` must hold "eager", what a user would write in plain PyTorch."""

    name: str
    shape: str
    draw: Callable[[], Inputs]  # called anew for every contender, which may overwrite its inputs
    oracle: Callable[[Inputs, int], list[Tensor]]  # the first rows in float64
    contenders: dict[str, Contender]


def measure(case: Case, device: str, repeats: int) -> dict[str, Any]:
    """Median, minimum and maximum milliseconds of every contender over `repeats` interleaved runs."""
    check(case)
    inputs = {name: case.draw() for name in case.contenders}
    times: dict[str, list[float]] = {name: [] for name in case.contenders}
    for turn in range(repeats + 2):  # two rounds of warming up
        for name, contender in case.contenders.items():
            milliseconds = timed(lambda run=contender, given=inputs[name]: run(given), device)
            if turn >= 2:
                times[name].append(milliseconds)
    summary = {
        name: {"median_ms": statistics.median(t), "min_ms": min(t), "max_ms": max(t)} for name, t in times.items()
    }
    return {"case": case.name, "shape": case.shape, "repeats": repeats, "contenders": summary}


def check(case: Case) -> None:
    """Every contender keeps the numerics contract beside "eager" on the first rows."""
    oracle = case.oracle(case.draw(), CHECKED_ROWS)
    eager = [x[:CHECKED_ROWS] for x in case.contenders["eager"](case.draw())]
    for name, contender in case.contenders.items():
        for i, result in enumerate(contender(case.draw())):
            assert_contract(f"{case.name}, {name}, result {i}", result[:CHECKED_ROWS], eager[i], oracle[i])


def timed(run: Callable[[], Any], device: str) -> float:
    """Milliseconds of one run: CUDA events on a GPU, the wall clock elsewhere."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def machine(device: str) -> dict[str, Any]:
    """Where and with what this ran."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    info = {
        "commit": git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        import triton

        info |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}
    return info


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def report(cases: list[Case], device: str, repeats: int, out: Path, **extra: Any) -> None:
    """Measures all cases, prints a line for each contender and writes everything to `out`."""
    results = []
    for case in cases:
        results.append(measure(case, device, repeats))
        times = results[-1]["contenders"]
        for name, row in times.items():
            ratio = times["eager"]["median_ms"] / row["median_ms"]
            print(
                f"{case.name:34} {case.shape:28} {name:8} {row['median_ms']:10.3f} ms  {ratio:6.2f} x eager", flush=True
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine(device), **extra, "cases": results}, indent=1) + "\n")
    print(f"-> {out}")
