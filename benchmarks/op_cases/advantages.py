"""Advantages and rewards."""

from __future__ import annotations

import torch

from benchmarks.op_cases.case import B, Case, T, mask, plane

CASES = [
    Case("gae", lambda: {"rewards": plane(), "values": plane(), "mask": mask(), "bootstrap": torch.randn(B)}),
    Case(
        "gae",
        lambda: {
            "rewards": plane().flatten(),
            "values": plane().flatten(),
            "cu_seqlens": torch.tensor([0, 1, T + 9, B * T]),
        },
        {"gamma": 0.99},
    ),
    Case("discounted_returns", lambda: {"rewards": plane(), "mask": mask()}, {"gamma": 0.9}),
    Case(
        "shaped_rewards",
        lambda: {"scores": torch.randn(B), "kl": plane(), "mask": mask()},
        {"kl_coef": 0.1, "clip": 1.0},
    ),
    Case("whiten", lambda: {"x": plane(), "mask": mask()}),
    Case("whiten", lambda: {"x": plane()}, {"shift_mean": False}),
    *(
        Case("group_advantages", lambda: {"rewards": torch.randn(12)}, {"group_size": 4, "kind": kind})
        for kind in ("grpo", "dr_grpo", "rloo")
    ),
    Case("group_advantages", lambda: {"rewards": torch.randn(12), "group_ids": torch.arange(12) % 5}),
]
