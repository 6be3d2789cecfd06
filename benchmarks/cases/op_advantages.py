"""Advantages and rewards: no gradients."""

from __future__ import annotations

import torch
from torch import Tensor

import rlhf_fast
from benchmarks.cases import advantages
from benchmarks.cases.build import Job, cases
from benchmarks.cases.sizes import Sizes, normal, planes, ragged_mask
from benchmarks.harness import Case, Inputs
from benchmarks.peers import GAMMA, LAM

GROUP, KL_COEF = 8, 0.05


def whitened(x: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / (count - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def scans(sizes: Sizes, device: str) -> list[Job]:
    shape, costed = f"B={sizes.B} T={sizes.T} float32", {"N": sizes.B * sizes.T, "s": 4}

    def masked(*names: str) -> Inputs:
        return planes(sizes, device, *names) | {"mask": ragged_mask(sizes.B, sizes.T, device)}

    def whole(rewards: Tensor, values: Tensor) -> list[Tensor]:
        return advantages.eager({"rewards": rewards, "values": values, "mask": torch.ones_like(rewards)})

    def gae_whitened(rewards: Tensor, values: Tensor, mask: Tensor) -> list[Tensor]:
        found, returns = advantages.eager({"rewards": rewards, "values": values, "mask": mask})
        return [whitened(found, mask), returns]

    def ours_whitened(rewards: Tensor, values: Tensor, mask: Tensor, backend: str) -> list[Tensor]:
        found, returns = rlhf_fast.gae(rewards, values, mask=mask, gamma=GAMMA, lam=LAM, backend=backend)
        return [rlhf_fast.whiten(found, mask, backend=backend), returns]

    def reward_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
        found, following = [], torch.zeros_like(rewards[:, 0])
        for t in reversed(range(rewards.shape[1])):
            following = torch.where(mask[:, t] != 0, rewards[:, t] + GAMMA * following, following)
            found.append(following * mask[:, t])
        return torch.stack(found[::-1], 1)

    def vtrace(rewards: Tensor, values: Tensor, logprobs: Tensor, behaviour_logprobs: Tensor) -> list[Tensor]:
        ratio = (logprobs - behaviour_logprobs).exp().clamp(max=1)
        zero = torch.zeros_like(rewards[:, 0])
        found, targets, next_value, next_target = [], [], zero, zero
        for t in reversed(range(rewards.shape[1])):
            rho, reward, value = ratio[:, t], rewards[:, t], values[:, t]
            ahead = next_target - next_value
            found.append(rho * (reward + GAMMA * (next_value + LAM * ahead) - value))
            target = value + rho * (reward + GAMMA * next_value - value) + GAMMA * LAM * rho * ahead
            targets.append(target)
            next_value, next_target = value, target
        return [torch.stack(found[::-1], 1), torch.stack(targets[::-1], 1)]

    return [
        Job(
            "gae", shape, costed, lambda: planes(sizes, device, "rewards", "values"), whole,
            lambda backend, **x: rlhf_fast.gae(**x, gamma=GAMMA, lam=LAM, backend=backend),
            label="no mask", peers="gae", compiles=False,
        ),
        Job(
            "gae + whiten", shape, costed, lambda: masked("rewards", "values"), gae_whitened, ours_whitened,
            peers="gae + whiten", compiles=False,
        ),
        Job(
            "discounted_returns", shape, costed, lambda: masked("rewards"), reward_to_go,
            lambda backend, **x: rlhf_fast.discounted_returns(**x, gamma=GAMMA, backend=backend),
            peers="discounted_returns", compiles=False,
        ),
        Job(
            "vtrace", shape, costed,
            lambda: planes(sizes, device, "rewards", "values", "logprobs", "behaviour_logprobs"), vtrace,
            lambda backend, **x: rlhf_fast.vtrace(**x, gamma=GAMMA, lam=LAM, backend=backend), compiles=False,
        ),
    ]  # fmt: skip


def others(sizes: Sizes, device: str) -> list[Job]:
    shape, costed = f"B={sizes.B} T={sizes.T} float32", {"N": sizes.B * sizes.T, "s": 4}
    prompts = 2 * sizes.B

    def with_mask(name: str) -> Inputs:
        return planes(sizes, device, name) | {"mask": ragged_mask(sizes.B, sizes.T, device)}

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
            "whiten", shape, costed, lambda: with_mask("x"), whitened,
            lambda backend, **x: rlhf_fast.whiten(**x, backend=backend), peers="whiten",
        ),
        Job(
            "shaped_rewards", shape, costed,
            lambda: with_mask("kl") | {"scores": normal(device, sizes.B, seed=1)}, shaped,
            lambda backend, **x: rlhf_fast.shaped_rewards(**x, kl_coef=KL_COEF, clip=1.0, backend=backend),
        ),
        Job(
            "group_advantages", f"{prompts} prompts x {GROUP} float32", {"N": prompts * GROUP, "s": 4}, groups, grouped,
            lambda backend, rewards, group_ids: rlhf_fast.group_advantages(rewards, group_size=GROUP, backend=backend),
            label="grpo", peers="group_advantages",
        ),
    ]  # fmt: skip


def op_cases(sizes: Sizes, device: str) -> list[Case]:
    return [case for job in [*scans(sizes, device), *others(sizes, device)] for case in cases(job, device)]
