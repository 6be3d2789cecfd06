"""kl_controller: the coefficient of the KL penalty, fixed or led by the KL that was measured.

Adaptive, after each batch of n samples with the mean KL to the reference, in nats per sample:

    error = clip(KL / target - 1, -0.2, 0.2)
    coefficient <- coefficient (1 + n error / horizon)

a proportional controller of the logarithm of the coefficient: a KL above the target raises it. No gradient passes, no
tensor is read; the cost is a few host FLOPs per batch.

Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences" (arXiv 1909.08593), section 2.2, where
K_beta n_batch is n / horizon.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_fast.ops.core import check

OPS: dict[str, tuple[str, ...]] = {}  # plain Python: nothing for a backend to run


@dataclass
class FixedKLController:
    """Keeps its coefficient >= 0, whatever KL is measured. Raises ValueError for a negative one."""

    coefficient: float

    def __post_init__(self) -> None:
        check.fields(self)
        check.that(self.coefficient >= 0, "coefficient", ">= 0", self.coefficient)

    @check.takes_numbers
    def update(self, kl: float, samples: int) -> float:
        """The coefficient, as it is."""
        return self.coefficient

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Put a state_dict back; the hyper-parameters stay those of the constructor."""
        coefficient = check.number("coefficient", state["coefficient"])
        check.that(coefficient >= 0, "coefficient", ">= 0", coefficient)
        self.coefficient = coefficient


@dataclass
class AdaptiveKLController(FixedKLController):
    """Leads the KL per sample to `target` nats, over about `horizon` samples; both > 0, else ValueError."""

    target: float
    horizon: float = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check.positive("target", self.target)
        check.positive("horizon", self.horizon)

    @check.takes_numbers
    def update(self, kl: float, samples: int) -> float:
        """The new coefficient, after a batch of `samples` with the mean `kl` in nats per sample.

        Raises ValueError for a NaN.
        """
        if kl != kl:
            raise ValueError(f"kl must be a number, got {kl}")
        error = min(0.2, max(-0.2, kl / self.target - 1.0))
        self.coefficient *= 1.0 + error * samples / self.horizon
        return self.coefficient
