"""Who a policy is distilled from, what the teacher reads, and completions of the data in the place of samples.

A teacher is another model, whose tokenizer and logit transform are the policy's; an adapter on the policy's backbone;
or `self`, an average of the policy that is shown more than the policy was asked: of its own completions to the prompt
one that succeeded, else feedback on it.

Sources: SDPO, Hübotter et al. 2026 (2601.20802), with the templates and the choice between solution and feedback of the
code of its authors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlhf_fast.data.batches import Batch, pad_batch
from rlhf_fast.data.encoded import encode_rows
from rlhf_fast.data.encoding import Encoder, Example, Prompt, TooLong, load_tokenizer
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.loading import load_model
from rlhf_fast.models.peft_io import base_of, load_adapter
from rlhf_fast.rollout import Rollout
from rlhf_fast.training import ranks
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.entries import FromStage
from rlhf_fast.training.experience import Experience, collect, everyone_alike, gathered, judge, own_prompts
from rlhf_fast.training.hints import filled, hinted
from rlhf_fast.training.job import Job
from rlhf_fast.training.joined import joined
from rlhf_fast.training.setup import prepare_rollouts

SELF = "self"


class TeacherConfig(RolloutConfig):
    """Keys of who teaches; a `reward` judges, and tells which completions succeeded."""

    teacher: str | FromStage = Field(description="model folder, adapter folder, or self")
    on_policy: float = Field(
        1.0, ge=0, le=1, description="share of the steps on own samples; the others learn the data's completions"
    )
    teacher_ema: float = Field(
        0.05, ge=0, le=1, description="of teacher: self, how far it follows the policy each step"
    )
    success: float = Field(1.0, description="of teacher: self, least reward of a completion that others are shown")
    feedback: str | None = Field(None, description="of teacher: self, the column shown where nothing succeeded")
    teacher_template: str = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n"
    solution_template: str = "\nCorrect solution:\n\n{solution}\n\n"
    feedback_template: str = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback}\n\n"

    @property
    def needs_reward(self) -> bool:
        return self.teacher == SELF and self.feedback is None

    @property
    def scores_policy(self) -> bool:
        return True

    @model_validator(mode="after")
    def _teaches(self) -> "TeacherConfig":
        if self.teacher != SELF and self.feedback is not None:
            raise ValueError(f"feedback {self.feedback!r} is of teacher: self, got {self.teacher}")
        if self.teacher == SELF and self.feedback is None and self.num_generations < 2:
            raise ValueError(f"teacher: self is shown other completions of a prompt: num_generations is "
                             f"{self.num_generations}, needs 2, or feedback a column")  # fmt: skip
        return self


class Teacher(NamedTuple):
    """backbone: the policy's or another. role: its adapter there; None: the model itself. encoder: of its prompts."""

    backbone: Backbone
    role: str | None
    encoder: Encoder


@dataclass(kw_only=True)
class TaughtJob(Job):
    teacher: Teacher


def prepare_taught(config: TeacherConfig) -> TaughtJob:
    plain = prepare_rollouts(config)
    columns = plain.train[0].columns
    if config.feedback is not None and config.feedback not in columns:
        raise UserError(f"feedback {config.feedback!r} is no column ({', '.join(columns)})")
    longer = replace(plain.encoder, max_prompt_tokens=plain.encoder.max_tokens - config.max_new_tokens)
    job = TaughtJob(**vars(plain), teacher=Teacher(*load_teacher(plain, config), longer))
    if config.on_policy < 1:
        job.train = plain.train.of(encode_rows(job.encoder, plain.train.rows, _answer, "completions").rows)
    return job


def _answer(encoder: Encoder, row: Row) -> Example:
    if not isinstance(row.values.get("completion"), str):
        raise UserError(f"{row.where}: on_policy below 1 needs the text column 'completion'; found: "
                        f"{', '.join(row.values)}")  # fmt: skip
    return encoder.completion(row)


def load_teacher(job: Job, config: TeacherConfig) -> tuple[Backbone, str | None]:
    """The teacher, frozen. UserError for one whose tokens or logits are not the policy's."""
    if config.teacher == SELF:
        job.backbone.add_adapter("teacher", copy_of="policy", trainable=False)
        return job.backbone, "teacher"
    folder = str(config.teacher)
    adapter = (Path(folder) / "adapter_config.json").is_file()
    base, own = base_of(folder) if adapter else folder, str(config.model)
    if (Path(own) / "adapter_config.json").is_file():
        own = base_of(own)
    if adapter and Path(base).resolve() == Path(own).resolve():
        load_adapter(job.backbone, "teacher", folder, trainable=False)
        return job.backbone, "teacher"
    weight = job.backbone.lm_head_weight
    backbone = Backbone(load_model(base, dtype=weight.dtype, device=weight.device,
                                   attn_implementation=config.attn_implementation,
                                   trust_remote_code=config.trust_remote_code))  # fmt: skip
    if adapter:
        load_adapter(backbone, "teacher", folder, trainable=False)
    tokenizer = load_tokenizer(base, trust_remote_code=config.trust_remote_code)
    if tokenizer.get_vocab() != job.encoder.tokenizer.get_vocab():
        raise UserError(f"teacher {folder} has another tokenizer than {own}")
    if backbone.logit_transform != job.backbone.logit_transform:
        raise UserError(f"teacher {folder} has another logit transform than {own}: {backbone.logit_transform} and "
                        f"{job.backbone.logit_transform}")  # fmt: skip
    return backbone, "teacher" if adapter else None


