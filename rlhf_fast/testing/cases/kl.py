"""KL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.testing.cases.case import B, Case, D, T, V, drawn, ids, logprobs, mask


def both_logits() -> dict[str, Tensor]:
    logits = 2 * torch.randn(B, T, V)
    return {"logits": logits, "ref_logits": logits + torch.randn(B, T, V), "mask": mask()}


def both_hidden() -> dict[str, Tensor]:
    hidden = torch.randn(B, T, D)
    tensors = {"hidden": hidden, "ref_hidden": hidden + torch.randn(B, T, D) / 4, "weight": torch.randn(V, D) / 4}
    return tensors | {"targets": ids(B, T), "mask": mask()}


def estimate(label: str, *names: str, **options: Any) -> Case:
    """A case of kl_estimate over `names` of log-probabilities."""
    trained = ("logprobs", "ref_logprobs") if names else ("logprobs",)
    return Case(
        "kl_estimate", lambda: drawn(logprobs, "logprobs", "ref_logprobs", *names), options, trained, label=label
    )


TRANSFORM: dict[str, Any] = {"temperature": 0.7, "logit_scale": 1.5, "softcap": 6.0}
DIVERGENCES = ("reverse", "forward", "js")
CASES = [
    *(estimate(k, variant=k) for k in ("k1", "k2", "k3")),
    *(estimate(f"{k}-straight-through", variant=k, gradient="k2") for k in ("k1", "k3")),
    *(estimate(f"{k}-weighted", "old_logprobs", variant=k) for k in ("k1", "k2", "k3")),
    estimate("clipped", "old_logprobs", variant="k3", log_ratio_clip=0.51, value_clip=0.0777, weight_clip=1.26),
    *(
        Case("token_kl", both_logits, {"variant": d, **options}, ("logits",), label=f"{d}{suffix}")
        for d in DIVERGENCES
        for suffix, options in (("", {}), ("-transformed", {**TRANSFORM, "js_weight": 0.2}))
    ),
    *(Case("linear_kl", both_hidden, {"variant": d}, ("hidden",), label=f"{d}-frozen") for d in DIVERGENCES),
    Case(
        "linear_kl", lambda: both_hidden() | {"bias": torch.randn(V), "temperature": 0.5 + torch.rand(B, T)},
        {"variant": "js", "js_weight": 0.3, "return_entropy": True, "logit_scale": 1.5, "softcap": 6.0},
        ("hidden", "weight", "bias"), label="trained",
    ),
    Case("linear_kl", both_hidden, {"variant": "forward", "top_k": 20}, ("hidden",), label="top-k"),
    Case(
        "linear_kl", lambda: both_hidden() | {"ref_weight": torch.randn(V, D) / 4, "ref_bias": torch.randn(V)},
        {"variant": "reverse", "chunk_tokens": 5}, ("hidden", "weight"), label="two-heads",
    ),
]  # fmt: skip
