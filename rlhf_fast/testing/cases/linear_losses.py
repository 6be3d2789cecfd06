"""Whole losses from hidden states: one case for each way in which a loss couples its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast import PolicyObjective, PreferenceObjective
from rlhf_fast.testing.cases.case import B, Case, D, T, V, ids, mask, on_policy, plane


def head() -> dict[str, Tensor]:
    return {"weight": torch.randn(V, D) / 8, "bias": torch.randn(V)}


def samples() -> dict[str, Tensor]:
    tensors = {"hidden": torch.randn(B, T, D), **head(), "targets": ids(B, T), "mask": mask()}
    old = -6 - 2 * torch.rand(B, T)  # near those of a random head over V tokens
    return tensors | {"old_logprobs": old, "advantages": plane()}


def pairs() -> dict[str, Tensor]:
    tensors = {"hidden": torch.randn(4, T // 2, D), **head(), "targets": ids(4, T // 2)}
    tensors |= {"mask": torch.rand(4, T // 2) < 0.8}
    return tensors | {name: -100 - 20 * torch.rand(2) for name in ("ref_chosen", "ref_rejected")}


def policy(label: str, grads: tuple[str, ...], objective: PolicyObjective, **options: Any) -> Case:
    return Case("linear_policy_loss", samples, {"objective": objective, **options}, grads, label=label)


def preference(label: str, grads: tuple[str, ...], objective: PreferenceObjective, **options: Any) -> Case:
    return Case("linear_preference_loss", pairs, {"objective": objective, **options}, grads, label=label)


TRAINED = ("hidden", "weight", "bias")

CASES = [
    policy("tokens", TRAINED, PolicyObjective(entropy_coef=0.01), temperature=0.7, chunk_tokens=50),
    policy("sequences", TRAINED, PolicyObjective("gspo", clip_eps_low=0.5, clip_eps_high=0.5)),
    policy("frozen", ("hidden",), PolicyObjective("cispo")),
    *(
        Case(
            "linear_policy_loss", samples, {"objective": PolicyObjective()}, grads, on_policy,
            f"on_policy-{'_'.join(grads)}",
        )
        for grads in (("hidden",), TRAINED)
    ),
    preference("pairs", TRAINED, PreferenceObjective("sigmoid"), softcap=5.0),
    preference("averaged", TRAINED, PreferenceObjective("ipo")),
    preference("batch", TRAINED, PreferenceObjective("aot")),
    preference("frozen", ("hidden",), PreferenceObjective("sigmoid")),
]  # fmt: skip
