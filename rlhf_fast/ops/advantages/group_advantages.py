"""group_advantages: advantages of sampled answers relative to other answers.

With r_i the rewards of one group of n answers to a prompt, l_i their lengths, mean and std (n - 1) the group's, B the
answers of all groups:

    grpo                (r_i - mean) / (std + eps)
    dr_grpo             r_i - mean
    rloo                r_i - mean of the others = (r_i - mean) n / (n - 1)
    opo                 r_i - sum_j l_j r_j / sum_j l_j
    pass_at_k           a / s for a right answer (r_i > 0), -a n_right / (n_wrong s) for a wrong one, with
                        a = C(n_wrong, k) / C(n, k), the share of the sets of k answers without a right one, and
                        s = sqrt(a (1 - a))
    reinforce_baseline  d_i / sqrt(sum_B d^2 / (B - 1) + eps),  d_i = r_i - mean
    gdpo                the same of d_i = sum_m w_m (r_im - mean_m) / (std_m + eps), over several rewards m
    reinforce_pp        (r_i - mean of all B) / sqrt(variance of all B + eps)
    remax               r_i - the reward of the greedy answer to the same prompt

A group of equal rewards, one of a single answer included, gives exactly 0. Over a group all but opo, reinforce_pp and
remax sum to 0, therefore reinforce_baseline and gdpo have nothing to subtract over the batch.

reinforce_baseline, gdpo and reinforce_pp whiten over answers. To whiten over tokens instead, where a long answer weighs
more, `whiten` the advantages of dr_grpo (or the rewards) spread over the tokens.

Numerics: distances to the group's first reward, so that nothing cancels; float32 (float64 for float64).

Gradients: advantages are constants of the loss, so the result is detached and the registered op has no derivative;
`reference` is differentiable.

Cost: one read and one write of B numbers, twice where they are whitened; group_ids add one sort.

Sources: GRPO, Shao et al. 2024 (arXiv 2402.03300), section 4.1.2; Dr. GRPO, Liu et al. 2025 (arXiv 2503.20783); RLOO,
Ahmadian et al. 2024 (arXiv 2402.14740), eq. 8; OPO, Hao et al. 2025 (arXiv 2505.23585), the optimal baseline for
gradients that grow with the length; Pass@k training, Chen et al. 2025 (arXiv 2508.10751), section 2 (analytical
derivation); REINFORCE++ and its baseline form, Hu et al. 2025 (arXiv 2501.03262); GDPO, Liu et al. 2026 (arXiv
2601.05242); ReMax, Li et al. 2023 (arXiv 2310.10505).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import DTYPE_CODES, native, packed, resolve, threads
from rlhf_fast.ops.advantages.whiten import whiten
from rlhf_fast.ops.core import check, masked_loss
from rlhf_fast.ops.core.registration_by_schema import op_without_gradient


@check.takes_numbers
def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    variant: str = "grpo",
    eps: float = 1e-4,
    lengths: Tensor | None = None,
    baseline_rewards: Tensor | None = None,
    k: int | None = None,
    reward_weights: Tensor | Sequence[float] | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Advantages within groups, (B,) float32 (float64 for float64), detached.

    rewards: (B,) float32, float64, bfloat16 or float16; gdpo (B, M), several rewards of each answer.
    group_size: groups are consecutive rewards, B a multiple of it; or else
    group_ids: (B,) int64 or int32, any values in any order; equal ids make a group. reinforce_pp and remax, which have
    no groups, take neither.
    variant: a key of VARIANTS, see the module's formulas.
    eps: >= 0, added to the group's standard deviation by grpo and gdpo; > 0 where the batch is whitened.
    lengths: opo needs (B,), tokens, any dtype, >= 0 (checked on the CPU).
    baseline_rewards: remax needs (B,), the greedy answer's reward.
    k: pass_at_k needs it, in [1, group_size]; a group of fewer than k wrong answers gives 0.
    reward_weights: gdpo takes (M,), what each reward's advantages are multiplied by before the sum; 1 by default.
    process_group: where the batch is whitened, over all its ranks together; every rank must call. Groups stay within
    a rank.

    Raises ValueError or TypeError for shapes, types and values that do not fit, and for what the variant does not take.
    """
    _check_arguments(rewards, variant, eps, lengths, baseline_rewards, k, process_group)
    rule = VARIANTS[variant]
    if reward_weights is not None:
        reward_weights = _checked_weights(rewards, variant, reward_weights)
    _check_groups(rewards, group_size, group_ids, variant)
    if k is not None and not 1 <= k <= (group_size or k):
        raise ValueError(f"k must be in [1, group_size], got k={k}, group_size={group_size}")
    dtype = check.compute_dtype(rewards.dtype)
    rewards = rewards.detach()
    if baseline_rewards is not None:
        return rewards.to(dtype) - baseline_rewards.detach().to(dtype)
    if not rule.grouped:
        return whiten(rewards, eps=eps, process_group=process_group, backend=backend)
    name = resolve("group_advantages", IMPLS, rewards.device, backend)
    if name == "reference":
        _check_lengths(lengths)
        ids = group_ids
        if ids is None:
            ids = torch.arange(rewards.shape[0], device=rewards.device) // (group_size or 1)
        return reference(
            rewards, ids, variant=variant, eps=eps, lengths=lengths, k=k, reward_weights=reward_weights,
            process_group=process_group,
        )  # fmt: skip
    weights = None if lengths is None else lengths.detach().to(dtype).contiguous()
    order, offsets = (None, None) if group_ids is None else _by_group(check.ids("group_ids", group_ids))
    columns = rewards.dim() == 2 and rewards.shape[1]
    if columns:
        rewards = rewards.T.reshape(-1)
        if order is not None and offsets is not None:
            order, offsets = _of_columns(order, offsets, columns)
    if variant == "pass_at_k":
        rewards = _right(rewards)
    parameter = float(eps if k is None else k)
    advantages = _op(rewards.contiguous(), weights, order, offsets, group_size or 0, rule.divisor, parameter, name)
    if columns:
        advantages = masked_loss.product(_row(reward_weights, advantages)[:, None], advantages.view(columns, -1)).sum(0)
    return _over_batch(advantages, eps, process_group) if rule.whitened else advantages


