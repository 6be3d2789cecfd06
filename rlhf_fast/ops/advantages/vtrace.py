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

Numerics: everything in float32 (float64 for float64).

Gradients: advantages and targets are constants of the loss, so results are detached and the registered op has no
derivative; `reference` is differentiable in rewards, values, logprobs and bootstrap.

Cost per step with inputs of s bytes: 4 s bytes read (and 1 for the mask), 8 written, an exponential and about 20 FLOPs.

Sources: Espeholt et al. 2018 (IMPALA, arXiv 1802.01561), eq. 1, remark 1 (the recursion), remark 2 (lam), and section
4.2 for the advantage, which with lam < 1 takes the lambda-return of the next state in the place of its target.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast.backends import DTYPE_CODES, native, packed, resolve, threads
from rlhf_fast.ops.core import check, sequences
from rlhf_fast.ops.core.registration_by_schema import op_without_gradient


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
) -> tuple[Tensor, Tensor]:
    """V-trace advantages and value targets.

    rewards, values, logprobs, sampler_logprobs: padded (B, T), or packed (N,) with cu_seqlens; float32, float64,
    bfloat16 or float16; rows may be strided. values[t] is the value of the state before step t; log-probabilities are
    those of the sampled tokens in nats, under the policy and under the one that sampled them.
    mask, cu_seqlens, bootstrap: as in `gae`; what is behind the mask is not looked at.
    gamma, lam: in [0, 1].
    rho_clip, c_clip: > 0, or None for no bound: of the weights of TD errors, and of the traces that carry them back.

    Returns (advantages, targets), each of the shape of rewards, float32 (float64 for float64), detached.
    Raises ValueError or TypeError for shapes, types and values that do not fit; the entries of cu_seqlens are checked
    on the CPU only.
    """
    inputs = {"rewards": rewards, "values": values, "logprobs": logprobs, "sampler_logprobs": sampler_logprobs}
    tensors, mask, cu_seqlens, bootstrap = sequences.prepared(inputs, mask, cu_seqlens, bootstrap)
    for name, rate in (("gamma", gamma), ("lam", lam)):
        if not 0 <= rate <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {rate}")
    rho_clip = math.inf if rho_clip is None else check.positive("rho_clip", rho_clip)
    c_clip = math.inf if c_clip is None else check.positive("c_clip", c_clip)
    name = resolve("vtrace", IMPLS, rewards.device, backend)
    if name == "reference":
        sequences.check_bounds(cu_seqlens, rewards.shape[-1])
        advantages, targets = reference(
            *tensors, mask=mask, cu_seqlens=cu_seqlens, bootstrap=bootstrap, gamma=gamma, lam=lam, rho_clip=rho_clip,
            c_clip=c_clip,
        )  # fmt: skip
    else:
        rates = [float(gamma), float(lam), rho_clip, c_clip]
        advantages, targets = _op(tensors, mask, cu_seqlens, bootstrap, rates, name)
    return advantages, targets


def reference(
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
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
) -> list[Tensor]:
    """[advantages, targets] by definition, differentiable any number of times."""
    walk = sequences.walk(rewards, mask, cu_seqlens, bootstrap)
    zeros = torch.zeros_like(rewards, dtype=check.compute_dtype(rewards.dtype))
    # What is behind the mask is replaced before any arithmetic, so that nothing there gets through.
    r, v, p, q = (
        torch.where(walk.counts, x.to(zeros.dtype), zeros) for x in (rewards, values, logprobs, sampler_logprobs)
    )
    ratio = (p - q).exp()
    rho, scale = ratio.clamp(max=rho_clip), gamma * lam * ratio.clamp(max=c_clip)

    def excess(t: int, next_value: Tensor, next_excess: Tensor) -> Tensor:
        return rho[..., t] * (r[..., t] + gamma * next_value - v[..., t]) + scale[..., t] * next_excess

    own, next_value, next_excess = sequences.backward(walk, v, excess)
    advantages = rho * (r + gamma * (next_value + lam * next_excess) - v)
    return [torch.where(walk.counts, x, zeros) for x in (advantages, v + own)]


def _cpu(inputs: list[Tensor], mask: Tensor | None, cu_seqlens: Tensor | None, bootstrap: Tensor | None,
         rates: list[float], outputs: list[Tensor]) -> None:  # fmt: skip
    addresses, strides = zip(*map(sequences.native_steps, inputs), strict=True)
    native().vtrace(
        addresses, DTYPE_CODES[inputs[0].dtype], strides,
        sequences.native_arguments(inputs[0], mask, cu_seqlens, bootstrap), rates, [packed(x) for x in outputs],
        threads(),
    )  # fmt: skip


def _triton(inputs: list[Tensor], mask: Tensor | None, cu_seqlens: Tensor | None, bootstrap: Tensor | None,
            rates: list[float], outputs: list[Tensor]) -> None:  # fmt: skip
    from rlhf_fast.kernels import vtrace as kernels

    kernels.vtrace(inputs, mask, cu_seqlens, bootstrap, rates, outputs)


# impl(inputs, mask | None, cu_seqlens | None, bootstrap | None, rates, outputs), with inputs = [rewards, values,
# logprobs, sampler_logprobs] of one dtype and unit last stride, rates = [gamma, lam, rho_clip, c_clip] with infinity
# for no bound, outputs = [advantages, targets]
IMPLS = {"cpu": _cpu, "triton": _triton}
OPS = {"vtrace": tuple(IMPLS)}


@op_without_gradient("vtrace")
def _op(inputs: list[Tensor], mask: Tensor | None, cu_seqlens: Tensor | None, bootstrap: Tensor | None,
        rates: list[float], backend: str) -> list[Tensor]:  # fmt: skip
    sequences.check_bounds(cu_seqlens, inputs[0].shape[-1])
    outputs = sequences.empty_outputs(inputs[0], cu_seqlens, 2)
    IMPLS[backend](inputs, mask, cu_seqlens, bootstrap, rates, outputs)
    return outputs


@_op.register_fake
def _(inputs, mask, cu_seqlens, bootstrap, rates, backend):
    return sequences.empty_outputs(inputs[0], cu_seqlens, 2)
