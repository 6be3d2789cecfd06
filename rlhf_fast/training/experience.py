"""Sampled completions with everything the update needs: log-probabilities, values, rewards; and their evaluation."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import signals
from rlhf_fast.data.batches import Batch, pad_batch, shuffled_indices
from rlhf_fast.data.encoding import Example, Prompt
from rlhf_fast.models.backbone import Scores
from rlhf_fast.ops.tokens.kl_estimate import kl_estimate
from rlhf_fast.rewards import Judged, Payment, Rewards
from rlhf_fast.rollout import Drawing, Rollout, agreement, roll_out, token_that_ends
from rlhf_fast.training import ranks as processes
from rlhf_fast.training.config import RolloutConfig, SamplingConfig
from rlhf_fast.training.engine import engine_of
from rlhf_fast.training.halving import in_passes
from rlhf_fast.training.job import Job, random_state, seed_everything, set_random_state
from rlhf_fast.training.joined import joined, on_device
from rlhf_fast.training.kept import keep
from rlhf_fast.training.ranks import Part


class StepRewards(NamedTuple):
    """What sources pay inside of completions.

    rewards: (B, T) fp32, 0 where nothing is paid. ends: (B, T) bool, True for the tokens that end a step, also one that
    is paid 0; where tokens are paid, for all of them.
    """

    rewards: Tensor
    ends: Tensor


@dataclass
class Experience:
    """A rollout and its scores.

    lower: (B, T, D), the input of the first adapted layer, or None when that is the first layer.
    scores: log-probabilities (B, T) of policy and reference, values (B, T) or None. Those of the policy are None until
    the first minibatch where `collect` leaves them to it.
    rewards: (B,) fp32, the weighted sum of the sources, of all their steps, less the penalties for length. parts: each
    source's scores. steps: what of the rewards is paid before the end; None where no source pays there.
    costs: (B,) of each constraint, by name. judged: (B,), the rewards before a step takes the costs off them.
    metrics: what making it told.
    """

    rollout: Rollout
    lower: Tensor | None
    scores: Scores
    rewards: Tensor
    parts: dict[str, Tensor]
    steps: StepRewards | None = None
    costs: dict[str, Tensor] = field(default_factory=dict)
    judged: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.judged is None:
            self.judged = self.rewards

    @property
    def final_rewards(self) -> Tensor:
        """(B,): what is paid at the last token: the rewards less those of the steps."""
        return self.rewards if self.steps is None else self.rewards - self.steps.rewards.sum(1)

    @property
    def batch(self) -> Batch:
        """(B, T): prompts and completions; the mask marks the sampled tokens."""
        return self.rollout.batch

    def learnt(self, config: RolloutConfig) -> Tensor:
        """(B, T): the mask of the tokens that the loss counts."""
        if not config.mask_truncated_completions:
            return self.batch.mask
        return self.batch.mask * self.rollout.finished.to(self.batch.mask)[:, None]

    @property
    def kl(self) -> Tensor:
        """(B, T): KL to the reference, k1 unless the exact one was asked for, 0 behind the mask."""
        return self.kl_by("k1" if self.scores.kl is None else "exact")

    def kl_by(self, variant: str) -> Tensor:
        """(B, T): the estimate k1, k2 or k3 of it, or the exact one."""
        if variant == "exact":
            assert self.scores.kl is not None  # where `collect` was asked for it
            return self.scores.kl
        assert self.scores.logprobs is not None  # after the first minibatch
        return kl_estimate(self.scores.logprobs, self.scores.ref_logprobs, variant=variant)

    def old_logprobs(self, rows: Tensor) -> Tensor | None:
        """(rows, T), those of the policy that sampled; None in the minibatch that makes them."""
        return None if self.scores.logprobs is None else self.scores.logprobs[rows]

    def keep_logprobs(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Where the policy was not scored: those of the first minibatch, (rows, log-probabilities) of micro-batches.

        Raises ValueError where these are not all rows: the others would be scored by newer weights than sampled them.
        """
        if self.scores.logprobs is None:
            made = processes.in_order(parts)
            if len(made) != len(self.rewards):
                raise ValueError(f"the policy was not scored, and the first minibatch has {len(made)} rows, "
                                 f"not all {len(self.rewards)}")  # fmt: skip
            self.scores = replace(self.scores, logprobs=made.to(self.rewards.device))


def prompts_of_step(job: Job, config: RolloutConfig, step: int) -> list[Prompt]:
    """The step's prompts in the shuffled order, each num_generations times in a row."""
    count = config.batch_size // config.num_generations
    return next_prompts(job, config, step * count + int(job.counters.get("extra_prompts", 0)), count)