def _right(rewards: Tensor) -> Tensor:
    """1 for a right answer, 0 for a wrong one; NaN is neither."""
    return torch.where(rewards.isnan(), rewards, (rewards > 0).to(rewards.dtype))


def _unit(count: Tensor, mean: Tensor, m2: Tensor, parameter: float) -> Tensor:
    return torch.ones_like(m2)


def _grpo(count: Tensor, mean: Tensor, m2: Tensor, eps: float) -> Tensor:
    spread = m2 > 0  # the root has no derivative at 0
    return torch.where(spread, torch.where(spread, m2 / (count - 1).clamp_min(1), 1).sqrt(), 0) + eps


def _rloo(count: Tensor, mean: Tensor, m2: Tensor, parameter: float) -> Tensor:
    return (count - 1).clamp_min(1) / count


def _pass_at_k(count: Tensor, mean: Tensor, m2: Tensor, k: float) -> Tensor:
    """n_wrong / n sqrt((1 - a) / a) for rewards 0 and 1, infinite where every set of k answers has a right one."""
    wrong = count - (count * mean).round()
    none, some = torch.ones_like(m2), torch.zeros_like(m2)  # of sets without a right one: a; 1 - a would cancel
    for j in range(int(k)):
        left = (count - j).clamp_min(1)
        some = some + none * (count - wrong) / left
        none = none * (wrong - j).clamp_min(0) / left
    return torch.where(none > 0, (some / torch.where(none > 0, none, 1)).sqrt() * wrong / count, math.inf)


# name -> what the distance to the mean is divided by, from the group's count, mean and sum of squared deviations, and
# the divisor's parameter (eps or k). The order is that of csrc/cpu/group_advantages.h.
DIVISORS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "unit": _unit,
    "grpo": _grpo,
    "rloo": _rloo,
    "pass_at_k": _pass_at_k,
}


class Rule(NamedTuple):
    divisor: str = "unit"
    needs: str | None = None  # the keyword without which the variant is not defined
    grouped: bool = True
    whitened: bool = False  # over the batch
    columns: bool = False  # several rewards of each answer


VARIANTS = {
    "grpo": Rule("grpo"),
    "dr_grpo": Rule(),
    "rloo": Rule("rloo"),
    "opo": Rule(needs="lengths"),
    "pass_at_k": Rule("pass_at_k", needs="k"),
    "reinforce_baseline": Rule(whitened=True),
    "gdpo": Rule("grpo", whitened=True, columns=True),
    "reinforce_pp": Rule(grouped=False, whitened=True),
    "remax": Rule(needs="baseline_rewards", grouped=False),
}


