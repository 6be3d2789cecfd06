"""First facts from a GPU, the most valuable first: what it can do at best, and how near each kernel comes.

    python -m benchmarks.roofline --out facts.jsonl --seconds 140      on a GPU; --device cpu is a trial at small sizes

One JSON line for each fact, written and flushed as it comes, so that a run that is cut short has told what it could:
median milliseconds, bytes or FLOPs per second, and the share of the limit, the longer of the bytes at the speed of a
copy and the FLOPs at that of the fastest product so far in the same run. Nothing is checked here: tests/gpu does that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.cases import advantages, head, losses, tokens
from benchmarks.cases.build import Job, backward, forward
from benchmarks.cases.sizes import GPU, Sizes, backends_of, normal
from benchmarks.clock import clock_for
from benchmarks.costs import Work, floor_seconds
from benchmarks.harness import Case, limits
from rlhf_fast.errors import first_line

SMALL = Sizes(N=64, V=512, D=32, B=8, T=64, packed=0, dtype=torch.float32)
REPEATS = 7
TILES = (1024, 2048, 8192)  # rows of a tile of logits

Run = Callable[[], Any]


class Fact(NamedTuple):
    """make() draws the inputs and gives what is timed; cost: the least that it must read, write and multiply."""

    name: str
    make: Callable[[], Run]
    cost: Work


class Journal:
    """The file of facts: every line is on the disk before the next one is measured."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8")

    def write(self, **fact: Any) -> None:
        line = json.dumps(fact)
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())


