"""python -m benchmarks.gpu --out out/gpu.json: Triton and CUDA kernels beside eager PyTorch, with the GPU's own limits.

--dry-run lists the cases; --device cpu --tiny goes through the same code with small shapes and the wall clock.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.cases import cases
from benchmarks.cases.sizes import GPU, Sizes
from benchmarks.harness import limits, report

TINY = Sizes(N=24, V=1031, D=32, B=17, T=33, packed=99, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    device, tiny = arguments.device, arguments.tiny
    selected = cases(TINY if tiny else GPU, device)
    if arguments.dry_run:
        for case in selected:
            print(f"{case.name}, {case.shape}: {', '.join(case.everyone)}")
        return
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: PyTorch finds no GPU here")
    measured = limits(device, *((1 << 16, 64) if tiny else (1 << 31, 8192)))
    head = {"peers": peers.versions(), "absent": peers.absent(), "limits": measured}
    report(selected, device, arguments.repeats, arguments.out, **head)


if __name__ == "__main__":
    main()
