"""A run that blows up: its KL to the reference, its loss or the norm of a gradient is far too large, step after step.

One step proves nothing: in healthy runs single batches have norms far above the others. So a size must be above its
limit in `explosion_steps` steps in a row: the KL per token above `max_kl`, the loss and each norm above
`max_loss_growth` and `max_norm_growth` times its largest value before, of as many steps at least. A loss up to 20 and a
norm up to 100 never count, since a start near 0 makes every growth large.

In 559 runs of this package's methods on small models, the KL stayed below 12 nats per token in every step, and growth
so taken below 3.4 for losses and norms of any size; nobody has measured it on large models.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from rlhf_fast.training.config import Config

LEAST_LOSS, LEAST_NORM = 20.0, 100.0


class Explosions:
    """above: of each size that is above its limit, its values in the steps in a row that it is. largest, calm: its
    largest value in the steps before, and how many these are."""

    def __init__(self, config: Config, steps: Iterable[Mapping[str, float]] = ()) -> None:
        """steps: the lines of metrics.jsonl so far."""
        self.config = config
        self.above: dict[str, list[float]] = {}
        self.largest: dict[str, float] = {}
        self.calm = Counter[str]()
        for metrics in steps:
            self.add(metrics)

    def add(self, metrics: Mapping[str, float]) -> None:
        """The metrics of a step."""
        for name, size in _sizes(metrics).items():
            limit = self._limit(name)
            if limit is not None and size > limit:
                self.above.setdefault(name, []).append(size)
            else:
                passed = [*self.above.pop(name, []), size]
                self.calm[name] += len(passed)
                finite = [value for value in passed if math.isfinite(value)]
                self.largest[name] = max([*finite, self.largest.get(name, 0.0)])

    @property
    def streak(self) -> int:
        """The number of last steps in which a size was above its limit."""
        return max(map(len, self.above.values()), default=0)

    @property
    def seen(self) -> str | None:
        """What exploded, in a sentence; None where nothing did."""
        for name, sizes in self.above.items():
            if len(sizes) >= self.config.explosion_steps:
                key = _key(name)
                bound, steps = f"{getattr(self.config, key):g}", f"for {len(sizes)} steps ({key})"
                if name == "kl":
                    return f"kl is {sizes[-1]:.4g} nats per token, and was above {bound} {steps}"
                largest = f"{self.largest[name]:.4g}"
                return f"{name} is {sizes[-1]:.4g}, and was above {bound} times its largest before, {largest}, {steps}"
        return None

    def _limit(self, name: str) -> float | None:
        bound = getattr(self.config, _key(name), None)
        if bound is None or name == "kl":
            return bound
        least = LEAST_LOSS if name == "loss" else LEAST_NORM
        return max(least, bound * self.largest[name]) if self.calm[name] >= self.config.explosion_steps else None


def _key(name: str) -> str:
    return {"kl": "max_kl", "loss": "max_loss_growth"}.get(name, "max_norm_growth")


def _sizes(metrics: Mapping[str, float]) -> dict[str, float]:
    """The KL per token, the size of the loss, of the policy's where there is one, and the norms; NaN as infinite."""
    sizes = {name: value for name, value in metrics.items() if name.startswith("grad_norm_")}
    loss = metrics.get("policy_loss", metrics.get("loss"))
    if loss is not None:
        sizes["loss"] = abs(loss)
    if "kl" in metrics and metrics.get("completion_length"):
        sizes["kl"] = metrics["kl"] / metrics["completion_length"]
    return {name: math.inf if math.isnan(size) else size for name, size in sizes.items()}
