"""torchrl's vectorised advantage estimates on our scans: `rlhf_fast.patch("torchrl")`.

torchrl gives every step its next value, and trajectories end with `done` anywhere in a row. With the TD errors (or, for
TD(lambda), the one-step returns) formed first, each estimate is a discounted sum along its trajectory,

    y_t = x_t + discount y_{t+1},   y of the step after a trajectory's last one: 0

which is `discounted_returns` of packed sequences, or, where the discount is the step's own, a loop over time in plain
PyTorch. torchrl leaves powers of the discount below 1e-7 out of its sums, fails for a discount of 0, and returns (T, 1)
for tensors of time alone with time_dim=0; here sums are whole, 0 is a discount, and shapes stay.

Gradients reach everything that torchrl differentiates: the transpose of the sum is the same sum along reversed time.

Source: torchrl 0.14.1, torchrl/objectives/value/functional.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast import discounted_returns, vtrace
from rlhf_fast.integrations._tensors import wide

PEER = "torchrl"
TESTED = "0.14.1"


def replacements() -> dict[str, Any]:
    """What `rlhf_fast.patch("torchrl")` replaces, under the names that define it."""
    ours = (vec_generalized_advantage_estimate, vec_td_lambda_return_estimate, vtrace_advantage_estimate)
    return {f"torchrl.objectives.value.functional.{x.__name__}": x for x in ours}


def vec_generalized_advantage_estimate(
    gamma: float | Tensor, lmbda: float | Tensor, state_value: Tensor, next_state_value: Tensor, reward: Tensor,
    done: Tensor, terminated: Tensor | None = None, *, time_dim: int = -2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(advantages, value targets) of the common shape of the inputs, (*batch, time, *features), float32 at least.

    gamma, lmbda: numbers, or tensors that broadcast to that shape. done ends a trajectory, terminated (done where it is
    None) also makes the next value 0, both bool. Raises RuntimeError for different shapes, as torchrl.
    """
    terminated = done if terminated is None else terminated
    _same_shapes(state_value, next_state_value, reward, done, terminated)
    td_errors = wide(reward) + gamma * _unless(terminated, next_state_value) - state_value
    advantages = _trajectory_sums(td_errors, gamma * lmbda, done, time_dim)
    return advantages, advantages + state_value


def vec_td_lambda_return_estimate(
    gamma: float | Tensor, lmbda: float | Tensor, next_state_value: Tensor, reward: Tensor, done: Tensor,
    terminated: Tensor | None = None, rolling_gamma: bool | None = None, *, time_dim: int = -2,
) -> Tensor:  # fmt: skip
    """TD(lambda) returns; arguments as in `vec_generalized_advantage_estimate`.

    rolling_gamma=False, a gamma of the step for all that follows it, raises NotImplementedError for tensors of gamma or
    lmbda, as in torchrl; for numbers it changes nothing.
    """
    terminated = done if terminated is None else terminated
    _same_shapes(next_state_value, reward, done, terminated)
    if rolling_gamma is False and not (_is_number(gamma) and _is_number(lmbda)):
        message = (
            "When using rolling_gamma=False, The vectorized version of TD(lambda) takes numbers for gamma and lmbda"
        )
        raise NotImplementedError(f"{message}, got {type(gamma).__name__} and {type(lmbda).__name__}")
    discounted = gamma * _unless(terminated, next_state_value)
    one_step = wide(reward) + discounted - _unless(_ends(done, time_dim), lmbda * discounted)
    return _trajectory_sums(one_step, gamma * lmbda, done, time_dim)


