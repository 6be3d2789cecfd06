"""Timing side by side: contenders take turns, results are compared with float64 first, all is written as JSON."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops._head import free_tile_buffer
from tests.numerics import assert_contract

ROOT = Path(__file__).parents[1]
LONG = 10  # fewer repeats than this are a trial, not a measurement
CHECKED_ROWS = 16  # rows of every result that are compared with float64

Inputs = dict[str, Tensor]
Contender = Callable[[Inputs], list[Tensor]]


@dataclass(frozen=True)
class Bar:
    """`ours` must be at least `ratio` times as fast as `against` (below 1: take at most 1 / ratio of its time)."""

    ours: str
    against: str
    ratio: float


@dataclass(frozen=True)
class Case:
    """A comparison. A contender gives results whose first dimension is the rows of the inputs, or whole tensors.

    "eager" is what a user would write in plain PyTorch; `peers` are other implementations of the same job, whose error
    is recorded and not asserted; `floors` are what the job cannot do without (bare products, a copy), not checked.
    bytes and flops: what the op's formula moves and computes at least; 0 where that bounds nothing. scratch: the most
    that our contenders may allocate at a time beside what they return; 0 for no bar.
    """

    name: str
    shape: str
    draw: Callable[[], Inputs]  # called anew for every contender, which may overwrite its inputs
    oracle: Callable[[Inputs, int], list[Tensor]]  # the first rows in float64
    contenders: dict[str, Contender]
    peers: dict[str, Contender] = field(default_factory=dict)
    floors: dict[str, Contender] = field(default_factory=dict)
    bars: tuple[Bar, ...] = ()
    bytes: int = 0
    flops: int = 0
    scratch: int = 0

    @property
    def everyone(self) -> dict[str, Contender]:
        return self.contenders | self.peers | self.floors


def measure(case: Case, device: str, repeats: int) -> dict[str, Any]:
    """Times, errors and bars of one case over at least `repeats` interleaved runs, after two that warm up.

    Short cases are repeated for two seconds: the best of a few runs of less than a millisecond is noise.
    """
    errors = check(case)
    inputs = {name: case.draw() for name in case.everyone}
    times: dict[str, list[float]] = {name: [] for name in case.everyone}
    gc.collect()
    gc.disable()  # as timeit does
    started, turn = time.perf_counter(), 0
    while turn < repeats + 2 or (repeats >= LONG and turn < 200 and time.perf_counter() - started < 2):
        for name, contender in case.everyone.items():
            milliseconds = timed(lambda run=contender, given=inputs[name]: run(given), device)
            if turn >= 2:
                times[name].append(milliseconds)
        turn += 1
    gc.enable()
    summary = {
        name: {"median_ms": statistics.median(t), "min_ms": min(t), "max_ms": max(t), "max_error": errors.get(name)}
        for name, t in times.items()
    }
    for name, contender in case.everyone.items():
        summary[name]["scratch_bytes"] = scratch_bytes(contender, inputs[name], device)
    return {
        "case": case.name, "shape": case.shape, "repeats": turn - 2, "bytes": case.bytes, "flops": case.flops,
        "scratch": case.scratch, "contenders": summary, "bars": [judged(bar, times) for bar in case.bars],
    }  # fmt: skip


def judged(bar: Bar, times: dict[str, list[float]]) -> dict[str, Any]:
    """The better of the interleaved repeats of both; None where the other one is not installed."""
    found = None if bar.against not in times else min(times[bar.against]) / min(times[bar.ours])
    return {"ours": bar.ours, "against": bar.against, "bar": bar.ratio, "measured": found}


def check(case: Case) -> dict[str, float]:
    """Our contenders keep the numerics contract beside "eager"; returns everybody's greatest error against float64."""
    oracle = case.oracle(case.draw(), CHECKED_ROWS)
    eager = [x[:CHECKED_ROWS] if x.dim() else x for x in case.contenders["eager"](case.draw())]
    errors = {}
    for name, contender in (case.contenders | case.peers).items():
        results = [x[:CHECKED_ROWS] if x.dim() else x for x in contender(case.draw())]
        errors[name] = max((r.double() - o).abs().max().item() for r, o in zip(results, oracle, strict=True))
        if name in case.contenders:
            for i, result in enumerate(results):
                assert_contract(f"{case.name}, {name}, result {i}", result, eager[i], oracle[i])
    return errors


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


def scratch_bytes(contender: Contender, inputs: Inputs, device: str) -> int:
    """The most bytes that a run holds at a time beside its inputs and what it returns."""
    gc.collect()
    results: list[Tensor] = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results.extend(contender(inputs))
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = peak_bytes(lambda: results.extend(contender(inputs)))
    returned = {x.data_ptr(): x.nbytes for x in results if all(x.data_ptr() != y.data_ptr() for y in inputs.values())}
    return max(0, peak - sum(returned.values()))


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes of CPU tensors made by `function` that are alive at a time."""
    free_tile_buffer()  # of an earlier call: it counts
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    changes = (e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(accumulate(changes), default=0)


def limits(device: str, size: int = 1 << 28, side: int = 2048) -> dict[str, float]:
    """What the machine can do at best: bytes copied (read and written) and FLOPs of a square product, per second."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    a, b, c = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(3))
    copy = min(timed(lambda: target.copy_(source), device) for _ in range(20))
    product = min(timed(lambda: torch.mm(a, b, out=c), device) for _ in range(20))
    name = f"{str(dtype).removeprefix('torch.')}_flops_per_second"
    return {"copy_bytes_per_second": 2e3 * size / copy, name: 2e3 * side**3 / product}


def machine(device: str) -> dict[str, Any]:
    """Where and with what this ran."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    info = {
        "commit": git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
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
    """Measures all cases, prints a line for each contender and bar, and writes everything to `out`."""
    results = []
    for case in cases:
        results.append(measure(case, device, repeats))
        gc.collect()
        times = results[-1]["contenders"]
        print(f"{case.name}, {case.shape}", flush=True)
        for name, row in times.items():
            ratio = times["eager"]["min_ms"] / row["min_ms"]
            error = "" if row["max_error"] is None else f"  error {row['max_error']:.1e}"
            print(f"  {name:24} {row['min_ms']:10.3f} ms  {ratio:7.2f} x eager{error}", flush=True)
        for line in [*map(described, results[-1]["bars"]), *described_scratch(results[-1], case.contenders)]:
            print(f"  {line}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine(device), **extra, "cases": results}, indent=1) + "\n")
    print(f"-> {out}")


def described(bar: dict[str, Any]) -> str:
    """One line: what was asked, what was measured."""
    if bar["measured"] is None:
        return f"bar: {bar['against']} is not installed"
    verdict = "kept" if bar["measured"] >= bar["bar"] else "MISSED"
    if bar["bar"] < 1:
        return f"bar {verdict}: {1 / bar['measured']:.3f} x the time of {bar['against']}, at most {1 / bar['bar']:.3f}"
    return f"bar {verdict}: {bar['measured']:.2f} x as fast as {bar['against']}, at least {bar['bar']:g}"


def described_scratch(result: dict[str, Any], ours: Iterable[str]) -> list[str]:
    """One line for each of our contenders, where the case bounds what they may allocate."""
    lines = []
    for name in ours:
        if result["scratch"] and name in result["contenders"] and name != "eager":
            took, allowed = result["contenders"][name]["scratch_bytes"], result["scratch"]
            verdict = "kept" if took <= allowed else "MISSED"
            lines.append(f"bar {verdict}: {name} takes {took >> 20} MiB beside its results, at most {allowed >> 20}")
    return lines
