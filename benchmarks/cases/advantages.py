"""Advantages by a scan over time."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import rlhf_fast
from benchmarks.cases.sizes import Sizes, backends_of, generator, ragged_mask
from benchmarks.harness import Bar, Case, Contender, Inputs
from benchmarks.peers import GAMMA, LAM

LOOPED = 1 << 15  # steps after which the loop over packed sequences has been timed for long enough


def eager(inputs: Inputs) -> list[Tensor]:
    """The loop over time of the usual trainers; steps behind the mask carry value and advantage through."""
    rewards, values, mask = inputs["rewards"], inputs["values"], inputs["mask"].to(inputs["rewards"].dtype)
    advantages, following, next_value = [], torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        counts = mask[:, t]
        advantage = rewards[:, t] + GAMMA * next_value - values[:, t] + GAMMA * LAM * following
        following = advantage * counts + following * (1 - counts)
        next_value = values[:, t] * counts + next_value * (1 - counts)
        advantages.append(advantage * counts)
    result = torch.stack(advantages[::-1], 1)
    return [result, (result + values) * mask]


def padded(sizes: Sizes, device: str) -> Case:
    def draw() -> Inputs:
        g = generator(device)
        drawn = {name: torch.randn(sizes.B, sizes.T, generator=g, device=device) for name in ("rewards", "values")}
        return drawn | {"mask": ragged_mask(sizes.B, sizes.T, device)}

    def exact(inputs: Inputs, rows: int) -> list[Tensor]:
        return eager({name: x[:rows].double() if x.is_floating_point() else x[:rows] for name, x in inputs.items()})

    contenders: dict[str, Contender] = {"eager": eager}
    for name in backends_of("gae", device):
        contenders[name] = lambda x, name=name: list(rlhf_fast.gae(**x, gamma=GAMMA, lam=LAM, backend=name))
    size = sizes.B * sizes.T * (4 * 4 + 1)  # rewards, values, two results, mask

    @cache
    def buffers() -> list[Tensor]:
        return [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2)]

    def memcpy(inputs: Inputs) -> list[Tensor]:
        """One copy of as many bytes as gae's inputs and results have together."""
        source, target = buffers()
        return [target.copy_(source)]

    return Case(
        "gae", f"B={sizes.B} T={sizes.T} float32, ragged mask", draw, exact, contenders, floors={"memcpy": memcpy},
        bars=(Bar("cpu", "eager", 200), Bar("cpu", "memcpy", 1 / 3)) if device == "cpu" else (),
        op="gae", sizes={"N": sizes.B * sizes.T, "s": 4},
    )  # fmt: skip


def packed(sizes: Sizes, device: str) -> Case:
    def draw() -> Inputs:
        g = generator(device)
        lengths = torch.randint(1, 2 * sizes.T, (2 * sizes.packed // sizes.T,), generator=g, device=device)
        ends = lengths.cumsum(0).clamp_max(sizes.packed)
        bounds = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), sizes.packed)])
        drawn = {name: torch.randn(sizes.packed, generator=g, device=device) for name in ("rewards", "values")}
        return drawn | {"cu_seqlens": bounds}

    def reference(inputs: Inputs, dtype: torch.dtype, steps: int) -> list[Tensor]:
        """Sequence by sequence, each a padded batch of one, until so many steps are done."""
        parts = []
        for start, stop in zip(inputs["cu_seqlens"][:-1].tolist(), inputs["cu_seqlens"][1:].tolist(), strict=True):
            if stop > start and start < steps:
                row = {name: inputs[name][None, start:stop].to(dtype) for name in ("rewards", "values")}
                parts.append(eager(row | {"mask": torch.ones_like(row["rewards"])}))
        return [torch.cat([part[k][0] for part in parts]) for k in range(2)]

    def done(inputs: Inputs) -> float:
        """The share of the steps that eager walks over."""
        ends = inputs["cu_seqlens"]
        return int(ends[ends >= min(LOOPED, sizes.packed)][0]) / sizes.packed

    contenders: dict[str, Contender] = {"eager": lambda x: reference(x, torch.float32, LOOPED)}
    for name in backends_of("gae", device):
        contenders[name] = lambda x, name=name: list(rlhf_fast.gae(**x, gamma=GAMMA, lam=LAM, backend=name))
    return Case(
        "gae packed", f"{sizes.packed} steps float32", draw,
        lambda x, rows: [result[:rows] for result in reference(x, torch.float64, rows)], contenders,
        op="gae", sizes={"N": sizes.packed, "s": 4}, timed_share={"eager": done},
    )  # fmt: skip


def cases(sizes: Sizes, device: str) -> list[Case]:
    return [padded(sizes, device), packed(sizes, device)]
