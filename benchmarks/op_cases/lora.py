"""Adapters and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.op_cases.case import B, Case, D, T, V, mask, plane


def lora_tensors() -> dict[str, Tensor]:
    adapters = {f"a{i}": torch.randn(rank, D) / 8 for i, rank in enumerate((8, 3))}
    adapters |= {f"b{i}": torch.randn(V, rank) / 4 for i, rank in enumerate((8, 3))}
    return {"x": torch.randn(B, T, D), "weight": torch.randn(V, D) / 8, "bias": torch.randn(V), **adapters}


def lora_arguments(tensors: dict[str, Tensor]) -> dict[str, Any]:
    rest = {name: tensors[name] for name in ("x", "weight", "bias")}
    bank = [(tensors["a0"], tensors["b0"], 2.0), (tensors["a1"], tensors["b1"], 0.5)]
    return rest | {"bank": bank, "segments": [(0, T), (-1, T // 2), (1, T + T // 2)]}


CASES = [
    Case("lora_linear", lora_tensors, grads=("x", "a0", "b0", "a1", "b1"), arguments=lora_arguments),
    Case(
        "value_loss",
        lambda: {"values": plane(), "old_values": plane(), "returns": plane(), "mask": mask()},
        grads=("values",),
    ),
    Case(
        "value_loss",
        lambda: {"values": plane(), "old_values": plane(), "returns": plane(), "mask": mask()},
        {"clip_eps": 0.2},
        ("values",),
    ),
]