def vtrace_advantage_estimate(
    gamma: float | Tensor, log_pi: Tensor, log_mu: Tensor, state_value: Tensor, next_state_value: Tensor,
    reward: Tensor, done: Tensor, terminated: Tensor | None = None, rho_thresh: float | Tensor = 1.0,
    c_thresh: float | Tensor = 1.0, time_dim: int = -2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(advantages, value targets) by V-trace; arguments as in `vec_generalized_advantage_estimate`.

    log_pi, log_mu: log-probabilities of the actions, in nats, under the policy and under the one that sampled them.
    rho_thresh, c_thresh: upper bounds of the importance weights of TD errors and of traces.
    """
    terminated = done if terminated is None else terminated
    _same_shapes(state_value, next_state_value, reward, done, terminated)
    next_value = gamma * _unless(terminated, next_state_value)
    td_errors = wide(reward) + next_value - state_value
    ratio = (wide(log_pi) - log_mu).exp()
    rho = ratio.clamp(max=rho_thresh)
    numbers = gamma, rho_thresh, c_thresh
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (td_errors, ratio))
    if all(_is_number(x) for x in numbers) and not differentiated:
        discount, rho_clip, c_clip = (float(x) for x in numbers)
        packed = [_packed(x.expand_as(done), time_dim) for x in (td_errors, wide(log_pi), wide(log_mu))]
        _, excess = vtrace(
            packed[0], torch.zeros_like(packed[0]), *packed[1:], cu_seqlens=_cu_seqlens(done, time_dim), gamma=discount,
            rho_clip=rho_clip, c_clip=c_clip,
        )  # fmt: skip
        excess = _unpacked(excess, done, time_dim)
    else:
        excess = _trajectory_sums(rho * td_errors, gamma * ratio.clamp(max=c_thresh), done, time_dim)
    targets = excess + state_value
    following = gamma * _unless(terminated, targets.roll(-1, time_dim))
    following = torch.where(_ends(done, time_dim), next_value, following)
    return rho * (wide(reward) + following - state_value), targets


# --- Sums along trajectories -----------------------------------------------------------------------------------------


def _trajectory_sums(x: Tensor, discount: float | Tensor, done: Tensor, time_dim: int) -> Tensor:
    """y_t = x_t + discount y_{t+1} within each trajectory."""
    if _is_number(discount):
        sums = _TrajectorySums.apply(_packed(x, time_dim), _cu_seqlens(done, time_dim), float(discount))
        return _unpacked(sums, done, time_dim)
    discounts = _unless(done, torch.as_tensor(discount).expand_as(done)).movedim(time_dim, -1)
    x = x.movedim(time_dim, -1)
    sums = [x[..., -1]]
    for t in reversed(range(x.shape[-1] - 1)):
        sums.append(x[..., t] + discounts[..., t] * sums[-1])
    return torch.stack(sums[::-1], time_dim)


class _TrajectorySums(torch.autograd.Function):
    """discounted_returns with a gradient: the same sum of the upstream one along reversed time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cu_seqlens: Tensor, discount: float) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.discount = discount
        return discounted_returns(x, cu_seqlens=cu_seqlens, gamma=discount)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (cu_seqlens,) = ctx.saved_tensors
        mirrored = cu_seqlens[-1] - cu_seqlens.flip(0)
        return _TrajectorySums.apply(grad.flip(0), mirrored, ctx.discount).flip(0), None, None


def _ends(done: Tensor, time_dim: int) -> Tensor:
    """Where a trajectory ends: at `done`, and at the last step of its row."""
    ends = done.clone()
    ends.select(time_dim, -1).fill_(True)
    return ends


def _cu_seqlens(done: Tensor, time_dim: int) -> Tensor:
    """(S + 1,): the bounds of the trajectories in `_packed` tensors. Waits for a GPU, as torchrl's count does."""
    return torch.nn.functional.pad(_packed(_ends(done, time_dim), time_dim).nonzero()[:, 0] + 1, (1, 0))


def _packed(x: Tensor, time_dim: int) -> Tensor:
    """(N,), row after row of time."""
    return x.movedim(time_dim, -1).reshape(-1)


def _unpacked(x: Tensor, like: Tensor, time_dim: int) -> Tensor:
    return x.view(like.movedim(time_dim, -1).shape).movedim(-1, time_dim)


# --- Arguments -------------------------------------------------------------------------------------------------------


def _same_shapes(*tensors: Tensor) -> None:
    shapes = [tuple(x.shape) for x in tensors]
    if len(set(shapes)) > 1:
        raise RuntimeError(f"values, rewards, done and terminated must share one shape, got {shapes}")


def _is_number(x: float | Tensor) -> bool:
    return not isinstance(x, Tensor) or x.numel() == 1


def _unless(condition: Tensor, x: Tensor) -> Tensor:
    """x in float32 at least, 0 where the condition holds."""
    return torch.where(condition, 0, wide(x))
