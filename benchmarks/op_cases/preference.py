"""Preference and reward losses."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.op_cases.case import B, Case


def pairs() -> Tensor:
    return -10 * torch.rand(B * 2)


CASES = [
    Case(
        "preference_loss",
        lambda: {"chosen": pairs(), "rejected": pairs(), "ref_chosen": pairs(), "ref_rejected": pairs()},
        {"variant": "sigmoid", "label_smoothing": 0.1},
        ("chosen", "rejected"),
    ),
    Case(
        "preference_loss",
        lambda: {
            "chosen": pairs(),
            "rejected": pairs(),
            "ref_chosen": pairs(),
            "ref_rejected": pairs(),
            "chosen_lengths": torch.full((B * 2,), 7),
            "rejected_lengths": torch.full((B * 2,), 5),
        },
        {"variant": "ipo"},
        ("chosen", "rejected"),
    ),
    Case(
        "reward_loss",
        lambda: {"chosen_rewards": torch.randn(B), "rejected_rewards": torch.randn(B)},
        grads=("chosen_rewards", "rejected_rewards"),
    ),
]
