"""Compiles every Triton kernel ahead of time, without a GPU, and reports registers, spills and shared memory.

    python -m benchmarks.aot --out benchmarks/results/aot_triton3.9.json      with the Triton that is on the path

Runs every case of rlhf_fast/testing/cases, forward and backward, through the real launchers; a launch compiles the
specialisation that it would have run, and runs nothing. The first case that launches a kernel compiles it for every
target and dtype; the later ones, which differ in a variant or an option, for one of each. Then the calls of
benchmarks/production.py, at the shapes of training, for sm_90, with the blocks of a kernel that fit a multiprocessor.

A row holds the fingerprint of what it was compiled from. Where a record in benchmarks/results, of the same Triton, has
the row with the same fingerprint, it is taken from there: a changed kernel costs its own compilation.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

if os.environ.get("TRITON_INTERPRET"):
    sys.exit("benchmarks.aot: unset TRITON_INTERPRET, which replaces the compiler by an interpreter")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks import fingerprint, production
from benchmarks.occupancy import blocks_per_sm
from benchmarks.ptxas import write
from rlhf_fast import backends, kernels
from rlhf_fast.ops import table
from rlhf_fast.testing.cases import CASES, Case

RESULTS = Path(__file__).parent / "results"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16, "f64": torch.float64}
COMMON = ("bf16", "f32")  # what the first case of a kernel is compiled for on every target, the other types on MAIN
MAIN = "sm_90"
LATER = (MAIN, "bf16")  # what the later cases of a kernel are compiled for


class Targets:
    """Stands in for Triton's GPU driver: device i is the i-th target; nothing can be launched on it."""

    def __init__(self) -> None:
        self.device = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return list(TARGETS.values())[self.device]


def kernel_names() -> list[str]:
    """Every @triton.jit function of rlhf_fast.kernels that is launched: its name ends in _kernel."""
    names = []
    for info in iter_modules(kernels.__path__):
        module = import_module(f"rlhf_fast.kernels.{info.name}")
        names += [
            f"{info.name}.{name}"
            for name, value in vars(module).items()
            if isinstance(value, JITFunction) and name.endswith("_kernel") and value.__module__ == module.__name__
        ]
    return sorted(names)


def resources(kernel: Any) -> dict[str, int]:
    """Registers per thread, accesses to spilled ones (AMD: spilled ones), bytes of shared memory, of one kernel."""
    if "amdgcn" in kernel.asm:
        found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", kernel.asm["amdgcn"]))
        registers, spills = int(found["vgpr_count"]), int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"])
    else:
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", cuobjdump("-res-usage", kernel.asm["cubin"])))
        registers, spills = int(usage["REG"]), 0
        if int(usage["STACK"]) + int(usage["LOCAL"]) > 0:  # a stack alone may be there for a call
            spills = len(re.findall(r"\b(?:LDL|STL)\b", cuobjdump("-sass", kernel.asm["cubin"])))
    return {
        "registers": registers, "spills": spills, "shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps
    }  # fmt: skip


def cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


Key = tuple[str, str, str]  # kernel, case, target


def recorded() -> dict[Key, dict[str, Any]]:
    """The rows of the records that this Triton made."""
    records = [json.loads(path.read_text()) for path in RESULTS.glob("aot_*.json")]
    rows = [row for record in records if record["triton"] == triton.__version__ for row in record["rows"]]
    return {(row["kernel"], row["case"], row["target"]): row for row in rows}


class Compiler:
    """While it is entered, a launch is noted for the targets that `wanted` names, and runs nothing.

    At the end of a case its kernels are compiled for the targets where no record has them. rows: the worst of all
    specialisations that a case launches.
    """

    def __init__(self) -> None:
        self.targets = Targets()
        self.recorded = recorded()
        self.rows: dict[Key, dict[str, Any]] = {}
        self.launches: dict[tuple[str, str], dict[str, Callable[[], Any]]] = {}  # kernel, target -> by fingerprint
        self.wanted: Callable[[str], Collection[str]] = lambda kernel: ()
        driver.set_active(self.targets)
        compiler, run = self, JITFunction.run

        def note_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            name = f"{self.fn.__module__.rsplit('.', 1)[1]}.{self.fn.__name__}"
            launch = partial(run, self, *args, grid=grid, warmup=True, **kwargs)
            for target in compiler.wanted(name):
                of_target = compiler.launches.setdefault((name, target), {})
                of_target[fingerprint.of_launch(self, args, kwargs)] = launch

        JITFunction.run = note_instead
        backends.why_not = lambda *_: None  # the tensors are on the CPU, which Triton would refuse

    def finish(self, case: str) -> set[str]:
        """Makes the rows of the launches since the last case; returns the kernels that were launched."""
        for (kernel, target), launches in self.launches.items():
            key, compiled_from = (kernel, case, target), fingerprint.digest(sorted(launches))
            known = self.recorded.get(key)
            if known and known["fingerprint"] == compiled_from:
                self.rows[key] = known
                continue
            self.targets.device = list(TARGETS).index(target)
            found = [resources(launch()) for launch in launches.values()]
            worst = {what: max(row[what] for row in found) for what in found[0]}
            blocks = blocks_per_sm(worst["registers"], worst["warps"], worst["shared"])
            worst |= {"blocks": blocks} if target == MAIN else {}
            names = dict(zip(("kernel", "case", "target"), key, strict=True))
            self.rows[key] = {**names, **worst, "fingerprint": compiled_from}
        kernels = {kernel for kernel, _ in self.launches}
        self.launches = {}
        return kernels

    def compile_small(self, cases: list[Case]) -> None:
        first: dict[str, str] = {}  # the first case of each kernel
        for case in cases:
            for dtype_name, dtype in DTYPES.items():

                def wanted(kernel: str, case: Case = case, dtype_name: str = dtype_name) -> Collection[str]:
                    if first.setdefault(kernel, case.name) != case.name:
                        return [MAIN] if (MAIN, dtype_name) == LATER else []
                    return TARGETS if dtype_name in COMMON else [MAIN]

                self.wanted = wanted
                case.run(case.inputs("cpu", dtype), "triton")
                launched = self.finish(f"{case.name}-{dtype_name}")
                if all(first[kernel] != case.name for kernel in launched):
                    break  # nothing of the other types is wanted

    def compile_production(self) -> None:
        self.wanted = lambda kernel: [MAIN]
        for name, call in production.calls().items():
            call("triton")
            self.finish(f"{production.LABEL}{name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    # Nothing is computed here, and what a call does next may depend on results: they are NaN instead of anything.
    torch.use_deterministic_algorithms(True, warn_only=True)
    with_triton = {op for op, impls in table().items() if "triton" in impls}
    compiler = Compiler()
    compiler.compile_small([case for case in CASES if case.op in with_triton])
    compiler.compile_production()
    rows = [row for _, row in sorted(compiler.rows.items())]
    write(out, rows, triton=triton.__version__, kernels=kernel_names())
    fresh = sum(row is not compiler.recorded.get((row["kernel"], row["case"], row["target"])) for row in rows)
    print(f"{len(rows)} rows, {fresh} of them compiled -> {out}")


if __name__ == "__main__":
    main()
