"""Log-probabilities from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.testing.cases.case import B, Case, T, V, ids, mask


def logits_and_targets(*several: int) -> dict[str, Tensor]:
    return {"logits": torch.randn(B, T, V), "targets": ids(B, T, *several)}


CASES = [
    Case("token_logprobs", logits_and_targets, grads=("logits",)),
    Case(
        "token_logprobs", lambda: logits_and_targets() | {"mask": mask()},
        {"temperature": 0.7, "return_entropy": True}, ("logits",), label="masked, with entropy",
    ),
    Case(
        "token_logprobs", logits_and_targets,
        {"logit_scale": 1.5, "softcap": 2.0, "return_entropy": True, "return_stats": True}, ("logits",),
        label="softcap, with statistics",
    ),
    Case(
        "token_logprobs",
        lambda: logits_and_targets(5) | {"temperature": torch.linspace(0.5, 2.0, B * T).view(B, T)},
        grads=("logits",), label="five targets, a temperature per row",
    ),
]  # fmt: skip
