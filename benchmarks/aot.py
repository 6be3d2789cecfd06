"""Compiles every Triton kernel ahead of time, without a GPU, and reports registers, spills and shared memory.

    python -m benchmarks.aot --out benchmarks/results/aot_triton3.9.json      with the Triton that is on the path

Runs every case of rlhf_fast/testing/cases, forward and backward, through the real launchers; a launch compiles the
specialisation that it would have run, and runs nothing. The first case that launches a kernel compiles it for every
target and dtype; the later ones, which differ in a variant or an option, for one of each. Then the calls of
benchmarks/production.py, at the shapes of training, for sm_90, with the blocks of a kernel that fit a multiprocessor.
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

from benchmarks import production
from benchmarks.occupancy import blocks_per_sm
from rlhf_fast import backends, kernels
from rlhf_fast.ops import table
from rlhf_fast.testing.cases import CASES, Case

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
        "registers": registers,
        "spills": spills,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }


def cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Compiler:
    """While it is entered, a launch compiles its kernel for the targets that `wanted` names, and runs nothing.

    rows: (kernel, case, target) -> the worst of its specialisations.
    """

    def __init__(self) -> None:
        self.targets = Targets()
        self.rows: dict[tuple[str, str, str], dict[str, int]] = {}
        self.case = ""
        self.wanted: Callable[[str], Collection[str]] = lambda kernel: ()
        driver.set_active(self.targets)
        compiler, run = self, JITFunction.run

        def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            name = f"{self.fn.__module__.rsplit('.', 1)[1]}.{self.fn.__name__}"
            for compiler.targets.device, target in enumerate(TARGETS):
                if target in compiler.wanted(name):
                    compiler.add(name, target, resources(run(self, *args, grid=grid, warmup=True, **kwargs)))

        JITFunction.run = compile_instead
        backends.why_not = lambda *_: None  # the tensors are on the CPU, which Triton would refuse

    def add(self, kernel: str, target: str, row: dict[str, int]) -> None:
        key = (kernel, self.case, target)
        worst = self.rows.get(key, row)
        self.rows[key] = {what: max(row[what], worst[what]) for what in row}

    def compile_small(self, cases: list[Case]) -> None:
        first: dict[str, str] = {}  # the first case of each kernel
        for case in cases:
            for dtype_name, dtype in DTYPES.items():

                def wanted(kernel: str, case: Case = case, dtype_name: str = dtype_name) -> Collection[str]:
                    if first.setdefault(kernel, case.name) != case.name:
                        return [MAIN] if (MAIN, dtype_name) == LATER else []
                    return TARGETS if dtype_name in COMMON else [MAIN]

                self.case, self.wanted = f"{case.name}-{dtype_name}", wanted
                case.run(case.inputs("cpu", dtype), "triton")

    def compile_production(self) -> None:
        for name, call in production.calls().items():
            self.case, self.wanted = f"{production.LABEL}{name}", lambda kernel: [MAIN]
            call("triton")

    def report(self) -> list[dict[str, Any]]:
        found = []
        for (kernel, case, target), row in sorted(self.rows.items()):
            blocks = {"blocks": blocks_per_sm(row["registers"], row["warps"], row["shared"])} if target == MAIN else {}
            found.append({"kernel": kernel, "case": case, "target": target, **row, **blocks})
        return found


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
    rows = compiler.report()
    head = json.dumps({"triton": triton.__version__, "kernels": kernel_names()})
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    out.write_text(f'{head[:-1]},\n "rows": [\n  {lines}\n]}}\n')
    print(f"{len(rows)} rows -> {out}")


if __name__ == "__main__":
    main()
