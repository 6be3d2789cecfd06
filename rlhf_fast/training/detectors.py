"""What goes wrong in a run that learns from its own samples, seen in its metrics, each with the name of its cause.

A detector is a function of the history: the metrics of the first steps, of the last ones, and the evaluations. It says
what it saw, or nothing; a run tells each cause once. `LIMITS` has every number. They are bars that a healthy run stays
far from, chosen by hand; what each catches and what to try is in `DETECTORS`.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import StatisticsError, correlation, fmean, stdev
from typing import Any, NamedTuple


class Limits(NamedTuple):
    """When a detector speaks. Means are over `window` steps; the start is the first `window` steps of the run."""

    window: int = 10
    length_change: float = 1.3  # times the start, or one over it
    length_correlation: float = 0.7  # with the reward, over the steps or inside the batches
    repetition: float = 0.3  # share of 4-grams that a completion had before
    repetition_rise: float = 0.15  # above the start
    kl: float = 10.0  # nats per completion
    kl_growth: float = 2.0  # times the window before
    standard_errors: float = 2.0  # of a reward that fell
    entropy_share: float = 0.2  # of the start
    equal_groups: float = 0.8
    clip_fraction: float = 0.3
    clip_ratio: float = 1.1  # a largest ratio below it never meets a bound
    sampler_kl: float = 0.01  # nats per token
    finished_fall: float = 0.25  # below the start


LIMITS = Limits()
Row = Mapping[str, float]


class Sight(NamedTuple):
    """What a detector saw: the number that passed its limit, and a sentence with it."""

    value: float
    text: str


@dataclass
class History:
    """The metrics that detectors look at.

    first: the steps of the start. last: the newest steps, three windows of them. evaluations: the metrics of each, and
    under `trained` the mean reward of the window before it, where there was one.
    """

    limits: Limits = LIMITS
    first: list[Row] = field(default_factory=list)
    last: deque[Row] = field(default_factory=deque)
    evaluations: list[dict[str, float]] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """The metrics of a step."""
        if len(self.first) < self.limits.window:
            self.first.append(row)
        self.last.append(row)
        if len(self.last) > 3 * self.limits.window:
            self.last.popleft()

    def add_evaluation(self, metrics: Row) -> None:
        now = self.now("reward")
        self.evaluations.append({**metrics, **({} if now is None else {"trained": fmean(now)})})

    def start(self, name: str) -> float | None:
        """The mean of a metric over the start; None where the start is not over, or it is not there."""
        known = _values(self.first, name)
        enough = len(self.first) == self.limits.window and len(self.last) > self.limits.window and known
        return fmean(known) if enough else None

    def now(self, name: str, *, windows: int = 1, before: int = 0) -> list[float] | None:
        """A metric of the last windows, less the `before` windows behind them; None unless every step has it."""
        size = self.limits.window
        rows = list(self.last)[: len(self.last) - before * size][-windows * size :]
        known = _values(rows, name)
        return known if len(known) == windows * size else None


def _values(rows: Iterable[Row], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


def length_drift(history: History) -> Sight | None:
    """Lengths leave those of the start, and the reward goes with them."""
    lengths, rewards = history.now("completion_length", windows=2), history.now("reward", windows=2)
    start, reward_start = history.start("completion_length"), history.start("reward")
    if lengths is None or rewards is None or not start or reward_start is None:
        return None
    size = history.limits.window
    length, reward = fmean(lengths[-size:]), fmean(rewards[-size:])
    inside = fmean(history.now("length_correlation") or [0.0])
    together = max(_correlation(lengths, rewards), inside, key=abs)
    grows = length >= history.limits.length_change * start and together >= history.limits.length_correlation
    shrinks = length * history.limits.length_change <= start and together <= -history.limits.length_correlation
    if reward <= reward_start or not (grows or shrinks):
        return None
    return Sight(length, f"completions went from {start:.3g} to {length:.3g} tokens while the reward rose from "
                 f"{reward_start:.3g} to {reward:.3g}; correlation {together:.2f}")  # fmt: skip


def repetition(history: History) -> Sight | None:
    """Completions say again what they have said."""
    start, now = history.start("repetition"), history.now("repetition")
    if start is None or now is None:
        return None
    share = fmean(now)
    if share < max(history.limits.repetition, start + history.limits.repetition_rise):
        return None
    return Sight(share, f"{share:.0%} of the 4-grams of a completion repeat an earlier one, {start:.0%} at the start")


def kl_explosion(history: History) -> Sight | None:
    """The reward rises by leaving the reference fast."""
    pairs = [(history.now(name), history.now(name, before=1)) for name in ("kl", "reward")]
    if any(part is None for pair in pairs for part in pair):
        return None
    (kl, kl_before), (reward, reward_before) = ((fmean(now or []), fmean(then or [])) for now, then in pairs)
    if kl < max(history.limits.kl, history.limits.kl_growth * kl_before) or reward <= reward_before:
        return None
    return Sight(kl, f"KL to the reference went from {kl_before:.3g} to {kl:.3g} nats per completion in "
                 f"{history.limits.window} steps, and the reward from {reward_before:.3g} to {reward:.3g}")  # fmt: skip


def held_out_falls(history: History) -> Sight | None:
    """The held-out reward is below its best while the reward in training is not below what it was then."""
    known = [metrics for metrics in history.evaluations if {"reward", "trained"} <= metrics.keys()]
    if len(known) < 2:
        return None
    best, now = max(known, key=lambda metrics: metrics["reward"]), known[-1]
    error = (best.get("reward_se", 0.0) ** 2 + now.get("reward_se", 0.0) ** 2) ** 0.5
    fall = best["reward"] - now["reward"]
    if fall <= history.limits.standard_errors * error or now["trained"] < best["trained"] or now is best:
        return None
    return Sight(now["reward"], f"the held-out reward fell from {best['reward']:.3g} to {now['reward']:.3g} while that "
                 f"in training went from {best['trained']:.3g} to {now['trained']:.3g}")  # fmt: skip


def source_falls(history: History) -> Sight | None:
    """One of several rewards, a judge's say, pays for the sum's rise."""
    total, now = history.start("reward"), history.now("reward")
    if total is None or now is None or fmean(now) <= total:
        return None
    for name in (name for name in history.last[-1] if name.startswith("reward/")):
        then, values = _values(history.first, name), history.now(name)
        if values is None or len(then) < history.limits.window:
            continue
        error = ((stdev(then) ** 2 + stdev(values) ** 2) / history.limits.window) ** 0.5
        if fmean(then) - fmean(values) > history.limits.standard_errors * error:
            return Sight(fmean(values), f"{name} fell from {fmean(then):.3g} to {fmean(values):.3g} while the sum rose "
                         f"from {total:.3g} to {fmean(now):.3g}")  # fmt: skip
    return None


def entropy_collapse(history: History) -> Sight | None:
    start, now = history.start("entropy"), history.now("entropy")
    if start is None or now is None or start <= 0 or fmean(now) > history.limits.entropy_share * start:
        return None
    return Sight(fmean(now), f"entropy is {fmean(now):.3g} nats per token, {start:.3g} at the start")


def dead_groups(history: History) -> Sight | None:
    now = history.now("equal_groups")
    if now is None or fmean(now) < history.limits.equal_groups:
        return None
    return Sight(fmean(now), f"in {fmean(now):.0%} of the groups all completions are judged the same")


def clipped_much(history: History) -> Sight | None:
    now = history.now("clip_fraction")
    if now is None or fmean(now) < history.limits.clip_fraction:
        return None
    return Sight(fmean(now), f"{fmean(now):.0%} of the tokens are at a bound of the objective")


def never_clipped(history: History) -> Sight | None:
    """Several updates of each rollout, and none moves the policy noticeably."""
    clipped, ratios = (history.now(name, windows=3) for name in ("clip_fraction", "ratio_max"))
    if clipped is None or ratios is None or any(clipped) or not 1 < max(ratios) < history.limits.clip_ratio:
        return None
    return Sight(max(ratios), f"no token met a bound in {len(clipped)} steps, and the largest ratio was "
                 f"{max(ratios):.4f}")  # fmt: skip


def sampler_mismatch(history: History) -> Sight | None:
    """At the start the mean difference is compared with rounding's; then, where the sampler's are kept, their KL."""
    row = history.last[-1]
    if "sampler_gap" in row and not row["sampler_gap"] <= row["sampler_gap_limit"]:  # NaN is a gap
        gap, limit = row["sampler_gap"], row["sampler_gap_limit"]
        return Sight(gap, f"log-probabilities of sampler and trainer differ by {gap:.2g} nats per token in the worst "
                     f"completion, rounding explains {limit:.2g}")  # fmt: skip
    now = history.now("sampler_kl")
    if now is None or fmean(now) < history.limits.sampler_kl:
        return None
    return Sight(fmean(now), f"the KL from the sampler to the trainer is {fmean(now):.2g} nats per token")


def useless_critic(history: History) -> Sight | None:
    now = history.now("explained_variance", windows=2)
    if now is None or max(now) > 0:
        return None
    return Sight(max(now), f"explained_variance was at most {max(now):.3g} in {len(now)} steps")


def missing_eos(history: History) -> Sight | None:
    start, now = history.start("finished"), history.now("finished")
    if start is None or now is None or start - fmean(now) < history.limits.finished_fall:
        return None
    return Sight(fmean(now), f"{fmean(now):.0%} of the completions end by themselves, {start:.0%} at the start")


class Detector(NamedTuple):
    """look: what sees the cause. means, remedy: for the person who reads it."""

    look: Callable[[History], Sight | None]
    means: str
    remedy: str


DETECTORS = {
    "length_drift": Detector(
        length_drift, "the reward may pay for length and not for quality", "a reward without length, overlong_buffer"
    ),
    "repetition": Detector(
        repetition, "the policy found a phrase that pays", "a larger KL penalty, a reward that repetition costs"
    ),
    "kl_explosion": Detector(
        kl_explosion, "the reward is likely exploited far from the reference", "kl_coef, kl_target, learning_rate lower"
    ),
    "held_out_falls": Detector(
        held_out_falls, "the policy is over-optimised", "an earlier checkpoint, a larger KL penalty, more prompts"
    ),
    "source_falls": Detector(
        source_falls, "one reward is bought with another", "reward_weights, reward_floors"
    ),
    "entropy_collapse": Detector(
        entropy_collapse, "samples are nearly the same, so nothing new is found", "objective.entropy_coef, "
        "objective.clip_eps_high, a lower learning_rate"
    ),
    "dead_groups": Detector(
        dead_groups, "they teach nothing: the task is too easy or too hard", "other prompts, max_resamples, a reward "
        "with more than two values"
    ),
    "clipped_much": Detector(
        clipped_much, "updates of one rollout go too far", "a lower learning_rate, fewer ppo_epochs"
    ),
    "never_clipped": Detector(
        never_clipped, "updates hardly move the policy", "a higher learning_rate, advantages that are not 0"
    ),
    "sampler_mismatch": Detector(
        sampler_mismatch, "completions are drawn from another distribution than they are scored by",
        "dtype: float32, top_p 1 and top_k 0, sampler_correction",
    ),
    "useless_critic": Detector(
        useless_critic, "the critic foresees no better than a constant", "a higher critic_learning_rate, a critic that "
        "starts from the reward model"
    ),
    "missing_eos": Detector(
        missing_eos, "completions run into max_new_tokens", "missing_eos_penalty, overlong_buffer, more max_new_tokens"
    ),
}  # fmt: skip


@dataclass
class Watch:
    """The history of a run and the causes that it was told of."""

    history: History = field(default_factory=History)
    told: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, steps: Sequence[Row], evaluations: Sequence[Mapping[str, Any]], told: Iterable[str]) -> "Watch":
        """As it was after the lines `steps` of metrics.jsonl and `evaluations` of eval.jsonl."""
        watch, rest = cls(told=set(told)), list(steps)
        for evaluation in evaluations:
            while rest and rest[0]["step"] <= evaluation["step"]:
                watch.history.add(rest.pop(0))
            watch.history.add_evaluation(evaluation["metrics"])
        for row in rest:
            watch.history.add(row)
        return watch

    def step(self, step: int, metrics: Row) -> list[dict[str, Any]]:
        """What is new after a step: the lines for warnings.jsonl."""
        self.history.add(metrics)
        return self._look(step)

    def evaluation(self, step: int, metrics: Row) -> list[dict[str, Any]]:
        self.history.add_evaluation(metrics)
        return self._look(step)

    def _look(self, step: int) -> list[dict[str, Any]]:
        if not self.history.last:
            return []
        found = []
        for cause, detector in DETECTORS.items():
            sight = None if cause in self.told else detector.look(self.history)
            if sight is not None:
                self.told.add(cause)
                found.append({"step": step, "cause": cause, "value": sight.value, "seen": sight.text,
                              "means": detector.means, "try": detector.remedy})  # fmt: skip
        return found


def _correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's; 0 where one does not vary."""
    try:
        return correlation(x, y)
    except StatisticsError:
        return 0.0
