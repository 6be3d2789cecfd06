"""Labels made by machine: sample answers to each prompt, or take those of columns, judge them, write what others learn.

Nothing is trained: the run folder's data/ is what a later stage names by `data: {from: label}`. A judge that compares
writes every two answers of a prompt with a soft label (RLAIF, Lee et al. 2023, 2309.00267); a judge that rates, and any
other reward, writes ratings, rankings, or the best over the worst.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from rlhf_fast.data.batches import shuffled_indices
from rlhf_fast.data.encoded import encode_rows
from rlhf_fast.data.encoding import Encoder, Prompt
from rlhf_fast.errors import UserError
from rlhf_fast.models.peft_io import load_adapter
from rlhf_fast.training import labels
from rlhf_fast.training.config import SamplingConfig
from rlhf_fast.training.experience import separate_randomness
from rlhf_fast.training.folder import write_rows, written_rows
from rlhf_fast.training.job import Job
from rlhf_fast.training.run import Run
from rlhf_fast.training.setup import add_rewards, all_rows, build_encoder, build_model


class AlgorithmConfig(SamplingConfig):
    """The keys of labelling; batch_size counts answers, and the run is one pass over the prompts."""

    family = "label"
    counted = False
    reads = "grpo"
    gives = ("data",)
    divides = False

    answers: str | list[str] | None = Field(None, description="columns of given answers; default: they are sampled")
    num_generations: int = Field(2, ge=2, description="answers to sample for each prompt")
    write: Literal["auto", "pairs", "rankings", "ratings", "best"] = Field(
        "auto", description="rows to write; auto: pairs of a judge that compares, else ratings"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_pass(cls, values: Any) -> Any:
        return values if {"steps", "epochs"} & values.keys() else {**values, "epochs": 1.0}

    @model_validator(mode="after")
    def _fits(self) -> "AlgorithmConfig":
        if self.compares and (not self.judge_alone or self.write == "ratings"):
            other = f"reward {self.reward}" if self.reward else "verify" if self.verify else f"write: {self.write}"
            raise ValueError(f"judge.form compare gives no number to one answer: leave out {other}")
        return self

    @property
    def compares(self) -> bool:
        return self.judge is not None and self.judge.form == "compare"

    @property
    def kind(self) -> str:
        """What the rows are, where `write` leaves it to the judge."""
        return self.write if self.write != "auto" else "pairs" if self.compares else "ratings"

    @property
    def given(self) -> list[str]:
        return [self.answers] if isinstance(self.answers, str) else self.answers or []

    @property
    def criteria(self) -> list[str]:
        """What a rating is made of; a reward is one number."""
        return self.judge.criteria or [] if self.judge is not None and self.judge_alone else []

    @property
    def examples_per_step(self) -> int:
        return max(1, self.batch_size // self.num_generations)


def prepare(config: AlgorithmConfig) -> Job:
    """The model, or the adapter, that samples; and what judges, tried on short answers to the first prompt."""
    if config.reward is None and config.verify is None and config.judge is None:
        raise UserError("label needs a judge, a reward or verify")
    rows = all_rows(config, [("prompt",)])
    backbone, tokenizer, saved = build_model(config)
    if saved is not None:
        load_adapter(backbone, "policy", saved, trainable=False)
    encoder = build_encoder(config, backbone, tokenizer, new_tokens=config.max_new_tokens)
    prompts = encode_rows(encoder, rows, Encoder.prompt, "data")
    job = Job(backbone, encoder, prompts, prompts.of([]), {}, add_rewards(backbone, config, rows, tokenizer))
    with separate_randomness(config.seed):
        labelled(job, config.model_copy(update={"max_new_tokens": min(8, config.max_new_tokens)}), prompts[:1])
    return job


def train(job: Job, config: AlgorithmConfig, run: Run) -> None:
    """For each batch of prompts in shuffled order: answers, judgements, rows."""
    count = config.examples_per_step
    for step in run.steps():
        start = step * count
        left = len(job.train) - start  # a pass ends with the last prompt, not with the first ones again
        indices = shuffled_indices(len(job.train), config.order_seed, start, min(count, left) if left > 0 else count)
        prompts = [job.train[i] for i in indices]
        rows, metrics = labelled(job, config, prompts)
        write_rows(run.folder, step, rows)
        job.counters["labelled"] = step + 1
        run.log(step, {**metrics, "rows": float(len(rows))}, tokens=sum(len(prompt.ids) for prompt in prompts))


def labelled(job: Job, config: AlgorithmConfig, prompts: list[Prompt]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of some prompts, and what the judge tells."""
    answers = (
        labels.given_answers(prompts, config.given) if config.given
        else labels.sampled_answers(job, config, prompts, config.num_generations)
    )  # fmt: skip
    assert job.rewards is not None
    keep = [labels.kept_columns(prompt.columns, config.given) for prompt in prompts]
    if config.compares:
        rows = labels.compared_rows(job, config.kind, prompts, answers, keep)
    else:
        scores = labels.scores_of(job, config, prompts, answers)
        rows = labels.scored_rows(config.kind, answers, scores, config.criteria, keep)
    return rows, job.rewards.metrics()


def evaluate(job: Job, config: AlgorithmConfig) -> dict[str, Any]:
    """How many rows there are so far, and the means of what they say."""
    rows = written_rows(Path(config.output_dir), steps=int(job.counters.get("labelled", 0)))
    means = {name: [row[name] for row in rows if name in row] for name in ("preference", "rating", "gap")}
    metrics = {name: sum(values) / len(values) for name, values in means.items() if values}
    return {"metrics": {"rows": float(len(rows)), **metrics}, "samples": []}


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """Nothing beside the rows, which are there already."""
    if not written_rows(Path(config.output_dir)):
        raise UserError(
            f"label wrote no row into {config.output_dir}: every answer to a prompt was the same, or as good"
        )


def example_rows(job: Job, config: AlgorithmConfig) -> list[dict[str, Any]]:
    """Rows like those that a run writes, to check a later stage with."""
    keep = [labels.kept_columns(prompt.columns, config.given) for prompt in job.train]
    if config.compares and config.kind == "pairs":
        return [{**row, "chosen": "a", "rejected": "b", "preference": 0.75} for row in keep]
    scores = torch.arange(2.0 * len(keep))[:, None].repeat(1, max(1, len(config.criteria)))
    return labels.scored_rows(config.kind, [["a", "b"]] * len(keep), scores, config.criteria, keep)
