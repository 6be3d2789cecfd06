"""What is timed: our ops beside the plain PyTorch that they replace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import rlhf_fast
from benchmarks.harness import Case, Contender, Inputs
from rlhf_fast.ops import table
from rlhf_fast.ops.token_logprobs import reference


@dataclass(frozen=True)
class Sizes:
    """Tokens N, vocabulary V, hidden D, sequences B, time T, and the dtype of logits and weights."""

    N: int
    V: int
    D: int
    B: int
    T: int
    dtype: torch.dtype


def eager_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None])[:, 0]


def eager_gae(inputs: Inputs, gamma: float = 0.99, lam: float = 0.95) -> list[Tensor]:
    """The loop over time of the usual trainers."""
    rewards, values = inputs["rewards"], inputs["values"]
    advantages, following, next_value = [], torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * following
        next_value = values[:, t]
        advantages.append(following)
    result = torch.stack(advantages[::-1], 1)
    return [result, result + values]


def backends_of(op: str, device: str) -> list[str]:
    return [name for name in table()[op] if name in {"cpu": ("cpu",), "cuda": ("triton", "cuda")}[device]]


def with_gradient(logprobs: Callable[..., Tensor], leaf: str) -> Contender:
    """[logprobs, gradient of their sum by `leaf`]"""

    def run(inputs: Inputs) -> list[Tensor]:
        inputs = inputs | {leaf: inputs[leaf].detach().requires_grad_()}
        found = logprobs(**inputs)
        (gradient,) = torch.autograd.grad(found.sum(), inputs[leaf])
        return [found.detach(), gradient]

    return run


def token_logprobs_cases(sizes: Sizes, device: str) -> list[Case]:
    def draw() -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        logits = torch.randn(sizes.N, sizes.V, generator=g, device=device, dtype=sizes.dtype)
        return {"logits": logits, "targets": torch.randint(sizes.V, (sizes.N,), generator=g, device=device)}

    def exact(logits: Tensor, targets: Tensor) -> Tensor:
        return reference(logits.double(), targets)[0]

    def first(inputs: Inputs, rows: int) -> Inputs:
        return {"logits": inputs["logits"][:rows].double(), "targets": inputs["targets"][:rows]}

    def ours(backend: str, **options: bool) -> Callable[..., Tensor]:
        return lambda logits, targets: rlhf_fast.token_logprobs(logits, targets, backend=backend, **options)

    names = backends_of("token_logprobs", device)
    forward: dict[str, Contender] = {"eager": lambda x: [eager_logprobs(**x)]}
    forward |= {name: (lambda x, name=name: [ours(name)(**x)]) for name in names}
    both = {"eager": with_gradient(eager_logprobs, "logits")}
    both |= {name: with_gradient(ours(name, inplace_backward=True), "logits") for name in names}
    shape = f"N={sizes.N} V={sizes.V} {str(sizes.dtype).removeprefix('torch.')}"
    return [
        Case("token_logprobs forward", shape, draw, lambda x, rows: [exact(**first(x, rows))], forward),
        Case(
            "token_logprobs forward+backward", shape, draw,
            lambda x, rows: with_gradient(exact, "logits")(first(x, rows)), both,
        ),
    ]  # fmt: skip


def linear_logprobs_case(sizes: Sizes, device: str) -> Case:
    def draw() -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        new = {"generator": g, "device": device, "dtype": sizes.dtype}
        return {
            "hidden": torch.randn(sizes.N, sizes.D, **new),
            "weight": torch.randn(sizes.V, sizes.D, **new) / sizes.D**0.5,
            "targets": torch.randint(sizes.V, (sizes.N,), generator=g, device=device),
        }

    def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return eager_logprobs(hidden @ weight.T, targets)

    def exact(inputs: Inputs, rows: int) -> list[Tensor]:
        def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return reference(hidden @ weight.T, targets)[0]

        first = {"hidden": inputs["hidden"][:rows].double(), "targets": inputs["targets"][:rows]}
        return with_gradient(logprobs, "hidden")(first | {"weight": inputs["weight"].double()})

    contenders = {"eager": with_gradient(eager, "hidden")}
    for name in backends_of("linear_logprobs", device):
        contenders[name] = with_gradient(
            lambda hidden, weight, targets, name=name: rlhf_fast.linear_logprobs(hidden, weight, targets, backend=name),
            "hidden",
        )
    shape = f"N={sizes.N} D={sizes.D} V={sizes.V} {str(sizes.dtype).removeprefix('torch.')}"
    return Case("linear_logprobs frozen, fwd+bwd", shape, draw, exact, contenders)


def gae_case(sizes: Sizes, device: str) -> Case:
    def draw() -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        return {name: torch.randn(sizes.B, sizes.T, generator=g, device=device) for name in ("rewards", "values")}

    contenders: dict[str, Contender] = {"eager": eager_gae}
    for name in backends_of("gae", device):
        contenders[name] = lambda x, name=name: list(rlhf_fast.gae(**x, gamma=0.99, lam=0.95, backend=name))
    return Case(
        "gae", f"B={sizes.B} T={sizes.T} float32", draw,
        lambda x, rows: eager_gae({name: tensor[:rows].double() for name, tensor in x.items()}), contenders,
    )  # fmt: skip


def cases(sizes: Sizes, device: str) -> list[Case]:
    return [*token_logprobs_cases(sizes, device), linear_logprobs_case(sizes, device), gae_case(sizes, device)]
