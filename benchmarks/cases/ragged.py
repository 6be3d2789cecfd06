"""Log-probabilities of which 30 % or 70 % count: 8 sequences of unequal lengths, padded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import rlhf_fast
from benchmarks import peers
from benchmarks.cases.build import Job, case, cases
from benchmarks.cases.linear import draw_tokens, eager_logprobs, exact_logprobs
from benchmarks.cases.sizes import Sizes, normal, short, with_gradient
from benchmarks.harness import Case, Inputs

VALID = (0.3, 0.7)
SEQUENCES = 8


def mask(tokens: int, valid: float, device: str) -> Tensor:
    """(tokens,) bytes: lengths around `valid` of the padded one, evenly spread, the longest first."""
    time = tokens // SEQUENCES
    half_width = min(valid, 1 - valid)
    lengths = time * torch.linspace(valid + half_width, valid - half_width, SEQUENCES, device=device)
    counted = torch.arange(time, device=device) < lengths.round()[:, None]
    return counted.flatten().to(torch.uint8)


def gathered(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` of the rows that count alone, as libraries without masks are called; waits for the GPU."""

    def of_rows(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        rows = mask.bool()
        found = function(hidden[rows], weight, targets[rows])
        return torch.zeros(mask.shape, device=mask.device, dtype=found.dtype).masked_scatter(rows, found)

    return of_rows


def heads(sizes: Sizes, device: str, valid: float) -> list[Case]:
    counted = mask(sizes.N, valid, device)
    masked = {
        name: gathered(function)
        for name, function in ({"eager, gathered": eager_logprobs} | peers.find("linear_logprobs")).items()
    }
    job = Job(
        "linear_logprobs", f"N={sizes.N} D={sizes.D} V={sizes.V} {short(sizes.dtype)}, {valid:.0%} valid",
        {"N": int(counted.sum()), "D": sizes.D, "V": sizes.V, "s": sizes.dtype.itemsize},
        lambda: draw_tokens(sizes, device) | {"mask": mask(sizes.N, valid, device)},
        lambda hidden, weight, targets, mask: eager_logprobs(hidden, weight, targets) * mask,
        lambda backend, **x: rlhf_fast.linear_logprobs(**x, backend=backend), ("hidden",),
        exact=lambda hidden, weight, targets, mask: exact_logprobs(hidden, weight, targets) * mask, group="ragged",
    )  # fmt: skip
    made = []
    for label, leaves, trained in (("frozen", ("hidden",), False), ("trained", ("hidden", "weight"), True)):
        passes = "trained head" if trained else "backward"

        def ready(function: Callable[..., Tensor], leaves: tuple[str, ...] = leaves):
            return with_gradient(function, *leaves)

        of_head = replace(job, label=f"{label} head", leaves=leaves, trained=trained)
        found = case(of_head, device, passes, ready)
        others = found.peers | {name: ready(function) for name, function in masked.items()}
        made.append(replace(found, peers=others))
    return made


def tokens(sizes: Sizes, device: str, valid: float) -> list[Case]:
    counted = mask(sizes.N, valid, device)

    def draw() -> Inputs:
        logits = normal(device, sizes.N, sizes.V, seed=0, dtype=sizes.dtype)
        return {"logits": logits, "targets": draw_ids(sizes, device), "mask": mask(sizes.N, valid, device)}

    def eager(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return wide.log_softmax(-1).gather(-1, targets[:, None])[:, 0] * mask

    job = Job(
        "token_logprobs", f"N={sizes.N} V={sizes.V} {short(sizes.dtype)}, {valid:.0%} valid",
        {"N": int(counted.sum()), "V": sizes.V, "s": sizes.dtype.itemsize}, draw, eager,
        lambda backend, **x: rlhf_fast.token_logprobs(**x, backend=backend), ("logits",), group="ragged",
        head=lambda inputs, rows: {name: x[:rows] for name, x in inputs.items()},
    )  # fmt: skip
    return cases(job, device)


def draw_ids(sizes: Sizes, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randint(sizes.V, (sizes.N,), generator=generator, device=device)


def ragged_cases(sizes: Sizes, device: str) -> list[Case]:
    return [found for valid in VALID for family in (tokens, heads) for found in family(sizes, device, valid)]
