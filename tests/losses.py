"""What the tests of every elementwise loss share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import PolicyObjective, PreferenceObjective
from rlhf_fast.ops.policy.objective import FUNCTIONS, VARIANTS
from rlhf_fast.testing.numerics import assert_contract

BACKENDS = ["reference", "cpu", "triton"]
KERNELS = ["cpu", "triton"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# one token, odd, ragged against every block size
SHAPES = [(1, 1), (17, 3), (5, 331)]

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def draw(shape: Sequence[int], count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g).to(dtype) for _ in range(count)]


def ragged(shape: Sequence[int]) -> Tensor:
    """A mask whose row b counts its first (7 b) % T + 1 tokens."""
    return torch.arange(shape[1])[None] < (7 * torch.arange(shape[0]) % shape[1] + 1)[:, None]


# Of policy_loss: every variant on the reference, every function on each of its kernels; presets are data.
_FUNCTIONS = {variant.function: name for name, variant in reversed(VARIANTS.items())}
EVERYWHERE = [(name, "reference") for name in VARIANTS] + [
    (name, backend) for function, name in reversed(_FUNCTIONS.items()) for backend in FUNCTIONS[function].kernels
]


def on_backends(variants: Mapping[str, Any], backends: Sequence[str] = BACKENDS) -> list[tuple[str, str]]:
    """(variant, backend) of preference losses: of each variant "reference", and where it has a kernel the others."""
    return [(v, b) for v, variant in variants.items() for b in backends if b == "reference" or variant.kernel]


def with_objective(kind: type, **options: Any) -> dict[str, Any]:
    """Arguments of a loss, those that belong to its objective as one."""
    numbers = {field.name: options.pop(field.name) for field in dataclasses.fields(kind) if field.name in options}
    return {"objective": kind(**numbers), **options}


of_policy = partial(with_objective, PolicyObjective)
of_preference = partial(with_objective, PreferenceObjective)


def evaluate(loss: Loss, inputs: Sequence[Tensor], trained: int) -> dict[str, Tensor]:
    """The loss, its metrics and the gradients of the first `trained` inputs."""
    leaves = [x.detach().requires_grad_(k < trained) for k, x in enumerate(inputs)]
    value, metrics = loss(*leaves)
    value.backward()
    gradients = {f"gradient {k}": leaves[k].grad for k in range(trained)}
    return {"loss": value.detach(), **metrics, **gradients}


def assert_keeps_contract(loss: Loss, eager: Loss, inputs: Sequence[Tensor], trained: int) -> None:
    """`loss` beside the `eager` that a user would have written, in the same dtype and in fp64."""
    got, plain = evaluate(loss, inputs, trained), evaluate(eager, inputs, trained)
    exact = evaluate(eager, [x.double() for x in inputs], trained)
    for name, value in got.items():
        assert_contract(name, value, plain[name], exact[name].double())
    for k in range(trained):
        assert got[f"gradient {k}"].dtype == inputs[k].dtype


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def compiled(function: Callable) -> Callable:
    """`function` as one whole graph; what earlier tests compiled does not count against the recompile limit."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")
