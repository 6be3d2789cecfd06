"""Log-probabilities from hidden states."""

from __future__ import annotations

import torch

from benchmarks.op_cases.case import B, Case, D, T, V, ids, mask

CASES = [
    Case(
        "linear_logprobs",
        lambda: {"hidden": torch.randn(B, T, D), "weight": torch.randn(V, D) / 8, "targets": ids(B, T)},
        {"return_entropy": True},
        ("hidden", "weight"),
    ),
    Case(
        "linear_logprobs",
        lambda: {"hidden": torch.randn(B, T, D), "weight": torch.randn(V, D) / 8, "targets": ids(B, T), "mask": mask()},
        {"temperature": 0.7},
        ("hidden",),
    ),
]
