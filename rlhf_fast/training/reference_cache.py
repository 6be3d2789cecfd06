"""The reference's log-probabilities of the data's answers: they never change, so a run scores each answer once."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.batches import Batch, shuffled_indices
from rlhf_fast.data.encoded import Encoded
from rlhf_fast.models.pieces import whole_tensor
from rlhf_fast.training import ranks
from rlhf_fast.training.config import Config
from rlhf_fast.training.folder import REFERENCE_FILE
from rlhf_fast.training.job import Job
from rlhf_fast.training.run import Run
from rlhf_fast.training.supervised import answer_logprobs, padded, sequences_of

# (job, config, role, batch) -> (B,): the log-probability of every sequence's answer.
Logprobs = Callable[[Job, Any, str, Batch], Tensor]


def references_of_run(
    job: Job, config: Config, run: Run, score: Callable[[list[Any]], Tensor], *, kind: str = ""
) -> Tensor:
    """(examples, K): what `score` gives for the examples that the run uses, NaN for the others.

    kind: what else than the examples and the reference its numbers depend on. The run folder keeps them for a resume.
    The first pass over the data takes the examples in the order of its shuffle; they are scored in that order, in whole
    parts, so that a run that is continued has the bits of a longer one.
    """
    path, key = run.folder / REFERENCE_FILE, fingerprint(job, kind)
    references = read_references(path, key)
    size = config.micro_batch_size or config.batch_size
    order = shuffled_indices(len(job.train), config.order_seed, 0, len(job.train))
    parts = [order[i : i + size] for i in range(0, min(len(order), config.steps * config.batch_size), size)]
    if references is not None:
        parts = [part for part in parts if references[part, 0].isnan().any()]
    for part in run.track("reference", parts):
        scores = score([job.train[i] for i in part]).cpu()
        if references is None:
            references = torch.full((len(job.train), scores.shape[1]), torch.nan)
        references[part] = scores
    assert references is not None  # a run has at least one step
    if parts and ranks.is_first():
        staging = path.with_name(f".{path.name}.tmp")
        torch.save({"key": key, "references": references}, staging)
        staging.replace(path)
    return references.to(job.device)


def read_references(path: Path, key: str) -> Tensor | None:
    """What `references_of_run` stored; None where that is absent, cut off, or of another model or other data."""
    try:
        stored = torch.load(path, weights_only=True)
        return stored["references"] if stored["key"] == key else None
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, UnpicklingError):
        return None


def fingerprint(job: Job, kind: str = "") -> str:
    """A hash of what the reference's log-probabilities depend on: the examples, the adapter, the model and its types,
    and `kind`."""
    digest = hashlib.sha256(kind.encode())
    if isinstance(job.train, Encoded):
        digest.update(job.train.key.encode())
    else:
        for example in job.train:
            digest.update(repr(sequences_of([example])).encode())
    tensors = dict(job.backbone.model.named_parameters())
    if "reference" in job.backbone.adapters:
        tensors |= job.backbone.named_parameters_of("reference")
    for name, tensor in tensors.items():
        every = (
            whole_tensor(tensor).detach().flatten()[:: max(1, tensor.numel() // 4096)]
        )  # enough to tell models apart
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device.type}".encode())
        digest.update(every.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    digest.update(str(job.backbone.model.config._attn_implementation).encode())
    return digest.hexdigest()


@torch.no_grad()
def reference_logprobs(
    job: Job, config: Config, examples: Sequence[Any], logprobs: Logprobs = answer_logprobs
) -> Tensor:
    """(examples, K): the reference's log-probability of each of the K answers of every example, in nats."""
    size = config.micro_batch_size or config.batch_size
    parts = [examples[start : start + size] for start in range(0, len(examples), size)]
    sums = [logprobs(job, config, "reference", padded(job, part)).view(-1, len(part)) for part in parts]
    return torch.cat(sums, dim=1).T
