"""Prompts in a second form, with what helps to answer them: asked with it, learnt without it."""

from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Any

from torch import Tensor

from rlhf_fast.data.encoded import encode_rows
from rlhf_fast.data.encoding import Encoder, Example, Prompt
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.experience import Experience, collect, rescored
from rlhf_fast.training.job import Job
from rlhf_fast.training.setup import prepare_rollouts


@dataclass
class HintJob(Job):
    """hint: what stands for a prompt in its second form; None: none has one. unhinted: places of those that have none
    because it is too long."""

    hint: str | None = None
    unhinted: set[str] = field(default_factory=set)


def prepare_hints(config: RolloutConfig, hint: str | None) -> HintJob:
    """As for rollouts, with the second form of every prompt."""
    job = HintJob(**vars(prepare_rollouts(config)), hint=hint)
    if hint is not None:
        rows = job.train.rows
        encoded = encode_rows(
            job.encoder, rows, lambda encoder, row: hinted(encoder, row.where, row.values, hint), "hints"
        )
        if encoded.rows is not rows:
            job.unhinted = {row.where for row in rows} - {row.where for row in encoded.rows}
    return job


def hinted(encoder: Encoder, where: str, columns: dict[str, Any], hint: str) -> Prompt:
    """UserError for a hint that names what is no column."""
    prompt = columns["prompt"]
    said = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    text = filled(where, hint, {**columns, "prompt": said})
    changed = text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]
    return replace(encoder.prompt(Row(where, {**columns, "prompt": changed})), columns=columns)


def filled(where: str, template: str, values: dict[str, Any]) -> str:
    """The template with {column} filled in; UserError for one that is none."""
    for _, name, _, _ in Formatter().parse(template):
        if name is not None and name not in values:
            raise UserError(f"{where}: {template!r} needs {name!r}, which is no column ({', '.join(values)})")
    return template.format_map(values)


def asked_again(job: HintJob, config: RolloutConfig, experience: Experience, which: Tensor) -> Experience | None:
    """New completions, with the hint, of the prompts `which`, (P,) bool, as answers to the plain ones: scored as such,
    and judged as they were given. None where there is no such prompt."""
    asked = zip(experience.rollout.prompts, which.repeat_interleave(config.num_generations).tolist(), strict=True)
    prompts = [prompt for prompt, again in asked if again and prompt.where not in job.unhinted]
    if job.hint is None or not prompts:
        return None
    answers = collect(job, config, [hinted(job.encoder, p.where, p.columns, job.hint) for p in prompts])
    ids = answers.rollout.completion_ids()
    examples = [Example(p.ids + answer, len(p.ids)) for p, answer in zip(prompts, ids, strict=True)]
    return rescored(job, config, replace(answers, steps=None), prompts, examples)
