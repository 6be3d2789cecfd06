"""Advantages and rewards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.testing.cases.case import B, Case, T, logprobs, mask, plane


def vtrace_tensors() -> dict[str, Tensor]:
    return {"rewards": plane(), "values": plane(), "logprobs": logprobs(), "sampler_logprobs": logprobs()}


def grouped(tensors: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    return tensors() | {"group_ids": torch.arange(12) % 5}


def one_reward() -> dict[str, Tensor]:
    return {"rewards": torch.randn(12)}


# The variants with groups: what they take beside the groups.
GROUPED: list[tuple[str, Callable[[], dict[str, Tensor]], dict[str, Any]]] = [
    ("grpo", one_reward, {}),
    ("dr_grpo", one_reward, {}),
    ("rloo", one_reward, {}),
    ("opo", lambda: one_reward() | {"lengths": torch.randint(1, 40, (12,))}, {}),
    ("pass_at_k", one_reward, {"k": 2}),
    ("reinforce_baseline", one_reward, {}),
    ("gdpo", lambda: {"rewards": torch.randn(12, 3)}, {}),
]

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
    Case(
        "gae",
        lambda: {"rewards": plane(), "values": plane(), "mask": mask(), "lam": torch.rand(B)},
        {"value_lam": 1.0},
        label="lam by sequence, value_lam 1",
    ),
    Case("vtrace", lambda: vtrace_tensors() | {"mask": mask(), "bootstrap": torch.randn(B)}, {"lam": 0.9}),
    Case(
        "vtrace",
        lambda: (
            {name: x.flatten() for name, x in vtrace_tensors().items()}
            | {"cu_seqlens": torch.tensor([0, 1, T + 9, B * T])}
        ),
        {"rho_clip": None, "c_clip": None},
        label="packed without clips",
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
        Case("group_advantages", partial(grouped, tensors), {"variant": variant, **options})
        for variant, tensors, options in GROUPED
    ),
    Case("group_advantages", lambda: {"rewards": torch.randn(12)}, {"group_size": 4}, label="by size"),
    Case("group_advantages", lambda: {"rewards": torch.randn(12)}, {"variant": "reinforce_pp"}),
    Case(
        "group_advantages",
        lambda: {"rewards": torch.randn(12), "baseline_rewards": torch.randn(12)},
        {"variant": "remax"},
    ),
]
