"""Advantages and rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.testing.cases.case import B, Case, T, drawn, logprobs, mask, plane


def vtrace_tensors() -> dict[str, Tensor]:
    return {"rewards": plane(), "values": plane(), "logprobs": logprobs(), "sampler_logprobs": logprobs()}


def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    bounds = torch.tensor([0, 1, T + 9, B * T])
    return {name: x.flatten() for name, x in tensors.items()} | {"cu_seqlens": bounds}


def one_reward() -> dict[str, Tensor]:
    return {"rewards": torch.randn(12)}


def grouped(variant: str, tensors: Callable[[], dict[str, Tensor]] = one_reward, **options: Any) -> Case:
    """A variant with groups, and what it takes beside them."""
    ids = {"group_ids": torch.arange(12) % 5}
    return Case("group_advantages", lambda: tensors() | ids, {"variant": variant, **options})


CASES = [
    Case("gae", lambda: drawn(plane, "rewards", "values") | {"mask": mask(), "bootstrap": torch.randn(B)}),
    Case("gae", lambda: packed(drawn(plane, "rewards", "values")), {"gamma": 0.99}),
    Case(
        "gae", lambda: drawn(plane, "rewards", "values") | {"mask": mask(), "lam": torch.rand(B)}, {"value_lam": 1.0},
        label="lam by sequence, value_lam 1",
    ),
    Case("vtrace", lambda: vtrace_tensors() | {"mask": mask(), "bootstrap": torch.randn(B)}, {"lam": 0.9}),
    Case(
        "vtrace", lambda: packed(vtrace_tensors()), {"rho_clip": None, "c_clip": None}, label="packed without clips",
    ),
    Case("discounted_returns", lambda: {"rewards": plane(), "mask": mask()}, {"gamma": 0.9}),
    Case(
        "shaped_rewards", lambda: {"scores": torch.randn(B), "kl": plane(), "mask": mask()},
        {"kl_coef": 0.1, "clip": 1.0},
    ),
    Case("whiten", lambda: {"x": plane(), "mask": mask()}),
    Case("whiten", lambda: {"x": plane()}, {"shift_mean": False}),
    *map(grouped, ("grpo", "dr_grpo", "rloo")),
    grouped("opo", lambda: one_reward() | {"lengths": torch.randint(1, 40, (12,))}),
    grouped("pass_at_k", k=2),
    grouped("reinforce_baseline"),
    grouped("gdpo", lambda: {"rewards": torch.randn(12, 3)}),
    Case("group_advantages", one_reward, {"group_size": 4}, label="by size"),
    Case("group_advantages", one_reward, {"variant": "reinforce_pp"}),
    Case("group_advantages", lambda: one_reward() | {"baseline_rewards": torch.randn(12)}, {"variant": "remax"}),
]  # fmt: skip
