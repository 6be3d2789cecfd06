"""A small call of every op with every tensor that it takes, and what can be done to one of them.

For tests that try something on every argument of every op: layouts, sizes, NaN, derivatives of every kind.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast import Adapter, PolicyObjective, PreferenceObjective
from rlhf_fast.ops import table
from rlhf_fast.testing.cases.case import Case

OPS = table()
# Sizes are read when tensors are drawn: a test may set one of them to 0.
B, T, V, D, R = 4, 6, 21, 5, 2  # sequences, time, vocabulary, hidden, rank
ANSWERS, REWARDS, PAIRS, BINS, TARGETS = 12, 3, 6, 7, 3
TRANSFORM: dict[str, Any] = {"logit_scale": 1.5, "softcap": 4.0}


def plane(*shape: int) -> Tensor:
    return torch.randn(shape or (B, T))


def logprobs(*shape: int) -> Tensor:
    return -torch.rand(shape or (B, T)) - 0.1


def some(*shape: int) -> Tensor:
    """A mask that counts the first place, and not the last one."""
    mask = torch.rand(shape or (B, T)) < 0.7
    mask.view(-1)[:1], mask.view(-1)[-1:] = True, False
    return mask


def ids(*shape: int) -> Tensor:
    return torch.randint(max(V, 1), shape or (B, T))


def sequences() -> Tensor:
    return torch.tensor([0, 2, 2, T + 3, B * T - 1]).clamp(0, B * T)


def one(value: float) -> Tensor:
    return torch.tensor(value)


def flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tokens as one packed row of the four `sequences`."""
    of_sequences = {"bootstrap": plane(4), "overlong": torch.tensor([False, True, False, False])}
    tensors |= {name: x for name, x in of_sequences.items() if name in tensors}
    return {name: x.flatten(0, 1) if x.dim() > 1 and x.shape[:2] == (B, T) else x for name, x in tensors.items()}


def steps(*names: str) -> dict[str, Tensor]:
    return {name: plane() for name in names} | {"mask": some(), "bootstrap": plane(B)}


def off_policy() -> dict[str, Tensor]:
    return {"logprobs": logprobs(), "sampler_logprobs": logprobs()}


def policy_constants() -> dict[str, Tensor]:
    tensors = {name: logprobs() for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs")}
    tensors |= {"advantages": plane(), "mask": some(), "overlong": torch.arange(B) == 1}
    return tensors | {"denominator": one(17.0), "sequences": one(5.0)}


POLICY: dict[str, Any] = {"aggregation": "seq_mean_token_mean", "kl_coef": 0.1, "entropy_coef": 0.1}


def head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"weight": plane(V, D), "bias": plane(V), "lora_a": plane(R, D), "lora_b": plane(V, R)}


def with_lora(tensors: dict[str, Tensor]) -> dict[str, Any]:
    arguments: dict[str, Any] = dict(tensors)
    arguments["head_lora"] = (arguments.pop("lora_a"), arguments.pop("lora_b"), 0.5)
    return arguments


def scored() -> dict[str, Tensor]:
    """What is made from hidden states to log-probabilities."""
    return head({"hidden": plane(B, T, D), "targets": ids(), "temperature": 0.5 + torch.rand(B, T)})


def pair_constants(pairs: int) -> dict[str, Tensor]:
    tensors = {"weights": torch.rand(pairs), "reward_shift": one(0.2), "denominator": one(3.0)}
    return tensors | {name: plane(pairs) for name in ("chosen_advantages", "rejected_advantages")}


PAIRED = {"bco_pair": 0.5, "hpo": 0.3, "ipo": 0.2}
TRAINED = ("hidden", "weight", "bias", "lora_a", "lora_b")
CRITIC = {"old_values": plane, "returns": plane, "mask": some, "denominator": lambda: one(9.0)}


