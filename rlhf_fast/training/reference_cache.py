"""The reference's log-probabilities of preference pairs: they never change, so a run scores each pair once."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from rlhf_fast.data.batches import shuffled_indices
from rlhf_fast.training.config import Config
from rlhf_fast.training.folder import REFERENCE_FILE
from rlhf_fast.training.job import Job
from rlhf_fast.training.pairs import Pair
from rlhf_fast.training.run import Run


def references_of_run(job: Job, config: Config, run: Run, score: Callable[[list[Pair]], Tensor]) -> Tensor:
    """(pairs, 2): what `score` gives for the pairs that the run uses, NaN for the others.

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
        references[part] = score([job.train[i] for i in part]).cpu()
    if parts:
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
