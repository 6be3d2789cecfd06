"""Supervised fine-tuning: the mean negative log-probability of the completion's tokens (or of all tokens).

With `lora_rank: 0` every weight trains and the run folder holds a whole model; otherwise it holds an adapter.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from rlhf_fast.data.batches import Batch, pad_batch, shuffled_indices
from rlhf_fast.data.encoding import Encoder, Example, encode_rows
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.models.peft_io import save_adapter
from rlhf_fast.training.config import Config
from rlhf_fast.training.job import FULL, Job, dropout_seed
from rlhf_fast.training.optim import adamw, learning_rate, set_learning_rates, update
from rlhf_fast.training.run import Run
from rlhf_fast.training.setup import add_trained_adapter, build_encoder, build_model, load_rows

LAYOUTS = [("prompt", "completion"), ("messages",), ("text",)]


class AlgorithmConfig(Config):
    """SFT's keys."""

    completion_only: bool = Field(True, description="false: the prompt's tokens count too")


def prepare(config: AlgorithmConfig) -> Job:
    train_rows, held_out_rows = load_rows(config, LAYOUTS)
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
    backbone.enable_checkpointing(config.gradient_checkpointing)
    encode = partial(_encode, config, encoder)
    train = encode_rows(encoder, train_rows, encode, "data")
    held_out = encode_rows(encoder, held_out_rows, encode, "held-out data")
    return Job(backbone, encoder, train, held_out, optimizers)


def _encode(config: AlgorithmConfig, encoder: Encoder, row: Row) -> Example:
    if {"prompt", "completion"} <= row.values.keys():
        example = encoder.completion(row)
    elif "messages" in row.values:
        example = encoder.conversation(row)
    else:
        example = encoder.text(row)
    return example if config.completion_only else Example(example.ids, 0)


def train(job: Job, config: AlgorithmConfig, run: Run) -> None:
    """Batches in shuffled order; one update per step."""
    (role,) = job.optimizers
    for step in run.steps():
        rate = learning_rate(config, step)
        set_learning_rates(job, {role: rate})
        indices = shuffled_indices(len(job.train), config.order_seed, step * config.batch_size, config.batch_size)
        batch = pad_batch([job.train[i] for i in indices], job.encoder.pad_id).to(job.device)
        loss = accumulate(job, config, batch)
        norms = update(job, config, {"loss": loss})
        metrics = {"loss": float(loss), **norms, "learning_rate": rate}
        run.log(step, metrics, tokens=int(batch.attention_mask.sum()))


def accumulate(job: Job, config: AlgorithmConfig, batch: Batch) -> Tensor:
    """Backward of one batch in micro-batches; the loss is the mean over all of the batch's tokens."""
    count = batch.mask.sum().clamp(min=1)
    total = torch.zeros((), device=job.device)
    for rows in torch.arange(len(batch)).split(config.micro_batch_size or len(batch)):
        part = batch.rows(rows)
        loss = -token_logprobs_of(job, config, part).sum() / count
        loss.backward()
        total += loss.detach()
    return total


def token_logprobs_of(job: Job, config: AlgorithmConfig, batch: Batch) -> Tensor:
    """(B, T) log-probabilities under the model that trains."""
    role = None if FULL in job.optimizers else "policy"
    seed = dropout_seed(job, config)
    hidden = job.backbone.hidden(batch.input_ids, batch.attention_mask, [role], dropout_seed=seed)[role]
    logprobs = job.backbone.logprobs(hidden, batch.input_ids, batch.mask)
    assert isinstance(logprobs, Tensor)
    return logprobs


@torch.no_grad()
def evaluate(job: Job, config: AlgorithmConfig) -> dict[str, Any]:
    """Mean loss per token on the held-out examples."""
    total, count = 0.0, 0
    for start in range(0, len(job.held_out), config.batch_size):
        examples = job.held_out[start : start + config.batch_size]
        batch = pad_batch(examples, job.encoder.pad_id).to(job.device)
        total -= float(token_logprobs_of(job, config, batch).sum())
        count += int(batch.mask.sum())
    return {"metrics": {"loss": total / max(1, count)}, "samples": []}


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The whole model, or the policy adapter, at the top of `folder`."""
    if FULL in job.optimizers:
        job.backbone.model.save_pretrained(folder)
    else:
        save_adapter(job.backbone, "policy", str(folder))