def drawn(makers: dict[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
    return {name: make() for name, make in makers.items()}


def adapters() -> dict[str, Tensor]:
    tensors = {"x": plane(B, T, D), "weight": plane(V, D), "bias": plane(V), "seed": torch.tensor(5)}
    return tensors | {"a": plane(R, D), "b": plane(V, R), "a2": plane(3, D), "b2": plane(V, 3), "m": torch.rand(V) + 1}


def bank(tensors: dict[str, Tensor]) -> dict[str, Any]:
    entries = [Adapter(tensors["a"], tensors["b"], 0.5), Adapter(tensors["a2"], tensors["b2"], 2.0, tensors["m"])]
    rows = tensors["x"].shape[:-1].numel()
    parts = [(0, rows // 3), (-1, rows // 4), (1, rows - rows // 3 - rows // 4)]
    return {n: tensors[n] for n in ("x", "weight", "bias", "seed")} | {"bank": entries, "segments": parts}


CASES = [
    Case("gae", lambda: steps("rewards", "values") | {"lam": torch.rand(B), "value_lam": torch.rand(B)}, label="rows"),
    Case("gae", lambda: flat(steps("rewards", "values")) | {"cu_seqlens": sequences()}, label="packed"),
    Case("discounted_returns", lambda: steps("rewards"), {"gamma": 0.9}, label="rows"),
    Case("discounted_returns", lambda: flat(steps("rewards")) | {"cu_seqlens": sequences()}, label="packed"),
    Case("vtrace", lambda: steps("rewards", "values") | off_policy(), {"lam": 0.9}, label="rows"),
    Case(
        "vtrace",
        lambda: flat(steps("rewards", "values") | off_policy()) | {"cu_seqlens": sequences()},
        label="packed",
    ),
    Case(
        "shaped_rewards",
        lambda: {"scores": plane(B), "kl": plane(), "mask": some()},
        {"kl_coef": 0.1, "clip": 2.0},
        label="rows",
    ),
    Case("whiten", lambda: {"x": plane(), "mask": some()}, label="masked"),
    Case(
        "group_advantages",
        lambda: {"rewards": plane(ANSWERS), "group_ids": torch.arange(ANSWERS) % 5, "lengths": torch.rand(ANSWERS) + 1},
        {"variant": "opo"},
    ),
    *(
        Case("group_advantages", lambda: {"rewards": plane(ANSWERS)}, {"variant": variant, "group_size": 4, **options})
        for variant, options in {"grpo": {}, "rloo": {}, "pass_at_k": {"k": 2}, "reinforce_baseline": {}}.items()
    ),
    Case("group_advantages", lambda: {"rewards": plane(ANSWERS, REWARDS)}, {"variant": "gdpo", "group_size": 4}),
    Case(
        "group_advantages",
        lambda: {"rewards": plane(ANSWERS, REWARDS), "reward_weights": torch.rand(REWARDS) + 0.5},
        {"variant": "gdpo", "group_size": 4},
        label="weighted",
    ),
    Case("group_advantages", lambda: {"rewards": plane(ANSWERS)}, {"variant": "reinforce_pp"}),
    Case(
        "group_advantages",
        lambda: {"rewards": plane(ANSWERS), "baseline_rewards": plane(ANSWERS)},
        {"variant": "remax"},
    ),
    Case(
        "kl_estimate",
        lambda: {name: logprobs() for name in ("logprobs", "ref_logprobs", "old_logprobs")},
        {"variant": "k3"},
        ("logprobs", "ref_logprobs"),
    ),
    Case(
        "token_kl",
        lambda: {
            "logits": plane(B, T, V), "ref_logits": plane(B, T, V), "mask": some(),
            "temperature": 0.5 + torch.rand(B, T),
        },
        TRANSFORM,
        ("logits",),
        label="rows",
    ),
    Case("token_kl", lambda: {"logits": plane(B, V), "ref_logits": plane(B, V)}, {"variant": "js"}, ("logits",)),
    Case("token_kl", lambda: {"logits": plane(B, V), "ref_logits": plane(B, V)}, {"top_k": 4}, ("logits",)),
    Case(
        "token_logprobs",
        lambda: {
            "logits": plane(B, T, V), "targets": ids(), "mask": some(), "temperature": 0.5 + torch.rand(B, T)
        },
        {**TRANSFORM, "return_entropy": True, "return_stats": True},
        ("logits",),
        label="rows",
    ),
    Case("token_logprobs", lambda: {"logits": plane(B, V), "targets": ids(B, TARGETS)}, {}, ("logits",), label="ids"),
    Case(
        "linear_logprobs",
        lambda: scored() | {"mask": some()},
        {**TRANSFORM, "return_entropy": True, "return_stats": True, "chunk_tokens": 16},
        TRAINED,
        with_lora,
        "trained",
    ),
    Case("linear_logprobs", lambda: scored() | {"mask": some()}, {}, ("hidden",), with_lora, "frozen"),
    Case(
        "linear_kl",
        lambda: {
            "hidden": plane(B, T, D), "ref_hidden": plane(B, T, 3), "weight": plane(V, D), "ref_weight": plane(V, 3),
            "bias": plane(V), "ref_bias": plane(V), "targets": ids(), "mask": some(),
            "temperature": 0.5 + torch.rand(B, T),
        },
        {"return_entropy": True, "chunk_tokens": 16},
        ("hidden", "weight", "bias"),
        label="trained",
    ),
    Case(
        "linear_kl",
        lambda: {"hidden": plane(B, T, D), "ref_hidden": plane(B, T, D), "weight": plane(V, D), "targets": ids()},
        {},
        ("hidden",),
        label="frozen",
    ),
    Case(
        "policy_loss",
        lambda: policy_constants() | {"logprobs": logprobs(), "entropy": torch.rand(B, T)},
        {"objective": PolicyObjective(**POLICY)},
        ("logprobs", "entropy"),
        label="rows",
    ),
    Case(
        "policy_loss",
        lambda: flat(policy_constants() | {"logprobs": logprobs(), "entropy": torch.rand(B, T)})
        | {"cu_seqlens": sequences()},
        {"objective": PolicyObjective("gspo", **POLICY, correction_level="geometric")},
        ("logprobs", "entropy"),
        label="packed",
    ),
    Case(
        "policy_loss",
        lambda: drawn({"advantages": plane, "mask": some, **dict.fromkeys(("logprobs", "old_logprobs"), logprobs)})
        | {"entropy": torch.rand(B, T), "kl": torch.rand(B, T)},
        {"objective": PolicyObjective(**POLICY, kl_variant="exact")},
        ("logprobs", "entropy", "kl"),
        label="exact KL",
    ),
    Case(
        "linear_policy_loss",
        lambda: scored() | policy_constants(),
        {"objective": PolicyObjective(**POLICY), **TRANSFORM, "chunk_tokens": 16},
        TRAINED,
        with_lora,
        "rows",
    ),
    Case(
        "linear_policy_loss",
        lambda: flat(scored() | policy_constants()) | {"cu_seqlens": sequences()},
        {"objective": PolicyObjective("gspo")},
        ("hidden",),
        with_lora,
        "packed and frozen",
    ),
    Case(
        "preference_loss",
        lambda: {name: -5 * torch.rand(PAIRS) for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")}
        | {name: torch.randint(1, 9, (PAIRS,)) for name in ("chosen_lengths", "rejected_lengths")}
        | pair_constants(PAIRS),
        {"objective": PreferenceObjective(PAIRED)},
        ("chosen", "rejected"),
        label="three losses",
    ),
    Case(
        "preference_loss",
        lambda: {name: -5 * torch.rand(PAIRS) for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")},
        {"objective": "aot"},
        ("chosen", "rejected"),
    ),
    Case(
        "linear_preference_loss",
        lambda: scored()
        | {name: -9 * torch.rand(B // 2) for name in ("ref_chosen", "ref_rejected")}
        | pair_constants(B // 2)
        | {"mask": some()},
        {"objective": PreferenceObjective(PAIRED), "return_logprobs": True, **TRANSFORM},
        TRAINED,
        with_lora,
        "rows",
    ),
    Case(
        "linear_preference_loss",
        lambda: flat(
            scored() | {"ref_hidden": plane(B, T, D), "ref_weight": plane(V, D), "ref_bias": plane(V), "mask": some()}
        )
        | {"cu_seqlens": torch.tensor([0, 2, 2, T + 3, B * T]).clamp(max=B * T)},
        {},
        ("hidden",),
        with_lora,
        "packed and frozen",
    ),
    Case(
        "unpaired_preference_loss",
        lambda: {
            "logprobs": -5 * torch.rand(PAIRS), "ref_logprobs": -5 * torch.rand(PAIRS),
            "desirable": torch.arange(PAIRS) % 3 > 0, "weights": torch.rand(PAIRS), "kl": one(0.3),
            "denominator": one(5.0),
        },
        {"objective": "kto"},
        ("logprobs",),
    ),
    Case(
        "unpaired_preference_loss",
        lambda: {
            "logprobs": -5 * torch.rand(PAIRS), "ref_logprobs": -5 * torch.rand(PAIRS),
            "desirable": torch.arange(PAIRS) % 3 > 0, "reward_shift": one(0.1),
        },
        {"objective": "bco"},
        ("logprobs",),
    ),
    Case(
        "reward_loss",
        lambda: {name: plane(PAIRS) for name in ("chosen_rewards", "rejected_rewards", "margin")}
        | {"preferences": torch.rand(PAIRS), "denominator": one(5.0)},
        {"label_smoothing": 0.1, "centring": 0.1},
        ("chosen_rewards", "rejected_rewards"),
        label="pairs",
    ),
    Case(
        "step_reward_loss",
        lambda: {"scores": plane(), "labels": torch.rand(B, T), "mask": some(), "denominator": one(9.0)},
        {},
        ("scores",),
        label="rows",
    ),
    Case(
        "ranking_loss",
        lambda: {
            "rewards": plane(ANSWERS), "ranks": torch.randint(0, 3, (ANSWERS,)), "group_ids": torch.arange(ANSWERS) % 5,
            "denominator": one(5.0),
        },
        {},
        ("rewards",),
        label="ids",
    ),
    *(
        Case(
            "ranking_loss",
            lambda: {"rewards": plane(ANSWERS), "ranks": torch.randint(0, 3, (ANSWERS,))},
            {"variant": variant, "group_size": 4},
            ("rewards",),
        )
        for variant in ("breslow", "pairwise")
    ),
    Case("value_loss", lambda: drawn(CRITIC) | {"values": plane()}, {"clip_eps": 0.2}, ("values",), label="clipped"),
    Case(
        "linear_value_loss",
        lambda: drawn(CRITIC) | {"hidden": plane(B, T, D), "weight": plane(D), "bias": plane(1)},
        {"clip_eps": 0.2},
        ("hidden", "weight", "bias"),
        label="clipped",
    ),
    Case(
        "distributional_value_loss",
        lambda: {"logits": plane(B, T, BINS), "returns": plane(), "mask": some(), "denominator": one(9.0)},
        {"v_min": -1.0, "v_max": 2.0},
        ("logits",),
        label="bins",
    ),
    Case("lora_linear", adapters, {"dropout": 0.2}, ("x", "weight", "bias", *"ab", "a2", "b2", "m"), bank, "trained"),
    Case("lora_linear", adapters, {}, (), lambda tensors: bank(tensors | {"seed": None}), "scored"),
    Case(
        "sample_tokens",
        lambda: {
            "logits": plane(B, V), "row_ids": torch.arange(B), "seed": torch.tensor(3), "step": torch.tensor(2),
            "temperature": 0.5 + torch.rand(B),
        },
        {"top_k": 9, "top_p": 0.9, "min_p": 0.01, **TRANSFORM},
        label="truncated",
    ),
]  # fmt: skip


def missing() -> dict[str, list[str]]:
    """op -> those of its arguments that can be a tensor and that no case gives."""
    lacking_of = {}
    for op in OPS:
        parameters = inspect.signature(getattr(rlhf_fast, op)).parameters.values()
        names = {name for case in CASES if case.op == op for name in case.arguments(case.tensors())}
        lacking = [p.name for p in parameters if "Tensor" in str(p.annotation) and p.name not in names]
        if lacking:
            lacking_of[op] = lacking
    return lacking_of


FIRST = list({case.op: case for case in reversed(CASES)}.values())


def each(*backends: str, of: Callable[[Case], bool] = lambda case: True) -> list[Any]:
    """Every case of `of` with "reference", and with those of `backends` that its op has; slow but an op's first one."""
    return [
        pytest.param(case, backend, id=f"{case.name}-{backend}", marks=() if case in FIRST else pytest.mark.slow)
        for case in CASES
        if of(case)
        for backend in backends
        if backend == "reference" or backend in OPS[case.op]
    ]
