"""Learning from the policy's own samples: the loop of rollouts, and the updates that a method's loss makes of one.

A method brings `loss(rows) -> (loss, metrics)`. Both are sums over the rows, divided by the numbers of the whole
minibatch (`Rows.tokens`, `Rows.sequences`), so that micro-batches change nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.data.batches import Batch
from rlhf_fast.data.notes import say
from rlhf_fast.ops.policy.policy_loss import policy_loss
from rlhf_fast.training import ranks
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.constraints import reward_weights_at
from rlhf_fast.training.experience import (
    Experience,
    collect,
    move_reference,
    prompts_of_step,
    rollout_metrics,
    sampler_gap,
    samples_of,
)
from rlhf_fast.training.halving import Parts
from rlhf_fast.training.job import Job, dropout_seed
from rlhf_fast.training.kept import Kept
from rlhf_fast.training.optim import Loss, Terms, accumulate, as_numbers, learning_rate, set_learning_rates, update
from rlhf_fast.training.resampling import resampled
from rlhf_fast.training.run import Run


class Hidden(dict[str | None, Tensor]):
    """Role -> (M, T, D), in a pass of its own when it is asked for: what one role keeps for its backward is gone before
    the next one begins. Of a model in shards all roles are there, from one pass."""

    def __init__(self, of: Callable[[Sequence[str | None]], dict[str | None, Tensor]]) -> None:
        super().__init__()
        self.of = of

    def __missing__(self, role: str | None) -> Tensor:
        self[role] = self.of([role])[role]
        return self[role]


class Rows(NamedTuple):
    """A micro-batch of an experience, as the weights that train see it; M rows of T tokens.

    indices: (M,), its rows of the experience, on the CPU. batch: their tokens. hidden: role -> (M, T, D), of every role
    that trains; see Hidden. logprobs, entropy: (M, T), nats, of the policy. old_logprobs: (M, T), those of the policy
    that sampled; None: the same as logprobs. ref_logprobs: (M, T), the reference's. sampler_logprobs: (M, T), those
    that the sampler itself gave, where `sampler_correction` asks for them. kl: (M, T), the divergence from the
    reference over the whole vocabulary, nats, where the loss has it.
    tokens, sequences: 0-d, what counts in the whole minibatch. idle: see ranks.Part.
    """

    indices: Tensor
    batch: Batch
    hidden: dict[str | None, Tensor]
    logprobs: Tensor
    entropy: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor
    sampler_logprobs: Tensor | None
    kl: Tensor | None
    tokens: Tensor
    sequences: Tensor
    idle: bool = False

    @property
    def mask(self) -> Tensor:
        """(M, T): 1 for the sampled tokens."""
        return self.batch.mask


def experiences(
    job: Job,
    config: RolloutConfig,
    run: Run,
    *,
    exact_kl: bool = False,
    sample: Callable[..., Experience] = collect,
) -> Iterator[tuple[int, Experience]]:
    """For each step, with the learning rates set, the completions of its prompts, scored. sample: as `collect`."""
    for step in run.steps():
        set_learning_rates(job, config, step)
        if config.final_reward_weights is not None:
            assert job.rewards is not None
            job.rewards.reweigh(reward_weights_at(config, step))
        more = partial(
            sample,
            job,
            config,
            score_policy=config.scores_policy,
            exact_kl=exact_kl,
            collisions=config.needs_collisions,
        )
        compared = step == run.start == 0
        experience = more(prompts_of_step(job, config, step), keep_sampler=config.sampler_correction or compared)
        told = (
            sampler_gap(job, config, experience.rollout) if compared and experience.rollout.sampler is not None else {}
        )
        if config.max_resamples:
            more = partial(more, keep_sampler=config.sampler_correction)
            experience = resampled(job, config, step, experience, more)
        experience = replace(experience, metrics=experience.metrics | told)
        if config.mask_truncated_completions and not experience.rollout.finished.any():
            say("mask_truncated_completions: no completion of a step was finished, and so nothing was learnt from it")
        yield step, constrained(job, experience)


def constrained(job: Job, experience: Experience) -> Experience:
    """The multipliers move by the experience's costs, and it is paid less for them."""
    metrics = {} if job.constraints is None else job.constraints.ascend(experience.costs)
    return replace(paid(job, experience), metrics=experience.metrics | metrics)


def paid(job: Job, experience: Experience) -> Experience:
    """With its rewards less its costs, by the multipliers as they are."""
    if job.constraints is None:
        return experience
    rewards, steps = job.constraints.paid(experience.rewards, experience.costs), experience.steps
    if steps is not None:
        steps = steps._replace(rewards=job.constraints.scaled(steps.rewards))
    return replace(experience, rewards=rewards, steps=steps)


