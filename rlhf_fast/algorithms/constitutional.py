"""Constitutional AI, the supervised part: answers, critiques and revisions by written principles, then SFT on them.

For every prompt the model answers, says where its answer falls short of a principle, and writes another, for one round
or several. The last revisions, less those that repeat, are the run folder's data/; the policy learns them, beside
`helpful_data`. Source: Bai et al. 2022 (2212.08073), section 3. Its second part, preferences by AI, is `label` with a
judge that has principles.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from rlhf_fast.algorithms.sft import loss_of
from rlhf_fast.data.encoded import encode_rows
from rlhf_fast.data.encoding import Encoder, Prompt
from rlhf_fast.data.notes import say
from rlhf_fast.data.reading import Row
from rlhf_fast.data.rows import joined
from rlhf_fast.errors import UserError
from rlhf_fast.rewards.speakers import LocalSpeaker
from rlhf_fast.training import labels, supervised
from rlhf_fast.training.config import SamplingConfig
from rlhf_fast.training.experience import evaluate_policy, separate_randomness
from rlhf_fast.training.folder import DROPPED, written_rows
from rlhf_fast.training.job import Job, save_roles
from rlhf_fast.training.judging import lines_of
from rlhf_fast.training.optim import adamw
from rlhf_fast.training.revision import PRINCIPLES, Draft, revised, told, write_sifted
from rlhf_fast.training.run import Run
from rlhf_fast.training.setup import (
    add_policy,
    add_rewards,
    build_encoder,
    build_model,
    load_rows,
    rows_of,
    try_rewards,
)


class AlgorithmConfig(SamplingConfig):
    """The keys of Constitutional AI; `epochs` goes by the prompts. A reward or a judge only judges held-out samples
    before and after."""

    family = "constitutional"
    counted = False
    reads = "grpo"
    gives = ("model", "data")
    divides = False

    principles: str | list[str] | None = Field(None, description="a list, or a file of lines; default: a short list")
    revision_rounds: int = Field(1, ge=1, description="critiques and revisions of each answer")
    critique_tokens: int = Field(64, ge=1, description="of one critique")
    max_repetition: float = Field(0.3, ge=0, le=1, description="share of a revision that it has said before")
    helpful_data: str | None = Field(None, description="prompts with completions to learn beside the revisions")
    data_only: bool = Field(False, description="write the revisions and train nothing")


def prepare(config: AlgorithmConfig) -> Job:
    """The policy, prompts, and a trial: one answer of a few tokens is revised."""
    train, held_out = load_rows(config, [("prompt",)])
    backbone, tokenizer, saved = build_model(config)
    add_policy(backbone, config, saved)
    backbone.enable_checkpointing(bool(config.gradient_checkpointing))
    encoder = build_encoder(config, backbone, tokenizer, new_tokens=config.max_new_tokens)
    job = Job(
        backbone, encoder, encode_rows(encoder, train, Encoder.prompt, "data"),
        encode_rows(encoder, held_out, Encoder.prompt, "held-out data"),
        {"policy": adamw(backbone.parameters_of("policy"), config)},
        add_rewards(backbone, config, joined([train, held_out]), tokenizer),
    )  # fmt: skip
    helpful_rows(config)
    if job.rewards is not None:
        try_rewards(job, config, job.held_out)
    few = config.model_copy(update={"max_new_tokens": min(4, config.max_new_tokens), "critique_tokens": 4})
    drafts_of(job, few, job.train[:1], 0)
    return job


def helpful_rows(config: AlgorithmConfig) -> Sequence[Row]:
    if config.helpful_data is None:
        return []
    return rows_of(config, config.helpful_data, [("prompt", "completion")], as_algorithm="sft")


def train(job: Job, config: AlgorithmConfig, run: Run) -> None:
    """Revise once, then learn the revisions."""
    prompts = job.train
    write_sifted(run, job.train, config.batch_size, config.max_repetition, partial(drafts_of, job, config))
    say(told([row["dropped"] for row in written_rows(run.folder, DROPPED)], len(prompts)))
    rows = [Row(f"revision {i + 1}", row) for i, row in enumerate(written_rows(run.folder))]
    job.counters["revisions"] = len(rows)
    if not rows:
        raise UserError(
            f"no revision is left of {len(prompts)}: look at {run.folder / DROPPED}, or raise max_repetition"
        )
    if config.data_only:
        return
    encoder = build_encoder(config, job.backbone, job.encoder.tokenizer)
    job.train = encode_rows(encoder, [*rows, *helpful_rows(config)], Encoder.completion, "revisions")
    supervised.train(job, config, run, loss_of(job, config))


def drafts_of(job: Job, config: AlgorithmConfig, prompts: Sequence[Prompt], part: int) -> list[Draft]:
    """Answers of the policy with their revisions, drawn by a seed of this part's own."""
    tokens = max(config.critique_tokens, config.max_new_tokens)
    plain = config.model_copy(update={"max_prompt_tokens": None, "max_tokens": None})
    encoder = build_encoder(plain, job.backbone, job.encoder.tokenizer, new_tokens=tokens)
    speaker = LocalSpeaker(job.backbone, encoder, "policy", config.micro_batch_size or 16, config.temperature)
    with separate_randomness(config.seed + part):
        answers = [texts[0] for texts in labels.sampled_answers(job, config, prompts, 1)]
        return revised(
            speaker, prompts, answers, lines_of(config.principles, "principles") or PRINCIPLES, seed=config.seed,
            rounds=config.revision_rounds, critique_tokens=config.critique_tokens, answer_tokens=config.max_new_tokens,
        )  # fmt: skip


def evaluate(job: Job, config: AlgorithmConfig) -> dict[str, Any]:
    """Samples for the held-out prompts, where there is a reward; how many revisions it learns from."""
    found = evaluate_policy(job, config, job.held_out) if job.rewards is not None else {"metrics": {}, "samples": []}
    return {**found, "metrics": {**found["metrics"], "revisions": float(job.counters.get("revisions", 0))}}


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The policy at the top of `folder`; the reference beside it where it is an adapter."""
    save_roles(job, folder, "reference")


def example_rows(job: Job, config: AlgorithmConfig) -> list[dict[str, Any]]:
    """Rows like those that a run writes, to check a later stage with."""
    return [{**labels.kept_columns(prompt.columns), "completion": "a", "original": "b"} for prompt in job.train]
