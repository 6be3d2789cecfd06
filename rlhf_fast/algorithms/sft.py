"""Supervised fine-tuning: the mean negative log-probability of the completion's tokens (or of all tokens).

With `lora_rank: 0` every weight trains and the run folder holds a whole model; otherwise it holds an adapter.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from rlhf_fast.data.encoded import encode_rows
from rlhf_fast.data.encoding import Encoder, Example
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.training import ranks, supervised
from rlhf_fast.training.config import Config
from rlhf_fast.training.job import FULL, Job, save_roles
from rlhf_fast.training.optim import Loss, adamw
from rlhf_fast.training.run import Run
from rlhf_fast.training.setup import add_trained_adapter, build_encoder, build_model, load_rows
from rlhf_fast.training.supervised import Rows, logprobs_of, micro_batches


class AlgorithmConfig(Config):
    """SFT's keys."""

    family = "sft"

    completion_only: bool = Field(True, description="false: the prompt's tokens count too")


def prepare(config: AlgorithmConfig) -> Job:
    train_rows, held_out_rows = load_rows(config, supervised.LAYOUTS)
    backbone, tokenizer, saved = build_model(config)
    encoder = build_encoder(config, backbone, tokenizer)
    if config.lora_rank == 0 and saved is None:
        if config.lora_dropout:
            raise UserError(f"lora_dropout {config.lora_dropout} is for adapters: lora_rank 0 trains every weight")
        parameters = list(backbone.model.requires_grad_(True).parameters())
        optimizers = {FULL: adamw(parameters, config)}
    else:
        add_trained_adapter(backbone, "policy", config, saved)
        optimizers = {"policy": adamw(backbone.parameters_of("policy"), config)}
    backbone.enable_checkpointing(bool(config.gradient_checkpointing))
    encode = partial(_encode, config)
    train = encode_rows(encoder, train_rows, encode, "data")
    held_out = encode_rows(encoder, held_out_rows, encode, "held-out data")
    return Job(backbone, encoder, train, held_out, optimizers)


def _encode(config: AlgorithmConfig, encoder: Encoder, row: Row) -> Example:
    example = supervised.encode(encoder, row)
    return example if config.completion_only else Example(example.ids, 0)


def train(job: Job, config: AlgorithmConfig, run: Run) -> None:
    supervised.train(job, config, run, loss_of(job, config))


def loss_of(job: Job, config: Config) -> Loss[Rows]:
    """The mean over all of a batch's tokens."""

    def loss(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        return -logprobs_of(job, config, role_of(job), rows.batch).sum() / rows.tokens, {}

    return loss


def role_of(job: Job) -> str | None:
    """The role that trains; None: the model itself."""
    return None if FULL in job.optimizers else "policy"


@torch.no_grad()
def evaluate(job: Job, config: AlgorithmConfig) -> dict[str, Any]:
    """Mean loss per token on the held-out examples."""
    total, count = 0.0, 0
    for rows in micro_batches(job, job.held_out, range(len(job.held_out)), config.batch_size):
        of_rows = float(logprobs_of(job, config, role_of(job), rows.batch).sum())
        total, count = total - (0.0 if rows.idle else of_rows), rows.tokens
    return {"metrics": {"loss": float(ranks.all_sum(torch.tensor(total, dtype=torch.float64))) / count}, "samples": []}


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The whole model, or the policy adapter, at the top of `folder`."""
    if FULL in job.optimizers:
        job.backbone.model.save_pretrained(folder)
    else:
        save_roles(job, folder)
