"""vtrace: value targets and advantages of sequences that another policy sampled, by one backward scan over time.

With r_t the reward of step t, V_t the value of the state before it, n the next step that counts, the bootstrap value
V_T (0 where none is given) after the last step, and the importance ratio of the policy to the one that sampled:

    ratio_t = exp(logprob_t - sampler_logprob_t)
    rho_t = min(rho_clip, ratio_t),   c_t = lam min(c_clip, ratio_t)
    target_t = V_t + delta_t + gamma c_t (target_n - V_n),   delta_t = rho_t (r_t + gamma V_n - V_t)
    advantage_t = rho_t (r_t + gamma (V_n + lam (target_n - V_n)) - V_t)

Steps behind the mask give 0 and hand the next value and target through unchanged, without a discount. On the policy's
own samples (every ratio 1, neither clip below 1) these are the advantages and returns of `gae`.

target_t - V_t is an affine map of target_n - V_n (scale gamma c_t; the identity behind the mask), so the recurrence is
an associative scan.

Computed in float32 (float64 for float64). Results are constants of the loss, without a derivative; `reference` has
that by rewards, values, logprobs and bootstrap.

Cost per step with inputs of s bytes: 4 s bytes read (and 1 for the mask), 8 written, an exponential and about 20 FLOPs.

Sources: Espeholt et al. 2018 (IMPALA, arXiv 1802.01561), eq. 1, remark 1 (the recursion), remark 2 (lam), and section
4.2 for the advantage, which with lam < 1 takes the lambda-return of the next state in the place of its target.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import DTYPE_CODES, native, packed, resolve, threads, triton_kernels
from rlhf_fast.ops.advantages import _scan
from rlhf_fast.ops.advantages._scan import Advantages, Sequences
from rlhf_fast.ops.core import check


@check.takes_numbers
def vtrace(
    rewards: Tensor,
    values: Tensor,
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_clip: float | None = 1.0,
    c_clip: float | None = 1.0,
    backend: str | None = None,
) -> Advantages:
    """V-trace advantages and value targets.

    rewards, values, logprobs, sampler_logprobs: padded (B, T), or packed (N,) with cu_seqlens; float32, float64,
    bfloat16 or float16; rows may be strided. values[t] is the value of the state before step t; log-probabilities are
    those of the sampled tokens in nats, under the policy and under the one that sampled them.
    mask, cu_seqlens, bootstrap: as in `gae`; what is behind the mask is not looked at.
    gamma, lam: in [0, 1].
    rho_clip, c_clip: > 0, or None for no bound: of the weights of TD errors, and of the traces that carry them back.

    Returns (advantages, returns = the value targets), each of the shape of rewards, float32 (float64 for float64),
    detached.
    Raises ValueError or TypeError for shapes, types and values that do not fit; the entries of cu_seqlens are checked
    on the CPU only.
    """
    inputs = {"rewards": rewards, "values": values, "logprobs": logprobs, "sampler_logprobs": sampler_logprobs}
    tensors, sequences = _scan.checked(inputs, mask, cu_seqlens, bootstrap)
    steps = Steps(*tensors)
    for name, rate in (("gamma", gamma), ("lam", lam)):
        check.that(0 <= rate <= 1, name, "in [0, 1]", rate)
    rho_clip = math.inf if rho_clip is None else check.positive("rho_clip", rho_clip)
    c_clip = math.inf if c_clip is None else check.positive("c_clip", c_clip)
    rates = Rates(gamma, lam, rho_clip, c_clip)
    name = resolve("vtrace", IMPLS, rewards.device, backend)
    if name == "reference":
        return Advantages(
            *reference(*steps, **sequences._asdict(), gamma=gamma, lam=lam, rho_clip=rho_clip, c_clip=c_clip)
        )
    return Advantages(*_run(steps, sequences, rates, name))


def reference(
    rewards: Tensor, values: Tensor, logprobs: Tensor, sampler_logprobs: Tensor, *, mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, bootstrap: Tensor | None = None, gamma: float = 1.0, lam: float = 1.0,
    rho_clip: float = 1.0, c_clip: float = 1.0,
) -> list[Tensor]:  # fmt: skip
    """[advantages, returns] by definition, differentiable any number of times."""
    walk = _scan.walk(rewards, mask, cu_seqlens, bootstrap)
    zeros = torch.zeros_like(rewards, dtype=check.compute_dtype(rewards.dtype))
    # What is behind the mask is replaced before any arithmetic, so that nothing there gets through.
    r, v, p, q = (
        torch.where(walk.counts, x.to(zeros.dtype), zeros) for x in (rewards, values, logprobs, sampler_logprobs)
    )
    ratio = (p - q).exp()
    rho, scale = ratio.clamp(max=rho_clip), gamma * lam * ratio.clamp(max=c_clip)

    def excess(t: int, next_value: Tensor, next_excess: Tensor) -> Tensor:
        return rho[..., t] * (r[..., t] + gamma * next_value - v[..., t]) + scale[..., t] * next_excess

    own, next_value, next_excess = walk.back(v, excess)
    advantages = rho * (r + gamma * (next_value + lam * next_excess) - v)
    return [torch.where(walk.counts, x, zeros) for x in (advantages, v + own)]


class Steps(NamedTuple):
    """Of one type, with unit last stride."""

    rewards: Tensor
    values: Tensor
    logprobs: Tensor
    sampler_logprobs: Tensor


class Rates(NamedTuple):
    gamma: float
    lam: float
    rho_clip: float  # infinity for no bound
    c_clip: float


def _cpu(steps: Steps, sequences: Sequences, rates: Rates, outputs: list[Tensor]) -> None:
    addresses, strides = zip(*map(_scan.native_steps, steps), strict=True)
    native().vtrace(
        addresses, DTYPE_CODES[steps.rewards.dtype], strides, sequences.native(steps.rewards), rates,
        [packed(x) for x in outputs], threads(),
    )  # fmt: skip


def _triton(steps: Steps, sequences: Sequences, rates: Rates, outputs: list[Tensor]) -> None:
    triton_kernels("vtrace").vtrace(list(steps), *sequences, list(rates), outputs)


IMPLS = {"cpu": _cpu, "triton": _triton}
OPS = {"vtrace": tuple(IMPLS)}
_run = _scan.register("vtrace", (Steps, Sequences, Rates), IMPLS)
