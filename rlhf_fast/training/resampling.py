"""Dynamic sampling: prompts whose completions are all judged the same make room for new ones.

Source: DAPO, Yu et al. 2025 (arXiv 2503.14476), section 3.2.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_fast.data.encoding import Prompt
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.experience import Experience, alike_in_steps, next_prompts
from rlhf_fast.training.job import Job
from rlhf_fast.training.joined import joined


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
        experience = joined(alike_in_steps(experience, fresh), [_rows(config, kept), _rows(config, found)])
        rounds, dropped = rounds + 1, dropped + missing
    metrics = {"resamples": float(rounds), "dropped_groups": float(dropped)}
    return replace(experience, metrics=experience.metrics | metrics)


def _rows(config: RolloutConfig, groups: Tensor) -> Tensor:
    return (groups[:, None] * config.num_generations + torch.arange(config.num_generations)).view(-1)
