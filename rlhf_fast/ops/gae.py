"""gae, discounted_returns: advantages and returns of token sequences by one backward scan over time.

With r_t the reward of step t, V_t the value of the state before it, n the next step that counts, and the bootstrap
value V_T (0 where none is given) after the last step:

    delta_t = r_t + gamma V_n - V_t
    advantage_t = delta_t + gamma lam advantage_n
    return_t = advantage_t + V_t

    discounted return_t = r_t + gamma (discounted return)_n, starting from V_T

Steps behind the mask (the tool's and the environment's tokens in multi-turn training) give 0 and hand the next value
and advantage through unchanged, without a discount.

Computed in the equivalent form of lambda-returns, in which a step hands one number to the step before it:

    return_t = r_t + s_n,   s_t = gamma ((1 - lam) V_t + lam return_t),   s_T = gamma V_T
    advantage_t = return_t - V_t

s_t is an affine map of s_n (scale gamma lam; the identity behind the mask), so the recurrence is an associative scan;
the discounted return is the case V = 0, lam = 1, bit for bit.

Numerics: everything in float32 (float64 for float64).

Gradients: advantages and returns are constants of the loss, so results are detached and the registered op has no
derivative; `reference` is differentiable in rewards, values and bootstrap.

Cost per step with inputs of s bytes: 2 s bytes read (and 1 for the mask), 8 written, about 10 FLOPs.

Sources: Schulman et al. 2016 (arXiv 1506.02438), eq. 16; lambda-returns as in Sutton & Barto 2018, eq. 12.20.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.backends import DTYPE_CODES, address, native, resolve, stream, threads
from rlhf_fast.ops import _check


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the value targets that go with them.

    rewards, values: padded (B, T), or packed (N,) with cu_seqlens; float32, float64, bfloat16 or float16; rows may be
    strided. values[t] is the value of the state before step t.
    mask: shape of rewards, any dtype, nonzero counts. Steps with 0 (padding anywhere, and the tokens that the policy
    did not write) give 0 and carry the next value and advantage through; their rewards and values are not looked at.
    cu_seqlens: (S + 1,) int64 or int32, from 0, non-decreasing, at most N: sequence i is [cu_seqlens[i],
    cu_seqlens[i + 1]). Steps after the last sequence give 0.
    bootstrap: (B,) or (S,), the value of the state after the last step of a truncated sequence; 0 where it ended.
    gamma, lam: in [0, 1].

    Returns (advantages, returns), each of the shape of rewards, float32 (float64 for float64), detached.
    Raises ValueError or TypeError for shapes, types and values that do not fit; the entries of cu_seqlens are checked
    on the CPU only.
    """
    _check_rewards(rewards, cu_seqlens)
    _check.floating("values", values)
    _check.shaped("values", values, rewards.shape, "rewards.shape")
    _check.same_device(("rewards", rewards), ("values", values))
    advantages, returns = _run("gae", rewards, values, mask, cu_seqlens, bootstrap, gamma, lam, backend)
    return advantages, returns


