"""Timing side by side: contenders take turns, results are compared with float64 first, all is written as JSON."""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import clock_for
from benchmarks.costs import Work, work
from benchmarks.machine import machine
from rlhf_fast.errors import first_line
from rlhf_fast.testing.memory import peak_bytes
from rlhf_fast.testing.numerics import assert_contract

LONG = 10  # fewer repeats than this are a trial, not a measurement
FEWEST = 5  # repeats of a case that has used up its BUDGET
BUDGET = 10  # seconds that the contenders of a case share
BAR_BUDGET = 40  # where a bar is judged by the best runs
WARM_UP = 0.3  # seconds of load before a limit of the machine is timed
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
    scratch: the most that our contenders may allocate at a time beside what they return; 0 for no bar.
    op, passes and sizes: what benchmarks.costs counts FLOPs and bytes from; without an op nothing is counted.
    yardstick: "eager" for the first rows alone, where the whole of it does not fit and is no contender.
    compared: what of the inputs and results is compared, where results as they are cannot be (random draws).
    timed_share: contender -> the share of the inputs that it works on, for one that would take minutes; its times are
    divided by that, and the result says so.
    """

    name: str
    shape: str
    draw: Callable[[], Inputs]  # called anew for every contender, which may overwrite its inputs
    oracle: Callable[[Inputs, int], list[Tensor]]  # the first rows in float64
    contenders: dict[str, Contender]
    peers: dict[str, Contender] = field(default_factory=dict)
    floors: dict[str, Contender] = field(default_factory=dict)
    bars: tuple[Bar, ...] = ()
    scratch: int = 0
    op: str = ""
    passes: str = "forward"
    sizes: Mapping[str, int] = field(default_factory=dict)
    group: str = "bars"
    yardstick: Contender | None = None
    compared: Callable[[Inputs, list[Tensor]], list[Tensor]] = lambda inputs, results: results
    timed_share: Mapping[str, Callable[[Inputs], float]] = field(default_factory=dict)

    @property
    def everyone(self) -> dict[str, Contender]:
        return self.contenders | self.peers | self.floors

    @property
    def cost(self) -> Work:
        return work(self.op, self.passes, self.sizes) if self.op else Work()


def measure(case: Case, device: str, repeats: int) -> dict[str, Any]:
    """Times, errors and bars of one case over `repeats` interleaved runs; see `enough`.

    Everybody warms up twice: in the check and in the first turn.
    """
    drawn = case.draw()  # once: random numbers for a large head take as long as a product
    case = replace(case, draw=lambda: {name: x.clone() for name, x in drawn.items()})
    errors, failed = check(case)
    runs = {name: (contender, case.draw()) for name, contender in case.everyone.items() if name not in failed}
    times: dict[str, list[float]] = {name: [] for name in runs}
    clocks = {name: clock_for(device) for name in runs}
    shares = {name: share(drawn) for name, share in case.timed_share.items()}
    gc.collect()
    gc.disable()  # as timeit does
    started, turn = time.perf_counter(), 0
    budget = BAR_BUDGET if case.bars else BUDGET
    while not enough(turn - 1, repeats, time.perf_counter() - started, budget):
        for name, (contender, inputs) in runs.items():
            milliseconds = clocks[name].time(partial(contender, inputs))
            if turn >= 1:
                times[name].append(milliseconds / shares.get(name, 1))
        turn += 1
    gc.enable()
    summary = {name: spread(t) | {"max_error": errors.get(name)} for name, t in times.items()}
    for name, (contender, inputs) in runs.items():
        summary[name] |= {"scratch_bytes": scratch_bytes(contender, inputs, device), **clocks[name].remarks()}
        summary[name] |= {"timed_share": shares[name]} if name in shares else {}
    return {
        "case": case.name, "shape": case.shape, "group": case.group, "op": case.op, "passes": case.passes,
        "sizes": dict(case.sizes), "repeats": turn - 1, "bytes": case.cost.bytes, "flops": case.cost.flops,
        "scratch": case.scratch, "contenders": summary, "bars": [judged(bar, times) for bar in case.bars],
        "failed": failed,
    }  # fmt: skip


def enough(done: int, repeats: int, seconds: float, budget: float) -> bool:
    """Whether `done` of `repeats` runs are enough after so many seconds.

    Short cases are repeated for a fifth of the budget: a few runs of less than a millisecond are noise. Long ones stop
    at FEWEST runs when the budget is used up.
    """
    if done < repeats:
        return done >= FEWEST and seconds > budget
    return repeats < LONG or done >= 198 or seconds > budget / 5


def spread(milliseconds: list[float]) -> dict[str, float]:
    """The extremes of the repeats, their tenth and ninetieth percentile and their median."""
    tenths = statistics.quantiles(milliseconds, n=10, method="inclusive") if len(milliseconds) > 1 else milliseconds
    return {
        "median_ms": statistics.median(milliseconds), "min_ms": min(milliseconds), "max_ms": max(milliseconds),
        "p10_ms": tenths[0], "p90_ms": tenths[-1],
    }  # fmt: skip


def judged(bar: Bar, times: dict[str, list[float]]) -> dict[str, Any]:
    """The better of the interleaved repeats of both; None where the other one did not run."""
    ratio = None if bar.against not in times else min(times[bar.against]) / min(times[bar.ours])
    return {"ours": bar.ours, "against": bar.against, "bar": bar.ratio, "measured": ratio}


def check(case: Case) -> tuple[dict[str, float], dict[str, str]]:
    """Everybody's greatest error against float64, and the peers that could not run with their reasons.

    Our contenders keep the numerics contract beside "eager"; what they raise is raised.
    """
    oracle = case.oracle(case.draw(), CHECKED_ROWS)
    yardstick = case.yardstick or case.contenders["eager"]
    eager = first_rows(case, yardstick)
    errors, failed = {}, {}
    for name, contender in (case.contenders | case.peers).items():
        try:
            results = first_rows(case, contender)
        except (RuntimeError, ImportError) as error:  # of a peer: memory, what it does not support, or imports late
            if name in case.contenders:
                raise
            failed[name] = f"{type(error).__name__}: {first_line(error)}"
            continue
        errors[name] = max((r.double() - o).abs().max().item() for r, o in zip(results, oracle, strict=True))
        if name in case.contenders:
            for i, result in enumerate(results):
                assert_contract(f"{case.name}, {name}, result {i}", result, eager[i], oracle[i])
    return errors, failed


def first_rows(case: Case, contender: Contender) -> list[Tensor]:
    """What is compared of the contender's results; of those with rows, the first ones."""
    inputs = case.draw()
    return [x[:CHECKED_ROWS] if x.dim() else x for x in case.compared(inputs, contender(inputs))]


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


