"""Sampling."""

from __future__ import annotations

import torch

from rlhf_fast.testing.cases.case import B, Case


def logits() -> dict[str, torch.Tensor]:
    return {"logits": 3 * torch.randn(B * 2, 131)}


CASES = [
    Case("sample_tokens", logits, {"seed": 7}, label="full"),
    Case("sample_tokens", logits, {"seed": 7, "temperature": 0.7, "softcap": 5.0, "top_k": 20}, label="top_k"),
    Case("sample_tokens", logits, {"seed": 7, "step": 3, "top_p": 0.8}, label="top_p"),
    Case("sample_tokens", logits, {"seed": 7, "top_k": 50, "top_p": 0.9, "min_p": 0.05}, label="top_k, top_p, min_p"),
    Case(
        "sample_tokens",
        lambda: logits() | {"temperature": torch.rand(B * 2) + 0.5, "row_ids": torch.arange(B * 2) + 2**33},
        {"seed": 2**40}, label="per row",
    ),
]  # fmt: skip