def discounted_returns(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    gamma: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Discounted rewards to go (gamma 1: their sum), of the shape of rewards; arguments and errors as in `gae`."""
    _check_rewards(rewards, cu_seqlens)
    return _run("discounted_returns", rewards, None, mask, cu_seqlens, bootstrap, gamma, 1.0, backend)[0]


def reference(
    rewards: Tensor,
    values: Tensor | None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> list[Tensor]:
    """[advantages, returns], or [returns] without values, by definition, differentiable any number of times."""
    dtype = _compute_dtype(rewards, values)
    # (rows, time) with, per step, whether it is its sequence's last and the bootstrap value of that sequence.
    r, v = (torch.zeros_like(rewards) if x is None else x for x in (rewards, values))
    counts = torch.ones_like(r, dtype=torch.bool) if mask is None else mask != 0
    steps = torch.arange(r.shape[-1], device=r.device)
    if cu_seqlens is None:
        sequence = torch.arange(r.shape[0], device=r.device)[:, None].expand(r.shape)
        last = (steps == r.shape[-1] - 1).expand(r.shape)
    else:
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True).clamp(max=len(cu_seqlens) - 2)
        counts, last = counts & (steps < cu_seqlens[-1]), steps + 1 == cu_seqlens[1:][sequence]
    after = r.new_zeros(r.shape, dtype=dtype) if bootstrap is None else bootstrap.to(dtype)[sequence]
    # What is behind the mask is replaced before any arithmetic, so that nothing there gets through.
    r, v = (torch.where(counts, x.to(dtype), torch.zeros_like(x, dtype=dtype)) for x in (r, v))
    next_value = next_advantage = r.new_zeros(r.shape[:-1])
    advantages = []
    for t in reversed(range(r.shape[-1])):
        next_value = torch.where(last[..., t], after[..., t], next_value)
        next_advantage = torch.where(last[..., t], torch.zeros_like(next_advantage), next_advantage)
        advantage = r[..., t] + gamma * next_value - v[..., t] + gamma * lam * next_advantage
        advantages.append(torch.where(counts[..., t], advantage, torch.zeros_like(advantage)))
        next_value = torch.where(counts[..., t], v[..., t], next_value)
        next_advantage = torch.where(counts[..., t], advantage, next_advantage)
    result = torch.stack(advantages[::-1], -1) if advantages else r
    return [result] if values is None else [result, result + v]


def _cpu(rewards: Tensor, values: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None,
         bootstrap: Tensor | None, gamma: float, lam: float, outputs: list[Tensor]) -> None:  # fmt: skip
    native().gae(*_native_arguments(rewards, values, mask, cu_seqlens, bootstrap, gamma, lam, outputs), threads())


def _cuda(rewards: Tensor, values: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None,
          bootstrap: Tensor | None, gamma: float, lam: float, outputs: list[Tensor]) -> None:  # fmt: skip
    native().gae_cuda(
        *_native_arguments(rewards, values, mask, cu_seqlens, bootstrap, gamma, lam, outputs),
        rewards.get_device(), stream(rewards.device),
    )  # fmt: skip


def _triton(rewards: Tensor, values: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None,
            bootstrap: Tensor | None, gamma: float, lam: float, outputs: list[Tensor]) -> None:  # fmt: skip
    from rlhf_fast.kernels import gae as kernels

    kernels.gae(rewards, values, mask, cu_seqlens, bootstrap, gamma, lam, outputs)


# impl(rewards, values | None, mask | None, cu_seqlens | None, bootstrap | None, gamma, lam, outputs)
# with rewards and values of one dtype and unit last stride; outputs = [advantages, returns], without values [returns]
IMPLS = {"cpu": _cpu, "triton": _triton, "cuda": _cuda}
OPS = {"gae": tuple(IMPLS), "discounted_returns": tuple(IMPLS)}


def empty_outputs(rewards: Tensor, values: Tensor | None, cu_seqlens: Tensor | None) -> list[Tensor]:
    """Unwritten [advantages, returns], or [returns] without values; zeros where packed, for steps of no sequence."""
    new = rewards.new_empty if cu_seqlens is None else rewards.new_zeros
    dtype = _check.compute_dtype(rewards.dtype)
    return [new(rewards.shape, dtype=dtype) for _ in range(1 if values is None else 2)]


@torch.library.custom_op("rlhf_fast::gae", mutates_args=())
def _op(rewards: Tensor, values: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None,
        bootstrap: Tensor | None, gamma: float, lam: float, backend: str) -> list[Tensor]:  # fmt: skip
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, rewards.shape[0])
    outputs = empty_outputs(rewards, values, cu_seqlens)
    IMPLS[backend](rewards, values, mask, cu_seqlens, bootstrap, gamma, lam, outputs)
    return outputs


@_op.register_fake
def _(rewards, values, mask, cu_seqlens, bootstrap, gamma, lam, backend):
    return empty_outputs(rewards, values, cu_seqlens)


def _run(op: str, rewards: Tensor, values: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None,
         bootstrap: Tensor | None, gamma: float, lam: float, backend: str | None) -> list[Tensor]:  # fmt: skip
    """Checks what both public functions share, then runs the backend. No gradient: see the module's docstring."""
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(f"cu_seqlens must be (S + 1,) with S >= 1, got {tuple(cu_seqlens.shape)}")
        cu_seqlens = _check.ids("cu_seqlens", cu_seqlens)
    sequences = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if bootstrap is not None:
        _check.floating("bootstrap", bootstrap)
        _check.shaped("bootstrap", bootstrap, (sequences,), "(B,)" if cu_seqlens is None else "(S,)")
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    _check.same_device(("rewards", rewards), ("mask", mask), ("cu_seqlens", cu_seqlens), ("bootstrap", bootstrap))
    mask = _check.mask_bytes(mask, rewards.shape, "rewards.shape")
    name = resolve(op, IMPLS, rewards.device, backend)
    dtype = _compute_dtype(rewards, values)
    rewards, values = rewards.detach(), None if values is None else values.detach()
    bootstrap = None if bootstrap is None else bootstrap.detach().to(dtype).contiguous()
    if name == "reference":
        if cu_seqlens is not None and not torch.compiler.is_compiling():
            _check_cu_seqlens(cu_seqlens, rewards.shape[0])
        return reference(rewards, values, mask=mask, cu_seqlens=cu_seqlens, bootstrap=bootstrap, gamma=gamma, lam=lam)
    if values is not None and values.dtype != rewards.dtype:
        rewards, values = rewards.to(dtype), values.to(dtype)
    rewards = _unit_stride(rewards)
    values = None if values is None else _unit_stride(values)
    return torch.ops.rlhf_fast.gae(rewards, values, mask, cu_seqlens, bootstrap, gamma, lam, name)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_rewards(rewards: Tensor, cu_seqlens: Tensor | None) -> None:
    _check.floating("rewards", rewards)
    if rewards.dim() != (2 if cu_seqlens is None else 1):
        meaning = "(B, T) without cu_seqlens" if cu_seqlens is None else "(N,) with cu_seqlens"
        raise ValueError(f"rewards must be {meaning}, got {tuple(rewards.shape)}")


def _check_cu_seqlens(cu_seqlens: Tensor, steps: int) -> None:
    """Raises ValueError on the CPU; elsewhere the entries are not read, which would wait for the device."""
    if cu_seqlens.device.type != "cpu":
        return
    if cu_seqlens[0] != 0 or (cu_seqlens.diff() < 0).any() or cu_seqlens[-1] > steps:
        raise ValueError(f"cu_seqlens must be non-decreasing from 0 to at most N = {steps}, got {cu_seqlens.tolist()}")


def _compute_dtype(rewards: Tensor, values: Tensor | None) -> torch.dtype:
    return _check.compute_dtype(rewards.dtype if values is None else torch.promote_types(rewards.dtype, values.dtype))


def _native_arguments(
    rewards: Tensor,
    values: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    outputs: list[Tensor],
) -> tuple:
    sequences = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = [sequences, rewards.shape[-1], rewards.stride(0), 0 if values is None else values.stride(0)]
    return (
        address(rewards), address(values), DTYPE_CODES[rewards.dtype], sizes, address(mask), address(cu_seqlens),
        address(bootstrap), gamma, lam, [0 if values is None else address(outputs[0]), address(outputs[-1])],
    )  # fmt: skip
