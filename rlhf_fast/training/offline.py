"""The start and the evaluation of the methods that learn from given answers and a reference.

Where such a run has a `reward`, it teaches nothing: it judges samples for the held-out prompts, before and after.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf_fast.data.encoded import encode_rows
from rlhf_fast.data.encoding import Encoder, Prompt
from rlhf_fast.data.reading import Row
from rlhf_fast.data.rows import joined
from rlhf_fast.training.config import SamplingConfig
from rlhf_fast.training.experience import evaluate_policy
from rlhf_fast.training.job import Job
from rlhf_fast.training.optim import Loss, adamw
from rlhf_fast.training.setup import add_policy, add_rewards, build_encoder, build_model, try_rewards
from rlhf_fast.training.supervised import Rows, held_out_metrics


@dataclass
class OfflineJob(Job):
    """held_out_prompts: prompts to sample for the reward, when there is one. held_out_references: (examples, K), the
    reference's log-probabilities of their K answers, once they were needed. widest: of rankings, the answers
    of the longest.
    """

    held_out_prompts: Sequence[Prompt] = ()
    held_out_references: Tensor | None = None
    widest: int = 0


def prepare_offline(
    config: SamplingConfig,
    rows: tuple[Sequence[Row], Sequence[Row]],
    encode: Callable[[Encoder, Row], Any],
    prompt: Callable[[Encoder, Row], Prompt],
) -> OfflineJob:
    """Policy, reference and the examples that `encode` makes of the (training, held-out) rows; `prompt` is asked for
    those of the held-out ones where there is a reward."""
    train_rows, held_out_rows = rows
    backbone, tokenizer, saved = build_model(config)
    add_policy(backbone, config, saved)
    backbone.enable_checkpointing(bool(config.gradient_checkpointing))
    rewards = add_rewards(backbone, config, joined([train_rows, held_out_rows]), tokenizer)
    encoder = build_encoder(config, backbone, tokenizer)
    job = OfflineJob(
        backbone,
        encoder,
        train=encode_rows(encoder, train_rows, encode, "data"),
        held_out=encode_rows(encoder, held_out_rows, encode, "held-out data"),
        optimizers={"policy": adamw(backbone.parameters_of("policy"), config)},
        rewards=rewards,
    )
    if rewards is not None:
        prompts = build_encoder(config, backbone, tokenizer, new_tokens=config.max_new_tokens)
        job.held_out_prompts = encode_rows(prompts, held_out_rows, prompt, "held-out prompts")
        try_rewards(job, config, job.held_out_prompts)
    return job


def evaluate_offline(job: OfflineJob, config: SamplingConfig, loss: Loss[Rows]) -> dict[str, Any]:
    """The loss and its metrics on the held-out examples; with a reward, also samples for the held-out prompts."""
    metrics = held_out_metrics(job, config, loss)
    if job.rewards is None:
        return {"metrics": metrics, "samples": []}
    sampled = evaluate_policy(job, config, job.held_out_prompts)
    return {"metrics": {**metrics, **sampled["metrics"]}, "samples": sampled["samples"]}
