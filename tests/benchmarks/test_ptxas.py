"""What ptxas says of the CUDA kernels: no register spills, for every architecture that a wheel holds."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.ptxas import ARCHITECTURES, CSRC, FMAD, compiled, sources

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "ptxas.json"
COMMAND = "python -m benchmarks.ptxas --out benchmarks/results/ptxas.json"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def architectures():
    """One in every run, the others where time is no matter."""
    return [pytest.param(a, marks=[] if a == "sm_90a" else [pytest.mark.slow]) for a in ARCHITECTURES]


@pytest.fixture(scope="module")
def of(request):
    """of(source, architecture): (rows, PTX), compiled once."""
    found = {}

    def lookup(source, architecture):
        if (source, architecture) not in found:
            found[source, architecture] = compiled(source, architecture)
        return found[source, architecture]

    return lookup


@needs_nvcc
@pytest.mark.parametrize("source", sources(), ids=lambda path: path.name)
@pytest.mark.parametrize("architecture", architectures())
def test_no_cuda_kernel_spills_registers(of, architecture, source):
    rows, _ = of(source, architecture)
    assert [row for row in rows if row["spills"]] == []
    recorded = {row["kernel"] for row in json.loads(RECORD.read_text())["rows"] if row["target"] == architecture}
    assert {row["kernel"] for row in rows} <= recorded, f"regenerate the record: {COMMAND}"


@needs_nvcc
@pytest.mark.parametrize("name", ["token_logprobs", "token_logprobs_cluster"])
def test_the_compiler_chooses_no_rounding_of_kernels_that_must_have_the_same_bits(of, name):
    """A product or a sum that ptxas may contract has no rounding mode in PTX."""
    _, ptx = of(CSRC / "cuda" / f"{name}.cu", "sm_90a")
    assert re.findall(r"\b(?:mul|add|sub)\.(?:f32|f64)\b.*", ptx) == []
    assert len(re.findall(r"\bfma\.rn\.f32\b", ptx)) > 100  # in the loops, where std::fma asks for it


def test_the_contraction_that_is_tested_is_that_of_the_build():
    text = (CSRC / "CMakeLists.txt").read_text()
    options = re.findall(
        r"set_source_files_properties\(\s*(cuda/[^)]*?) PROPERTIES COMPILE_OPTIONS -fmad=(\w+)\)", text
    )
    assert {Path(name).stem: value for names, value in options for name in names.split()} == FMAD
    assert {path.stem for path in sources()} == set(FMAD)
