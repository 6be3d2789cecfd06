"""One small call of an op, and the tensors that several families draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import rlhf_fast

B, T, V, D = 3, 8, 1031, 64  # sequences, time, vocabulary (odd: rows are not aligned), hidden


@dataclass(frozen=True)
class Case:
    """One call of an op: `tensors` are drawn on the CPU in float32, `grads` names those that get a gradient.

    `label` names the case beside the op; without one its options do.
    """

    op: str
    tensors: Callable[[], dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)
    grads: tuple[str, ...] = ()
    arguments: Callable[[dict[str, Tensor]], dict[str, Any]] = dict  # from the tensors to the op's arguments
    label: str | None = None

    @property
    def name(self) -> str:
        return "-".join([self.op, *([self.label] if self.label else (str(v) for v in self.options.values()))])

    def inputs(self, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors on `device`, floating ones in `dtype`; the same values for every device and dtype."""
        torch.manual_seed(0)
        drawn = {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in self.tensors().items()}
        return {name: x.requires_grad_(name in self.grads) for name, x in drawn.items()}

    def call(self, inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
        """The tensors of the op's result, in order."""
        return flatten(getattr(rlhf_fast, self.op)(**self.arguments(inputs), **self.options, backend=backend))

    def run(self, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        """Every result by its place, and the gradient of each of `grads` under fixed upstream gradients."""
        results = self.call(inputs, backend)
        values = {f"result {i}": x.detach() for i, x in enumerate(results)}
        through = [x for x in results if x.requires_grad]
        if self.grads:
            upstream = [torch.linspace(0.5, 1.5, x.numel(), device=x.device).to(x.dtype).view(x.shape) for x in through]
            leaves = [inputs[name] for name in self.grads]
            gradients = torch.autograd.grad(through, leaves, upstream)
            values |= {f"gradient of {name}": g for name, g in zip(self.grads, gradients, strict=True)}
        return values


def flatten(results: Any) -> list[Tensor]:
    """The tensors of a result: a tensor, a (named) tuple of results, a dict of them, or None for none."""
    if results is None:
        return []
    if isinstance(results, Tensor):
        return [results]
    if isinstance(results, dict):
        return [x for name in sorted(results) for x in flatten(results[name])]
    return [x for part in results for x in flatten(part)]


def drawn(draw: Callable[[], Tensor], *names: str) -> dict[str, Tensor]:
    return {name: draw() for name in names}


def plane() -> Tensor:
    return torch.randn(B, T)


def logprobs() -> Tensor:
    return -torch.rand(B, T) - 0.01


def mask() -> Tensor:
    return torch.rand(B, T) < 0.8


def ids(*shape: int) -> Tensor:
    return torch.randint(V, shape)


def on_policy(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of a policy loss of samples that are the policy's own: no old log-probabilities."""
    return {**tensors, "old_logprobs": None}
