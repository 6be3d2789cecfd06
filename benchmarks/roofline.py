"""First facts from a GPU, the most valuable first: what it can do at best, and how near each kernel comes.

    python -m benchmarks.roofline --out facts.jsonl --seconds 140      on a GPU; --device cpu is a trial at small sizes

One JSON line for each fact, written and flushed as it comes, so that a run that is cut short has told what it could:
median milliseconds, bytes or FLOPs per second, and the share of the limit, the longer of the bytes at the speed of a
copy and the FLOPs at that of a square product in the same run. Nothing is checked here: tests/gpu does that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf_fast
from benchmarks.cases.linear import draw_samples, draw_tokens
from benchmarks.cases.sizes import GPU, Sizes, backends_of, normal, planes, ragged_mask
from benchmarks.clock import clock_for
from benchmarks.costs import PASSES, Work, floor_seconds, work
from benchmarks.harness import limits
from rlhf_fast.ops.tokens.token_logprobs import IMPLS, Transform, empty_stats

SMALL = Sizes(N=64, V=512, D=32, B=8, T=64, packed=0, dtype=torch.float32)
REPEATS = 7
TILES = (1024, 1639, 2048, 4096)  # rows of a tile of logits

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


def of_op(op: str, passes: str, sizes: Sizes, **more: int) -> Work:
    of = {"N": sizes.N, "V": sizes.V, "D": sizes.D, "s": sizes.dtype.itemsize} | more
    return work(op, passes, of)


def facts(sizes: Sizes, device: str) -> Iterator[Fact]:
    """Every backend of what the bars are about, then the other kernels, then the bare products of the heads."""
    for backend in backends_of("token_logprobs", device):
        yield from from_logits(sizes, device, backend)
        yield from from_hidden(sizes, device, backend)
    for backend in backends_of("gae", device):
        yield scan(sizes, device, backend)
    first = backends_of("policy_loss", device)[0]
    yield from others(sizes, device, first)
    if device == "cuda":
        for rows in TILES:
            yield from products(sizes, device, rows)


def from_logits(sizes: Sizes, device: str, backend: str) -> Iterator[Fact]:
    def drawn() -> tuple[Tensor, Tensor]:
        logits = normal(device, sizes.N, sizes.V, seed=0, dtype=sizes.dtype)
        return logits, torch.randint(sizes.V, (sizes.N,), device=device)

    def forward(**options: bool) -> Callable[[], Run]:
        def make() -> Run:
            logits, targets = drawn()
            return lambda: rlhf_fast.token_logprobs(logits, targets, backend=backend, **options)

        return make

    def backward() -> Run:
        logits, targets = drawn()
        logits.requires_grad_()

        def run() -> None:
            found = rlhf_fast.token_logprobs(logits, targets, inplace_backward=True, backend=backend)
            torch.autograd.grad(found.sum(), logits)

        return run

    once, twice = (of_op("token_logprobs", passes, sizes) for passes in PASSES[:2])
    yield Fact(f"token_logprobs {backend}", forward(), once)
    yield Fact(f"token_logprobs + entropy {backend}", forward(return_entropy=True), once)
    yield Fact(f"token_logprobs, backward in place {backend}", backward, twice)
    yield Fact(f"row kernel, float32 with its gradient {backend}", row_kernel(sizes, device, backend, False),
               Work(bytes=2 * 4 * sizes.N // 4 * sizes.V))  # fmt: skip
    if backend == "triton":
        yield Fact(f"row kernel, float32 to {sizes.dtype} {backend}", row_kernel(sizes, device, backend, True),
                   Work(bytes=(4 + sizes.dtype.itemsize) * (sizes.N // 4) * sizes.V))  # fmt: skip


def row_kernel(sizes: Sizes, device: str, backend: str, narrow: bool) -> Callable[[], Run]:
    """As ops with a linear head call it on a tile, a quarter of the rows."""

    def make() -> Run:
        rows = sizes.N // 4
        logits = normal(device, 1, rows, sizes.V, seed=0)
        targets = torch.randint(sizes.V, (1, rows), device=device)
        gradient = torch.empty_like(logits, dtype=sizes.dtype) if narrow else logits
        stats = empty_stats(logits, want_entropy=False)
        return lambda: IMPLS[backend][0](logits, targets, None, Transform(), False, stats, gradient)

    return make


def from_hidden(sizes: Sizes, device: str, backend: str) -> Iterator[Fact]:
    def frozen() -> Run:
        given = draw_tokens(sizes, device)
        hidden = given["hidden"].requires_grad_()
        return lambda: torch.autograd.grad(rlhf_fast.linear_logprobs(**given, backend=backend).sum(), hidden)

    def trained() -> Run:
        given = draw_samples(sizes, device)
        leaves = [given[name].requires_grad_() for name in ("hidden", "weight")]
        return lambda: torch.autograd.grad(rlhf_fast.linear_policy_loss(**given, backend=backend)[0], leaves)

    yield Fact(f"linear_logprobs, frozen head, both passes {backend}", frozen,
               of_op("linear_logprobs", "backward", sizes))  # fmt: skip
    if backend in backends_of("linear_policy_loss", device):
        yield Fact(f"linear_policy_loss, trained head, both passes {backend}", trained,
                   of_op("linear_policy_loss", "trained head", sizes))  # fmt: skip


def scan(sizes: Sizes, device: str, backend: str) -> Fact:
    def make() -> Run:
        given = planes(sizes, device, "rewards", "values") | {"mask": ragged_mask(sizes.B, sizes.T, device)}
        return lambda: rlhf_fast.gae(**given, gamma=1.0, lam=0.95, backend=backend)

    return Fact(f"gae {backend}", make, of_op("gae", "forward", sizes, N=sizes.B * sizes.T, s=4))


def others(sizes: Sizes, device: str, backend: str) -> Iterator[Fact]:
    elements = {"N": sizes.B * sizes.T, "s": 4}

    def policy() -> Run:
        given = planes(sizes, device, "logprobs", "old_logprobs", "advantages")
        mask, leaf = ragged_mask(sizes.B, sizes.T, device), given["logprobs"].requires_grad_()
        return lambda: torch.autograd.grad(rlhf_fast.policy_loss(**given, mask=mask, backend=backend)[0], leaf)

    def whiten() -> Run:
        x, mask = planes(sizes, device, "x")["x"], ragged_mask(sizes.B, sizes.T, device)
        return lambda: rlhf_fast.whiten(x, mask, backend=backend)

    def token_kl() -> Run:
        a, b = (normal(device, sizes.N // 4, sizes.V, seed=seed, dtype=sizes.dtype) for seed in range(2))
        return lambda: rlhf_fast.token_kl(a, b, backend=backend)

    def sample() -> Run:
        logits = 3 * normal(device, 256, sizes.V, seed=0, dtype=sizes.dtype)
        return lambda: rlhf_fast.sample_tokens(logits, seed=0, top_p=0.95, backend=backend)

    yield Fact(f"policy_loss, both passes {backend}", policy, of_op("policy_loss", "backward", sizes, **elements))
    yield Fact(f"whiten {backend}", whiten, of_op("whiten", "forward", sizes, **elements))
    yield Fact(f"token_kl {backend}", token_kl, of_op("token_kl", "forward", sizes, N=sizes.N // 4))
    yield Fact(f"sample_tokens, top_p, 256 rows {backend}", sample, of_op("sample_tokens", "forward", sizes, N=256))


def products(sizes: Sizes, device: str, rows: int) -> Iterator[Fact]:
    """The three products of a tile alone, into what is there already."""
    flops = Work(flops=2 * rows * sizes.D * sizes.V)

    def of(a: tuple[int, int], b: tuple[int, int], dtype: torch.dtype, old: float | None = None) -> Callable[[], Run]:
        def make() -> Run:
            x, y = normal(device, *a, seed=0, dtype=sizes.dtype), normal(device, *b, seed=1, dtype=sizes.dtype)
            out = torch.zeros(a[0], b[1], device=device, dtype=dtype)
            if old is None:
                return lambda: torch.ops.aten.mm.dtype_out(x, y, dtype, out=out)
            return lambda: torch.ops.aten.addmm.dtype_out(out, x, y, dtype, beta=old, alpha=1.0, out=out)

        return make

    narrow, wide = sizes.dtype, torch.float32
    yield Fact(f"logits of {rows} rows, {narrow}", of((rows, sizes.D), (sizes.D, sizes.V), narrow), flops)
    yield Fact(f"logits of {rows} rows, float32", of((rows, sizes.D), (sizes.D, sizes.V), wide), flops)
    yield Fact(f"G @ weight of {rows} rows", of((rows, sizes.V), (sizes.V, sizes.D), narrow), flops)
    for old in (0.0, 1.0):
        name = f"G^T @ hidden of {rows} rows, float32, beta {old:g}"
        yield Fact(name, of((sizes.V, rows), (rows, sizes.D), wide, old), flops)


def measured(fact: Fact, device: str, best: dict[str, float]) -> dict[str, Any]:
    clock, run = clock_for(device), fact.make()
    run()  # compiles
    found = [clock.time(run) for _ in range(REPEATS)]
    median = statistics.median(found)
    return {
        "fact": fact.name, "ms": round(median, 4), "min_ms": round(min(found), 4),
        "TB/s": round(fact.cost.bytes / median / 1e9, 3), "TFLOP/s": round(fact.cost.flops / median / 1e9, 1),
        "of the limit": round(1e3 * floor_seconds(fact.cost, best) / median, 3), **clock.remarks(),
    }  # fmt: skip


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
            journal.write(fact=fact.name, error=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
            traceback.print_exc(limit=-3)
        if gpu:
            torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
