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
# quack's and Liger's H200 comparison, Gemma 2 2B in cut-cross-entropy's README. Second: Llama 2 with three tokens more.
PUBLISHED = (
    (8192, 4096, 151_936), (8192, 4096, 32_003), (8192, 4096, 131_072), (4096, 4096, 128_256), (8192, 2304, 256_000),
)  # fmt: skip


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


def tensors(returned: Any) -> list[Tensor]:
    """What is compared: a tensor, all of several, or the loss that comes with metrics."""
    if isinstance(returned, Tensor):
        return [returned]
    return [returned[0]] if any(isinstance(x, dict) for x in returned) else list(returned)


def results(function: Callable[..., Any]) -> Contender:
    """What `function` returns, without gradients."""

    @torch.no_grad()
    def run(inputs: Inputs) -> list[Tensor]:
        return tensors(function(**inputs))

    return run


def with_gradient(function: Callable[..., Any], *leaves: str) -> Contender:
    """[the result or the loss, the gradient of its sum by each of `leaves`]"""

    def run(inputs: Inputs) -> list[Tensor]:
        inputs = inputs | {leaf: inputs[leaf].detach().requires_grad_() for leaf in leaves}
        (result,) = tensors(function(**inputs))
        return [result.detach(), *torch.autograd.grad(result.sum(), [inputs[leaf] for leaf in leaves])]

    return run


def wide(x: Tensor) -> Tensor:
    """At least float32, as trainers take a softmax."""
    return x if x.dtype == torch.float64 else x.float()


def normal(device: str, *shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(device, seed), device=device, dtype=dtype)


def planes(sizes: Sizes, device: str, *names: str) -> Inputs:
    """(B, T) normal numbers for each of `names`."""
    return {name: normal(device, sizes.B, sizes.T, seed=seed) for seed, name in enumerate(names)}


def masked(sizes: Sizes, device: str, *names: str) -> Inputs:
    return planes(sizes, device, *names) | {"mask": ragged_mask(sizes.B, sizes.T, device)}


def ragged_mask(rows: int, columns: int, device: str) -> Tensor:
    """Rows of random lengths from a quarter to the whole, as bytes."""
    lengths = torch.randint(columns // 4, columns + 1, (rows, 1), generator=generator(device), device=device)
    return (torch.arange(columns, device=device) < lengths).to(torch.uint8)


VALID = (0.3, 0.7)  # the parts of padded batches that count
SEQUENCES = 8


def ragged_rows(tokens: int, valid: float, device: str) -> Tensor:
    """(tokens,) bytes: 8 padded sequences with lengths around `valid` of the longest, evenly spread, that one first."""
    time = tokens // SEQUENCES
    half_width = min(valid, 1 - valid)
    lengths = time * torch.linspace(valid + half_width, valid - half_width, SEQUENCES, device=device)
    counts = torch.arange(time, device=device) < lengths.round()[:, None]
    return counts.flatten().to(torch.uint8)


def ids(sizes: Sizes, device: str) -> Tensor:
    """A target for each of N tokens."""
    return torch.randint(sizes.V, (sizes.N,), generator=generator(device, 1), device=device)


def generator(device: str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def of_planes(sizes: Sizes) -> tuple[str, dict[str, int]]:
    """How (B, T) numbers are named and counted."""
    return f"B={sizes.B} T={sizes.T} float32", {"N": sizes.B * sizes.T, "s": 4}


def of_logits(sizes: Sizes) -> tuple[str, dict[str, int]]:
    return f"N={sizes.N} V={sizes.V} {short(sizes.dtype)}", {"N": sizes.N, "V": sizes.V, "s": sizes.dtype.itemsize}


def of_hidden(sizes: Sizes) -> tuple[str, dict[str, int]]:
    """How hidden states under a head are named and counted."""
    shape = f"N={sizes.N} D={sizes.D} V={sizes.V} {short(sizes.dtype)}"
    return shape, {"N": sizes.N, "D": sizes.D, "V": sizes.V, "s": sizes.dtype.itemsize}