def mixed(job: TaughtJob, config: TeacherConfig, prompts: Sequence[Prompt], **options: Any) -> Experience:
    """`collect`, or with the chance 1 - on_policy, drawn for the whole step, the data's completions."""
    if config.on_policy == 1 or float(torch.rand(())) < config.on_policy:
        return collect(job, config, prompts, **options)
    own = own_prompts(prompts)
    asked = [prompts[row] for row in own.rows]
    answers = [_answer(job.encoder, Row(prompt.where, prompt.columns)) for prompt in asked]
    batch = pad_batch(answers, job.encoder.pad_id).to(job.device)
    written = [prompt.columns["completion"] for prompt in asked]
    rollout = Rollout(asked, batch, written, torch.ones(len(asked), dtype=torch.bool))
    with everyone_alike(job):
        experience = judge(job, config, rollout, score_policy=options["score_policy"])
    return gathered(experience, prompts, own)


def shown(job: TaughtJob, config: TeacherConfig, experience: Experience) -> tuple[Experience, Batch]:
    """The M rows that are taught, and what the teacher reads: the same completions behind what it is asked."""
    rows = torch.arange(len(experience.rewards))
    if config.mask_truncated_completions:
        rows = rows[experience.rollout.finished]
    if config.teacher != SELF:
        taught = joined([experience], [rows])
        return taught, taught.batch
    prompts, ids = demonstrations(job, config, experience), experience.rollout.completion_ids()
    known = {row: prompts[row] for row in rows.tolist() if prompts[row] is not None}
    examples = [Example([*prompt.ids, *ids[row]], len(prompt.ids)) for row, prompt in known.items() if prompt]
    taught = joined([experience], [torch.tensor([*known], dtype=torch.int64)])
    return taught, pad_batch(examples, job.encoder.pad_id).to(job.device) if examples else taught.batch


def demonstrations(job: TaughtJob, config: TeacherConfig, experience: Experience) -> list[Prompt | None]:
    """What the teacher is asked in the place of each row's prompt; None where there is nothing to show, or no room."""
    good = [bool(experience.parts) and reward >= config.success for reward in experience.rewards.tolist()]
    size, prompts = config.num_generations, list[Prompt | None]()
    for row, prompt in enumerate(experience.rollout.prompts):
        group = range(row - row % size, row - row % size + size)
        texts = [experience.rollout.completions[other] for other in group if good[other] and other != row]
        said = prompt.columns.get(config.feedback) if config.feedback else None
        solution = filled(prompt.where, config.solution_template, {"solution": texts[0]}) if texts else ""
        feedback = filled(prompt.where, config.feedback_template, {"feedback": said}) if said and not texts else ""
        columns = {**prompt.columns, "solution": solution, "feedback": feedback}
        try:
            nothing = not (solution or feedback)
            prompts.append(
                None if nothing else hinted(job.teacher.encoder, prompt.where, columns, config.teacher_template)
            )
        except TooLong:
            prompts.append(None)
    return prompts


@torch.no_grad()
def teacher_hidden(job: TaughtJob, batch: Batch) -> Tensor:
    """(B, T, E): the teacher's last hidden states."""
    role = job.teacher.role
    return job.teacher.backbone.hidden(batch.input_ids, batch.attention_mask, [role])[role]


@torch.no_grad()
def teacher_logprobs(job: TaughtJob, config: TeacherConfig, taught: Experience, read: Batch) -> Tensor:
    """(M, T): the teacher's log-probabilities of the taught completions, 0 elsewhere."""
    backbone, made = job.teacher.backbone, []
    for numbers, idle in ranks.share(read.attention_mask.sum(1).tolist(), size=config.micro_batch_size):
        rows = read.rows(torch.tensor(numbers))
        logprobs = backbone.logprobs(
            teacher_hidden(job, rows), rows.input_ids, rows.mask, mask_count=rows.count, temperature=config.temperature
        )
        made += [] if idle else [(numbers, logprobs)]
    placed = torch.zeros(taught.batch.mask.shape, device=job.device)
    placed[taught.batch.mask.bool()] = ranks.in_order(made).to(job.device)[read.mask.bool()]
    return placed
