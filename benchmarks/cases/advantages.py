"""Advantages and rewards: scans over time, whitening, groups. No gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

import rlhf_fast
from benchmarks.cases.build import Job, both, first_rows, forward
from benchmarks.cases.sizes import Sizes, generator, masked, normal, of_planes, planes
from benchmarks.harness import Bar, Case, Inputs
from benchmarks.peers import GAMMA, LAM

LOOPED = 1 << 15  # steps after which the loop over packed sequences has been timed for long enough
GROUP, KL_COEF = 8, 0.05


def loop(rewards: Tensor, values: Tensor, mask: Tensor) -> list[Tensor]:
    """The loop over time of the usual trainers; steps behind the mask carry value and advantage through."""
    mask = mask.to(rewards.dtype)
    advantages, following, next_value = [], torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        counts = mask[:, t]
        advantage = rewards[:, t] + GAMMA * next_value - values[:, t] + GAMMA * LAM * following
        following = advantage * counts + following * (1 - counts)
        next_value = values[:, t] * counts + next_value * (1 - counts)
        advantages.append(advantage * counts)
    result = torch.stack(advantages[::-1], 1)
    return [result, (result + values) * mask]


def whole(rewards: Tensor, values: Tensor) -> list[Tensor]:
    return loop(rewards, values, torch.ones_like(rewards))


def gae(sizes: Sizes, device: str) -> Job:
    return Job(
        "gae", *of_planes(sizes), lambda: planes(sizes, device, "rewards", "values"), whole,
        partial(rlhf_fast.gae, gamma=GAMMA, lam=LAM), label="no mask", peers="gae", compiles=False,
    )  # fmt: skip


def ragged_gae(sizes: Sizes, device: str) -> Job:
    shape, counted = of_planes(sizes)
    moved = counted["N"] * (4 * 4 + 1)  # rewards, values, two results, mask

    @cache
    def buffers() -> list[Tensor]:
        return [torch.zeros(moved, dtype=torch.uint8, device=device) for _ in range(2)]

    def memcpy(inputs: Inputs) -> list[Tensor]:
        """One copy of as many bytes as gae's inputs and results have together."""
        source, target = buffers()
        return [target.copy_(source)]

    return replace(
        gae(sizes, device), name="gae", shape=f"{shape}, ragged mask", peers="", eager=loop, first=first_rows,
        draw=lambda: masked(sizes, device, "rewards", "values"), floors={"memcpy": memcpy},
        bars=(Bar("cpu", "eager", 200), Bar("cpu", "memcpy", 1 / 3)), group="bars",
    )  # fmt: skip


