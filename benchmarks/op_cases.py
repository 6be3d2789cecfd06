"""Small inputs for every op: what the GPU tests compare and what the ahead-of-time report compiles.

A new op needs one entry here; tests/test_aot.py and tests/gpu name what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import rlhf_fast

B, T, V, D = 3, 40, 1031, 64  # sequences, time, vocabulary (odd: rows are not aligned), hidden


@dataclass(frozen=True)
class Case:
    """One call of an op: `tensors` are drawn on the CPU in float32, `grads` names those that get a gradient."""

    op: str
    tensors: Callable[[], dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)
    grads: tuple[str, ...] = ()
    arguments: Callable[[dict[str, Tensor]], dict[str, Any]] = dict  # from the tensors to the op's arguments

    @property
    def name(self) -> str:
        return "-".join([self.op, *(str(v) for v in self.options.values())])

    def inputs(self, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors on `device`, floating ones in `dtype`; the same values for every device and dtype."""
        torch.manual_seed(0)
        drawn = {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in self.tensors().items()}
        return {name: x.requires_grad_(name in self.grads) for name, x in drawn.items()}

    def run(self, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        """Every floating result by its place, and the gradient of each of `grads` under fixed upstream gradients."""
        results = flatten(getattr(rlhf_fast, self.op)(**self.arguments(inputs), **self.options, backend=backend))
        found = {f"result {i}": x.detach() for i, x in enumerate(results)}
        through = [x for x in results if x.requires_grad]
        if self.grads:
            upstream = [torch.linspace(0.5, 1.5, x.numel(), device=x.device).to(x.dtype).view(x.shape) for x in through]
            leaves = [inputs[name] for name in self.grads]
            gradients = torch.autograd.grad(through, leaves, upstream)
            found |= {f"gradient of {name}": g for name, g in zip(self.grads, gradients, strict=True)}
        return found


def flatten(results: Any) -> list[Tensor]:
    """The tensors of a result: a tensor, a tuple of them, or (loss, metrics)."""
    if isinstance(results, Tensor):
        return [results]
    if isinstance(results, dict):
        return [x for _, x in sorted(results.items())]
    return [x for part in results for x in flatten(part)]


def plane() -> Tensor:
    return torch.randn(B, T)


def logprobs() -> Tensor:
    return -torch.rand(B, T) - 0.01


def mask() -> Tensor:
    return torch.rand(B, T) < 0.8


def ids(*shape: int) -> Tensor:
    return torch.randint(V, shape)


def pairs() -> Tensor:
    return -10 * torch.rand(B * 2)


def lora_tensors() -> dict[str, Tensor]:
    adapters = {f"a{i}": torch.randn(rank, D) / 8 for i, rank in enumerate((8, 3))}
    adapters |= {f"b{i}": torch.randn(V, rank) / 4 for i, rank in enumerate((8, 3))}
    return {"x": torch.randn(B, T, D), "weight": torch.randn(V, D) / 8, "bias": torch.randn(V), **adapters}


def lora_arguments(tensors: dict[str, Tensor]) -> dict[str, Any]:
    rest = {name: tensors[name] for name in ("x", "weight", "bias")}
    bank = [(tensors["a0"], tensors["b0"], 2.0), (tensors["a1"], tensors["b1"], 0.5)]
    return rest | {"bank": bank, "segments": [(0, T), (-1, T // 2), (1, T + T // 2)]}


CASES = [
    Case("token_logprobs", lambda: {"logits": torch.randn(B, T, V), "targets": ids(B, T)}, grads=("logits",)),
    Case(
        "token_logprobs",
        lambda: {"logits": torch.randn(B, T, V), "targets": ids(B, T), "mask": mask()},
        {"temperature": 0.7, "return_entropy": True},
        ("logits",),
    ),
    Case(
        "linear_logprobs",
        lambda: {"hidden": torch.randn(B, T, D), "weight": torch.randn(V, D) / 8, "targets": ids(B, T)},
        {"return_entropy": True},
        ("hidden", "weight"),
    ),
    Case(
        "linear_logprobs",
        lambda: {"hidden": torch.randn(B, T, D), "weight": torch.randn(V, D) / 8, "targets": ids(B, T), "mask": mask()},
        {"temperature": 0.7},
        ("hidden",),
    ),
    Case("lora_linear", lora_tensors, grads=("x", "a0", "b0", "a1", "b1"), arguments=lora_arguments),
    *(
        Case(
            "kl_estimate", lambda: {"logprobs": logprobs(), "ref_logprobs": logprobs()}, {"estimator": k}, ("logprobs",)
        )
        for k in ("k1", "k2", "k3")
    ),
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
    Case(
        "policy_loss",
        lambda: {"logprobs": logprobs(), "old_logprobs": logprobs(), "advantages": plane(), "mask": mask()},
        {"dual_clip": 3.0},
        ("logprobs",),
    ),
    Case(
        "value_loss",
        lambda: {"values": plane(), "old_values": plane(), "returns": plane(), "mask": mask()},
        grads=("values",),
    ),
    Case(
        "value_loss",
        lambda: {"values": plane(), "old_values": plane(), "returns": plane(), "mask": mask()},
        {"clip_eps": 0.2},
        ("values",),
    ),
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
