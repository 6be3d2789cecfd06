"""Every Triton kernel compiles ahead of time for every GPU of the list, on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "aot.json"
COMMAND = "python -m benchmarks.aot --out benchmarks/results/aot.json"
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("aot") / "aot.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["MALLOC_PERTURB_"] = "255"  # fresh memory is 0: what is compiled must not depend on it
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", "--out", str(out)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_compiled(report, target):
    compiled = {row["kernel"] for row in report["rows"] if row["target"] == target}
    missing = sorted(set(report["kernels"]) - compiled)
    assert missing == [], f"no case of benchmarks/op_cases launches {missing}"


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills_registers(report, target):
    rows = [row for row in report["rows"] if row["target"] == target]
    assert [row for row in rows if row["spills"]] == []


def test_the_record_holds_every_kernel_case_and_target(report):
    def keys(of):
        return {(row["kernel"], row["case"], row["target"]) for row in of["rows"]}

    assert keys(json.loads(RECORD.read_text())) == keys(report), f"regenerate the record: {COMMAND}"
