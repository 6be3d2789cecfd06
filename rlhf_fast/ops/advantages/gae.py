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

Computed in float32 (float64 for float64); the rates gamma lam and gamma (1 - lam) are rounded once. Results are
constants of the loss, without a derivative; `reference` has that by rewards, values and bootstrap.

Cost per step with inputs of s bytes: 2 s bytes read (and 1 for the mask), 8 written, about 10 FLOPs.

Sources: Schulman et al. 2016 (arXiv 1506.02438), eq. 16; lambda-returns as in Sutton & Barto 2018, eq. 12.20; a
lambda of its own for the returns: Yuan et al. 2025 (arXiv 2503.01491), section 3.2, and Yue et al. 2025 (VAPO, arXiv
2504.05118), section 4.1; lambda by length: VAPO, section 4.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import DTYPE_CODES, native, packed, resolve, stream, threads, triton_kernels
from rlhf_fast.ops.advantages import _scan
from rlhf_fast.ops.advantages._scan import Advantages, Sequences
from rlhf_fast.ops.core import check


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
) -> Advantages:
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
    return Advantages(*_of("gae", inputs, mask, cu_seqlens, bootstrap, gamma, lam, value_lam, backend))


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
    return _of("discounted_returns", inputs, mask, cu_seqlens, bootstrap, gamma, 1.0, None, backend)[0]


@check.takes_numbers
def length_adaptive_lambda(lengths: Tensor, alpha: float = 0.05) -> Tensor:
    """1 - 1 / (alpha length) per sequence, float32, 0 where alpha length is below 1 (VAPO, section 4.2).

    lengths: (B,), tokens that count. With it sum_t lam^t = alpha length: the share of a sequence over which the
    TD errors of an advantage reach does not depend on its length. alpha: > 0.
    """
    check.positive("alpha", alpha)
    return (1 - 1 / (alpha * lengths.float()).clamp_min(1)).detach()


def reference(
    rewards: Tensor, values: Tensor | None, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None, gamma: float = 1.0, lam: float | Tensor = 0.95,
    value_lam: float | Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """[advantages, returns], or [returns] without values, by definition, differentiable any number of times."""
    walk = _scan.walk(rewards, mask, cu_seqlens, bootstrap)
    zeros = torch.zeros_like(rewards, dtype=check.compute_dtype(rewards.dtype))
    # What is behind the mask is replaced before any arithmetic, so that nothing there gets through.
    r, v = (zeros if x is None else torch.where(walk.counts, x.to(zeros.dtype), zeros) for x in (rewards, values))

    def advantages(lam: float | Tensor) -> Tensor:
        decay = zeros + gamma * (lam[walk.sequence].to(zeros.dtype) if isinstance(lam, Tensor) else lam)
        states, _, _ = walk.back(
            v, lambda t, value, advantage: r[..., t] + gamma * value - v[..., t] + decay[..., t] * advantage
        )
        return torch.where(walk.counts, states, zeros)

    result = advantages(lam)
    if values is None:
        return [result]
    return [result, (result if value_lam is None else advantages(value_lam)) + v]


class Steps(NamedTuple):
    """Of one type, with unit last stride."""

    rewards: Tensor
    values: Tensor | None  # None: discounted returns alone


class Rates(NamedTuple):
    """gamma, and the lambdas: numbers, or instead of both `lams`, (2, sequences) float64: lam and value_lam of each.

    value_lam is None where the returns are those of the advantages."""

    gamma: float
    lam: float
    value_lam: float | None
    lams: Tensor | None


def _cpu(steps: Steps, sequences: Sequences, rates: Rates, outputs: list[Tensor]) -> None:
    native().gae(*_native_arguments(steps, sequences, rates, outputs), threads())


def _cuda(steps: Steps, sequences: Sequences, rates: Rates, outputs: list[Tensor]) -> None:
    device = steps.rewards.device
    native().gae_cuda(*_native_arguments(steps, sequences, rates, outputs), device.index, stream(device))


def _native_arguments(steps: Steps, sequences: Sequences, rates: Rates, outputs: list[Tensor]) -> tuple:
    gamma, lam, value_lam, lams = rates
    (rewards_at, reward_stride), (values_at, value_stride) = map(_scan.native_steps, steps)
    return (
        rewards_at, values_at, DTYPE_CODES[steps.rewards.dtype], [reward_stride, value_stride],
        sequences.native(steps.rewards), [gamma, lam, lam if value_lam is None else value_lam], packed(lams),
        value_lam is not None, [0 if steps.values is None else packed(outputs[0]), packed(outputs[-1])],
    )  # fmt: skip


def _triton(steps: Steps, sequences: Sequences, rates: Rates, outputs: list[Tensor]) -> None:
    triton_kernels("gae").gae(*steps, *sequences, *rates, outputs)


IMPLS = {"cpu": _cpu, "triton": _triton, "cuda": _cuda}
OPS = {"gae": tuple(IMPLS), "discounted_returns": tuple(IMPLS)}


def _of(op: str, inputs: dict[str, Tensor], mask: Tensor | None, cu_seqlens: Tensor | None,
        bootstrap: Tensor | None, gamma: float, lam: float | Tensor, value_lam: float | Tensor | None,
        backend: str | None) -> list[Tensor]:  # fmt: skip
    """What both public functions are, `inputs` being rewards and, for gae, values."""
    tensors, sequences = _scan.checked(inputs, mask, cu_seqlens, bootstrap)
    steps = Steps(tensors[0], tensors[1] if len(tensors) > 1 else None)
    for name, rate in (("gamma", gamma), ("lam", lam), ("value_lam", value_lam)):
        if isinstance(rate, Tensor):
            _scan.check_per_sequence(name, rate, ("rewards", steps.rewards), sequences)
        elif rate is not None:
            check.that(0 <= rate <= 1, name, "in [0, 1]", rate)
    rates = _rates(gamma, lam, value_lam, steps.rewards, sequences)
    name = resolve(op, IMPLS, steps.rewards.device, backend)
    if name == "reference":
        _check_lams(rates.lams)
        return reference(*steps, **sequences._asdict(), gamma=gamma, lam=lam, value_lam=value_lam)
    return _run(steps, sequences, rates, name)


def _rates(
    gamma: float, lam: float | Tensor, value_lam: float | Tensor | None, rewards: Tensor, sequences: Sequences
) -> Rates:
    if not isinstance(lam, Tensor) and not isinstance(value_lam, Tensor):
        return Rates(gamma, lam, value_lam, None)
    shape = (sequences.count(rewards),)
    rows = [
        x.detach().double() if isinstance(x, Tensor) else rewards.new_full(shape, x, dtype=torch.float64)
        for x in (lam, lam if value_lam is None else value_lam)
    ]
    return Rates(gamma, 1.0, None if value_lam is None else 1.0, torch.stack(rows))


def _check_lams(lams: Tensor | None) -> None:
    """Raises ValueError on the CPU; elsewhere entries are not read, which would wait for the device."""
    if lams is None or lams.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not ((lams >= 0) & (lams <= 1)).all():
        raise ValueError(f"lam and value_lam must be in [0, 1], got {lams.tolist()}")


_run = _scan.register("gae", (Steps, Sequences, Rates), IMPLS, lambda rates: _check_lams(rates.lams))
