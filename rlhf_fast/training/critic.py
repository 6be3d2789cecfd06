"""The critic: an adapter of its own or a head on the policy's, its values, and the loss that it learns them by."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlhf_fast.models.peft_io import save_adapter
from rlhf_fast.ops.values.distributional_value_loss import distributional_value_loss
from rlhf_fast.ops.values.value_loss import value_loss
from rlhf_fast.rewards import write_stats
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.job import Job
from rlhf_fast.training.on_policy import Rows
from rlhf_fast.training.optim import build_optimizer


class CriticConfig(RolloutConfig):
    """The keys of an algorithm with a critic.

    Sources: critic_warmup_steps, Yuan et al. 2025 (VC-PPO, 2503.01491), section 3.1, which trains the critic on the
    samples of a policy that stands still; critic_loss: distributional, ops/values/distributional_value_loss.py.
    """

    critic: Literal["own", "shared"] = Field("own", description="an adapter of its own, or a head on the policy's")
    critic_gradient: float = Field(
        1.0, ge=0, le=1, description="of critic: shared, how much of the value loss's gradient reaches the adapter"
    )
    critic_loss: Literal["squared", "distributional"] = Field(
        "squared", description="distributional: cross-entropy over value_bins from value_min to value_max"
    )
    value_bins: int = Field(51, ge=2)
    value_min: float = -10.0
    value_max: float = 10.0
    value_clip_eps: float | None = Field(
        0.2, gt=0, description="how far the critic may move from its old values; of critic_loss: squared"
    )
    vf_coef: float = Field(1.0, gt=0, description="weight of the value loss beside the policy's")
    critic_learning_rate: float | None = Field(None, gt=0, description="default: learning_rate")
    critic_warmup_steps: int = Field(0, ge=0, description="first steps, in which the critic alone trains")

    @model_validator(mode="after")
    def _has_bins_and_steps(self) -> "CriticConfig":
        if not self.value_min < self.value_max:
            raise ValueError(f"value_min must be below value_max, got {self.value_min} and {self.value_max}")
        if self.epochs is None and self.critic_warmup_steps >= self.steps:
            raise ValueError(
                f"critic_warmup_steps {self.critic_warmup_steps} leave the policy none of {self.steps} steps"
            )
        return self

    def peak_rate(self, role: str) -> float:
        own = self.critic_learning_rate if role == "critic" else None
        return self.learning_rate if own is None else own


def add_critic(job: Job, config: CriticConfig) -> None:
    """The role 'critic', which starts as the reward role where it has an adapter of its own and there is such a role.

    Its head is zero where it cannot start as the reward's.
    """
    backbone = job.backbone
    start = "reward" if config.critic == "own" and "reward" in backbone.adapters else None
    if config.critic == "own":
        backbone.add_adapter(
            "critic", rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets,
            top_layers=config.top_layers, copy_of=start, seed=config.seed + 1, use_rslora=config.use_rslora,
            use_dora=config.use_dora,
        )  # fmt: skip
        backbone.set_dropout("critic", config.lora_dropout)
    if config.critic_loss == "distributional":
        backbone.add_head("critic", outputs=config.value_bins, on=reads(config))
    else:
        backbone.add_head("critic", copy_of=start, on=reads(config))
    job.optimizers["critic"] = build_optimizer(backbone.parameters_of("critic"), config)


def reads(config: CriticConfig) -> str:
    """The role whose hidden states the critic's head is given."""
    return "policy" if config.critic == "shared" else "critic"


def critic_values(job: Job, config: CriticConfig, outputs: Tensor) -> Tensor:
    """(B, T), in units of the reward: the critic's values from its head's outputs, (B, T) or (B, T, value_bins)."""
    if config.critic_loss == "distributional":
        half = (config.value_max - config.value_min) / config.value_bins / 2
        centres = torch.linspace(config.value_min + half, config.value_max - half, config.value_bins)
        return outputs.softmax(-1) @ centres.to(outputs)
    scale = reward_units(job, config)
    return outputs if scale is None else (outputs - scale[0]) / scale[1]


def reward_units(job: Job, config: CriticConfig) -> tuple[float, float] | None:
    """(mean, std) of the raw scores that a critic predicts whose head started as the reward role's; PPO is paid in
    their deviations. None for another critic."""
    adapter = None if job.rewards is None else job.rewards.adapter
    if adapter is None or config.critic == "shared" or config.critic_loss == "distributional":
        return None
    return adapter.mean, adapter.std


def critic_term(
    job: Job, config: CriticConfig, rows: Rows, old_values: Tensor, returns: Tensor, *, alone: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """vf_coef times the value loss of the rows; old_values and returns are (M, T), in units of the reward.

    alone: nothing reaches the policy's adapter, whoever reads it.
    """
    hidden = rows.hidden[reads(config)]
    if config.critic == "shared":
        share = 0.0 if alone else config.critic_gradient
        hidden = hidden.detach() + share * (hidden - hidden.detach())
    outputs = job.backbone.values("critic", hidden)
    if config.critic_loss == "distributional":
        loss, metrics, _ = distributional_value_loss(
            outputs, returns, v_min=config.value_min, v_max=config.value_max, mask=rows.mask, denominator=rows.tokens
        )
        found = {"value_loss": loss, "returns_outside_bins": metrics["outside_fraction"]}
    else:
        loss, _ = value_loss(
            critic_values(job, config, outputs), old_values, returns, mask=rows.mask, clip_eps=config.value_clip_eps,
            denominator=rows.tokens,
        )  # fmt: skip
        found = {"value_loss": loss}
    return config.vf_coef * loss, found


def save_critic(job: Job, config: CriticConfig, folder: Path) -> None:
    """critic/ in `folder`, at the end of a run: a head on the policy's adapter is saved with a copy of that."""
    if config.critic == "shared":
        job.backbone.add_adapter("critic", copy_of="policy", trainable=False)
    save_adapter(job.backbone, "critic", folder / "critic")
    scale = reward_units(job, config)
    if scale is not None:
        write_stats(folder / "critic", *scale)


def explained_variance(returns: Tensor, values: Tensor, mask: Tensor) -> float:
    """Share of the spread of the returns that the critic foresaw: 1 is perfect, 0 no better than a constant."""
    counts = mask.bool()
    residual, spread = (returns - values)[counts].var(), returns[counts].var()
    return float(1 - residual / spread.clamp(min=1e-12))
