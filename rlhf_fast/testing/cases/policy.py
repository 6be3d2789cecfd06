"""Policy losses: every variant with kernels as it stands, and each once with every term around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import PolicyObjective
from rlhf_fast.ops.policy.objective import KERNELS, VARIANTS
from rlhf_fast.testing.cases.case import B, Case, T, logprobs, mask, on_policy, plane

TERMS: dict[str, Any] = {
    "kl_coef": 0.1, "entropy_coef": 0.01, "entropy_fraction": 0.8, "correction_low": 0.5, "correction_high": 1.5,
    "off_policy_max_kl": 0.5, "fixed_length": T, "cov_fraction": 0.2, "cov_low": 0.0,
}  # fmt: skip
LOG_RATIO = 0.2
WITH_KERNELS = [v for v in VARIANTS if PolicyObjective(v, fixed_length=T).kernels == KERNELS]


def near(old: Tensor, scale: float) -> Tensor:
    return (old + scale * torch.randn(B, T)).clamp(max=-1e-3)


def tokens(variant: str) -> dict[str, Tensor]:
    """Losses of the ratio of a whole sequence get one near 1."""
    old = logprobs() - 0.5
    scale = LOG_RATIO / T if variant in ("dro", "vespo") else LOG_RATIO
    return {"logprobs": near(old, scale), "old_logprobs": old, "advantages": plane(), "mask": mask()}


def everything(variant: str) -> dict[str, Tensor]:
    drawn = tokens(variant)
    old = drawn["old_logprobs"]
    others = {"ref_logprobs": near(old, LOG_RATIO), "sampler_logprobs": near(old, LOG_RATIO)}
    return drawn | others | {"entropy": torch.rand(B, T)}


def case(
    label: str, draw: Callable[[str], dict[str, Tensor]], grads: tuple[str, ...], variant: str = "ppo_clip", **of: Any
) -> Case:
    """Of the objective that has the variant and numbers `of`."""
    return Case(
        "policy_loss", partial(draw, variant), {"objective": PolicyObjective(variant, **of)}, grads, label=label
    )


CASES = [
    *(case(v, tokens, ("logprobs",), v, fixed_length=T) for v in WITH_KERNELS),
    *(case(f"{v}-with_every_term", everything, ("logprobs", "entropy"), v, **TERMS) for v in WITH_KERNELS),
    *(
        case(f"{level}_correction", everything, ("logprobs",), correction_level=level, correction_high=1.2)
        for level in ("sequence", "geometric")
    ),
    replace(case("on_policy", everything, ("logprobs", "entropy"), **TERMS), arguments=on_policy),
]
