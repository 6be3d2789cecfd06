"""python -m benchmarks.cpu --out out/cpu.json: our C++ kernels beside eager PyTorch, other libraries and bare products.

--case SUBSTRING times only the cases whose name holds it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.cases import Sizes, cases
from benchmarks.harness import limits, report

SIZES = Sizes(N=512, V=49_152, D=576, B=64, T=4096, packed=1 << 15, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--case", default="")
    arguments = parser.parse_args()
    selected = [case for case in cases(SIZES, "cpu") if arguments.case in case.name]
    report(selected, "cpu", arguments.repeats, arguments.out, peers=peers.versions(), limits=limits("cpu"))


if __name__ == "__main__":
    main()
