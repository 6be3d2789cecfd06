"""Several reward models on the one backbone, trained together in one traversal, and how sure a single one is.

The members are outputs of one head on one adapter, or adapters with a head each: the roles "reward", "reward_1", ...
Their run folder is that of the first member, with the others in member_1/, member_2/ ... beside it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.batches import Batch
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.peft_io import save_adapter
from rlhf_fast.rewards.adapter import Output, member_folders, write_covariance, write_stats
from rlhf_fast.training import ranks
from rlhf_fast.training.config import Config
from rlhf_fast.training.job import Job, dropout_seed
from rlhf_fast.training.reward_data import Judgement, JudgementData, places_of
from rlhf_fast.training.setup import add_trained_adapter
from rlhf_fast.training.supervised import padded, shared_out


@dataclass
class RewardJob(Job):
    """outputs: names of those of each head."""

    outputs: list[str] = field(default_factory=list)
    data: JudgementData | None = None

    def judged(self, scores: Tensor) -> Tensor:
        """(S, M) -> the mean over the members, (S, 1); criteria stay apart."""
        criteria = len(self.data.outputs) if self.data else 1
        return scores if criteria > 1 else scores.mean(1, keepdim=True)


def add_members(backbone: Backbone, config: Any, saved: str | None, criteria: Sequence[str]) -> list[str]:
    """The reward roles, each with an adapter and a head, trainable; returns the names of the outputs of each head.

    A member that starts from nothing has the seed config.seed + its number, so that it is what a run with that seed
    would train alone. saved: a run folder to go on from, of a policy, or of as many members.
    """
    if config.ensemble > 1 and len(criteria) > 1:
        raise UserError(f"ensemble {config.ensemble} needs one score, and the ratings have {len(criteria)} criteria: "
                        "give criterion_weights")  # fmt: skip
    heads = config.ensemble if config.ensemble_of == "heads" else 1
    outputs = list(criteria) if heads == 1 else [f"member {number}" for number in range(heads)]
    count = config.ensemble if heads == 1 else 1
    folders = [Path(saved), *member_folders(Path(saved))] if saved else []
    if len(folders) > 1 and len(folders) != count:
        raise UserError(f"{saved} has {len(folders)} members: it goes on with ensemble {len(folders)}, got {count}")
    for number in range(count):
        role = f"reward_{number}" if number else "reward"
        folder = str(folders[number if len(folders) > 1 else 0]) if saved else None
        add_trained_adapter(backbone, role, config.model_copy(update={"seed": config.seed + number}), folder)
        if role not in backbone.heads:
            # What starts from zeros, or from the same adapter, would stay equal.
            differ = config.ensemble > 1 and (heads > 1 or saved is not None)
            seed = config.seed + number if differ else None
            backbone.add_head(role, outputs=len(outputs), seed=seed)
        elif len(folders) < count:
            raise UserError(f"{saved} is one reward model: {count} members that start from it would stay the same")
        elif backbone.heads[role].out_features != len(outputs):
            raise UserError(f"{saved} has {backbone.heads[role].out_features} outputs, this run {len(outputs)}")
    return outputs


def member_scores(job: Job, config: Config, batch: Batch, judged: Sequence[Judgement]) -> tuple[Tensor, Tensor]:
    """(S, M) scores of all outputs of all members, in one traversal, and (S, D), the states that the first has them
    from; `batch` has the rows of `judged`."""
    roles, backbone = job.backbone.reward_roles, job.backbone
    hidden = backbone.hidden(batch.input_ids, batch.attention_mask, roles, dropout_seed=dropout_seed(job, config))
    states = [hidden[role][places_of(judged)].float() for role in roles]
    return torch.cat([backbone.head(role)(x) for role, x in zip(roles, states, strict=True)], 1), states[0]


@torch.no_grad()
def passes(job: Job, config: Config, judged: Sequence[Judgement]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """`member_scores` of this process's share in passes of few rows: which of `judged` each has, its scores and states
    on the CPU."""
    for indices, idle in shared_out(judged, config.micro_batch_size or config.batch_size):
        some = [judged[i] for i in indices]
        scores, states = member_scores(job, config, padded(job, some), some)
        if not idle:
            yield indices, scores.cpu(), states.cpu()


def all_scores(job: Job, config: Config, judged: Sequence[Judgement]) -> Tensor:
    """(S, M): the scores of all outputs of all members, on the CPU."""
    found = passes(job, config, judged)
    return ranks.in_order([([i for i in indices for _ in judged[i].ends], scores) for indices, scores, _ in found])


def covariance(job: Job, config: Any) -> Tensor:
    """Sigma = bound_ridge I + sum over the training pairs that were told apart of (phi_better - phi_worse)(...)^T,
    (D, D) fp64, phi what the head of the first member is given.

    In rankings every pair of different ranks counts once. Source: pessimistic maximum likelihood, Zhu et al. 2023
    (2301.11270), where 1/n of this sum stands; the ridge is theirs times n.
    """
    dim = job.backbone.head("reward").in_features
    total = (config.bound_ridge if ranks.is_first() else 0.0) * torch.eye(dim, dtype=torch.float64)
    for indices, _, states in passes(job, config, job.train):
        judged = [job.train[i] for i in indices]
        for one, phi in zip(judged, states.double().split([len(one.ends) for one in judged]), strict=True):
            better, worse = torch.tensor(one.comparisons, dtype=torch.int64).view(-1, 2).unbind(1)
            apart = phi[better] - phi[worse]
            total += apart.T @ apart
    return ranks.all_sum(total)


def save_members(job: RewardJob, config: Any, folder: Path) -> None:
    """Every member in its folder, with the statistics of its scores on the reference answers, and what the bound of one
    model needs."""
    assert job.data is not None
    roles = job.backbone.reward_roles
    beside = [f"member_{number}" for number in range(1, len(roles))]
    scores = all_scores(job, config, job.data.references).double().chunk(len(roles), 1)
    about: dict[str, Any] = {"form": job.train[0].form}
    about |= {"step_separator": config.step_separator} if about["form"] == "steps" else {}
    about |= {"ratings": [list(scale) for scale in job.data.scales]} if job.data.scales else {}
    for role, name, part in zip(roles, ["", *beside], scores, strict=True):
        save_adapter(job.backbone, role, str(folder / name))
        outputs = [Output(what, *spread(column)) for what, column in zip(job.outputs, part.unbind(1), strict=True)]
        members = [] if name else beside
        write_stats(folder / name, *spread(part.mean(1)), outputs if len(outputs) > 1 else [], members=members, **about)
    if config.bound:
        write_covariance(folder, covariance(job, config))


def spread(scores: Tensor) -> tuple[float, float]:
    """Mean and standard deviation, which is no less than what a division bears."""
    return float(scores.mean()), float(scores.std().clamp(min=1e-6)) if len(scores) > 1 else 1.0
