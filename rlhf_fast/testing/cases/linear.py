"""Log-probabilities from hidden states: head frozen or trained, its transform, its LoRA, several targets per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.testing.cases.case import B, Case, D, T, V, ids, mask

R = 4  # rank of the head's LoRA


def drawn() -> dict[str, Tensor]:
    return {"hidden": torch.randn(B, T, D), "weight": torch.randn(V, D) / 8, "targets": ids(B, T)}


def drawn_lora() -> dict[str, Tensor]:
    return drawn() | {"lora_a": torch.randn(R, D) / 8, "lora_b": torch.randn(V, R) / 8, "mask": mask()}


def with_lora(tensors: dict[str, Tensor]) -> dict[str, Any]:
    arguments: dict[str, Any] = dict(tensors)
    arguments["head_lora"] = (arguments.pop("lora_a"), arguments.pop("lora_b"), 2.0)
    return arguments


CASES = [
    Case("linear_logprobs", drawn, {"return_entropy": True}, ("hidden", "weight"), label="trained"),
    Case("linear_logprobs", lambda: drawn() | {"mask": mask()}, {"temperature": 0.7}, ("hidden",), label="frozen"),
    Case("linear_logprobs", drawn_lora, {}, ("hidden", "lora_a", "lora_b"), with_lora, label="head_lora"),
    Case(
        "linear_logprobs",
        lambda: drawn() | {"bias": torch.randn(V), "temperature": torch.rand(B, T) + 0.5, "mask": mask()},
        {"logit_scale": 0.5, "softcap": 3.0, "return_stats": True}, ("hidden", "weight", "bias"),
        label="softcap and temperatures",
    ),
    Case(
        "linear_logprobs", lambda: drawn() | {"targets": ids(B, T, 3), "mask": mask()},
        {"return_entropy": True, "chunk_tokens": 16}, ("hidden",), label="three targets",
    ),
]  # fmt: skip
