"""Costs whose mean is held at a limit: a Lagrange multiplier while training, a test on held-out prompts.

With C the cost of a completion, d the limit, U the mean of the last `cost_window` costs and lambda the multiplier, each
step makes

    log lambda <- min(log lambda + cost_multiplier_rate lambda (U - d), log cost_multiplier_max)
    reward     <- (reward - sum over the costs of lambda C) / (1 + sum of lambda)

the first by gradient ascent on the dual, in log lambda so that lambda stays positive. The division keeps the scale of
what is paid; the KL penalty is taken off afterwards and so does not depend on lambda.

The test: a policy passes where the upper confidence bound of the mean cost of n held-out completions is at most d, for
every cost. The bound is mean + t s / sqrt(n) with Student's quantile t, for costs that are not far from normal, or with
`cost_range` [a, b] Hoeffding's mean + (b - a) sqrt(log(1 / delta) / (2 n)), for any. delta is 1 - cost_confidence, over
the number of evaluations of the run: that the policy which was kept is over the limit has at most that probability.
With a test the multiplier sees it coming: U is mean + kappa s, and C has the gradient of that, C + kappa (C - mean)^2 /
(2 s), with kappa = t_m / sqrt(m) + t_n / sqrt(n) for m costs in the window.

A reward that must not fall below a floor is a cost of its negative, held at minus the floor: the multiplier is added to
its weight, which is then a dual variable. Weights may also go from one number to another by a schedule.

Sources: Dai et al. 2023, Safe RLHF (arXiv 2310.12773), section 3.4 and appendix B, for the multiplier, with the window,
rate and maximum of its code; Chittepu et al. 2025 (arXiv 2506.08266) for the test and kappa; Hoeffding 1963, theorem 2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.rewards import Rewards
from rlhf_fast.training.config import RolloutConfig


@dataclass
class Constraints:
    """The costs of a run, by name, and their multipliers.

    sources: what the costs come from. limits: name -> limit. held_out: how many completions an evaluation has.
    floors: name -> the reward whose negative this cost is. log_multipliers, recent: what changes: the logarithms, and
    the last costs, of each.
    """

    sources: Rewards
    limits: dict[str, float]
    config: RolloutConfig
    held_out: int
    floors: dict[str, str] = field(default_factory=dict)
    log_multipliers: dict[str, float] = field(default_factory=dict)
    recent: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.log_multipliers = dict.fromkeys(self.limits, math.log(self.config.cost_multiplier))
        self.recent = {name: [] for name in self.limits}

    @property
    def multipliers(self) -> dict[str, float]:
        return {name: math.exp(value) for name, value in self.log_multipliers.items()}

    def measured(self, parts: Mapping[str, Tensor], rewards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The costs, (B,) each, from the scores of the sources and those of the rewards."""
        return {**parts, **{name: -rewards[reward] for name, reward in self.floors.items()}}

    def ascend(self, costs: Mapping[str, Tensor]) -> dict[str, float]:
        """Take the costs (B,) of a step into the windows and move the multipliers; metrics of both."""
        config, highest = self.config, math.log(self.config.cost_multiplier_max)
        for name, limit in self.limits.items():
            self.recent[name] = [*self.recent[name], *costs[name].tolist()][-config.cost_window :]
            mean, std = self.moments(name)
            excess = mean + self.caution(name) * std - limit
            moved = self.log_multipliers[name] + config.cost_multiplier_rate * self.multipliers[name] * excess
            self.log_multipliers[name] = min(moved, highest)
        metrics = {_key("cost", name, costs): float(costs[name].mean()) for name in self.limits}
        return metrics | {_key("cost_multiplier", name, costs): m for name, m in self.multipliers.items()}

    def moments(self, name: str) -> tuple[float, float]:
        """Mean and standard deviation (n - 1) of the window."""
        window = torch.tensor(self.recent[name], dtype=torch.float64)
        return float(window.mean()), float(window.std(correction=min(1, len(window) - 1)))

    def caution(self, name: str) -> float:
        """kappa."""
        sizes, confidence = (len(self.recent[name]), self.held_out), self.config.cost_confidence
        if confidence is None or min(sizes) < 2:
            return 0.0
        return sum(student_t_quantile(confidence, n - 1) / math.sqrt(n) for n in sizes)

    def paid(self, rewards: Tensor, costs: Mapping[str, Tensor]) -> Tensor:
        """(B,): the rewards (B,) less the costs (B,) by their multipliers, all over 1 + the sum of these."""
        total = rewards
        for name, multiplier in self.multipliers.items():
            cost, (mean, std) = costs[name].to(rewards.device), self.moments(name)
            if std > 0:
                cost = cost + self.caution(name) * (cost - mean).square() / (2 * std)
            total = total - multiplier * cost
        return self.scaled(total)

    def scaled(self, rewards: Tensor) -> Tensor:
        return rewards / (1.0 + sum(self.multipliers.values()))

    @property
    def evaluations(self) -> int:
        """How many the run has: before, after, and every `eval_every` steps between."""
        every = self.config.eval_every
        return 2 + (0 if every is None else (self.config.steps - 1) // every)

    def tested(self, costs: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics of an evaluation: the mean costs (B,), and with cost_confidence their upper bounds and whether all
        are within the limits."""
        metrics = {_key("cost", name, costs): float(costs[name].mean()) for name in self.limits}
        if self.config.cost_confidence is None:
            return metrics
        delta = (1.0 - self.config.cost_confidence) / self.evaluations
        bounds = {name: upper_bound(costs[name], delta, self.config.cost_range) for name in self.limits}
        metrics |= {_key("cost_upper", name, costs): bound for name, bound in bounds.items()}
        return metrics | {"cost_passed": float(all(bounds[name] <= limit for name, limit in self.limits.items()))}

    def state_dict(self) -> dict[str, Any]:
        return {"log_multipliers": dict(self.log_multipliers), "recent": {k: list(v) for k, v in self.recent.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.log_multipliers, self.recent = dict(state["log_multipliers"]), dict(state["recent"])


def reward_weights_at(config: RolloutConfig, step: int) -> list[float]:
    """Those of `step`, from 0: from reward_weights, at the first step, to final_reward_weights."""
    final = config.final_reward_weights
    assert final is not None
    first = [1.0] * len(final) if config.reward_weights is None else config.reward_weights
    share = min(1.0, step / max(1, (config.reward_schedule_steps or config.steps) - 1))
    if config.reward_schedule == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return [a + share * (b - a) for a, b in zip(first, final, strict=True)]


def _key(metric: str, name: str, costs: Mapping[str, Tensor]) -> str:
    return metric if len(costs) == 1 else f"{metric}/{name}"


def upper_bound(costs: Tensor, delta: float, cost_range: tuple[float, float] | None = None) -> float:
    """What the mean of the costs' distribution exceeds with a probability of at most delta, by Student or, in a
    range, by Hoeffding. costs: (n,). UserError for costs outside of the range, or fewer than two without one."""
    costs, n = costs.double(), len(costs)
    if cost_range is not None:
        low, high = cost_range
        if not low <= float(costs.min()) <= float(costs.max()) <= high:
            raise UserError(f"cost_range {low} to {high} does not hold costs of {float(costs.min()):.4g} to "
                            f"{float(costs.max()):.4g}")  # fmt: skip
        return float(costs.mean()) + (high - low) * math.sqrt(math.log(1 / delta) / (2 * n))
    if n < 2:
        raise UserError(f"cost_confidence needs two held-out prompts, or a cost_range, got {n}")
    return float(costs.mean()) + student_t_quantile(1 - delta, n - 1) * float(costs.std()) / math.sqrt(n)


def student_t_quantile(probability: float, freedom: int) -> float:
    """The t that a Student variable of `freedom` >= 1 whole degrees stays below with a probability in (0.5, 1)."""
    low, high = 0.0, 1.0
    while _student_t(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_t(middle, freedom) < probability else (low, middle)
    return high


def _student_t(t: float, freedom: int) -> float:
    """The distribution function, t >= 0; Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd, square = freedom % 2, math.cos(angle) ** 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for j in range(2 + odd, freedom, 2):
        term *= square * (j - 1) / j
        total += term
    central = math.sin(angle) * total
    return 0.5 + (angle + central) / math.pi if odd else 0.5 + central / 2
