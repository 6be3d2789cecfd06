"""Sampling completions from the weights that train.

Of a checkpoint's generation_config only the stop ids are used: whatever else it says would sample from another
distribution than the one whose log-probabilities are trained on. `check_sampler` compares the two.
"""

from rlhf_fast.rollout.agreement import Agreement, agreement, check_sampler
from rlhf_fast.rollout.completions import Rollout, SamplerView, stop_ids, token_that_ends
from rlhf_fast.rollout.drawing import Drawing, Mixing
from rlhf_fast.rollout.sampling import roll_out

__all__ = [
    "Agreement", "Drawing", "Mixing", "Rollout", "SamplerView", "agreement", "check_sampler", "roll_out", "stop_ids",
    "token_that_ends",
]  # fmt: skip
