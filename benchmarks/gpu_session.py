"""What a machine with a GPU is asked, in two commands of at most seven minutes each, the most valuable first.

    make gpu-first OUT=out        build, correctness of every kernel in bfloat16 and float32, then the roofline table
    make gpu-second OUT=out       the other types, the bars beside eager PyTorch, the profiler, the sanitizer

For a machine that has PyTorch with CUDA, nvcc, a compiler, pybind11, cmake, ninja and pytest, and no network: nothing
is fetched. Every phase has its own limit, writes to OUT as it goes, and ends without ending the others; what is left
of the seven minutes bounds them all. OUT/facts.jsonl has a line per phase and per fact, OUT/log.txt what they printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.roofline import Journal

ROOT = Path(__file__).parents[1]
SECONDS = 420
PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-v", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
CORES = os.cpu_count() or 1
WORKERS = ["-n", str(max(2, CORES * 3 // 4))] if importlib.util.find_spec("xdist") else []
HALF_AND_DOUBLE = "(torch.float16 or torch.float64)"
# Of every kind of kernel with barriers or shared memory, one; clusters, packed rows, and rows that are not aligned.
SANITIZED = (
    "torch.bfloat16 and (gae-cuda or vtrace-packed or whiten-triton or linear_logprobs-trained "
    "or token_logprobs-masked or lora_linear-magnitude or policy_loss-gspo-triton or sample_tokens-top_p-triton "
    "or (gradient_in_forward and 151936))"
)
SANITIZER = ["--error-exitcode", "1", "--target-processes", "all"]
SANITIZER += ["--kernel-name-exclude", "regex:at::native", "--kernel-name-exclude", "regex:cutlass"]
OUTCOMES = ("passed", "failed", "error", "skipped")


@dataclass(frozen=True)
class Phase:
    """A command with its limit in seconds. built: it needs the native module. tool: the program that it cannot do
    without. environment: variables beside this process's.
    """

    name: str
    command: list[str]
    seconds: float
    built: bool = False
    tool: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def tests_of(name: str, which: str, seconds: float, built: bool) -> Phase:
    return Phase(name, [*PYTEST, *WORKERS, "-k", which], seconds, built)


def first(out: Path, device: str) -> list[Phase]:
    roofline = [PYTHON, "-m", "benchmarks.roofline", "--device", device, "--out", str(out / "facts.jsonl")]
    return [
        tests_of("Triton tests", f"triton and not {HALF_AND_DOUBLE}", 160, built=False),
        tests_of("CUDA tests", "cuda and not triton", 60, built=True),
        Phase("roofline", [*roofline, "--seconds", "130"], 150, built=True),
    ]


def second(out: Path, device: str) -> list[Phase]:
    bars = [PYTHON, "-m", "benchmarks", "--device", device, "--group", "bars", "--repeats", "5"]
    bars += [] if device == "cuda" else ["--quick"]
    heads = [*bars, "--case", "linear_", *(["--shape", "N=8192 D=4096 V=151936"] if device == "cuda" else [])]
    rows = [*bars, "--case", "token_logprobs"]
    profiled = [PYTHON, "-m", "benchmarks.roofline", "--device", device, "--seconds", "40", "--out"]
    profiler = ["ncu", "--clock-control", "none", "--target-processes", "all", "--launch-count", "24"]
    profiler += ["--kernel-name", "regex:forward_kernel|backward_kernel|cluster_kernel|gae_kernel"]
    sanitized = [*PYTEST[:3], "-q", *PYTEST[4:], "-k", SANITIZED]
    memcheck, racecheck = (["compute-sanitizer", "--tool", tool, *SANITIZER] for tool in ("memcheck", "racecheck"))
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # PyTorch's own allocator hides what is out of bounds
    return [
        tests_of("float16 and float64 tests", f"triton and {HALF_AND_DOUBLE}", 90, built=False),
        Phase("bars of heads", [*heads, "--out", str(out / "heads.json")], 100, True),
        Phase("bars of rows", [*rows, "--out", str(out / "rows.json")], 60, True),
        Phase("profiler", [*profiler, *profiled, str(out / "profiled.jsonl")], 50, True, profiler[0]),
        Phase("memcheck", [*memcheck, *sanitized], 60, True, memcheck[0], uncached),
        Phase("racecheck", [*racecheck, *sanitized], 50, True, racecheck[0], uncached),
    ]


COMMANDS = {"first": first, "second": second}


class Session:
    """Runs phases one after the other while a build goes on beside the first ones."""

    def __init__(self, out: Path, seconds: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.started, self.seconds = time.perf_counter(), seconds
        self.journal = Journal(out / "facts.jsonl")
        self.log, self.build_log = ((out / name).open("ab") for name in ("log.txt", "build.txt"))
        self.build: subprocess.Popen[bytes] | None = None
        self.failed = False

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.started)

    def note(self, name: str, began: float, status: int | str, **more: Any) -> None:
        self.failed |= status not in (0, "left out")
        self.journal.write(phase=name, status=status, seconds=round(time.perf_counter() - began, 1), **more)

    def begin_build(self) -> None:
        """The package is importable at once; its native module is built for this GPU beside what does not need it."""
        began = time.perf_counter()
        environment = {"RLHF_FAST_NATIVE": "0"}
        pip = [PYTHON, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."]
        status, _ = self.command(pip, min(60, self.left), environment)
        self.note("install", began, status)
        native = {"RLHF_FAST_CUDA_ARCHITECTURES": os.environ.get("RLHF_FAST_CUDA_ARCHITECTURES", "90a-real")}
        self.build = spawn([PYTHON, "setup.py", "build_ext", "--inplace"], native, self.build_log)

    def end_build(self) -> None:
        if self.build is not None:
            began, build = time.perf_counter(), self.build
            self.build = None
            self.note("native module", began, finished(build, min(150, self.left)))

    def run(self, phase: Phase) -> None:
        began = time.perf_counter()
        if phase.built:
            self.end_build()
        if phase.tool and shutil.which(phase.tool) is None:
            self.note(phase.name, began, "left out", reason=f"{phase.tool} is not on the path")
            return
        if self.left < 5:
            self.note(phase.name, began, "left out", reason="no time")
            return
        began = time.perf_counter()
        status, printed = self.command(phase.command, min(phase.seconds, self.left), phase.environment)
        self.note(phase.name, began, status, **outcomes(printed))

    def command(self, command: list[str], seconds: float, environment: Mapping[str, str]) -> tuple[int | str, str]:
        """(exit status, or "over its limit"; what it printed, which is in the log as well)"""
        self.log.write(f"\n$ {' '.join(command)}\n".encode())
        self.log.flush()
        start = os.path.getsize(self.log.name)
        status = finished(spawn(command, environment, self.log), seconds)
        with open(self.log.name, "rb") as log:
            log.seek(start)
            return status, log.read().decode(errors="replace")


def spawn(command: list[str], environment: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """In a process group of its own, so that its workers end with it."""
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log, start_new_session=True)


def finished(process: subprocess.Popen[bytes], seconds: float) -> int | str:
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "over its limit"


def outcomes(printed: str) -> dict[str, Any]:
    """How many tests of a verbose run ended how, and which failed, also where the run was cut short."""
    word, test = "(PASSED|FAILED|ERROR|SKIPPED)", r"(\S+::.+?)"
    of_workers = re.findall(rf"^\[gw\d+\] \[ *\d+%\] {word} {test} *$", printed, re.MULTILINE)
    alone = re.findall(rf"^{test} {word}(?: \(.*\))? +\[ *\d+%\]$", printed, re.MULTILINE)
    lines = [*of_workers, *((word, test) for test, word in alone)]
    counts = {name: sum(word.lower() == name for word, _ in lines) for name in OUTCOMES}
    failed = sorted({test for word, test in lines if word in ("FAILED", "ERROR")})
    return {name: count for name, count in counts.items() if count} | ({"which": failed[:40]} if failed else {})


def native_is_there() -> bool:
    return any((ROOT / "rlhf_fast").glob(f"_native*{sysconfig.get_config_var('EXT_SUFFIX')}"))


def main(words: list[str] | None = None) -> int:
    """The exit status: 1 where a phase failed or was cut short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=COMMANDS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a trial, in which tests skip")
    parser.add_argument("--built", action="store_true", help="the package is installed and built")
    parser.add_argument("--dry-run", action="store_true", help="print the phases")
    asked = parser.parse_args(words)
    phases = COMMANDS[asked.which](asked.out.absolute(), asked.device)
    if asked.dry_run:
        for phase in phases:
            print(f"{phase.name}, at most {phase.seconds} s: {' '.join(phase.command)}")
        return 0
    session = Session(asked.out, asked.seconds)
    if not asked.built and not (asked.which == "second" and native_is_there()):
        session.begin_build()
    for phase in phases:
        session.run(phase)
    session.end_build()
    session.journal.write(done=asked.which, seconds=round(asked.seconds - session.left, 1))
    return 1 if session.failed else 0


if __name__ == "__main__":
    sys.exit(main())
