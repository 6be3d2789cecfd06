"""The sizes of a run, and what the cases share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import Contender, Inputs
from rlhf_fast.ops import table


@dataclass(frozen=True)
class Sizes:
    """Tokens N, vocabulary V, hidden D, sequences B, time T, packed steps, and the dtype of hidden states and heads."""

    N: int
    V: int
    D: int
    B: int
    T: int
    packed: int
    dtype: torch.dtype


# What the published figures of this repository are measured at.
CPU = Sizes(N=512, V=49_152, D=576, B=64, T=4096, packed=1 << 15, dtype=torch.float32)
GPU = Sizes(N=8192, V=151_936, D=4096, B=512, T=4096, packed=1 << 20, dtype=torch.bfloat16)

# N, D, V of linear heads at which peers publish their own figures: TRL's issue 7244, Liger's scaled cross-entropy,
# quack's and Liger's H200 comparison, Gemma 2 2B in cut-cross-entropy's README.
PUBLISHED = ((8192, 4096, 151_936), (8192, 4096, 131_072), (4096, 4096, 128_256), (8192, 2304, 256_000))


def published(sizes: Sizes, device: str) -> list[Sizes]:
    """`sizes`, and on a GPU at full size the published shapes beside it."""
    if device == "cpu" or (sizes.N, sizes.D, sizes.V) not in PUBLISHED:
        return [sizes]
    return [replace(sizes, N=n, D=d, V=v) for n, d, v in PUBLISHED]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def backends_of(op: str, device: str) -> list[str]:
    return [name for name in table()[op] if name in {"cpu": ("cpu",), "cuda": ("triton", "cuda")}[device]]


ORACLE_ROWS = 256  # whose float64 logits are there at a time


def by_rows(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs) of (N, ...) inputs and an (N,) result, ORACLE_ROWS at a time, also in the backward pass.

    What a chunk makes on the way is made again for its gradient: the float64 logits of a training batch and what
    autograd keeps of them would take more than a GPU has.
    """
    chunks = zip(*(x.split(ORACLE_ROWS) for x in inputs), strict=True)
    return torch.cat([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks])


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def results(function: Callable[..., Any]) -> Contender:
    """What `function` returns, without gradients."""

    @torch.no_grad()
    def run(inputs: Inputs) -> list[Tensor]:
        return tensors(function(**inputs))

    return run


def with_gradient(function: Callable[..., Tensor], *leaves: str) -> Contender:
    """[the result, the gradient of its sum by each of `leaves`]"""

    def run(inputs: Inputs) -> list[Tensor]:
        inputs = inputs | {leaf: inputs[leaf].detach().requires_grad_() for leaf in leaves}
        found = function(**inputs)
        return [found.detach(), *torch.autograd.grad(found.sum(), [inputs[leaf] for leaf in leaves])]

    return run


def generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def normal(device: str, *shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=dtype)


def planes(sizes: Sizes, device: str, *names: str) -> Inputs:
    """(B, T) normal numbers for each of `names`."""
    return {name: normal(device, sizes.B, sizes.T, seed=seed) for seed, name in enumerate(names)}


def ragged_mask(rows: int, columns: int, device: str) -> Tensor:
    """Rows of random lengths from a quarter to the whole, as bytes."""
    lengths = torch.randint(columns // 4, columns + 1, (rows, 1), generator=generator(device), device=device)
    return (torch.arange(columns, device=device) < lengths).to(torch.uint8)