def next_prompts(job: Job, config: RolloutConfig, start: int, count: int) -> list[Prompt]:
    """Those from `start` of the endless shuffled order, each num_generations times in a row."""
    indices = shuffled_indices(len(job.train), config.order_seed, start, count)
    return [job.train[i] for i in indices for _ in range(config.num_generations)]


def collect(
    job: Job,
    config: SamplingConfig,
    prompts: Sequence[Prompt],
    *,
    score_policy: bool = True,
    keep_sampler: bool = False,
    exact_kl: bool = False,
    collisions: bool = False,
    mixture: float = 0.0,
    ranks: bool = False,
    drawing: Drawing | None = None,
) -> Experience:
    """Sample a completion for each prompt and score all roles in one traversal (micro_batch_size rows at a time).

    score_policy: False leaves the policy's log-probabilities to the first minibatch, which must have all rows: its
    weights are still those that sampled. keep_sampler: the rollout has the sampler's log-probabilities, which are the
    policy's where they are, to rounding, those of a scoring pass. exact_kl: the experience's KL is over the whole
    vocabulary. collisions: the scores have them. mixture: the weight of the reference in what samples. ranks: also the
    sampled tokens' ranks by the reference. drawing: what draws the tokens in the policy's place.
    """
    sampler_scores = job.sampler_scores and not (exact_kl or collisions or mixture) and drawing is None
    early = any(rewards.early for rewards in judges_of(job))
    own = own_prompts(prompts)
    asked = [prompts[row] for row in own.rows]
    rollout = roll_out(
        job.backbone, job.encoder.tokenizer, asked, max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, rows_per_pass=config.rollout_rows,
        chunk=config.rollout_chunk, keep=partial(keep, job),
        keep_logprobs=keep_sampler or (score_policy and sampler_scores),
        on_finished=(lambda row, *of_row: submit(job, row, asked[row], *of_row)) if early else None,
        mixture=mixture, drawing=drawing, row_ids=own.rows, engine=engine_of(job, config),
    )  # fmt: skip
    with everyone_alike(job):
        by_pass = score_policy and not sampler_scores
        experience = judge(job, config, rollout, score_policy=by_pass, exact_kl=exact_kl, ranks=ranks)
    if score_policy and sampler_scores:
        assert rollout.sampler is not None
        experience.scores = replace(experience.scores, logprobs=rollout.sampler.logprobs)
    return gathered(experience, prompts, own)


def own_prompts(prompts: Sequence[Prompt]) -> Part:
    """This process's share; the completions of one prompt, which follow each other, stay together."""
    together = math.gcd(*(len(list(same)) for _, same in groupby(prompts, key=id)))
    (part,) = processes.share([len(prompt.ids) for prompt in prompts], together=together)
    return part


@contextmanager
def everyone_alike(job: Job) -> Iterator[None]:
    """What differs between processes inside does not outside: random states, and the requests that a judge sent."""
    if processes.world() == 1:
        yield
        return
    assert job.rewards is not None
    state, calls = random_state(), job.rewards.judge_calls
    with signals.apart() if job.backbone.shards is None else nullcontext():
        yield
    set_random_state(state)
    job.rewards.judge_calls = calls + int(processes.all_sum(torch.tensor(job.rewards.judge_calls - calls)))


def gathered(experience: Experience, prompts: Sequence[Prompt], own: Part) -> Experience:
    """The experience of all `prompts`, of which this process has made the rows `own`.

    What is large, the hidden states, is left where it is and computed anew when it is needed.
    """
    if processes.world() == 1:
        return experience
    rollout = replace(experience.rollout, prompts=[], batch=experience.batch.packed())
    scores = replace(experience.scores, ref_hidden=None)
    small = replace(experience, lower=None, scores=scores, rollout=rollout)
    made = processes.all_gather_objects(None if own.idle else (own.rows, on_device(small, "cpu")))
    found, order = [], []
    for rows, part in filter(None, made):
        known = replace(part.rollout, prompts=[prompts[row] for row in rows], batch=part.batch.unpacked())
        found.append(replace(part, rollout=known))
        order += rows
    whole = joined(alike_in_steps(*found), [torch.arange(len(part.rewards)) for part in found])
    whole = joined([whole], [torch.tensor(order).argsort()])
    metrics = {name: sum(part.metrics[name] for part in found) / len(found) for name in found[0].metrics}
    return replace(on_device(whole, alike_in_steps(whole, small)[1]), metrics=metrics)


