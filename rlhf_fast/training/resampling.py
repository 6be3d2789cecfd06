"""Dynamic sampling: prompts whose completions are all judged the same make room for new ones.

Source: DAPO, Yu et al. 2025 (arXiv 2503.14476), section 3.2.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_fast.data.encoding import Prompt
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.experience import Experience, StepRewards, next_prompts
from rlhf_fast.training.job import Job


def judged_alike(job: Job, config: RolloutConfig, experience: Experience) -> Tensor:
    """(groups,) bool, on the CPU: no source with a weight tells the completions of the prompt apart.

    Penalties for their length do not count: they would tell wrong answers apart from each other.
    """
    assert job.rewards is not None
    weighed = [experience.parts[name] for name, weight in job.rewards.weights.items() if weight]
    scores = torch.stack(weighed or [*experience.parts.values()])
    groups = scores.unflatten(1, (-1, config.num_generations))
    return (groups == groups[:, :, :1]).all(2).all(0)


def resampled(
    job: Job, config: RolloutConfig, step: int, experience: Experience, more: Callable[[list[Prompt]], Experience]
) -> Experience:
    """`experience` with its groups that are judged alike replaced, in at most max_resamples rounds.

    Each round takes as many new prompts as there are such groups left, and keeps those that are told apart. more:
    prompts -> their experience. The metrics are the rounds that it took and the groups that were thrown away.
    """
    count, rounds, dropped = config.batch_size // config.num_generations, 0, 0
    while rounds < config.max_resamples:
        alike = judged_alike(job, config, experience)
        missing = int(alike.sum())
        if missing == 0:
            break
        extra = int(job.counters.get("extra_prompts", 0))
        fresh = more(next_prompts(job, config, (step + 1) * count + extra, missing))
        job.counters["extra_prompts"] = extra + missing
        found = (~judged_alike(job, config, fresh)).nonzero().view(-1)
        # Of those that say nothing, as many stay as nothing better was found for.
        kept = alike.to(torch.uint8).argsort(stable=True)[: count - len(found)].sort().values
        experience = joined(_alike_in_steps(experience, fresh), [_rows(config, kept), _rows(config, found)])
        rounds, dropped = rounds + 1, dropped + missing
    metrics = {"resamples": float(rounds), "dropped_groups": float(dropped)}
    return replace(experience, metrics=experience.metrics | metrics)


def _rows(config: RolloutConfig, groups: Tensor) -> Tensor:
    return (groups[:, None] * config.num_generations + torch.arange(config.num_generations)).view(-1)


def _alike_in_steps(*experiences: Experience) -> list[Experience]:
    """Where a source pays inside of the completions of one, all have steps; those of the others pay nothing."""
    if all(experience.steps is None for experience in experiences):
        return list(experiences)
    masks = [experience.batch.mask for experience in experiences]
    none = [StepRewards(torch.zeros_like(mask, dtype=torch.float32), torch.zeros_like(mask).bool()) for mask in masks]
    return [replace(e, steps=e.steps or zeros) for e, zeros in zip(experiences, none, strict=True)]


def joined(values: Sequence[Any], rows: Sequence[Tensor]) -> Any:
    """The chosen rows (on the CPU) of each of several experiences, in order, padded with 0 to one length.

    values: experiences, or what they are made of: what has rows are tensors (B, ...) and lists.
    """
    first = values[0]
    if any(value is None for value in values):
        return None
    if isinstance(first, Tensor):
        chosen = [value[index] for value, index in zip(values, rows, strict=True)]
        if first.dim() > 1:
            length = max(value.shape[1] for value in chosen)
            chosen = [pad(v, (0, 0) * (v.dim() - 2) + (0, length - v.shape[1])) for v in chosen]
        return torch.cat(chosen)
    if isinstance(first, list):
        return [value[i] for value, index in zip(values, rows, strict=True) for i in index.tolist()]
    if isinstance(first, dict):
        return {name: joined([value[name] for value in values if name in value], rows) for name in first}
    names = [f.name for f in fields(first)] if is_dataclass(first) else getattr(first, "_fields", ())
    if not names:
        return first
    return type(first)(*(joined([getattr(value, name) for value in values], rows) for name in names))