def facts(sizes: Sizes, device: str) -> Iterator[Fact]:
    """Every backend of what the bars are about, then the other kernels, then the bare products of the heads."""

    def cases(passes: Callable[[Job, str], Case], *jobs: Job) -> list[Case]:
        """Without other libraries, whose imports take longer than what is timed here."""
        return [passes(replace(job, peers=""), device) for job in jobs]

    *without_gradient, in_place = tokens.logprobs_jobs(sizes, device)
    rows = [*cases(forward, *without_gradient), *cases(backward, in_place)]
    frozen = replace(head.logprobs(sizes, device), label="frozen head")
    trained = replace(head.policy_loss(sizes, device), label="trained head", leaves=head.TRAINED)
    heads = cases(backward, frozen, trained)
    scan = cases(forward, advantages.ragged_gae(sizes, device))
    kl, _ = tokens.logits_jobs(replace(sizes, N=sizes.N // 4), device)
    _, sample = tokens.logits_jobs(replace(sizes, N=256), device)
    whiten, *_ = advantages.others(sizes, device)
    rest = [*cases(backward, losses.policy(sizes, device)), *cases(forward, whiten, kl, sample)]

    for backend in backends_of("token_logprobs", device):
        yield from of_backend(rows, backend)
        yield from row_kernels(sizes, device, backend)
        yield from of_backend(heads, backend)
    for backend in backends_of("gae", device):
        yield from of_backend(scan, backend)
    yield from of_backend(rest, backends_of("policy_loss", device)[0])
    if device == "cuda":
        for tile in TILES:
            yield from products(sizes, device, tile)


def of_backend(cases: list[Case], backend: str) -> Iterator[Fact]:
    for case in cases:
        if backend in case.contenders:
            yield Fact(f"{case.name}, {case.shape}, {backend}", partial(ready, case, backend), case.cost)


def ready(case: Case, backend: str) -> Run:
    return partial(case.contenders[backend], case.draw())


def row_kernels(sizes: Sizes, device: str, backend: str) -> Iterator[Fact]:
    """As ops with a linear head call them on a tile, a quarter of the rows."""
    rows = sizes.N // 4

    def make(narrow: bool) -> Run:
        logits = normal(device, 1, rows, sizes.V, seed=0)
        targets = torch.randint(sizes.V, (1, rows), device=device)
        gradient = torch.empty_like(logits, dtype=sizes.dtype) if narrow else logits
        return tokens.row_kernel(backend, logits, targets, gradient)

    wide, narrow = (Work(bytes=(4 + size) * rows * sizes.V) for size in (4, sizes.dtype.itemsize))
    yield Fact(f"row kernel, float32 with its gradient {backend}", partial(make, False), wide)
    if backend == "triton":
        yield Fact(f"row kernel, float32 to {sizes.dtype} {backend}", partial(make, True), narrow)


def products(sizes: Sizes, device: str, rows: int) -> Iterator[Fact]:
    """The three products of a tile alone, of matrices laid out as the ops have them, into what is there already."""
    flops = Work(flops=2 * rows * sizes.D * sizes.V)
    hidden, weight, logits = (rows, sizes.D), (sizes.V, sizes.D), (rows, sizes.V)

    def of(
        a: tuple[int, int], b: tuple[int, int], dtype: torch.dtype, *, turned: str = "", old: float | None = None
    ) -> Callable[[], Run]:  # fmt: skip
        """turned: the one of a and b that is transposed."""

        def make() -> Run:
            x, y = normal(device, *a, seed=0, dtype=sizes.dtype), normal(device, *b, seed=1, dtype=sizes.dtype)
            x, y = x.t() if turned == "a" else x, y.t() if turned == "b" else y
            out = torch.zeros(x.shape[0], y.shape[1], device=device, dtype=dtype)
            if old is None:
                return lambda: torch.ops.aten.mm.dtype_out(x, y, dtype, out=out)
            return lambda: torch.ops.aten.addmm.dtype_out(out, x, y, dtype, beta=old, alpha=1.0, out=out)

        return make

    narrow, wide = sizes.dtype, torch.float32
    yield Fact(f"logits of {rows} rows, {narrow}", of(hidden, weight, narrow, turned="b"), flops)
    yield Fact(f"logits of {rows} rows, float32", of(hidden, weight, wide, turned="b"), flops)
    yield Fact(f"G @ weight of {rows} rows", of(logits, weight, narrow), flops)
    yield Fact(f"G^T @ hidden of {rows} rows, {narrow}", of(logits, hidden, narrow, turned="a"), flops)
    for old in (0.0, 1.0):
        name = f"G^T @ hidden of {rows} rows, float32, beta {old:g}"
        yield Fact(name, of(logits, hidden, wide, turned="a", old=old), flops)


def measured(fact: Fact, device: str, best: dict[str, float]) -> dict[str, Any]:
    """The fact's line; where it is a product and the fastest so far, it raises the limit in `best`."""
    clock, run = clock_for(device), fact.make()
    run()  # compiles
    times = [clock.time(run) for _ in range(REPEATS)]
    median = statistics.median(times)
    if not fact.cost.bytes:
        product = next(name for name in best if name.endswith("flops_per_second"))
        best[product] = max(best[product], 1e3 * fact.cost.flops / median)
    return {
        "fact": fact.name, "ms": round(median, 4), "min_ms": round(min(times), 4),
        "TB/s": round(fact.cost.bytes / median / 1e9, 3), "TFLOP/s": round(fact.cost.flops / median / 1e9, 1),
        "of the limit": round(1e3 * floor_seconds(fact.cost, best) / median, 3), **clock.remarks(),
    }  # fmt: skip


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Of several runs, in their order: the milliseconds of each; of the last that has a fact, bytes per second, the
    share of a copy where bytes are what counts, and FLOPs per second.
    """
    numbers = [f"{i}, ms" for i in range(1, len(runs) + 1)]
    lines = [
        f"| what | {' | '.join(numbers)} | TB/s | share of a copy | TFLOP/s |",
        "|---" + "|---:" * (len(runs) + 3) + "|",
    ]
    timed = [{fact["fact"]: fact for fact in run["facts"]} for run in runs]
    for name in dict.fromkeys(name for facts in timed for name in facts):
        run, fact = next(
            (run, facts[name]) for run, facts in zip(reversed(runs), reversed(timed), strict=True) if name in facts
        )
        times = [f"{facts[name]['ms']:.4g}" if name in facts else "" for facts in timed]
        if fact["TFLOP/s"] > 100:
            cells = ["", "", f"{fact['TFLOP/s']:.0f}"]
        else:
            cells = [f"{fact['TB/s']:.2f}", f"{fact['TB/s'] * 1e12 / run['copy_bytes_per_second']:.0%}", ""]
        lines.append(f"| {name} | {' | '.join([*times, *cells])} |")
    return "\n".join([*lines, "", *(origin(i, run) for i, run in enumerate(runs, 1)), ""])


def origin(number: int, run: dict[str, Any]) -> str:
    where = run["machine"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "triton", "cuda"))
    changed = " and changes" if where["uncommitted_changes"] else ""
    tests = "; ".join(
        f"{part['phase']}: {part['passed']} passed, {part['failed']} failed, {part['skipped']} skipped"
        for part in run["tests"]
    )
    return (
        f"{number}. {where['gpu']}; {versions}; commit {where['commit']}{changed}; `{where['command']}`. A copy moves "
        f"{run['copy_bytes_per_second'] / 1e12:.2f} TB/s, counting what is read and written. {tests}."
    )


def main(words: list[str] | None = None) -> int:
    """The exit status: 1 where a fact could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, which is added to")
    parser.add_argument("--seconds", type=float, default=140, help="after which no further fact is begun")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    asked = parser.parse_args(words)
    end = time.perf_counter() + asked.seconds
    journal, gpu, failed = Journal(asked.out), asked.device == "cuda", False
    best = limits(asked.device, *((1 << 31, 8192) if gpu else (1 << 20, 256)))
    where = torch.cuda.get_device_name() if gpu else "cpu"
    journal.write(device=where, torch=torch.__version__, **{name: rate / 1e12 for name, rate in best.items()})
    for fact in facts(GPU if gpu else SMALL, asked.device):
        if time.perf_counter() > end:
            journal.write(fact=fact.name, left_out="no time")
            continue
        try:
            journal.write(**measured(fact, asked.device, best))
        except (RuntimeError, NotImplementedError) as error:  # the next fact may be there
            failed = True
            journal.write(fact=fact.name, error=f"{type(error).__name__}: {first_line(error)[:200]}")
            traceback.print_exc(limit=-3)
        if gpu:
            torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
