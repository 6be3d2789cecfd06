"""Preference and reward losses that have kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import PreferenceObjective
from rlhf_fast.ops.preference import preference_loss, unpaired_preference_loss
from rlhf_fast.ops.rewards import ranking_loss, step_reward_loss
from rlhf_fast.testing.cases.case import Case, drawn, mask, plane

PAIRS = 6


def pairs() -> Tensor:
    return -10 * torch.rand(PAIRS)


def paired(variant: str) -> dict[str, Tensor]:
    """What `variant` looks at."""
    looks_at = preference_loss.VARIANTS[variant]
    tensors = drawn(pairs, "chosen", "rejected")
    if looks_at.reference:
        tensors |= drawn(pairs, "ref_chosen", "ref_rejected")
    if looks_at.averaged:
        tensors |= {"chosen_lengths": torch.arange(PAIRS) + 3, "rejected_lengths": 9 - torch.arange(PAIRS)}
    if looks_at.advantages:
        tensors |= {"chosen_advantages": torch.randn(PAIRS), "rejected_advantages": torch.randn(PAIRS)}
    return tensors


def with_references(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"ref_chosen": None, "ref_rejected": None, **tensors}


def objective(variant: str) -> PreferenceObjective:
    smoothing = 0.1 if preference_loss.VARIANTS[variant].smooths else 0.0
    return PreferenceObjective(variant, beta=0.3, label_smoothing=smoothing)


def unpaired() -> dict[str, Tensor]:
    answers = {"logprobs": pairs(), "ref_logprobs": pairs(), "desirable": torch.arange(PAIRS) % 3 > 0}
    return answers | {"weights": torch.rand(PAIRS), "kl": torch.rand(()), "reward_shift": torch.rand(())}


def steps() -> dict[str, Tensor]:
    return {"scores": plane(), "labels": torch.rand_like(plane()), "mask": mask()}


def rewards() -> dict[str, Tensor]:
    return {"chosen_rewards": torch.randn(PAIRS), "rejected_rewards": torch.randn(PAIRS)}


def ranked() -> dict[str, Tensor]:
    return {"rewards": torch.randn(12), "ranks": torch.randint(0, 3, (12,))}


CASES = [
    *(
        Case(
            "preference_loss", partial(paired, v), {"objective": objective(v)}, ("chosen", "rejected"),
            with_references, v,
        )
        for v, variant in preference_loss.VARIANTS.items()
        if variant.kernel
    ),
    *(
        Case(
            "preference_loss", lambda: paired("sigmoid"), {"objective": PreferenceObjective(divergence_variant=d)},
            ("chosen", "rejected"), label=d,
        )
        for d in ("forward_kl", "alpha", "js")
    ),
    *(
        Case("unpaired_preference_loss", unpaired, {"objective": v}, ("logprobs",))
        for v, variant in unpaired_preference_loss.VARIANTS.items()
        if variant.kernel
    ),
    Case("reward_loss", rewards, grads=("chosen_rewards", "rejected_rewards")),
    Case(
        "reward_loss", lambda: rewards() | {"margin": torch.rand(PAIRS), "preferences": torch.rand(PAIRS)},
        {"label_smoothing": 0.1, "centring": 0.01},
        ("chosen_rewards", "rejected_rewards"),
    ),
    *(Case("step_reward_loss", steps, {"variant": v}, ("scores",)) for v in step_reward_loss.VARIANTS),
    *(Case("ranking_loss", ranked, {"group_size": 4, "variant": v}, ("rewards",)) for v in ranking_loss.VARIANTS),
    Case("ranking_loss", lambda: ranked() | {"group_ids": torch.arange(12) % 5}, grads=("rewards",), label="group_ids"),
]  # fmt: skip
