"""Completions that meet others: which pairs they make, how often each wins, and rivals that the policy did not sample.

`rival` says what a completion meets: the other samples of its prompt; one from the mixture of policy and reference; or
the data's own `completion`, which always wins and which nobody needs to judge.

With r the rewards of a prompt's completions, s(x) = 1 / (1 + exp(-x)) and the temperature tau of preferences:

    best_worst   the best with the worst
    margin       the same, where they are at least `margin` apart
    all_above    every two that are at least `margin` apart
    threshold    every two with s((r_i - r_j) / tau) >= threshold

Equal rewards never make a pair.
Sources: threshold: RS-DPO, Khaki et al. 2024 (2402.10038), from memory.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from rlhf_fast.data.encoded import encode_rows
from rlhf_fast.data.encoding import Encoder, Example
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.experience import Experience, collect, rescored
from rlhf_fast.training.job import Job
from rlhf_fast.training.joined import joined
from rlhf_fast.training.on_policy import Rows, micro_batches, net_rewards, one_of_several, paid
from rlhf_fast.training.optim import Loss, accumulate, as_numbers, update
from rlhf_fast.training.setup import prepare_rollouts


def best_worst(gaps: Tensor, **_: float) -> Tensor:
    return F.one_hot(gaps.flatten(1).argmax(1), gaps.shape[1] ** 2).view(gaps.shape).bool()


# gaps (P, K, K), [p, i, j]: by how much completion i of prompt p beats j -> which are pairs; ties are dropped after
PICKS: dict[str, Callable[..., Tensor]] = {
    "best_worst": best_worst,
    "margin": lambda gaps, *, margin, **_: best_worst(gaps) & (gaps >= margin),
    "all_above": lambda gaps, *, margin, **_: gaps >= margin,
    "threshold": lambda gaps, *, threshold, temperature, **_: (gaps / temperature).sigmoid() >= threshold,
}


class DuelConfig(RolloutConfig):
    """Keys of who meets whom; batch_size counts the policy's completions."""

    num_generations: int = Field(2, ge=1, description="completions per prompt; batch_size counts completions")
    rival: Literal["samples", "mixture", "data"] = Field("samples", description="what a completion is compared with")
    mixture_coef: float = Field(0.5, gt=0, le=1, description="the reference's weight in rival: mixture")
    pick: Literal[tuple(PICKS)] = Field("best_worst", description="which of those that meet make a pair")  # type: ignore
    pick_margin: float = Field(0.0, ge=0, description="reward between the two of a pair, of pick margin and all_above")
    pick_threshold: float = Field(0.85, ge=0.5, lt=1, description="chance that the better one wins, of pick threshold")
    preference_temperature: float = Field(1.0, gt=0, description="difference of rewards that makes odds of e")

    @property
    def scores_policy(self) -> bool:
        return True

    @property
    def needs_reward(self) -> bool:
        return self.rival != "data"

    @model_validator(mode="after")
    def _can_mix(self) -> "DuelConfig":
        other = self.engine.kind == "vllm" or self.engine.continuous
        if self.rival == "mixture" and self.mixture_coef < 1 and other:
            raise ValueError(f"rival mixture samples from policy and reference together, which engine "
                             f"{self.engine.kind} cannot: engine local")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _can_meet(self) -> "DuelConfig":
        if self.rival == "samples" and self.num_generations < 2:
            raise ValueError("rival samples compares the completions of a prompt: num_generations is "
                             f"{self.num_generations}, needs 2")  # fmt: skip
        for name in ("sampler_correction", "early_stop_kl", "mask_truncated_completions", "max_resamples"):
            if getattr(self, name):
                raise ValueError(f"{name} is of policy losses, got {getattr(self, name)} for {self.algorithm}")
        return self


def prepare_duels(config: DuelConfig) -> Job:
    job = prepare_rollouts(config)
    if config.rival == "data":
        job.train = job.train.of(encode_rows(job.encoder, job.train.rows, _answer, "answers").rows)
    return job


def _answer(encoder: Encoder, row: Row) -> Example:
    if "completion" not in row.values:
        raise UserError(f"{row.where}: rival data needs the column 'completion'; found: {', '.join(row.values)}")
    return encoder.completion(row)


