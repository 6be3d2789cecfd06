"""DPO and its family: raise the chosen completion's log-probability over the rejected one's, relative to the reference.

The reference's log-probabilities never change, so they are computed once, for the pairs that the run uses, before the
first step, and kept in the run folder. `loss_type` is any
loss of ops/preference_loss that needs no data besides the pairs. aot, aot_unpaired and bco_pair compare the pairs of a
micro-batch.
Sources: Rafailov et al. 2023 (2305.18290); the others in ops/preference_loss.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlhf_fast.data.batches import Batch, pad_batch, shuffled_indices
from rlhf_fast.data.encoding import Prompt, encode_rows
from rlhf_fast.models.peft_io import save_adapter
from rlhf_fast.ops.preference.preference_loss import VARIANTS, PreferenceObjective, preference_loss
from rlhf_fast.training.config import SamplingConfig
from rlhf_fast.training.experience import evaluate_policy
from rlhf_fast.training.folder import REFERENCE_FILE
from rlhf_fast.training.job import Job, dropout_seed
from rlhf_fast.training.optim import adamw, learning_rate, set_learning_rates, update
from rlhf_fast.training.pairs import Pair, encode_pairs, load_pair_rows
from rlhf_fast.training.run import Run
from rlhf_fast.training.setup import add_policy, add_rewards, build_encoder, build_model, try_rewards

LOSS_TYPES = tuple(name for name, variant in VARIANTS.items() if not variant.advantages)


class AlgorithmConfig(SamplingConfig):
    """DPO's keys; batch_size counts pairs. `reward` only judges held-out samples before and after."""

    loss_type: Literal[LOSS_TYPES] = "sigmoid"  # type: ignore[valid-type]
    beta: float = Field(0.1, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    gamma: float = Field(0.5, description="target margin of simpo")

    @model_validator(mode="after")
    def _objective_exists(self) -> "AlgorithmConfig":
        PreferenceObjective(self.loss_type, self.beta, self.label_smoothing, gamma=self.gamma)
        return self


@dataclass
class PreferenceJob(Job):
    """held_out_prompts: prompts to sample for the reward, when there is one. held_out_references: (pairs, 2), the
    reference's log-probabilities, once they were needed.
    """

    held_out_prompts: list[Prompt] = field(default_factory=list)
    held_out_references: Tensor | None = None


def prepare(config: AlgorithmConfig) -> PreferenceJob:
    train_rows, held_out_rows = load_pair_rows(config)
    backbone, tokenizer, saved = build_model(config)
    add_policy(backbone, config, saved)
    backbone.enable_checkpointing(config.gradient_checkpointing)
    rewards = add_rewards(backbone, config, columns=list(train_rows[0].values))
    encoder = build_encoder(config, backbone, tokenizer)
    train, held_out = encode_pairs(encoder, train_rows, held_out_rows)
    optimizers = {"policy": adamw(backbone.parameters_of("policy"), config)}
    job = PreferenceJob(backbone, encoder, train, held_out, optimizers, rewards)
    if rewards is not None:
        prompts = build_encoder(config, backbone, tokenizer, new_tokens=config.max_new_tokens)
        job.held_out_prompts = encode_rows(prompts, held_out_rows, prompts.pair_prompt, "held-out prompts")
        try_rewards(job, config, job.held_out_prompts)
    return job


def train(job: PreferenceJob, config: AlgorithmConfig, run: Run) -> None:
    """Reference log-probabilities once; then batches of pairs in shuffled order, one update per step."""
    references = references_of_run(job, config, run)
    for step in run.steps():
        rate = learning_rate(config, step)
        set_learning_rates(job, {"policy": rate})
        indices = shuffled_indices(len(job.train), config.order_seed, step * config.batch_size, config.batch_size)
        pairs = [job.train[i] for i in indices]
        losses = accumulate(job, config, pairs, references[indices])
        norms = update(job, config, {"loss": losses["loss"]})
        metrics = {**{name: float(value) for name, value in losses.items()}, **norms, "learning_rate": rate}
        run.log(step, metrics, tokens=sum(len(p.chosen.ids) + len(p.rejected.ids) for p in pairs))


def accumulate(job: Job, config: AlgorithmConfig, pairs: list[Pair], references: Tensor) -> dict[str, Tensor]:
    """Backward of one batch of pairs in micro-batches; loss and metrics are means over the pairs."""
    size = config.micro_batch_size or len(pairs)
    totals: dict[str, Tensor] = {}
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        loss, metrics = pair_loss(job, config, part, references[start : start + size])
        share = len(part) / len(pairs)
        (loss * share).backward()
        for name, value in {"loss": loss, **metrics}.items():
            totals[name] = totals.get(name, 0.0) + value.detach() * share
    return totals


def pair_loss(
    job: Job, config: AlgorithmConfig, pairs: list[Pair], references: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss over the pairs. references: (B, 2), chosen and rejected."""
    batch = _batch(job, pairs)
    chosen, rejected = completion_logprobs(job, config, "policy", batch).split(len(pairs))
    lengths = batch.mask.sum(1).split(len(pairs))
    return preference_loss(
        chosen, rejected, references[:, 0], references[:, 1], variant=config.loss_type, beta=config.beta,
        label_smoothing=config.label_smoothing, gamma=config.gamma, chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
    )  # fmt: skip


def completion_logprobs(job: Job, config: AlgorithmConfig, role: str, batch: Batch) -> Tensor:
    """(B,): the sum over each completion's tokens."""
    seed = dropout_seed(job, config)
    hidden = job.backbone.hidden(batch.input_ids, batch.attention_mask, [role], dropout_seed=seed)[role]
    logprobs = job.backbone.logprobs(hidden, batch.input_ids, batch.mask)
    assert isinstance(logprobs, Tensor)
    return logprobs.sum(1)


def references_of_run(job: Job, config: AlgorithmConfig, run: Run) -> Tensor:
    """(pairs, 2): the reference's log-probabilities of the pairs that the run uses, NaN for the others.

    The run folder keeps them for a resume. The first pass over the data takes the pairs in the order of its shuffle;
    they are scored in that order, in whole parts, so that a run that is continued has the bits of a longer one.
    """
    path, key = run.folder / REFERENCE_FILE, fingerprint(job)
    references = read_references(path, key)
    if references is None:
        references = torch.full((len(job.train), 2), torch.nan)
    size = config.micro_batch_size or config.batch_size
    order = shuffled_indices(len(job.train), config.order_seed, 0, len(job.train))
    parts = [order[i : i + size] for i in range(0, min(len(order), config.steps * config.batch_size), size)]
    parts = [part for part in parts if references[part].isnan().any()]
    for part in run.track("reference", parts):
        references[part] = reference_logprobs(job, config, [job.train[i] for i in part]).cpu()
    if parts:
        staging = path.with_name(f".{path.name}.tmp")
        torch.save({"key": key, "references": references}, staging)
        staging.replace(path)
    return references.to(job.device)


def read_references(path: Path, key: str) -> Tensor | None:
    """What `references_of_run` kept; None where that is absent, cut off, or of another model or other data."""
    try:
        kept = torch.load(path, weights_only=True)
        return kept["references"] if kept["key"] == key else None
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, UnpicklingError):
        return None


def fingerprint(job: Job) -> str:
    """A hash of what the reference's log-probabilities depend on: the pairs, the adapter, the model and its types."""
    digest = hashlib.sha256()
    for pair in job.train:
        digest.update(repr((pair.chosen, pair.rejected)).encode())
    tensors = dict(job.backbone.model.named_parameters())
    if "reference" in job.backbone.adapters:
        tensors |= job.backbone.named_parameters_of("reference")
    for name, tensor in tensors.items():
        every = tensor.detach().flatten()[:: max(1, tensor.numel() // 4096)]  # enough to tell models apart
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device.type}".encode())
        digest.update(every.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    digest.update(str(job.backbone.model.config._attn_implementation).encode())
    return digest.hexdigest()


@torch.no_grad()
def reference_logprobs(job: Job, config: AlgorithmConfig, pairs: list[Pair]) -> Tensor:
    """(pairs, 2): the reference's log-probabilities of chosen and rejected."""
    size = config.micro_batch_size or config.batch_size
    parts = []
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        sums = completion_logprobs(job, config, "reference", _batch(job, part))
        parts.append(torch.stack(sums.split(len(part)), dim=1))
    return torch.cat(parts)


def _batch(job: Job, pairs: list[Pair]) -> Batch:
    examples = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return pad_batch(examples, job.encoder.pad_id).to(job.device)


@torch.no_grad()
def evaluate(job: PreferenceJob, config: AlgorithmConfig) -> dict[str, Any]:
    """Loss, accuracy and margin on the held-out pairs; with a reward, also samples for the held-out prompts."""
    if job.held_out_references is None:
        job.held_out_references = reference_logprobs(job, config, job.held_out)
    references = job.held_out_references
    size = config.micro_batch_size or config.batch_size
    totals: dict[str, float] = {}
    for start in range(0, len(job.held_out), size):
        part = job.held_out[start : start + size]
        loss, metrics = pair_loss(job, config, part, references[start : start + size])
        for name, value in {"loss": loss, **metrics}.items():
            totals[name] = totals.get(name, 0.0) + float(value) * len(part) / len(job.held_out)
    if job.rewards is None:
        return {"metrics": totals, "samples": []}
    sampled = evaluate_policy(job, config, job.held_out_prompts)
    return {"metrics": {**totals, **sampled["metrics"]}, "samples": sampled["samples"]}


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The policy at the top of `folder`; the reference beside it where it is an adapter."""
    save_adapter(job.backbone, "policy", str(folder))
    if "reference" in job.backbone.adapters:
        save_adapter(job.backbone, "reference", str(folder / "reference"))
