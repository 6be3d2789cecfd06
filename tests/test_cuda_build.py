"""What ptxas says of the CUDA kernels: no register spills, for every architecture that a wheel holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.ptxas import ARCHITECTURES, compile_report, sources

RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "ptxas.json"
COMMAND = "python -m benchmarks.ptxas --out benchmarks/results/ptxas.json"

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def architectures():
    """One in every run, the others where time is no matter."""
    return [pytest.param(a, marks=[] if a == "sm_90a" else [pytest.mark.slow]) for a in ARCHITECTURES]


@pytest.mark.parametrize("source", sources(), ids=lambda path: path.name)
@pytest.mark.parametrize("architecture", architectures())
def test_no_cuda_kernel_spills_registers(architecture, source):
    rows = compile_report(source, architecture)
    assert [row for row in rows if row["spills"]] == []
    recorded = {row["kernel"] for row in json.loads(RECORD.read_text())["rows"] if row["target"] == architecture}
    assert {row["kernel"] for row in rows} <= recorded, f"regenerate the record: {COMMAND}"