def reference(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    variant: str,
    eps: float = 1e-4,
    lengths: Tensor | None = None,
    k: int | None = None,
    reward_weights: Tensor | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """The advantages of a variant with groups by definition, differentiable any number of times."""
    r = rewards.to(check.compute_dtype(rewards.dtype))
    r = r if r.dim() == 2 else r[:, None]
    if variant == "pass_at_k":
        r = _right(r)
    ids, order = group_ids.sort(stable=True)
    group = torch.cat([order.new_zeros(min(1, ids.shape[0])), (ids[1:] != ids[:-1]).cumsum(0)])
    group = torch.empty_like(group).scatter(0, order, group)  # of every answer, from 0

    def over_group(x: Tensor) -> Tensor:
        """Per answer, the sum of x (B, M) over its group."""
        return x.new_zeros(x.shape).index_add(0, group, x)[group]

    place = torch.arange(r.shape[0], device=r.device)
    first = torch.full_like(place, r.shape[0]).scatter_reduce(0, group, place, "amin")[group]
    apart = r - r[first]  # from the group's first reward: nothing cancels, equal rewards are exactly 0 apart
    weights = torch.ones_like(r) if lengths is None else lengths.to(r.dtype)[:, None].expand_as(r)
    count, total = over_group(torch.ones_like(r)), over_group(weights)
    distance = masked_loss.product(
        (total != 0).to(r.dtype), apart - over_group(apart * weights) / torch.where(total == 0, 1, total)
    )
    mean, m2 = over_group(r) / count, over_group(distance.square())
    divisor = DIVISORS[VARIANTS[variant].divisor](count, mean, m2, eps if k is None else k)
    # The divisor is 0 without eps, for equal rewards.
    advantages = masked_loss.product(_row(reward_weights, r), distance / torch.where(divisor == 0, 1, divisor)).sum(-1)
    return _over_batch(advantages, eps, process_group) if VARIANTS[variant].whitened else advantages


def _row(reward_weights: Tensor | None, like: Tensor) -> Tensor:
    """The weights of the rewards, (M,) or one for all."""
    return like.new_ones(1) if reward_weights is None else reward_weights.to(like.dtype)


def _checked_weights(rewards: Tensor, variant: str, reward_weights: Tensor | Sequence[float]) -> Tensor:
    if not VARIANTS[variant].columns:
        raise ValueError(f"variant {variant} takes no reward_weights")
    if not isinstance(reward_weights, Tensor):
        reward_weights = [check.number("reward_weights", weight) for weight in reward_weights]
    weights = torch.as_tensor(reward_weights, device=rewards.device).detach()
    return check.shaped("reward_weights", weights, (rewards.shape[1],), "(M,)")


def _over_batch(advantages: Tensor, eps: float, process_group: torch.distributed.ProcessGroup | None) -> Tensor:
    """Advantages that sum to 0 by group, with variance 1 over all ranks."""
    size = advantages.new_full((), advantages.shape[0], dtype=torch.float64)
    total = torch.stack([advantages.double().square().sum(), size])
    if process_group is not None:
        torch.distributed.all_reduce(total, group=process_group)
    scale = torch.rsqrt(total[0] / (total[1] - 1).clamp_min(1) + eps)
    return advantages * scale.to(advantages.dtype)


def _by_group(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(order (B,), offsets (B + 1,)): group g is at order[offsets[g]:offsets[g + 1]]; unused groups come last, empty.

    As many groups as there could be, since their true number is known to the device alone.
    """
    ids, order = ids.sort(stable=True)
    group = torch.cat([ids.new_zeros(min(1, ids.shape[0])), (ids[1:] != ids[:-1]).cumsum(0)])
    return order, torch.searchsorted(group, torch.arange(ids.shape[0] + 1, device=ids.device))


def _of_columns(order: Tensor, offsets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The same groups in every one of `columns` runs of B rewards."""
    begin = (torch.arange(columns, device=order.device) * order.shape[0])[:, None]
    return (order + begin).view(-1), torch.cat([(offsets[:-1] + begin).view(-1), offsets[-1:] + begin[-1]])


def _check_arguments(
    rewards: Tensor,
    variant: str,
    eps: float,
    lengths: Tensor | None,
    baseline_rewards: Tensor | None,
    k: int | None,
    process_group: torch.distributed.ProcessGroup | None,
) -> None:
    """The variant, and what it takes and needs."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    rule = VARIANTS[variant]
    check.floating("rewards", rewards)
    if rewards.dim() != (2 if rule.columns else 1) or (rule.columns and rewards.shape[1] < 1):
        shape = "(B, M) with M >= 1" if rule.columns else "(B,)"
        raise ValueError(f"rewards of variant {variant} must be {shape}, got {tuple(rewards.shape)}")
    if not (eps > 0 if rule.whitened else eps >= 0):
        raise ValueError(f"eps must be {'> 0' if rule.whitened else '>= 0'} for variant {variant}, got {eps}")
    given = {"lengths": lengths, "baseline_rewards": baseline_rewards, "k": k}
    for name, value in given.items():
        if (value is not None) != (name == rule.needs):
            raise ValueError(f"variant {variant} {'needs' if value is None else 'takes no'} {name}")
        if isinstance(value, Tensor):
            check.shaped(name, value, rewards.shape, "(B,)")
            check.same_device(("rewards", rewards), (name, value))
    if process_group is not None and not rule.whitened:
        raise ValueError(f"variant {variant} takes no process_group: it is not whitened over the batch")


def _check_groups(rewards: Tensor, group_size: int | None, group_ids: Tensor | None, variant: str) -> None:
    shape = None if group_ids is None else tuple(group_ids.shape)
    if not VARIANTS[variant].grouped:
        if group_size is not None or group_ids is not None:
            raise ValueError(f"variant {variant} has no groups, got group_size={group_size} and group_ids={shape}")
        return
    if (group_size is None) == (group_ids is None):
        raise ValueError(
            f"exactly one of group_size and group_ids is needed, got group_size={group_size} and group_ids={shape}"
        )
    if group_ids is not None:
        check.shaped("group_ids", group_ids, rewards.shape[:1], "(B,)")
        check.same_device(("rewards", rewards), ("group_ids", group_ids))
        check.ids("group_ids", group_ids)
    if group_size is not None and (group_size < 1 or rewards.shape[0] % group_size != 0):
        raise ValueError(f"B must be a multiple of group_size >= 1, got B={rewards.shape[0]}, group_size={group_size}")


def _check_lengths(lengths: Tensor | None) -> None:
    """Raises ValueError on the CPU; elsewhere the entries are not read, which would wait for the device."""
    if lengths is None or torch.compiler.is_compiling() or not check.looks_at_values(lengths.device):
        return
    if (lengths < 0).any():
        raise ValueError(f"lengths must be >= 0, got {lengths.min().item()}")


def _cpu(rewards: Tensor, weights: Tensor | None, order: Tensor | None, offsets: Tensor | None, group_size: int,
         divisor: str, parameter: float, advantages: Tensor) -> None:  # fmt: skip
    groups = rewards.shape[0] // group_size if offsets is None else offsets.shape[0] - 1
    native().group_advantages(
        packed(rewards), DTYPE_CODES[rewards.dtype], packed(weights), groups, group_size, packed(order),
        packed(offsets), list(DIVISORS).index(divisor), parameter, packed(advantages), threads(),
    )  # fmt: skip


def _triton(rewards: Tensor, weights: Tensor | None, order: Tensor | None, offsets: Tensor | None, group_size: int,
            divisor: str, parameter: float, advantages: Tensor) -> None:  # fmt: skip
    from rlhf_fast.kernels import group_advantages as kernels

    kernels.group_advantages(rewards, weights, order, offsets, group_size, divisor, parameter, advantages)


# impl(rewards, weights | None, order | None, offsets | None, group_size (0 with offsets), divisor, parameter,
# advantages)
IMPLS = {"cpu": _cpu, "triton": _triton}
OPS = {"group_advantages": tuple(IMPLS)}


@op_without_gradient("group_advantages")
def _op(rewards: Tensor, weights: Tensor | None, order: Tensor | None, offsets: Tensor | None, group_size: int,
        divisor: str, parameter: float, backend: str) -> Tensor:  # fmt: skip
    _check_lengths(weights)
    advantages = torch.empty_like(rewards, dtype=check.compute_dtype(rewards.dtype))
    IMPLS[backend](rewards, weights, order, offsets, group_size, divisor, parameter, advantages)
    return advantages


@_op.register_fake
def _(rewards, weights, order, offsets, group_size, divisor, parameter, backend):
    return torch.empty_like(rewards, dtype=check.compute_dtype(rewards.dtype))