def reward_kl(job: Job, experience: Experience, variant: str = "k1") -> tuple[float, Tensor]:
    """(weight, (B, T)): the KL penalty in the reward; 0 where it has no weight, since then the policy need not be
    scored yet."""
    assert job.kl_controller is not None
    weight = job.kl_controller.coefficient
    return weight, experience.kl_by(variant) if weight else torch.zeros_like(experience.scores.ref_logprobs)


def net_rewards(job: Job, config: RolloutConfig, experience: Experience) -> Tensor:
    """(B,): the clipped reward of each completion less its KL penalty."""
    weight, kl = reward_kl(job, experience)
    return clipped(config, experience.rewards) - weight * kl.sum(1)


def clipped(config: RolloutConfig, rewards: Tensor) -> Tensor:
    """Within `reward_clip`."""
    return rewards if config.reward_clip is None else rewards.clamp(-config.reward_clip, config.reward_clip)


def improve(
    job: Job,
    config: RolloutConfig,
    experience: Experience,
    loss: Loss[Any] | Terms[Any],
    *,
    beside: Callable[[int], tuple[Loss[Any], Iterable[Any]]] | None = None,
    rows_of: Callable[..., Iterable[Any]] | None = None,
) -> dict[str, float]:
    """The epochs of minibatches over the experience, an update each; metrics averaged over the updates.

    beside: given a minibatch's number of rows, what is learnt beside it; see `accumulate`.
    rows_of: makes what the loss is given of a minibatch, as `micro_batches` does, which is the default.
    """
    history = []

    def minibatch(parts: tuple[Tensor, ...]) -> dict[str, float]:
        rows = (rows_of or micro_batches)(job, config, experience, parts, kept=job.kept)
        metrics = accumulate(loss, rows, job.kept, beside=beside and beside(sum(map(len, parts))))
        norms = update(job, config, metrics["loss"])
        return {**as_numbers(metrics), **norms}

    for _ in range(config.ppo_epochs):
        for parts in minibatches(config, len(experience.batch)):
            history.append(one_of_several(job, config, experience, partial(minibatch, parts)))
        if config.early_stop_kl is not None and history[-1]["approx_kl"] > config.early_stop_kl:
            break
    means = {name: sum(metrics[name] for metrics in history) / len(history) for name in history[0]}
    return means | first_ratio_error(history[0])


