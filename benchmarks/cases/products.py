"""Products of few rows with the matrices of a model, as they are where tokens are generated.

A step of generation reads every matrix of the model once, from memory: a case has as many matrices of one shape as make
TOTAL bytes, beyond any cache, and multiplies the same rows by one after the other. A bare read of the same bytes is the
floor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.cases.build import Job, forward
from benchmarks.cases.sizes import Sizes, normal, short
from benchmarks.harness import Bar, Case, Inputs
from rlhf_fast.ops.lora import lora_linear as lora

TOTAL, TOTAL_OF_FEW = 200 << 20, 1 << 16  # bytes of weights in a case, and in a trial of small sizes
RANK, SCALE = 8, 2.0
SHAPES = ((576, 576), (1536, 576), (49_152, 576))  # (out, in) of SmolLM2-135M: attention, MLP, head
ROWS = (1, 4, 8, 16, 32, 64)
TYPES = (torch.float32, torch.bfloat16)
READING = 16  # rows up to which reading the weights is the floor, and not the FLOPs
SHARE = 0.7  # of the bandwidth of a bare read, at least


def cases(sizes: Sizes, device: str) -> list[Case]:
    """On the CPU, with an adapter and without, beside F.linear (and the shrink and expand of an adapter)."""
    if device != "cpu":
        return []
    small = sizes.V < 49_152
    shapes = [(min(out, sizes.V), min(width, sizes.D)) for out, width in (SHAPES[-1:] if small else SHAPES)]
    return [
        few_rows(rows, out, width, dtype, rank, TOTAL_OF_FEW if small else TOTAL)
        for dtype in TYPES
        for out, width in shapes
        for rank in (0, RANK)
        for rows in ROWS
    ]


def few_rows(rows: int, out: int, width: int, dtype: torch.dtype, rank: int, total: int) -> Case:
    count = max(2, total // (out * width * dtype.itemsize))
    kept: list[tuple[Tensor, list[Callable[..., Tensor]]]] = []  # of one set of matrices

    def draw() -> Inputs:
        shapes = {"x": (rows, width), "weight": (count, out, width), "down": (rank, width), "up": (out, rank)}
        scales = {"x": 1.0, "weight": width**-0.5, "down": width**-0.5, "up": 0.1}
        return {
            name: scales[name] * normal("cpu", *shape, seed=seed, dtype=dtype)
            for seed, (name, shape) in enumerate(shapes.items())
        }

    def eager(x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        products = [linear(x, matrix) for matrix in weight]
        if rank:
            products = [y + SCALE * linear(linear(x, down), up) for y in products]
        return products[0], products[-1]

    def exact(x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return eager(x, weight[:: count - 1], down, up)

    def ours(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        if not kept or kept[0][0] is not weight:  # once for a shape, as in generation
            bank: Any = [(down, up, SCALE)] if rank else []
            segments = [(0 if rank else -1, rows)]
            kept[:] = [(weight, [lora.prepare(x, m, bank, segments, backend, one_pass=True) for m in weight])]
        results = [product(x, matrix, None) for product, matrix in zip(kept[0][1], weight, strict=True)]
        return results[0], results[-1]

    def read(inputs: Inputs) -> list[Tensor]:
        return [inputs["weight"].view(torch.int64).sum()]

    adapter = f" R={rank}" if rank else ""
    job = Job(
        "lora_linear", f"N={rows} D={width} out={out} x {count}{adapter} {short(dtype)}",
        {"N": rows, "D": width, "V": out * count, "R": rank, "s": dtype.itemsize}, draw, eager, ours,
        label="few rows", name="product of few rows", exact=exact, compiles=False, floors={"bare read": read},
        bars=(Bar("cpu", "bare read", SHARE),) if rows <= READING else (), group="products",
    )  # fmt: skip
    return forward(job, "cpu")
