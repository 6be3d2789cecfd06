"""python -m benchmarks.cpu --out out/cpu.json: our C++ kernels beside eager PyTorch."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.cases import Sizes, cases
from benchmarks.harness import report

SIZES = Sizes(N=256, V=49_152, D=576, B=64, T=1024, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    report(cases(SIZES, "cpu"), "cpu", arguments.repeats, arguments.out)


if __name__ == "__main__":
    main()