def rescored(
    job: Job, config: SamplingConfig, experience: Experience, prompts: Sequence[Prompt], examples: Sequence[Example]
) -> Experience:
    """The experience with `examples`, which answer `prompts`, in the place of its rows: scored anew, and paid as these
    were."""
    own = own_prompts(prompts)
    part: Experience = joined([experience], [torch.tensor(own.rows)])
    batch = pad_batch([examples[row] for row in own.rows], job.encoder.pad_id).to(job.device)
    rollout = replace(part.rollout, prompts=[prompts[row] for row in own.rows], batch=batch, sampler=None)
    lower, scores = score(job, config, rollout)
    return gathered(replace(part, rollout=rollout, lower=lower, scores=scores), prompts, own)


def alike_in_steps(*experiences: Experience) -> list[Experience]:
    """Where a source pays inside of the completions of one, all have steps; those of the others pay nothing."""
    if all(experience.steps is None for experience in experiences):
        return list(experiences)
    masks = [experience.batch.mask for experience in experiences]
    none = [StepRewards(torch.zeros_like(mask, dtype=torch.float32), torch.zeros_like(mask).bool()) for mask in masks]
    return [replace(e, steps=e.steps or zeros) for e, zeros in zip(experiences, none, strict=True)]


def judges_of(job: Job) -> list[Rewards]:
    """The rewards, and the costs where there are any."""
    assert job.rewards is not None
    return [job.rewards, *([] if job.constraints is None else [job.constraints.sources])]


def submit(job: Job, row: int, prompt: Prompt, completion: str, ids: list[int]) -> None:
    """Give a completion to the sources that can judge it while others are sampled or scored."""
    for rewards in judges_of(job):
        rewards.submit(row, completion, {**prompt.columns, "completion_ids": ids})


def judge(
    job: Job, config: SamplingConfig, rollout: Rollout, *, score_policy: bool = True, exact_kl: bool = False,
    ranks: bool = False,
) -> Experience:  # fmt: skip
    """The scores and rewards of completions that are there."""
    assert job.rewards is not None
    completion_ids = rollout.completion_ids()
    for row, of_row in enumerate(zip(rollout.prompts, rollout.completions, completion_ids, strict=True)):
        submit(job, row, *of_row)  # those that had no end
    lower, scores = score(job, config, rollout, policy=score_policy, exact_kl=exact_kl, ranks=ranks)
    columns = rollout.columns() | {"completion_ids": completion_ids}
    asked = [p.columns["prompt"] for p in rollout.prompts], rollout.completions, columns
    judged = paid_by(job, job.rewards, asked, scores.scores, scores.features)
    total = judged.total - penalties(config, rollout)
    steps = None if judged.payments is None else placed(job, rollout, judged.payments)
    costs = {}
    if job.constraints is not None:
        paid = paid_by(job, job.constraints.sources, asked, scores.costs)
        costs = job.constraints.measured(paid.parts, judged.parts)
    metrics = keep(job, "metrics", job.rewards.metrics)
    return Experience(rollout, lower, scores, total.to(job.device), judged.parts, steps, costs, metrics=metrics)


def paid_by(job: Job, rewards: Rewards, asked: tuple[Any, ...], *states: Tensor | None) -> Judged:
    """What the sources pay. asked: prompts, completions and columns; states: what the roles give the adapter's."""

    def made() -> dict[str, Any]:
        judged = rewards(*asked, *states)
        payments = None if judged.payments is None else [list(map(tuple, row)) for row in judged.payments]
        return {"total": judged.total, "parts": judged.parts, "payments": payments, "judge_calls": rewards.judge_calls}

    kept = keep(job, "rewards", made)
    rewards.judge_calls = kept["judge_calls"]
    payments = kept["payments"]
    paid = None if payments is None else [[Payment(*payment) for payment in row] for row in payments]
    return Judged(kept["total"], kept["parts"], paid)


def penalties(config: SamplingConfig, rollout: Rollout) -> Tensor:
    """(B,) on the CPU: what an unfinished completion loses, and one that reaches into the overlong buffer (the soft
    overlong punishment of DAPO, arXiv 2503.14476, eq. 13)."""
    penalty = config.missing_eos_penalty * (~rollout.finished).float()
    if config.overlong_tokens is None:
        return penalty
    beyond = rollout.batch.counts - (config.max_new_tokens - config.overlong_tokens)
    return penalty + config.overlong_penalty * (beyond / config.overlong_tokens).clamp(0, 1)


