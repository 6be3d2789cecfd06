"""What ptxas says of the CUDA kernels: no register spills, for every architecture that a wheel holds.

What the record holds with the fingerprint of today's sources and compiler is not compiled again.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest

from benchmarks.ptxas import ARCHITECTURES, CSRC, FMAD, fingerprint, release, report, sources

RECORD = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "ptxas.json").read_text())
COMMAND = "python -m benchmarks.ptxas --out benchmarks/results/ptxas.json"


def architectures():
    """One in every run, the others where time is no matter."""
    return [pytest.param(a, marks=[] if a == "sm_90a" else [pytest.mark.slow]) for a in ARCHITECTURES]


@cache
def of(source, architecture):
    """(rows, what else is known of the source), from the record or compiled once."""
    nvcc = release()
    recorded = recorded_of(source, architecture)
    if recorded and recorded[1]["fingerprint"] == fingerprint(source, architecture, nvcc or RECORD["nvcc"]):
        return recorded
    if not nvcc:
        pytest.skip("changed since the record, and there is no nvcc")
    return report(source, architecture, nvcc)


def recorded_of(source, architecture):
    whole = [row for row in RECORD["sources"] if (row["source"], row["target"]) == (source.stem, architecture)]
    rows = [
        row for row in RECORD["rows"] if row["target"] == architecture and row["kernel"].startswith(f"{source.stem}.")
    ]
    return (rows, whole[0]) if whole else None


@pytest.mark.parametrize("source", sources(), ids=lambda path: path.name)
@pytest.mark.parametrize("architecture", architectures())
def test_no_cuda_kernel_spills_registers(architecture, source):
    rows, _ = of(source, architecture)
    assert rows
    assert [row for row in rows if row["spills"]] == []
    recorded = {row["kernel"] for row in RECORD["rows"] if row["target"] == architecture}
    assert {row["kernel"] for row in rows} <= recorded, f"regenerate the record: {COMMAND}"


@pytest.mark.parametrize("name", ["token_logprobs", "token_logprobs_cluster"])
def test_the_compiler_chooses_no_rounding_of_kernels_that_must_have_the_same_bits(name):
    """A product or a sum that ptxas may contract has no rounding mode in PTX."""
    _, source = of(CSRC / "cuda" / f"{name}.cu", "sm_90a")
    assert source["contractable"] == 0
    assert source["fma"] > 100  # in the loops, where std::fma asks for it


def test_the_fingerprint_changes_with_a_header_that_is_reached_and_with_the_compiler(monkeypatch):
    source = CSRC / "cuda" / "gae.cu"
    before = fingerprint(source, "sm_90a", "release 13.0")
    assert before != fingerprint(source, "sm_90a", "release 13.1")
    read, header = Path.read_text, CSRC / "math" / "gae.h"
    monkeypatch.setattr(Path, "read_text", lambda path: read(path) + "// changed" * (path == header))
    assert before != fingerprint(source, "sm_90a", "release 13.0")


def test_the_contraction_that_is_tested_is_that_of_the_build():
    text = (CSRC / "CMakeLists.txt").read_text()
    options = re.findall(
        r"set_source_files_properties\(\s*(cuda/[^)]*?) PROPERTIES COMPILE_OPTIONS -fmad=(\w+)\)", text
    )
    assert {Path(name).stem: value for names, value in options for name in names.split()} == FMAD
    assert {path.stem for path in sources()} == set(FMAD)