def packed_gae(sizes: Sizes, device: str) -> Job:
    def draw() -> Inputs:
        count = 2 * sizes.packed // sizes.T
        lengths = torch.randint(1, 2 * sizes.T, (count,), generator=generator(device, 2), device=device)
        ends = lengths.cumsum(0).clamp_max(sizes.packed)
        bounds = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), sizes.packed)])
        steps = {name: normal(device, sizes.packed, seed=seed) for seed, name in enumerate(("rewards", "values"))}
        return steps | {"cu_seqlens": bounds}

    def whole_sequences(inputs: Inputs, steps: int) -> Inputs:
        """The first ones, which together have at least so many steps."""
        last = int((inputs["cu_seqlens"] < min(steps, sizes.packed)).sum())
        bounds = inputs["cu_seqlens"][: last + 1]
        return {name: inputs[name][: bounds[-1]] for name in ("rewards", "values")} | {"cu_seqlens": bounds}

    def by_sequence(rewards: Tensor, values: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
        """Each sequence is a padded batch of one."""
        lengths = [length for length in cu_seqlens.diff().tolist() if length]
        rows = (x[None].split(lengths, 1) for x in (rewards, values))
        sequences = [whole(*row) for row in zip(*rows, strict=True)]
        return [torch.cat([sequence[k][0] for sequence in sequences]) for k in range(2)]

    return replace(
        gae(sizes, device), name="gae packed", shape=f"{sizes.packed} steps float32", sizes={"N": sizes.packed, "s": 4},
        peers="", draw=draw, eager=by_sequence, first=whole_sequences, sampled=LOOPED, group="bars",
    )  # fmt: skip


def bars(sizes: Sizes, device: str) -> list[Case]:
    return [forward(job, device) for job in (ragged_gae(sizes, device), packed_gae(sizes, device))]


def whitened(x: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / (count - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def scans(sizes: Sizes, device: str) -> list[Job]:
    def gae_whitened(rewards: Tensor, values: Tensor, mask: Tensor) -> list[Tensor]:
        advantages, returns = loop(rewards, values, mask)
        return [whitened(advantages, mask), returns]

    def ours_whitened(rewards: Tensor, values: Tensor, mask: Tensor, backend: str) -> list[Tensor]:
        advantages, returns = rlhf_fast.gae(rewards, values, mask=mask, gamma=GAMMA, lam=LAM, backend=backend)
        return [rlhf_fast.whiten(advantages, mask, backend=backend), returns]

    def reward_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
        returns, following = [], torch.zeros_like(rewards[:, 0])
        for t in reversed(range(rewards.shape[1])):
            following = torch.where(mask[:, t] != 0, rewards[:, t] + GAMMA * following, following)
            returns.append(following * mask[:, t])
        return torch.stack(returns[::-1], 1)

    def vtrace(rewards: Tensor, values: Tensor, logprobs: Tensor, sampler_logprobs: Tensor) -> list[Tensor]:
        ratio = (logprobs - sampler_logprobs).exp().clamp(max=1)
        zero = torch.zeros_like(rewards[:, 0])
        advantages, targets, next_value, next_target = [], [], zero, zero
        for t in reversed(range(rewards.shape[1])):
            rho, reward, value = ratio[:, t], rewards[:, t], values[:, t]
            ahead = next_target - next_value
            advantages.append(rho * (reward + GAMMA * (next_value + LAM * ahead) - value))
            target = value + rho * (reward + GAMMA * next_value - value) + GAMMA * LAM * rho * ahead
            targets.append(target)
            next_value, next_target = value, target
        return [torch.stack(advantages[::-1], 1), torch.stack(targets[::-1], 1)]

    return [
        gae(sizes, device),
        Job(
            "gae + whiten", *of_planes(sizes), lambda: masked(sizes, device, "rewards", "values"), gae_whitened,
            ours_whitened, peers="gae + whiten", compiles=False,
        ),
        Job(
            "discounted_returns", *of_planes(sizes), lambda: masked(sizes, device, "rewards"), reward_to_go,
            partial(rlhf_fast.discounted_returns, gamma=GAMMA), peers="discounted_returns", compiles=False,
        ),
        Job(
            "vtrace", *of_planes(sizes),
            lambda: planes(sizes, device, "rewards", "values", "logprobs", "sampler_logprobs"), vtrace,
            partial(rlhf_fast.vtrace, gamma=GAMMA, lam=LAM), compiles=False,
        ),
    ]  # fmt: skip


def others(sizes: Sizes, device: str) -> list[Job]:
    prompts = 2 * sizes.B

    def shaped(scores: Tensor, kl: Tensor, mask: Tensor) -> Tensor:
        last = mask.sum(1, dtype=torch.int64) - 1
        return (-KL_COEF * kl * mask).scatter_add(1, last[:, None], scores.clamp(-1, 1)[:, None])

    def grouped(rewards: Tensor, group_ids: Tensor) -> Tensor:
        rows = rewards.view(-1, GROUP)
        return ((rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-4)).flatten()

    def groups() -> Inputs:
        ids = torch.arange(prompts, device=device).repeat_interleave(GROUP)
        return {"rewards": normal(device, prompts * GROUP, seed=0), "group_ids": ids}

    return [
        Job(
            "whiten", *of_planes(sizes), lambda: masked(sizes, device, "x"), whitened, rlhf_fast.whiten, peers="whiten",
        ),
        Job(
            "shaped_rewards", *of_planes(sizes),
            lambda: masked(sizes, device, "kl") | {"scores": normal(device, sizes.B, seed=1)}, shaped,
            partial(rlhf_fast.shaped_rewards, kl_coef=KL_COEF, clip=1.0),
        ),
        Job(
            "group_advantages", f"{prompts} prompts x {GROUP} float32", {"N": prompts * GROUP, "s": 4}, groups, grouped,
            lambda backend, rewards, group_ids: rlhf_fast.group_advantages(rewards, group_size=GROUP, backend=backend),
            label="grpo", peers="group_advantages",
        ),
    ]  # fmt: skip


def ops(sizes: Sizes, device: str) -> list[Case]:
    return [case for job in [*scans(sizes, device), *others(sizes, device)] for case in both(job, device)]
