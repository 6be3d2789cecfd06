"""Our function beside a peer's, on the same inputs: types, shapes, values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.testing.numerics import assert_contract

DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ragged(rows: int, columns: int) -> Tensor:
    """A mask whose row b counts its first (7 b) % columns + 1 tokens."""
    return torch.arange(columns)[None] < (7 * torch.arange(rows) % columns + 1)[:, None]


def evaluate(function: Callable[..., Any], inputs: Sequence[Tensor], trained: int) -> list[Tensor | None]:
    """The results, and the gradients of the first `trained` inputs of a loss that weighs every element."""
    leaves = [x.detach().clone().requires_grad_(k < trained) for k, x in enumerate(inputs)]
    found = function(*leaves)
    results = list(found) if isinstance(found, tuple) else [found]
    with_gradient = [x for x in results if x is not None and x.requires_grad]
    if not trained:
        return results
    upstream = [draw(*x.shape, seed=7 + k).to(x.dtype) for k, x in enumerate(with_gradient)]
    return results + list(torch.autograd.grad(with_gradient, leaves[:trained], upstream))


def assert_parity(
    ours: Callable[..., Any], theirs: Callable[..., Any], inputs: Sequence[Tensor], trained: int = 0
) -> None:
    """`ours` gives what `theirs` gives and keeps the numerics contract beside it; the oracle is `theirs` in float64."""
    got, expected = evaluate(ours, inputs, trained), evaluate(theirs, inputs, trained)
    exact = evaluate(theirs, [x.double() for x in inputs], trained)
    assert [x is None for x in got] == [x is None for x in expected]
    for k, (x, y, oracle) in enumerate(zip(got, expected, exact, strict=True)):
        if x is not None:
            assert (x.dtype, x.shape) == (y.dtype, y.shape), f"result {k}: {x.dtype} {x.shape}, {y.dtype} {y.shape}"
            assert_contract(f"result {k}", x, y, oracle.double())
