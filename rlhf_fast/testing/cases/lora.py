"""Adapters and values."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import Adapter
from rlhf_fast.testing.cases.case import B, Case, D, T, V, mask, plane

RANKS = (8, 3, 70)  # the last one is more than a tile of ranks


def lora_tensors(rows: int) -> dict[str, Tensor]:
    adapters = {f"a{i}": torch.randn(rank, D) / 8 for i, rank in enumerate(RANKS)}
    adapters |= {f"b{i}": torch.randn(V, rank) / 4 / rank**0.5 for i, rank in enumerate(RANKS)}
    return {"x": torch.randn(rows, D), "weight": torch.randn(V, D) / 8, "bias": torch.randn(V), **adapters}


def lora_arguments(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The adapters in turn over ragged segments, one of them without an adapter."""
    magnitudes = (None, tensors.get("magnitude"), None)
    bank = [Adapter(tensors[f"a{i}"], tensors[f"b{i}"], 2.0 / (i + 1), m) for i, m in enumerate(magnitudes)]
    part = len(tensors["x"]) // 8
    rest = len(tensors["x"]) - 6 * part
    return {name: tensors[name] for name in ("x", "weight", "bias")} | {
        "bank": bank, "segments": [(0, 4 * part), (-1, part), (1, rest), (2, part)]
    }  # fmt: skip


def old_values() -> dict[str, Tensor]:
    return {"old_values": plane(), "returns": plane(), "mask": mask()}


def linear_values() -> dict[str, Tensor]:
    head = {"hidden": torch.randn(B, T, D), "weight": torch.randn(D) / 8, "bias": torch.randn(1)}
    return head | old_values()


def bin_logits(bins: int) -> dict[str, Tensor]:
    return {"logits": torch.randn(B, T, bins), "returns": plane(), "mask": mask()}


LORA = ("x", *(f"{part}{i}" for part in "ab" for i in range(len(RANKS))))

CASES = [
    Case("lora_linear", lambda: lora_tensors(75), {}, LORA, lora_arguments, "many rows"),
    Case("lora_linear", lambda: lora_tensors(9), {}, (), lora_arguments, "few rows"),
    Case("lora_linear", lambda: lora_tensors(75), {"dropout": 0.3, "seed": 5}, LORA, lora_arguments, "dropout"),
    Case(
        "lora_linear", lambda: lora_tensors(75) | {"magnitude": 1 + torch.rand(V)}, {}, (*LORA, "magnitude"),
        lora_arguments, "magnitude",
    ),
    *(
        Case("value_loss", lambda: {"values": plane(), **old_values()}, options, ("values",))
        for options in ({}, {"clip_eps": 0.2})
    ),
    *(
        Case("linear_value_loss", linear_values, options, ("hidden", "weight", "bias"))
        for options in ({}, {"clip_eps": 0.2})
    ),
    Case(
        "linear_value_loss",
        lambda: {"hidden": torch.randn(B, D), "weight": torch.randn(D), "returns": torch.randn(B)},
        {"old_values": None}, ("hidden",), label="frozen head",
    ),
    *(
        Case(
            "distributional_value_loss", partial(bin_logits, bins), {"v_min": -1.5, "v_max": 2.0}, ("logits",),
            label=f"{bins} bins",
        )
        for bins in (51, 255)
    ),
]  # fmt: skip
