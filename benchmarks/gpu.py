"""python -m benchmarks.gpu --out out/gpu.json: Triton and CUDA kernels beside eager PyTorch, with the GPU's own limits.

--dry-run lists the cases; --device cpu --tiny goes through the same code with small shapes and the wall clock.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

from benchmarks.cases import Sizes, cases
from benchmarks.harness import report, timed

SIZES = Sizes(N=4096, V=151_936, D=4096, B=512, T=4096, dtype=torch.bfloat16)
TINY = Sizes(N=24, V=1031, D=32, B=17, T=33, dtype=torch.bfloat16)


def copy_bandwidth(device: str, size: int) -> float:
    """Bytes read and written per second by a device-to-device copy of `size` bytes."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    milliseconds = statistics.median([timed(lambda: target.copy_(source), device) for _ in range(20)][5:])
    return 2 * size / (milliseconds / 1e3)


def matrix_rate(device: str, size: int) -> float:
    """Floating-point operations per second of a bfloat16 product of two square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    milliseconds = statistics.median([timed(lambda: a @ b, device) for _ in range(20)][5:])
    return 2 * size**3 / (milliseconds / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    device, tiny = arguments.device, arguments.tiny
    selected = cases(TINY if tiny else SIZES, device)
    if arguments.dry_run:
        for case in selected:
            print(f"{case.name:34} {case.shape:28} {', '.join(case.contenders)}")
        return
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: PyTorch finds no GPU here")
    limits = {
        "copy_bytes_per_second": copy_bandwidth(device, 1 << (16 if tiny else 31)),
        "bf16_flops_per_second": matrix_rate(device, 64 if tiny else 8192),
    }
    report(selected, device, arguments.repeats, arguments.out, limits=limits)


if __name__ == "__main__":
    main()