def free_bytes(device: str) -> int:
    """What a contender may fill: what is free on the GPU, half of the machine's memory on the CPU."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def limits(device: str, size: int = 1 << 28, side: int = 2048, warm_up: float = WARM_UP) -> dict[str, float]:
    """What the machine can do at best: bytes copied (read and written) and FLOPs of a square product, per second.

    warm_up: seconds of each before it is timed. A GPU's clocks rise under load, and what it did before they have is no
    limit.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    source, target = (torch.randint(255, (size,), dtype=torch.uint8, device=device) for _ in range(2))
    a, b, c = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(3))
    copy = best_of(lambda: target.copy_(source), device, warm_up)
    product = best_of(lambda: torch.mm(a, b, out=c), device, warm_up)
    name = f"{str(dtype).removeprefix('torch.')}_flops_per_second"
    return {"copy_bytes_per_second": 2e3 * size / copy, name: 2e3 * side**3 / product}


def best_of(run: Callable[[], Any], device: str, warm_up: float) -> float:
    """Milliseconds of the fastest of 20 runs, after `warm_up` seconds of them."""
    clock, end = clock_for(device), time.perf_counter() + warm_up
    while time.perf_counter() < end:
        clock.time(run)
    return min(clock.time(run) for _ in range(20))


def report(cases: list[Case], device: str, repeats: int, out: Path, **extra: Any) -> None:
    """Measures all cases, prints a line for each contender and bar, and writes everything to `out`, case by case."""
    results: list[dict[str, Any]] = []
    head = {"machine": machine(device), **extra}
    out.parent.mkdir(parents=True, exist_ok=True)
    gc.collect()
    gc.freeze()  # or every collection walks through all that the other libraries have imported
    for case in cases:
        results.append(measure(case, device, repeats))
        gc.collect()
        print_result(results[-1], case)
        out.write_text(json.dumps({**head, "cases": results}, indent=1) + "\n")
    gc.unfreeze()
    print(f"-> {out}")


def print_result(result: dict[str, Any], case: Case) -> None:
    times = result["contenders"]
    print(f"{case.name}, {case.shape}", flush=True)
    for name, row in times.items():
        ratio = f"  {times['eager']['min_ms'] / row['min_ms']:7.2f} x eager" if "eager" in times else ""
        error = "" if row["max_error"] is None else f"  error {row['max_error']:.1e}"
        share = f"  {row['timed_share']:.2%} of it timed" if "timed_share" in row else ""
        host = "  with the host's time" if row.get("host_bound") else ""
        print(f"  {name:24} {row['min_ms']:10.3f} ms{ratio}{error}{share}{host}", flush=True)
    for name, reason in result["failed"].items():
        print(f"  {name:24} could not run: {reason}", flush=True)
    for line in [*map(described, result["bars"]), *described_scratch(result, case.contenders)]:
        print(f"  {line}", flush=True)


def described(bar: dict[str, Any]) -> str:
    """One line: what was asked, what was measured."""
    if bar["measured"] is None:
        return f"bar: {bar['against']} is not there"
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
