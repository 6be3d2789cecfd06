"""Compiles every CUDA kernel, without a GPU, and reports registers, spills and shared memory.

    python -m benchmarks.ptxas --out benchmarks/results/ptxas.json

The record has a fingerprint for each source and architecture: what it was compiled from, so that tests compile again
only what changed since.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

CSRC = Path(__file__).parents[1] / "csrc"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC}"]  # as csrc/CMakeLists.txt compiles
FMAD = {"gae": "true", "token_logprobs": "false", "token_logprobs_cluster": "false"}  # likewise, by source


def sources() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def release() -> str:
    """The release of nvcc, "" where there is none."""
    if shutil.which("nvcc") is None:
        return ""
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"release [^\n]*", text)[0]


def fingerprint(source: Path, architecture: str, nvcc: str) -> str:
    """Of all that its report depends on: its text and that of our headers that it reaches, compiler and flags."""
    texts = [f"{nvcc} {architecture} {FMAD[source.stem]} {' '.join(FLAGS[:-1])}"]
    files, read = [source], set[Path]()
    while files:
        file = files.pop()
        if file not in read:
            read.add(file)
            text = file.read_text()
            texts.append(text)
            files += [CSRC / name for name in re.findall(r'^#include "([^"]+)"', text, re.MULTILINE)]
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:12]


def report(source: Path, architecture: str, nvcc: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(a row per kernel; the fingerprint, the sums and products that ptxas may contract, the fma that it is given)"""
    rows, ptx = compiled(source, architecture)
    contractable = re.findall(r"\b(?:mul|add|sub)\.(?:f32|f64)\b", ptx)
    fma = re.findall(r"\bfma\.rn\.f32\b", ptx)
    return rows, {
        "source": source.stem, "target": architecture, "fingerprint": fingerprint(source, architecture, nvcc),
        "contractable": len(contractable), "fma": len(fma),
    }  # fmt: skip


def compiled(source: Path, architecture: str) -> tuple[list[dict[str, Any]], str]:
    """(a row per kernel of `source`, from what ptxas says; the PTX of them all)"""
    nvcc = shutil.which("nvcc")
    assert nvcc is not None, "needs nvcc"
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, f"-fmad={FMAD[source.stem]}", f"-arch={architecture}", "-Xptxas=-v", "-cubin"]
        command += ["--keep", f"--keep-dir={folder}", "-o", "/dev/null", str(source)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        ptx = (Path(folder) / f"{source.stem}.ptx").read_text()
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)'.*?"
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    reports = list(pattern.finditer(text))
    assert reports, f"no report from {' '.join(command)}:\n{text}"
    names = demangled([match["name"] for match in reports])
    rows = []
    for name, match in zip(names, reports, strict=True):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        rows.append({
            "kernel": f"{source.stem}.{name}", "target": architecture, "registers": int(match["registers"]),
            "spills": int(match["stores"]) + int(match["loads"]), "shared": int(shared[1]) if shared else 0,
        })  # fmt: skip
    return sorted(rows, key=lambda row: row["kernel"]), ptx


def demangled(symbols: list[str]) -> list[str]:
    """Function names with template arguments, without namespaces (whose anonymous part changes) and parameters."""
    text = subprocess.run(["c++filt", *symbols], capture_output=True, text=True, check=True).stdout
    names = re.sub(r"\(anonymous namespace\)::|\b\w*GLOBAL__N_\w*::|^void ", "", text, flags=re.MULTILINE)
    return [line.split("(")[0].removeprefix("rlhf::cuda::") for line in names.splitlines()]


def write(out: Path, rows: list[dict[str, Any]], **head: Any) -> None:
    """JSON with a line for each row, so that a changed kernel is a changed line."""
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    out.write_text(f'{json.dumps(head)[:-1]},\n "rows": [\n  {lines}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    nvcc = release()
    reports = [report(source, target, nvcc) for source in sources() for target in ARCHITECTURES]
    rows = [row for of_source, _ in reports for row in of_source]
    write(out, rows, nvcc=nvcc, sources=[source for _, source in reports])
    print(f"{len(rows)} rows -> {out}")


if __name__ == "__main__":
    main()