def one_of_several(
    job: Job, config: RolloutConfig, experience: Experience, make: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """The metrics of an update, which a step that is done again does not make again."""
    if job.kept is None or config.ppo_epochs * config.num_minibatches == 1:
        return make()

    scored = experience.scores.logprobs is not None

    def made() -> dict[str, Any]:
        metrics, logprobs = make(), experience.scores.logprobs
        return {"metrics": metrics, "logprobs": None if scored or logprobs is None else logprobs.cpu()}

    kept = job.kept.update(made)
    if not scored:
        experience.scores = replace(experience.scores, logprobs=kept["logprobs"].to(job.device))
    return kept["metrics"]


def first_ratio_error(metrics: dict[str, float]) -> dict[str, float]:
    """How far a ratio of the first minibatch is from 1, which it should be: no step was made yet. None where the loss
    has no ratios or counts no token."""
    if not metrics.get("ratio_max"):
        return {}
    return {"first_ratio_error": max(abs(metrics[name] - 1) for name in ("ratio_max", "ratio_min"))}


def minibatches(config: RolloutConfig, size: int) -> Iterator[tuple[Tensor, ...]]:
    """One epoch over `size` shuffled rows: for each minibatch, its micro-batches' row indices.

    Within a minibatch they are in order, so that completions of one prompt, which follow each other, share its pass.
    """
    for rows in torch.randperm(size).chunk(config.num_minibatches):
        rows = rows if config.compares_rows else rows.sort().values
        yield rows.split(config.micro_batch_size or len(rows))


def micro_batches(
    job: Job, config: RolloutConfig, experience: Experience, parts: tuple[Tensor, ...], *, together: int = 1,
    kept: Kept | None = None,
) -> Parts[Tensor, Rows]:  # fmt: skip
    """The rows `parts` of a minibatch, those of this process, each after a forward pass of every role that trains.

    together: see `own_parts`. kept: what has done some of them before.
    Where the policy was not scored, the experience keeps the log-probabilities of its first minibatch.
    """
    batch, backbone, learnt = experience.batch, job.backbone, experience.learnt(config)
    mask = learnt[torch.cat(parts)]
    tokens, sequences = mask.sum(), mask.any(1).sum()
    sampler = experience.rollout.sampler if config.sampler_correction else None
    roles = [role for role in job.optimizers if role in backbone.adapters]  # the others are heads on theirs
    own: list[tuple[Tensor, Tensor]] = []

    def make(indices: Tensor, idle: bool) -> Rows:
        part = batch.rows(indices)
        lower = None if experience.lower is None else experience.lower[indices]
        seed = dropout_seed(job, config)
        hidden = Hidden(lambda some: backbone.hidden(
            part.input_ids, part.attention_mask, some, lower=lower, dropout_seed=seed
        ))  # fmt: skip
        if backbone.shards is not None:
            hidden.update(hidden.of(roles))
        kl, logprobs, entropy = predictions(job, config, hidden["policy"], part, experience.scores.ref_hidden, indices)
        return Rows(
            indices, replace(part, mask=learnt[indices]), hidden, logprobs, entropy, experience.old_logprobs(indices),
            experience.scores.ref_logprobs[indices], None if sampler is None else sampler.logprobs[indices], kl,
            tokens, sequences, idle,
        )  # fmt: skip

    def made() -> list[tuple[Tensor, Tensor]]:
        """Of the first minibatch, where the policy was not scored."""
        return own if kept is None else kept.logprobs

    def scored(rows: Rows) -> None:
        if not rows.idle and experience.scores.logprobs is None:
            made().append((rows.indices, rows.logprobs.detach()))

    return Parts(
        job, "update", partial(own_parts, batch, parts, together=together, whole=config.compares_rows), make,
        together=together, whole=config.compares_rows, before=None if kept is None else kept.before,
        learnt=scored, end=lambda: experience.keep_logprobs(made()),
    )  # fmt: skip


def own_parts(
    batch: Batch, parts: Sequence[Tensor], *, together: int = 1, whole: bool = False
) -> Sequence[tuple[Tensor, bool]]:
    """(rows, idle) of this process's micro-batches, no larger than the first of `parts`, which are all of a minibatch.

    together: so many rows in a row are a unit, and stay so; of a micro-batch come the first rows of all its units, then
    the second ones, and so on. whole: the `parts` stay as they are, each in one process.
    """
    rows = torch.cat(tuple(parts))
    if ranks.world() == 1:
        own = [(part, False) for part in parts]
    else:
        lengths = batch.attention_mask.sum(1).cpu()[rows].tolist()
        dealt = ranks.share(lengths, size=len(parts[0]), together=len(parts[0]) if whole else together)
        own = [(rows[torch.tensor(part.rows)], part.idle) for part in dealt]
    return [(part.view(-1, together).T.flatten(), idle) for part, idle in own]


def predictions(
    job: Job, config: RolloutConfig, hidden: Tensor, part: Batch, ref_hidden: Tensor | None, indices: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(the loss's divergence from the reference or None, log-probabilities, entropy), (M, T) each, of the policy.

    ref_hidden: of all rows of the experience, of which `part` has those at `indices`.
    """
    of_tokens: dict[str, Any] = {
        "mask_count": part.count, "temperature": config.temperature, "return_entropy": True,
    }  # fmt: skip
    variant = config.loss_kl
    if variant is None:
        return None, *job.backbone.logprobs(hidden, part.input_ids, part.mask, **of_tokens)
    if ref_hidden is None:  # of several processes, which make them anew
        with torch.no_grad():
            theirs = job.backbone.hidden(part.input_ids, part.attention_mask, ["reference"])["reference"]
    else:
        theirs = ref_hidden[indices]
    kl, logprobs, _, entropy = job.backbone.divergence(
        hidden, theirs, part.input_ids, part.mask, variant=variant, **of_tokens
    )
    assert logprobs is not None
    assert entropy is not None
    return kl, logprobs, entropy


def policy_term(config: RolloutConfig, rows: Rows, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """policy_loss of the rows, whose advantages are (M, T) or (M,)."""
    return policy_loss(
        rows.logprobs, rows.old_logprobs, advantages, objective=config.objective, mask=rows.mask,
        ref_logprobs=rows.ref_logprobs, sampler_logprobs=rows.sampler_logprobs, entropy=rows.entropy, kl=rows.kl,
        denominator=rows.tokens, sequences=rows.sequences,
    )  # fmt: skip


def finish_step(
    job: Job,
    config: RolloutConfig,
    run: Run,
    step: int,
    experience: Experience,
    metrics: dict[str, float],
    *,
    moved: bool = True,
) -> None:
    """Record the step; where the policy `moved`, what follows it does: the weight of the KL penalty, its moving average
    and the reference."""
    metrics = {**metrics, **rollout_metrics(experience), "learning_rate": learning_rate(config, step)}
    assert job.kl_controller is not None
    if moved:
        job.kl_controller.update(metrics["kl"], config.batch_size)
        if config.policy_ema is not None:
            job.backbone.lerp_adapter("ema", "policy", 1.0 - config.policy_ema)
        move_reference(job, config, step)
    metrics["kl_coef"] = job.kl_controller.coefficient
    run.samples(step, samples_of(experience, 2))
    run.log(step, metrics, tokens=int(experience.batch.attention_mask.sum()))
