"""gae, discounted_returns: advantages and returns of token sequences by one backward scan over time.

With r_t the reward of step t, V_t the value of the state before it, n the next step that counts, and the bootstrap
value V_T (0 where none is given) after the last step:

    delta_t = r_t + gamma V_n - V_t
    advantage_t = delta_t + gamma lam advantage_n
    return_t = advantage_t + V_t, of advantages with value_lam in place of lam where it is given

    discounted return_t = r_t + gamma (discounted return)_n, starting from V_T

Steps behind the mask (the tool's and the environment's tokens in multi-turn training) give 0 and hand the next value
and advantage through unchanged, without a discount.

Computed in the equivalent form of lambda-returns, in which a step hands one number to the step before it:

    return_t = r_t + s_n,   s_t = gamma ((1 - lam) V_t + lam return_t),   s_T = gamma V_T
    advantage_t = return_t - V_t

s_t is an affine map of s_n (scale gamma lam; the identity behind the mask), so the recurrence is an associative scan;
the discounted return is the case V = 0, lam = 1, bit for bit. A lambda for the returns is a second scan of the same
numbers, read once.

Numerics: everything in float32 (float64 for float64); the rates gamma lam and gamma (1 - lam) are rounded once.

Gradients: advantages and returns are constants of the loss, so results are detached and the registered op has no
derivative; `reference` is differentiable in rewards, values and bootstrap.

Cost per step with inputs of s bytes: 2 s bytes read (and 1 for the mask), 8 written, about 10 FLOPs.

Sources: Schulman et al. 2016 (arXiv 1506.02438), eq. 16; lambda-returns as in Sutton & Barto 2018, eq. 12.20; a
lambda of its own for the returns: Yuan et al. 2025 (arXiv 2503.01491), section 3.2, and Yue et al. 2025 (VAPO, arXiv
2504.05118), section 4.1; lambda by length: VAPO, section 4.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import DTYPE_CODES, native, packed, resolve, stream, threads
from rlhf_fast.ops.core import check, sequences
from rlhf_fast.ops.core.registration_by_schema import op_without_gradient


@check.takes_numbers
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    value_lam: float | Tensor | None = None,
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
    gamma: in [0, 1]. lam: in [0, 1], a number or one per sequence, (B,) or (S,), as from `length_adaptive_lambda`.
    value_lam: like lam, for the returns alone; None for the lam of the advantages.

    Returns (advantages, returns), each of the shape of rewards, float32 (float64 for float64), detached.
    Raises ValueError or TypeError for shapes, types and values that do not fit; the entries of cu_seqlens and of
    tensors of lambdas are checked on the CPU only.
    """
    inputs = {"rewards": rewards, "values": values}
    advantages, returns = _run("gae", inputs, mask, cu_seqlens, bootstrap, gamma, lam, value_lam, backend)
    return advantages, returns


@check.takes_numbers
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
    inputs = {"rewards": rewards}
    return _run("discounted_returns", inputs, mask, cu_seqlens, bootstrap, gamma, 1.0, None, backend)[0]


@check.takes_numbers
def length_adaptive_lambda(lengths: Tensor, alpha: float = 0.05) -> Tensor:
    """1 - 1 / (alpha length) per sequence, float32, 0 where alpha length is below 1 (VAPO, section 4.2).

    lengths: (B,), tokens that count. With it sum_t lam^t = alpha length: the share of a sequence over which the
    TD errors of an advantage reach does not depend on its length. alpha: > 0.
    """
    check.positive("alpha", alpha)
    return (1 - 1 / (alpha * lengths.float()).clamp_min(1)).detach()


def reference(
    rewards: Tensor,
    values: Tensor | None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    value_lam: float | Tensor | None = None,
) -> list[Tensor]:
    """[advantages, returns], or [returns] without values, by definition, differentiable any number of times."""
    walk = sequences.walk(rewards, mask, cu_seqlens, bootstrap)
    zeros = torch.zeros_like(rewards, dtype=check.compute_dtype(rewards.dtype))
    # What is behind the mask is replaced before any arithmetic, so that nothing there gets through.
    r, v = (zeros if x is None else torch.where(walk.counts, x.to(zeros.dtype), zeros) for x in (rewards, values))

    def advantages(lam: float | Tensor) -> Tensor:
        decay = zeros + gamma * (lam[walk.sequence].to(zeros.dtype) if isinstance(lam, Tensor) else lam)
        states, _, _ = sequences.backward(
            walk, v, lambda t, value, advantage: r[..., t] + gamma * value - v[..., t] + decay[..., t] * advantage
        )
        return torch.where(walk.counts, states, zeros)

    result = advantages(lam)
    if values is None:
        return [result]
    return [result, (result if value_lam is None else advantages(value_lam)) + v]


class Rates(NamedTuple):
    """gamma, and the lambdas: numbers, or instead of both `lams`, (2, sequences) float64: lam and value_lam of each.

    value_lam is None where the returns are those of the advantages."""

    gamma: float
    lam: float
    value_lam: float | None
    lams: Tensor | None


def _cpu(rewards: Tensor, values: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None,
         bootstrap: Tensor | None, rates: Rates, outputs: list[Tensor]) -> None:  # fmt: skip
    native().gae(*_native_arguments(rewards, values, mask, cu_seqlens, bootstrap, rates, outputs), threads())


