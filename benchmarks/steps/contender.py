"""python -m benchmarks.steps.contender WORKSPACE NAME: one contender in a process of its own, JSON last.

--steps: only the first so many of the setting's. --profile counts the bytes of tensors over two steps instead of the
time, which the profiler would falsify.
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.memory import unique_bytes
from benchmarks.steps.recorder import Recorder
from benchmarks.steps.setting import Workspace
from rlhf_fast.data.encoding import quiet_libraries
from rlhf_fast.testing.memory import peak_bytes

MODULES = {"rlhf_fast": "benchmarks.steps.ours", "trl": "benchmarks.steps.with_trl"}


def measure(workspace: Workspace, name: str, *, profile: bool) -> dict[str, Any]:
    """Seconds by stage and loss of every step; bytes of the tensors that stay, resident and at the peak."""
    setting = workspace.setting
    module = import_module(MODULES[name])
    quiet_libraries()
    recorder = Recorder(setting.steps, setting.seed)
    train, tensors = module.prepare(workspace, recorder)
    if profile:
        return {"version": version(name), "tensor_peak_bytes": peak_bytes(train)}
    train()
    return {
        "version": version(name), "seconds": recorder.seconds, "losses": recorder.losses, "rewards": recorder.rewards,
        "grad_norms": recorder.grad_norms, "finished": recorder.finished,
        "held_bytes": unique_bytes(tensors()), "resident_bytes": 1024 * recorder.resident,
        "peak_bytes": 1024 * recorder.peak,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("name", choices=MODULES)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    workspace = Workspace(options.workspace, steps=2 if options.profile else options.steps)
    print(json.dumps(measure(workspace, options.name, profile=options.profile)))


if __name__ == "__main__":
    main()