class Duels(NamedTuple):
    """everyone: the policy's `samples` completions, then the rivals that it did not sample. pairs: (M, 2), rows of
    everyone, the better one first. chances: (samples,), of each to win against what it meets."""

    everyone: Experience
    samples: int
    pairs: Tensor
    chances: Tensor


def duels_of(job: Job, config: DuelConfig, experience: Experience) -> Duels:
    """Who meets whom in an experience, and the outcome; the chances by Bradley-Terry on the rewards."""
    count = len(experience.batch)
    rows, everyone = torch.arange(count), experience
    if config.rival == "data":
        everyone = joined([experience, answers_as_rivals(job, config, experience)], [rows, rows])
        return Duels(everyone, count, torch.stack([rows + count, rows], dim=1), torch.zeros(count))
    rewards = net_rewards(job, config, experience).cpu()
    if config.rival == "mixture":
        rivals = paid(job, collect(job, config, experience.rollout.prompts, mixture=config.mixture_coef))
        everyone = joined([experience, rivals], [rows, rows])
        rows = torch.stack([rows, rows + count], dim=1)
        rewards = torch.stack([rewards, net_rewards(job, config, rivals).cpu()], dim=1)
        chances = ((rewards[:, 0] - rewards[:, 1]) / config.preference_temperature).sigmoid()
    else:
        rows, rewards = (x.view(-1, config.num_generations) for x in (rows, rewards))
        chances = win_rates(rewards, temperature=config.preference_temperature).flatten()
    pairs = pick_pairs(
        rewards, config.pick, margin=config.pick_margin, threshold=config.pick_threshold,
        temperature=config.preference_temperature,
    )  # fmt: skip
    return Duels(everyone, count, rows.flatten()[pairs], chances)


def pick_pairs(rewards: Tensor, pick: str, **numbers: float) -> Tensor:
    """(M, 2) int64 on the CPU: the pairs (better, worse), as numbers of entries of `rewards`, row by row.

    rewards: (P, K), of P prompts' completions. numbers: margin, threshold and temperature, see the module.
    """
    gaps = rewards[:, :, None] - rewards[:, None, :]
    prompt, better, worse = (PICKS[pick](gaps, **numbers) & (gaps > 0)).cpu().nonzero().unbind(1)
    return prompt[:, None] * rewards.shape[1] + torch.stack([better, worse], dim=1)


def win_rates(rewards: Tensor, *, temperature: float) -> Tensor:
    """(P, K): the chance that a completion beats one of its prompt's, itself among them; rewards: (P, K)."""
    return ((rewards[:, :, None] - rewards[:, None, :]) / temperature).sigmoid().mean(2)


def answers_as_rivals(job: Job, config: DuelConfig, experience: Experience) -> Experience:
    """The data's answers to the experience's prompts; their rewards are 0."""
    prompts = experience.rollout.prompts
    answers = [_answer(job.encoder, Row(prompt.where, prompt.columns)) for prompt in prompts]
    rivals = rescored(job, config, experience, prompts, answers)
    return replace(rivals, rewards=torch.zeros_like(experience.rewards))


def learn_units(
    job: Job, config: DuelConfig, experience: Experience, units: Tensor, loss: Loss[Rows]
) -> dict[str, float]:
    """The epochs of minibatches over the units, an update each; metrics averaged over the updates.

    units: (M, 2) pairs of rows of the experience, or (M, 1) single ones. `loss` sees of a micro-batch the first rows of
    all its units, then the second ones.
    """
    history = []

    def minibatch(parts: tuple[Tensor, ...]) -> dict[str, float]:
        rows = micro_batches(job, config, experience, parts, together=units.shape[1], kept=job.kept)
        metrics = accumulate(loss, rows, job.kept)
        return {**as_numbers(metrics), **update(job, config, metrics["loss"])}

    for _ in range(config.ppo_epochs):
        for chosen in torch.randperm(len(units)).chunk(config.num_minibatches):
            size = max(1, (config.micro_batch_size or units.numel()) // units.shape[1])
            parts = tuple(units[part].flatten() for part in chosen.split(size))
            history.append(one_of_several(job, config, experience, partial(minibatch, parts)))
    return {name: sum(metrics[name] for metrics in history) / len(history) for name in history[0]}