def _cuda(rewards: Tensor, values: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None,
          bootstrap: Tensor | None, rates: Rates, outputs: list[Tensor]) -> None:  # fmt: skip
    native().gae_cuda(
        *_native_arguments(rewards, values, mask, cu_seqlens, bootstrap, rates, outputs),
        rewards.get_device(), stream(rewards.device),
    )  # fmt: skip


def _triton(rewards: Tensor, values: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None,
            bootstrap: Tensor | None, rates: Rates, outputs: list[Tensor]) -> None:  # fmt: skip
    from rlhf_fast.kernels import gae as kernels

    kernels.gae(rewards, values, mask, cu_seqlens, bootstrap, *rates, outputs)


# impl(rewards, values | None, mask | None, cu_seqlens | None, bootstrap | None, rates, outputs)
# with rewards and values of one dtype and unit last stride; outputs = [advantages, returns], without values [returns]
IMPLS = {"cpu": _cpu, "triton": _triton, "cuda": _cuda}
OPS = {"gae": tuple(IMPLS), "discounted_returns": tuple(IMPLS)}


def empty_outputs(rewards: Tensor, values: Tensor | None, cu_seqlens: Tensor | None) -> list[Tensor]:
    """Unwritten [advantages, returns], or [returns] without values."""
    return sequences.empty_outputs(rewards, cu_seqlens, 1 if values is None else 2)


@op_without_gradient("gae")
def _op(rewards: Tensor, values: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None,
        bootstrap: Tensor | None, gamma: float, lam: float, value_lam: float | None, lams: Tensor | None,
        backend: str) -> list[Tensor]:  # fmt: skip
    _check_entries(rewards, cu_seqlens, lams)
    outputs = empty_outputs(rewards, values, cu_seqlens)
    IMPLS[backend](rewards, values, mask, cu_seqlens, bootstrap, Rates(gamma, lam, value_lam, lams), outputs)
    return outputs


@_op.register_fake
def _(rewards, values, mask, cu_seqlens, bootstrap, gamma, lam, value_lam, lams, backend):
    return empty_outputs(rewards, values, cu_seqlens)


def _run(op: str, inputs: dict[str, Tensor], mask: Tensor | None, cu_seqlens: Tensor | None,
         bootstrap: Tensor | None, gamma: float, lam: float | Tensor, value_lam: float | Tensor | None,
         backend: str | None) -> list[Tensor]:  # fmt: skip
    """Checks what both public functions share, then runs the backend. No gradient: see the module's docstring."""
    tensors, mask, cu_seqlens, bootstrap = sequences.prepared(inputs, mask, cu_seqlens, bootstrap)
    rewards, values = tensors[0], tensors[1] if len(tensors) > 1 else None
    count = sequences.count(rewards, cu_seqlens)
    for name, rate in (("gamma", gamma), ("lam", lam), ("value_lam", value_lam)):
        if isinstance(rate, Tensor):
            check.floating(name, rate)
            check.shaped(name, rate, (count,), "(B,)" if cu_seqlens is None else "(S,)")
            check.same_device(("rewards", rewards), (name, rate))
        elif rate is not None and not 0 <= rate <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {rate}")
    rates = _rates(gamma, lam, value_lam, rewards, count)
    name = resolve(op, IMPLS, rewards.device, backend)
    if name == "reference":
        _check_entries(rewards, cu_seqlens, rates.lams)
        return reference(
            rewards, values, mask=mask, cu_seqlens=cu_seqlens, bootstrap=bootstrap, gamma=gamma, lam=lam,
            value_lam=value_lam,
        )  # fmt: skip
    return _op(rewards, values, mask, cu_seqlens, bootstrap, *rates, name)


def _rates(gamma: float, lam: float | Tensor, value_lam: float | Tensor | None, rewards: Tensor, count: int) -> Rates:
    if not isinstance(lam, Tensor) and not isinstance(value_lam, Tensor):
        return Rates(gamma, lam, value_lam, None)
    rows = [
        x.detach().double() if isinstance(x, Tensor) else rewards.new_full((count,), x, dtype=torch.float64)
        for x in (lam, lam if value_lam is None else value_lam)
    ]
    return Rates(gamma, 1.0, None if value_lam is None else 1.0, torch.stack(rows))


def _check_entries(rewards: Tensor, cu_seqlens: Tensor | None, lams: Tensor | None) -> None:
    """Raises ValueError on the CPU; elsewhere entries are not read, which would wait for the device."""
    sequences.check_bounds(cu_seqlens, rewards.shape[-1])
    if lams is None or lams.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not ((lams >= 0) & (lams <= 1)).all():
        raise ValueError(f"lam and value_lam must be in [0, 1], got {lams.tolist()}")


def _native_arguments(rewards: Tensor, values: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None,
                      bootstrap: Tensor | None, rates: Rates, outputs: list[Tensor]) -> tuple:  # fmt: skip
    gamma, lam, value_lam, lams = rates
    (rewards_at, reward_stride), (values_at, value_stride) = map(sequences.native_steps, (rewards, values))
    return (
        rewards_at, values_at, DTYPE_CODES[rewards.dtype], [reward_stride, value_stride],
        sequences.native_arguments(rewards, mask, cu_seqlens, bootstrap),
        [gamma, lam, lam if value_lam is None else value_lam], packed(lams), value_lam is not None,
        [0 if values is None else packed(outputs[0]), packed(outputs[-1])],
    )  # fmt: skip
