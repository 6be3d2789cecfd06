"""Bradley-Terry reward model: an adapter and a head whose score at the last token ranks chosen above rejected.

The run folder is the reward adapter, with the mean and standard deviation of its scores on the training pairs beside
it, so that PPO is paid in scores of zero mean and unit spread.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.batches import Batch
from rlhf_fast.models.peft_io import save_adapter
from rlhf_fast.ops.rewards.reward_loss import reward_loss
from rlhf_fast.rewards import write_stats
from rlhf_fast.training import supervised
from rlhf_fast.training.config import Config
from rlhf_fast.training.job import Job
from rlhf_fast.training.optim import Loss, adamw
from rlhf_fast.training.pairs import Pair, encode_pairs, load_pair_rows
from rlhf_fast.training.run import Run
from rlhf_fast.training.setup import add_trained_adapter, build_encoder, build_model
from rlhf_fast.training.supervised import Rows, hidden_of, padded


class AlgorithmConfig(Config):
    """The reward model's keys; batch_size counts pairs."""

    family = "reward_model"


def prepare(config: AlgorithmConfig) -> Job:
    """The role 'reward': a fresh adapter, or one that starts from a saved adapter, and a head."""
    train_rows, held_out_rows = load_pair_rows(config)
    backbone, tokenizer, saved = build_model(config)
    encoder = build_encoder(config, backbone, tokenizer)
    add_trained_adapter(backbone, "reward", config, saved)
    if "reward" not in backbone.heads:
        backbone.add_head("reward")
    backbone.enable_checkpointing(config.gradient_checkpointing)
    optimizers = {"reward": adamw(backbone.parameters_of("reward"), config)}
    train, held_out = encode_pairs(encoder, train_rows, held_out_rows)
    return Job(backbone, encoder, train, held_out, optimizers)


def train(job: Job, config: AlgorithmConfig, run: Run) -> None:
    supervised.train(job, config, run, loss_of(job, config))


def loss_of(job: Job, config: AlgorithmConfig) -> Loss[Rows]:
    """The mean over a batch's pairs."""

    def loss(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        return reward_loss(*pair_scores(job, config, rows.batch), denominator=rows.examples)

    return loss


def pair_scores(job: Job, config: AlgorithmConfig, batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores of chosen and rejected, (B,) each, in one traversal."""
    chosen, rejected = job.backbone.scores(
        "reward", hidden_of(job, config, "reward", batch), batch.attention_mask
    ).chunk(2)
    return chosen, rejected


@torch.no_grad()
def all_scores(job: Job, config: AlgorithmConfig, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """Scores of every pair, (B,) each."""
    size = config.micro_batch_size or config.batch_size
    parts = [pair_scores(job, config, padded(job, pairs[i : i + size])) for i in range(0, len(pairs), size)]
    return torch.cat([c for c, _ in parts]), torch.cat([r for _, r in parts])


def evaluate(job: Job, config: AlgorithmConfig) -> dict[str, Any]:
    """Loss, accuracy (a tie counts half) and margin on the held-out pairs."""
    chosen, rejected = all_scores(job, config, job.held_out)
    loss, metrics = reward_loss(chosen, rejected)
    right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    return {
        "metrics": {
            "accuracy": float(right.mean()),
            "accuracy_se": float(right.std(correction=0)) / len(right) ** 0.5,
            "margin": float(metrics["margin"]),
            "loss": float(loss),
        },
        "samples": [],
    }


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The reward adapter with its head at the top of `folder`, and the statistics of its scores."""
    save_adapter(job.backbone, "reward", str(folder))
    scores = torch.cat(all_scores(job, config, job.train)).double()
    write_stats(folder, float(scores.mean()), float(scores.std().clamp(min=1e-6)))
