"""Where and with what something was measured, as results have it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
THREADING = ("OMP_", "KMP_", "GOMP_", "MKL_")  # a waiting thread that sleeps makes other libraries four times as slow
CODE = ("csrc", "kernels", "rlhf_fast", "benchmarks", ":!benchmarks/results")  # what a time can depend on
CHANGES = ("--porcelain", "--untracked-files=no", "--", *CODE)


def machine(device: str) -> dict[str, Any]:
    """Where and with what this ran."""

    module = "benchmarks" if Path(sys.argv[0]).stem == "__main__" else f"benchmarks.{Path(sys.argv[0]).stem}"
    info = {
        "commit": git("rev-parse", "HEAD") or None,
        "uncommitted_changes": changed if (changed := git("status", *CHANGES)) is None else bool(changed),
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(THREADING)},
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        import triton

        info |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}
    return info


def git(*arguments: str) -> str | None:
    """What git says of this checkout; None where there is no git, or no checkout."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
