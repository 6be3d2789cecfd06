"""How far the policy is from a teacher at the tokens of a completion, over the whole vocabulary, and that as a loss."""

from functools import partial
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from rlhf_fast.data.batches import Batch
from rlhf_fast.ops.head.linear_kl import linear_kl
from rlhf_fast.training.experience import Experience
from rlhf_fast.training.halving import Parts
from rlhf_fast.training.job import dropout_seed
from rlhf_fast.training.kept import Kept
from rlhf_fast.training.on_policy import own_parts
from rlhf_fast.training.optim import Loss
from rlhf_fast.training.teachers import TaughtJob, TeacherConfig, teacher_hidden


class DivergenceConfig(TeacherConfig):
    """Keys of the divergence."""

    js_weight: float = Field(1.0, ge=0, le=1, description="0: forward KL, 1: reverse KL, between: the teacher's share")
    is_clip: float | None = Field(None, gt=0, description="largest weight of a token that the policy has moved from")


class Part(NamedTuple):
    """Of a micro-batch the K tokens that count. hidden, teacher: (K, D) and (K, E), what predicts them. targets: (K,).
    old_logprobs: (K,), of the policy that sampled. tokens: how many the whole minibatch has. idle: see ranks.Part."""

    hidden: Tensor
    teacher: Tensor
    targets: Tensor
    old_logprobs: Tensor
    tokens: Tensor
    idle: bool = False


def parts_of(
    job: TaughtJob, config: DivergenceConfig, taught: Experience, parts: tuple[Tensor, ...], *, read: Batch,
    kept: Kept | None = None,
) -> Parts[Tensor, Part]:  # fmt: skip
    """The rows `parts` of a minibatch, those of this process, after a pass of policy and teacher each.

    read: the tokens as the teacher reads them. kept: what has done some of the parts before.
    """
    old, tokens = taught.scores.logprobs, taught.batch.mask[torch.cat(parts)].sum()
    assert old is not None  # scores_policy

    def make(indices: Tensor, idle: bool) -> Part:
        batch, theirs = taught.batch.rows(indices), read.rows(indices)
        hidden = job.backbone.hidden(
            batch.input_ids, batch.attention_mask, ["policy"], dropout_seed=dropout_seed(job, config),
            lower=None if taught.lower is None else taught.lower[indices],
        )["policy"]  # fmt: skip
        return Part(
            predicting(hidden, batch), predicting(teacher_hidden(job, theirs), theirs),
            batch.input_ids[batch.mask.bool()], old[indices][batch.mask.bool()], tokens, idle,
        )  # fmt: skip

    deal = partial(own_parts, taught.batch, parts)
    return Parts(job, "update", deal, make, before=None if kept is None else kept.before)


def divergence_of(job: TaughtJob, config: DivergenceConfig) -> Loss[Part]:
    """The mean over a minibatch's tokens."""
    teacher = job.teacher.backbone
    rows = min(len(job.backbone.lm_head_weight), len(teacher.lm_head_weight))  # ids beyond are no tokens
    own, other = ((b.lm_head_weight[:rows], None if b.lm_head_bias is None else b.lm_head_bias[:rows])
                  for b in (job.backbone, teacher))  # fmt: skip
    ref_weight, ref_bias = (None, None) if teacher is job.backbone else other
    variant = "forward" if config.js_weight == 0 else "reverse" if config.js_weight == 1 else "js"

    def loss(part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        kl, logprobs, *_ = linear_kl(
            part.hidden, part.teacher, own[0], None if config.is_clip is None else part.targets, bias=own[1],
            ref_weight=ref_weight, ref_bias=ref_bias, temperature=config.temperature, variant=variant,
            js_weight=config.js_weight if variant == "js" else 0.5, **job.backbone.logit_transform,
        )  # fmt: skip
        mean = kl.sum() / part.tokens
        if logprobs is None:
            return mean, {"divergence": mean}
        weights = (logprobs.detach() - part.old_logprobs).exp().clamp(max=config.is_clip)
        return (weights * kl).sum() / part.tokens, {"divergence": mean}

    return loss


def predicting(hidden: Tensor, batch: Batch) -> Tensor:
    """(K, D): the states that predict the K tokens that count, row by row."""
    return hidden[:, :-1][batch.mask[:, 1:].bool()]
