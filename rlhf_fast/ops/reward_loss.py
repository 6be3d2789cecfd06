"""reward_loss: Bradley-Terry, the loss of a reward model on pairs.

With h = chosen_reward - rejected_reward - margin:

    L = -log sigmoid(h) = log(1 + exp(-h)),   loss = mean of L over the pairs

    d L / d chosen_reward = -sigmoid(-h) = -d L / d rejected_reward

Numerics. Both are taken through exp(-|h|): no overflow, and no loss of the gradient of a pair that is told apart with
confidence. Computed in float32 (float64 for float64).

Cost per pair: three numbers read, two gradient coefficients written; one launch and a sum.

Sources: InstructGPT, Ouyang et al. 2022 (arXiv 2203.02155, eq. 1); the margin, Llama 2, Touvron et al. 2023
(arXiv 2307.09288, eq. 2).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fast.backends import resolve
from rlhf_fast.ops import _check, _losses

METRICS = ("accuracy", "margin")


def reward_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: Tensor | float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean Bradley-Terry loss of B pairs and its metrics; both rewards get a gradient.

    chosen_rewards, rejected_rewards: (B,) float32, bfloat16, float16 or float64, any strides.
    margin: by how much chosen must lead, one number or (B,), in units of the rewards; none by default.

    Returns (loss, metrics): 0-d, float32 (float64 for float64), the metrics detached: accuracy (share of the pairs
    whose chosen reward is the greater one) and margin (mean of chosen - rejected), both without the `margin`.
    No pair gives a loss of 0. Raises ValueError or TypeError for what does not fit.
    """
    if chosen_rewards.dim() != 1:
        raise ValueError(f"chosen_rewards must be (B,), got {tuple(chosen_rewards.shape)}")
    shape = tuple(chosen_rewards.shape)
    if not isinstance(margin, Tensor):
        number = chosen_rewards.new_full((), margin or 0.0, dtype=_check.compute_dtype(chosen_rewards.dtype))
        margin = number.expand(shape)
    tensors = {"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards, "margin": margin.detach()}
    _losses.floats(shape, "(B,)", **tensors)
    name = resolve("reward_loss", IMPLS, chosen_rewards.device, backend)
    if name == "reference":
        return reference(*tensors.values())
    return _losses.call("reward_loss", list(tensors.values()), None, None, "bradley_terry", (), name, METRICS)


def reference(chosen_rewards: Tensor, rejected_rewards: Tensor, margin: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) by definition, differentiable any number of times."""
    dtype = _check.compute_dtype(chosen_rewards.dtype)
    difference = chosen_rewards.to(dtype) - rejected_rewards.to(dtype)
    losses = -logsigmoid(difference - margin.to(dtype))
    lead = difference.detach()
    means = [_losses.mean(x, None, None) for x in ((lead > 0).to(dtype), lead)]
    return _losses.mean(losses, None, None), dict(zip(METRICS, means, strict=True))


# ("bradley_terry", [chosen_rewards, rejected_rewards, margin], None, None, [0, 0, 0], outputs)
IMPLS = {"cpu": _losses.cpu, "triton": _losses.triton}
OPS = {"reward_loss": tuple(IMPLS)}
_losses.register("reward_loss", IMPLS, gradients=2)
