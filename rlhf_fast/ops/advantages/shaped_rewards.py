"""shaped_rewards: per-token rewards out of one score per sequence and a KL estimate per token.

    reward_t = -kl_coef kl_t + 1[t is the row's last valid token] clamp(score, -clip, clip)

Computed in float32 (float64 for float64). The result is a constant of the loss, without a derivative; `reference` has
that by scores and kl.

Cost per token with a KL of s bytes: s + 1 bytes read, 4 written.

Source: the KL penalty inside the reward, Ouyang et al. 2022 (arXiv 2203.02155), eq. 2, per token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import native, packed, resolve, strided, threads, triton_kernels
from rlhf_fast.ops.core import check, masked_loss, registration


@check.takes_numbers
def shaped_rewards(
    scores: Tensor,
    kl: Tensor,
    *,
    mask: Tensor,
    kl_coef: float,
    clip: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rewards per token: -kl_coef * kl, and at every row's last valid token its score, clipped to [-clip, clip].

    scores: (B,); kl: (B, T) in nats, rows may be strided; float32, float64, bfloat16 or float16.
    mask: (B, T) any dtype, nonzero counts; elsewhere the reward is 0. A row without a valid token gives 0 throughout.
    kl_coef: reward per nat.
    clip: > 0, or None for the scores as they are.

    Returns (B, T) float32 (float64 where kl is float64), detached.
    Raises ValueError or TypeError for shapes, types and values that do not fit.
    """
    check.floating("scores", scores)
    check.floating("kl", kl)
    check.that(kl.dim() == 2, "kl", "(B, T)", kl)
    check.shaped("scores", scores, kl.shape[:1], "(B,)")
    check.same_device(("kl", kl), ("scores", scores), ("mask", mask))
    check.that(math.isfinite(kl_coef), "kl_coef", "finite", kl_coef)
    clip = math.inf if clip is None else check.positive("clip", clip)
    counts = check.mask_bytes(mask, kl.shape, "kl.shape")
    assert counts is not None  # mask is not optional here
    scores, kl = scores.detach().to(check.compute_dtype(kl.dtype)).contiguous(), kl.detach()
    name = resolve("shaped_rewards", IMPLS, kl.device, backend)
    if name == "reference":
        return reference(scores, kl, mask=counts, kl_coef=kl_coef, clip=clip)
    return _run(Inputs(scores, check.unit_stride(kl), counts, kl_coef, clip), name)[0]


def reference(scores: Tensor, kl: Tensor, *, mask: Tensor, kl_coef: float, clip: float = math.inf) -> Tensor:
    """The rewards by definition, differentiable any number of times."""
    counts, dtype = mask != 0, check.compute_dtype(kl.dtype)
    later = counts.flip(-1).cumsum(-1).flip(-1)  # valid tokens from here on
    last = counts & (later == 1)
    penalty = masked_loss.product(-kl_coef, torch.where(counts, kl.to(dtype), torch.zeros_like(kl, dtype=dtype)))
    score = scores.to(dtype).clamp(-clip, clip)[:, None]
    return penalty + torch.where(last, score, torch.zeros_like(score))


class Inputs(NamedTuple):
    scores: Tensor  # in the type of the rewards
    kl: Tensor  # with unit last stride
    mask: Tensor  # uint8
    kl_coef: float
    clip: float


def _cpu(inputs: Inputs, outputs: list[Tensor]) -> None:
    scores, kl, mask, kl_coef, clip = inputs
    at, code, (batch, stride) = strided(kl)
    native().shaped_rewards(
        packed(scores), at, code, [batch, kl.shape[1], stride], packed(mask), kl_coef, clip, packed(outputs[0]),
        threads(),
    )  # fmt: skip


def _triton(inputs: Inputs, outputs: list[Tensor]) -> None:
    triton_kernels("shaped_rewards").shaped_rewards(*inputs, *outputs)


IMPLS = {"cpu": _cpu, "triton": _triton}
OPS = {"shaped_rewards": tuple(IMPLS)}


def _empty(inputs: Inputs, backend: str) -> list[Tensor]:
    return [inputs.kl.new_empty(inputs.kl.shape, dtype=check.compute_dtype(inputs.kl.dtype))]


_run = registration.op_without_gradient("shaped_rewards", (Inputs,), registration.filled(IMPLS, _empty), fake=_empty)
