"""Runs the contenders in turn, each in a process of its own, and writes what they took as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.steps.contender import MODULES
from benchmarks.steps.setting import Setting, build
from rlhf_fast.data.encoding import quiet_libraries

ROOT = Path(__file__).parents[2]


def write(setting: Setting, repeats: int, trl112: Path, out: Path) -> None:
    """Measure and write `out`; a line for each process that ended."""
    results = measure(setting, repeats, trl112)
    results["machine"]["command"] = " ".join(["python -m benchmarks.steps", *sys.argv[1:]])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"-> {out}")


def measure(setting: Setting, repeats: int, trl112: Path) -> dict[str, Any]:
    """All repeats of all contenders, interleaved, then one run of each under the profiler for the bytes of tensors."""
    if setting.steps < 2 or repeats < 1:
        raise ValueError(f"needs 2 steps, of which the first is not timed, and 1 repeat: {setting.steps}, {repeats}")
    quiet_libraries()
    absent = {}
    reason = why_no_trl(setting.algorithm, trl112)
    if reason:
        absent["trl"] = reason
        print(f"trl: {reason}", flush=True)
    contenders: dict[str, Any] = {name: {"repeats": []} for name in MODULES if name not in absent}
    with tempfile.TemporaryDirectory() as folder:
        workspace = build(Path(folder), setting)
        for repeat in range(repeats):
            for name, row in contenders.items():
                row["repeats"].append(run(workspace.folder, name, setting.algorithm, trl112))
                seconds = sum(sum(step.values()) for step in row["repeats"][-1]["seconds"])
                print(f"{name}, repeat {repeat}: {setting.steps} steps in {seconds:.2f} s", flush=True)
        for name, row in contenders.items():
            row |= run(workspace.folder, name, setting.algorithm, trl112, "--profile")
    names = ("transformers", "peft", "accelerate")
    return {
        "machine": machine("cpu"), "versions": {name: version(name) for name in names}, "setting": asdict(setting),
        "contenders": contenders, "absent": absent,
    }  # fmt: skip


def why_no_trl(algorithm: str, trl112: Path) -> str | None:
    """None where the trainer of this algorithm can be imported."""
    if algorithm == "ppo":
        command = f"pip install --no-deps --target {trl112} trl==1.12.0"
        return None if (trl112 / "trl").is_dir() else f"TRL 1.12 is not there: {command}"
    return None if find_spec("trl") else "TRL is not there: pip install trl==1.16.0"


def run(workspace: Path, name: str, algorithm: str, trl112: Path, *flags: str) -> dict[str, Any]:
    """What the contender prints last. Raises RuntimeError with the end of its errors."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if name == "trl" and algorithm == "ppo":
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(trl112), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks.steps.contender", str(workspace), name, *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
