"""Log-probabilities from logits."""

from __future__ import annotations

import torch

from benchmarks.op_cases.case import B, Case, T, V, ids, mask

CASES = [
    Case("token_logprobs", lambda: {"logits": torch.randn(B, T, V), "targets": ids(B, T)}, grads=("logits",)),
    Case(
        "token_logprobs",
        lambda: {"logits": torch.randn(B, T, V), "targets": ids(B, T), "mask": mask()},
        {"temperature": 0.7, "return_entropy": True},
        ("logits",),
    ),
]
