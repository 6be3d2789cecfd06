"""Rejection-sampling fine-tuning: sample n completions of each prompt, keep some, learn them by likelihood, and again.

    keep: best         the best of each prompt
    keep: percentile   the different ones at or above a percentile of their prompt's rewards, and above its lowest; one
                       pass for each of improve_steps percentiles from `percentile` to `last_percentile`
    keep: correct      the different ones that are paid correct_at or more; a prompt that has none is asked once more
                       with `hint`, and what is right then is learnt as the answer to the plain prompt

What is compared are the rewards less kl_coef times the KL. loss = policy_loss(advantages of 1): with `reinforce`, the
mean negative log-probability, and objective.kl_coef as a term. `sample_from: reference` learns the best of n of one
distribution, which is at most log n - (n - 1) / n from it; the best of a policy that moves lead further each step.
Presets. raft: Dong et al. 2023 (2304.06767). rft: the percentiles of trlx, whose last one comes a step short of
last_percentile; keeping what is correct and different is the RFT of Yuan et al. 2023 (2308.01825). star: Zelikman et
al. 2022 (2203.14465) without its restarts from the base model, from memory. best_of_n_distillation: of the two KLs that
Sessa et al. 2024 (BOND, 2407.14622) mix the forward one; reference_ema moves its anchor.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.ops.policy.policy_loss import PolicyObjective
from rlhf_fast.training.best_of_n import KEEPS, best_of, curve, different, kl_bound, powers_of_two
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.experience import Experience, collect, evaluate_policy, separate_randomness
from rlhf_fast.training.hints import HintJob, asked_again, prepare_hints
from rlhf_fast.training.job import Job, save_roles
from rlhf_fast.training.joined import joined
from rlhf_fast.training.on_policy import Rows, experiences, finish_step, improve, net_rewards, policy_term
from rlhf_fast.training.optim import Loss
from rlhf_fast.training.run import Run

LIKELIHOOD = {"variant": "reinforce", "aggregation": "token_mean"}


class AlgorithmConfig(RolloutConfig):
    """Best of n's keys; batch_size counts completions."""

    family = "grpo"

    num_generations: int = Field(8, ge=1, description="completions per prompt; batch_size counts completions")
    objective: PolicyObjective = Field(
        LIKELIHOOD, validate_default=True, description="the loss: its name, or a mapping of its numbers"
    )  # type: ignore[assignment]
    keep: Literal[tuple(KEEPS)] = Field("best", description="which completions are learnt")  # type: ignore
    percentile: float = Field(0.70, ge=0, le=1, description="the first, of keep: percentile")
    last_percentile: float = Field(0.95, ge=0, le=1, description="the last one")
    improve_steps: int = Field(4, ge=1, description="percentiles, each with ppo_epochs passes over what it keeps")
    correct_at: float = Field(1.0, description="least reward of keep: correct")
    sample_from: Literal["policy", "reference"] = Field("policy", description="whose completions are learnt")
    hint: str | None = Field(
        None, description="of keep: correct, a prompt's second form, {prompt} and other columns filled in"
    )

    @model_validator(mode="after")
    def _keeps(self) -> "AlgorithmConfig":
        if self.percentile > self.last_percentile:
            raise ValueError(f"percentile {self.percentile} is above last_percentile {self.last_percentile}")
        if self.hint is not None and self.keep != "correct":
            raise ValueError(f"hint {self.hint!r} is of keep: correct, got {self.keep}")
        return self

    @property
    def scores_policy(self) -> bool:
        return True


def prepare(config: AlgorithmConfig) -> HintJob:
    return prepare_hints(config, config.hint)


def train(job: HintJob, config: AlgorithmConfig, run: Run) -> None:
    """Sample, keep, learn; a step that keeps nothing teaches nothing."""
    sample = partial(collect, mixture=1.0) if config.sample_from == "reference" else collect
    for step, experience in experiences(job, config, run, sample=sample):
        passes = kept(job, config, experience)
        history = [improve(job, config, part, likelihood(config)) for part in passes if len(part.rewards)]
        metrics = {name: sum(one[name] for one in history) / len(history) for name in (history or [{}])[0]}
        counts = torch.tensor([float(len(part.rewards)) for part in passes])
        metrics |= {"kept": float(counts.mean()) / len(experience.rewards)}
        finish_step(job, config, run, step, experience, metrics)
    if not job.counters.get("updates"):
        raise UserError(f"keep {config.keep} kept no completion in {config.steps} steps")


def kept(job: HintJob, config: AlgorithmConfig, experience: Experience) -> list[Experience]:
    """What each pass of a step learns from."""
    rewards = net_rewards(job, config, experience).view(-1, config.num_generations).cpu()
    if config.keep == "percentile":
        steps = torch.linspace(config.percentile, config.last_percentile, config.improve_steps).tolist()
        selections = [KEEPS["percentile"](rewards, percentile=percentile) for percentile in steps]
        return [joined([experience], [different(experience, chosen)]) for chosen in selections]
    chosen = KEEPS[config.keep](rewards, correct_at=config.correct_at)
    parts, rows = [experience], [different(experience, chosen)]
    again = asked_again(job, config, experience, ~chosen.any(1))
    if again is not None:
        parts.append(again)
        rows.append(different(again, again.rewards.view(-1, config.num_generations) >= config.correct_at))
    return [joined(parts, rows)]


def likelihood(config: AlgorithmConfig) -> Loss[Rows]:
    """Every completion counts the same."""

    def loss(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        return policy_term(config, rows, torch.ones(len(rows.indices), device=rows.logprobs.device))

    return loss


def evaluate(job: Job, config: AlgorithmConfig) -> dict[str, Any]:
    """Also what the best of 1, 2, 4 ... samples of a held-out prompt is paid, and how far the best of n may lead."""
    result = evaluate_policy(job, config, job.held_out)
    with separate_randomness(config.seed + 2):
        best = best_of(job, config, job.held_out, config.num_generations)
    sizes = powers_of_two(config.num_generations)
    golds = {"": best.scores} | {f"/{name}": part for name, part in best.parts.items() if len(best.parts) > 1}
    for suffix, gold in golds.items():
        paid = curve(best.scores, gold, sizes).tolist()
        result["metrics"] |= {f"best_of_{n}{suffix}": reward for n, reward in zip(sizes, paid, strict=True)}
    result["metrics"]["kl_bound"] = kl_bound(config.num_generations)
    return result


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The policy at the top of `folder`; the reference beside it where it is an adapter."""
    save_roles(job, folder, "reference")
