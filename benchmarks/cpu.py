"""python -m benchmarks.cpu --out out/cpu.json: our C++ kernels beside eager PyTorch, other libraries and bare products.

--case SUBSTRING times only the cases whose name holds it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import peers
from benchmarks.cases import cases
from benchmarks.cases.sizes import CPU
from benchmarks.harness import limits, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--case", default="")
    arguments = parser.parse_args()
    selected = [case for case in cases(CPU, "cpu") if arguments.case in case.name]
    head = {"peers": peers.versions(), "absent": peers.absent(), "limits": limits("cpu")}
    report(selected, "cpu", arguments.repeats, arguments.out, **head)


if __name__ == "__main__":
    main()