def placed(job: Job, rollout: Rollout, payments: Sequence[Sequence[Payment]]) -> StepRewards:
    """The payments at their tokens; several at one token add up."""
    rewards = torch.zeros(rollout.batch.mask.shape)
    ends = torch.zeros(rollout.batch.mask.shape, dtype=torch.bool)
    for row, (prompt, ids, paid) in enumerate(zip(rollout.prompts, rollout.completion_ids(), payments, strict=True)):
        first = int(rollout.batch.mask[row].argmax())
        for reward, token, end in paid:
            if token is None:
                token = token_that_ends(job.encoder.tokenizer, prompt, ids, rollout.completions[row][:end])
            rewards[row, first + token] += reward
            ends[row, first + token] = True
    return StepRewards(rewards.to(job.device), ends.to(job.device))


def sampler_gap(job: Job, config: SamplingConfig, rollout: Rollout) -> dict[str, float]:
    """How far the sampler's log-probabilities are from scored ones, and what rounding may make of it, in nats per
    token: of whole completions, those that have the most padding on the left."""
    assert rollout.sampler is not None
    shortest = torch.tensor([len(p.ids) for p in rollout.prompts]).argsort(stable=True)
    size = config.micro_batch_size or len(shortest)
    rows = shortest[: min(size, job.most_rows.get("scoring", size))]
    sampler = replace(rollout.sampler, logprobs=rollout.sampler.logprobs[rows], drawn=rollout.sampler.drawn[rows])
    comparison = agreement(job.backbone, rollout.batch.rows(rows), sampler, config.temperature)
    return {"sampler_gap": comparison.gap, "sampler_gap_limit": comparison.bar}


def score(
    job: Job,
    config: SamplingConfig,
    rollout: Rollout,
    *,
    policy: bool = True,
    exact_kl: bool = False,
    ranks: bool = False,
) -> tuple[Tensor | None, Scores]:
    """The unadapted layers' output, computed once, and the scores of every role, in passes of few rows."""
    batch = rollout.batch
    size = config.micro_batch_size or len(batch)
    shared = job.backbone.shards is not None

    def scores_of(start: int, size: int) -> tuple[Tensor | None, Scores]:
        rows = batch.rows(slice(start, start + size))
        lower = job.backbone.lower(rows.input_ids, rows.attention_mask)
        scored = partial(
            job.backbone.score, rows.input_ids, rows.attention_mask, rows.mask, mask_count=rows.count,
            temperature=config.temperature, lower=lower, policy=policy, exact_kl=exact_kl, ranks=ranks,
            ref_hidden=config.loss_kl is not None and processes.world() == 1,
        )  # fmt: skip
        # Hidden states are larger than what is worth keeping.
        what = f"scores {start} of {size}"
        scores = scored() if config.loss_kl is not None else kept_scores(job, what, scored, together=shared)
        signals.heed()
        return lower, scores

    made = list(in_passes(job, "scoring", len(batch), size, scores_of))
    for _ in range(job.backbone.idle_passes(len(made))):
        scores_of(0, size)
    lowers, passes = zip(*made, strict=True)
    joined: dict[str, Any] = {f.name: _joined([getattr(p, f.name) for p in passes]) for f in fields(Scores)}
    return _joined(lowers), Scores(**joined)


def kept_scores(job: Job, what: str, make: Callable[[], Scores], *, together: bool) -> Scores:
    """One pass of scoring; a step that is done again reads it."""
    if job.kept is None:
        return make()
    kept: dict[str, Any] = job.kept(
        what, lambda: {name: None if x is None else x.cpu() for name, x in vars(make()).items()}, together=together
    )
    placed: dict[str, Any] = {name: None if x is None else x.to(job.device) for name, x in kept.items()}
    return Scores(**placed)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The rows of all passes; None for what no pass has."""
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def move_reference(job: Job, config: RolloutConfig, step: int) -> None:
    """Refresh the reference from the policy where the config says so."""
    if config.reference_ema is not None:
        job.backbone.lerp_adapter("reference", "policy", 1.0 - config.reference_ema)
    if config.reference_refresh_every is not None and (step + 1) % config.reference_refresh_every == 0:
        job.backbone.copy_adapter("policy", "reference")


def rollout_metrics(experience: Experience) -> dict[str, float]:
    """Means over the batch: reward, KL per completion (nats), length (tokens), share that was finished, share of
    repeated 4-grams; and the correlation of rewards with lengths."""
    assert experience.judged is not None
    lengths = experience.batch.counts.float()
    metrics: dict[str, Tensor | float] = {
        "reward": experience.judged.mean(),
        "reward_std": experience.judged.std(correction=0),
        "kl": experience.kl.sum(1).mean(),
        "completion_length": lengths.mean(),
        "length_correlation": correlation_of(experience.judged.cpu(), lengths),
        "finished": experience.rollout.finished.float().mean(),
        "repetition": repetition_of(experience.rollout.completion_ids()),
    }
    return as_judged(experience, metrics) | experience.metrics


def as_judged(experience: Experience, metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """The metrics on the host, without those of the reward where nothing judges; of several sources also each one's."""
    if len(experience.parts) > 1:
        metrics = {**metrics, **{f"reward/{name}": scores.mean() for name, scores in experience.parts.items()}}
    return {n: float(value) for n, value in metrics.items() if experience.parts or not n.startswith("reward")}


