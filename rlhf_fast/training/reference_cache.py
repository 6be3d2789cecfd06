"""The reference's log-probabilities of the data's answers: they never change, so a run scores each answer once."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.batches import Batch, shuffled_indices
from rlhf_fast.data.encoded import Encoded
from rlhf_fast.models.pieces import whole_tensor
from rlhf_fast.training import ranks
from rlhf_fast.training.config import Config
from rlhf_fast.training.folder import REFERENCE_FILE, replace_file
from rlhf_fast.training.halving import Parts
from rlhf_fast.training.job import Job
from rlhf_fast.training.run import Run
from rlhf_fast.training.supervised import answer_logprobs, padded, sequences_of, shared_out

# (job, config, role, batch) -> (B,): the log-probability of every sequence's answer.
Logprobs = Callable[[Job, Any, str, Batch], Tensor]


def references_of_run(
    job: Job, config: Config, run: Run, score: Callable[[list[Any]], Tensor], *, kind: str = ""
) -> Tensor:
    """(examples, K): what `score` gives for the examples that the run uses, NaN for the others.

    kind: what else than the examples and the reference its numbers depend on. The run folder keeps them for a resume.
    The first pass over the data takes the examples in the order of its shuffle; they are scored in that order, in whole
    parts, so that a run that is continued has the bits of a longer one. Every part is kept as soon as it is there.
    """
    path, key = run.folder / REFERENCE_FILE, fingerprint(job, kind)
    references = read_references(path, key, len(job.train))
    size = config.batch_size if config.micro_batch_size is None else config.micro_batch_size * ranks.world()
    order = shuffled_indices(len(job.train), config.order_seed, 0, len(job.train))
    parts = [order[i : i + size] for i in range(0, min(len(order), config.steps * config.batch_size), size)]
    if references is not None:
        parts = [part for part in parts if references[part, 0].isnan().any()]
    for part in run.track("reference", parts):
        scores = score([job.train[i] for i in part]).cpu()
        if references is None:
            references = torch.full((len(job.train), scores.shape[1]), torch.nan)
        references[part] = scores
        if ranks.is_first():
            with path.open("a", encoding="utf-8") as file:
                file.write(line_of(key, part, scores.tolist()))
    assert references is not None  # a run has at least one step
    return references.to(job.device)


def line_of(key: str, part: list[int], scores: list[list[float]]) -> str:
    """A part as the file has it: fp32 numbers as decimals are read back as the same ones."""
    said = json.dumps([key, part, scores])
    return json.dumps([hashlib.sha256(said.encode()).hexdigest(), key, part, scores]) + "\n"


def read_references(path: Path, key: str, examples: int) -> Tensor | None:
    """What `references_of_run` kept of so many examples, NaN for the others; None where it kept nothing of them under
    this key. What else the file has, of another model or cut off by a kill, is removed from it."""
    kept, references = [], None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.is_file() else []
    for line in lines:
        try:
            _, of, part, scores = json.loads(line)
        except (ValueError, TypeError):
            continue
        if of == key and line == line_of(key, part, scores):
            kept.append(line)
            if references is None:
                references = torch.full((examples, len(scores[0])), torch.nan)
            references[part] = torch.tensor(scores)
    if kept != lines and ranks.is_first():
        replace_file(path, "".join(kept))
    return references


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

    def of_part(rows: list[int], idle: bool) -> list[tuple[list[int], Tensor]]:
        part = [examples[row] for row in rows]
        sums = logprobs(job, config, "reference", padded(job, part)).view(-1, len(part)).T
        return [] if idle else [(rows, sums)]

    size = config.micro_batch_size or config.batch_size
    parts = Parts(job, "reference", lambda: shared_out(examples, size), of_part)
    return ranks.in_order([one for made in parts.each(lambda made: made) for one in made or ()]).to(job.device)
