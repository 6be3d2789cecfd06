"""group_advantages: advantages of sampled answers relative to the other answers to the same prompt.

With r_i the rewards of one group, n their number, mean and std (n - 1) those of the group:

    grpo      (r_i - mean) / (std + eps)
    dr_grpo   r_i - mean
    rloo      r_i - mean of the others = (r_i - mean) n / (n - 1)

A group of equal rewards, one of a single answer included, gives exactly 0.

Numerics: distances to the group's first reward, so that nothing cancels; float32 (float64 for float64).

Gradients: advantages are constants of the loss, so the result is detached and the registered op has no derivative;
`reference` is differentiable.

Cost: one read and one write of B numbers; group_ids add one sort.

Sources: GRPO, Shao et al. 2024 (arXiv 2402.03300), section 4.1.2; Dr. GRPO, Liu et al. 2025 (arXiv 2503.20783);
RLOO, Ahmadian et al. 2024 (arXiv 2402.14740), eq. 8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_fast.backends import DTYPE_CODES, address, native, resolve, threads
from rlhf_fast.ops import _check


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    kind: str = "grpo",
    eps: float = 1e-4,
    backend: str | None = None,
) -> Tensor:
    """Advantages within groups, (B,) float32 (float64 for float64), detached.

    rewards: (B,) float32, float64, bfloat16 or float16.
    group_size: groups are consecutive rewards, B a multiple of it; or else
    group_ids: (B,) int64 or int32, any values in any order; equal ids make a group.
    kind: "grpo", "dr_grpo" or "rloo".
    eps: >= 0, added to the standard deviation by grpo.

    Raises ValueError or TypeError for shapes, types and values that do not fit.
    """
    _check.floating("rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be (B,), got {tuple(rewards.shape)}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if (group_size is None) == (group_ids is None):
        raise ValueError(
            f"exactly one of group_size and group_ids is needed, got group_size={group_size} and "
            f"group_ids={'None' if group_ids is None else tuple(group_ids.shape)}"
        )
    if group_ids is not None:
        _check.shaped("group_ids", group_ids, rewards.shape, "(B,)")
        _check.same_device(("rewards", rewards), ("group_ids", group_ids))
        group_ids = _check.ids("group_ids", group_ids)
    if group_size is not None and (group_size < 1 or rewards.shape[0] % group_size != 0):
        raise ValueError(f"B must be a multiple of group_size >= 1, got B={rewards.shape[0]}, group_size={group_size}")
    rewards, size = rewards.detach().contiguous(), group_size or 0
    name = resolve("group_advantages", IMPLS, rewards.device, backend)
    if name == "reference":
        ids = torch.arange(rewards.shape[0], device=rewards.device) // size if group_ids is None else group_ids
        return reference(rewards, ids, kind=kind, eps=eps)
    order, offsets = (None, None) if group_ids is None else _by_group(group_ids)
    return torch.ops.rlhf_fast.group_advantages(rewards, order, offsets, size, kind, eps, name)


def _grpo(count: Tensor, m2: Tensor, eps: float) -> Tensor:
    spread = m2 > 0  # the root has no derivative at 0
    return torch.where(spread, torch.where(spread, m2 / (count - 1).clamp_min(1), 1).sqrt(), 0) + eps


def _dr_grpo(count: Tensor, m2: Tensor, eps: float) -> Tensor:
    return torch.ones_like(m2)


def _rloo(count: Tensor, m2: Tensor, eps: float) -> Tensor:
    return (count - 1).clamp_min(1) / count


# kind -> what the distance to the mean is divided by, from the group's count and sum of squared deviations.
KINDS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"grpo": _grpo, "dr_grpo": _dr_grpo, "rloo": _rloo}


def reference(rewards: Tensor, group_ids: Tensor, *, kind: str, eps: float = 1e-4) -> Tensor:
    """The advantages by definition, over all pairs, differentiable any number of times."""
    r = rewards.to(_check.compute_dtype(rewards.dtype))
    same = group_ids[:, None] == group_ids[None, :]
    count = same.sum(-1).to(r.dtype)
    distance = torch.where(same, r[:, None] - r[None, :], 0).sum(-1) / count
    m2 = torch.where(same, distance.square()[None, :], 0).sum(-1)
    divisor = KINDS[kind](count, m2, eps)
    return distance / torch.where(divisor == 0, 1, divisor)  # 0 without eps, for equal rewards


def _by_group(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(order (B,), offsets (B + 1,)): group g is at order[offsets[g]:offsets[g + 1]]; unused groups come last, empty.

    As many groups as there could be, since their true number is known to the device alone.
    """
    ids, order = ids.sort(stable=True)
    group = torch.cat([ids.new_zeros(min(1, ids.shape[0])), (ids[1:] != ids[:-1]).cumsum(0)])
    return order, torch.searchsorted(group, torch.arange(ids.shape[0] + 1, device=ids.device))


def _cpu(rewards: Tensor, order: Tensor | None, offsets: Tensor | None, group_size: int, kind: str, eps: float,
         advantages: Tensor) -> None:  # fmt: skip
    groups = rewards.shape[0] // group_size if offsets is None else offsets.shape[0] - 1
    native().group_advantages(
        address(rewards), DTYPE_CODES[rewards.dtype], groups, group_size, address(order), address(offsets),
        list(KINDS).index(kind), eps, address(advantages), threads(),
    )  # fmt: skip


def _triton(rewards: Tensor, order: Tensor | None, offsets: Tensor | None, group_size: int, kind: str, eps: float,
            advantages: Tensor) -> None:  # fmt: skip
    from rlhf_fast.kernels import group_advantages as kernels

    kernels.group_advantages(rewards, order, offsets, group_size, kind, eps, advantages)


# impl(rewards, order | None, offsets | None, group_size (0 with offsets), kind, eps, advantages)
IMPLS = {"cpu": _cpu, "triton": _triton}
OPS = {"group_advantages": tuple(IMPLS)}


@torch.library.custom_op("rlhf_fast::group_advantages", mutates_args=())
def _op(rewards: Tensor, order: Tensor | None, offsets: Tensor | None, group_size: int, kind: str, eps: float,
        backend: str) -> Tensor:  # fmt: skip
    advantages = torch.empty_like(rewards, dtype=_check.compute_dtype(rewards.dtype))
    IMPLS[backend](rewards, order, offsets, group_size, kind, eps, advantages)
    return advantages


@_op.register_fake
def _(rewards, order, offsets, group_size, kind, eps, backend):
    return torch.empty_like(rewards, dtype=_check.compute_dtype(rewards.dtype))