def correlation_of(x: Tensor, y: Tensor) -> Tensor:
    """(B,), (B,) -> (): Pearson's; 0 where one does not vary."""
    x, y = x.float() - x.float().mean(), y.float() - y.float().mean()
    spread = x.norm() * y.norm()
    return (x * y).sum() / spread if spread > 0 else torch.zeros(())


def repetition_of(completions: Sequence[Sequence[int]], n: int = 4) -> float:
    """Mean over the completions of the share of their n-grams of tokens that occurred earlier in the same one."""
    shares = []
    for ids in completions:
        grams = list(zip(*(ids[i:] for i in range(n)), strict=False))
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)


def token_shift(ranks: Tensor) -> dict[str, Tensor | float]:
    """Shares of the sampled tokens that are the reference's likeliest (unshifted), its second or third (marginal), and
    less likely ones (shifted): Lin et al. 2023 (arXiv 2312.01552, section 2.2), there of greedy decoding.

    ranks: (B, T), 0 for what does not count.
    """
    counted = ranks[ranks > 0]
    kinds = {"unshifted": counted == 1, "marginal": (counted == 2) | (counted == 3), "shifted": counted > 3}
    return {f"tokens_{name}": kind.float().mean() for name, kind in kinds.items()}


def samples_of(experience: Experience, count: int) -> list[dict[str, Any]]:
    """The first `count` completions, as the run folder keeps them."""
    rollout = experience.rollout
    assert experience.judged is not None
    return [
        {"prompt": p.text, "completion": c, "reward": float(r)}
        for p, c, r, _ in zip(rollout.prompts, rollout.completions, experience.judged, range(count), strict=False)
    ]


def evaluate_policy(
    job: Job, config: SamplingConfig, prompts: Sequence[Prompt], *, drawing: Drawing | None = None
) -> dict[str, Any]:
    """Sample held-out prompts with a seed of their own: mean and standard error of reward and KL, and samples.

    The training run's random states are left as they were. A policy that passes the test of its costs is kept as the
    adapter 'safe'.
    """
    if isinstance(config, RolloutConfig) and config.final_reward_weights is not None:
        assert job.rewards is not None
        job.rewards.reweigh(config.final_reward_weights)  # so that evaluations compare
    with separate_randomness(config.seed + 1):
        experience = collect(job, config, prompts, ranks=True, drawing=drawing)
    kl = experience.kl.sum(1)
    root = len(kl) ** 0.5
    metrics: dict[str, Tensor | float] = {
        "reward": experience.rewards.mean(),
        "reward_se": experience.rewards.std(correction=1 if len(kl) > 1 else 0) / root,
        "kl": kl.mean(),
        "kl_se": kl.std(correction=1 if len(kl) > 1 else 0) / root,
        "completion_length": experience.batch.counts.float().mean(),
        "finished": experience.rollout.finished.float().mean(),
        "repetition": repetition_of(experience.rollout.completion_ids()),
    }
    assert experience.scores.ref_ranks is not None
    metrics |= token_shift(experience.scores.ref_ranks)
    numbers = as_judged(experience, metrics) | experience.metrics
    if job.constraints is not None:
        numbers |= job.constraints.tested(experience.costs)
        if numbers.get("cost_passed"):
            job.backbone.copy_adapter("policy", "safe")
            job.counters["passed"] = 1
    return {"metrics": numbers, "samples": samples_of(experience, 5)}


@contextmanager
def separate_randomness(seed: int) -> Iterator[None]:
    """Every generator is seeded inside and put back after."""
    state = random_state()
    seed_everything(seed)
    try:
        yield
    finally:
        set_random_state(state)
