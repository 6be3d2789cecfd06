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

Numerics: distances to the group's first reward, so that nothing cancels; float32 (float64 for float64). The result is
a constant of the loss, without a derivative; `reference` has one.

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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import DTYPE_CODES, native, packed, resolve, threads, triton_kernels
from rlhf_fast.ops.advantages.whiten import whiten
from rlhf_fast.ops.core import check, masked_loss, registration
from rlhf_fast.ops.core.groups import Groups, check_groups, ids_of, in_order


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
    check.one_of("variant", variant, VARIANTS)
    rule = VARIANTS[variant]
    _check_rewards(rewards, variant, eps)
    _check_options(rewards, variant, lengths=lengths, baseline_rewards=baseline_rewards, k=k)
    if process_group is not None and not rule.whitened:
        raise ValueError(f"variant {variant} takes no process_group: it is not whitened over the batch")
    weights = None if reward_weights is None else _checked_weights(rewards, variant, reward_weights)
    if rule.grouped:
        check_groups(("rewards", rewards), group_size, group_ids)
    elif group_size is not None or group_ids is not None:
        shape = None if group_ids is None else tuple(group_ids.shape)
        raise ValueError(f"variant {variant} has no groups, got group_size={group_size} and group_ids={shape}")
    if k is not None and not 1 <= k <= (group_size or k):
        raise ValueError(f"k must be in [1, group_size], got k={k}, group_size={group_size}")
    rewards = rewards.detach()
    if baseline_rewards is not None:
        dtype = check.compute_dtype(rewards.dtype)
        return rewards.to(dtype) - baseline_rewards.detach().to(dtype)
    if not rule.grouped:
        return whiten(rewards, eps=eps, process_group=process_group, backend=backend)
    name = resolve("group_advantages", IMPLS, rewards.device, backend)
    if name == "reference":
        _check_lengths(lengths)
        return reference(
            rewards, ids_of(rewards, group_size, group_ids), variant=variant, eps=eps, lengths=lengths, k=k,
            reward_weights=weights, process_group=process_group,
        )  # fmt: skip
    groups, distance = Groups.of(group_size, group_ids), Distance(rule.divisor, float(eps if k is None else k))
    if rule.columns:
        each = _of_columns(rewards, groups, distance, name)
        advantages = masked_loss.product(_row(weights, each)[:, None], each).sum(0)
    else:
        answers = _right(rewards) if variant == "pass_at_k" else rewards
        lengths = None if lengths is None else lengths.detach().to(check.compute_dtype(rewards.dtype)).contiguous()
        (advantages,) = _run(Answers(answers.contiguous(), lengths), groups, distance, name)
    return _over_batch(advantages, eps, process_group) if rule.whitened else advantages


def _of_columns(rewards: Tensor, groups: Groups, distance: Distance, backend: str) -> Tensor:
    """(M, B): the advantages of each of several rewards (B, M), which have the same groups."""
    size, columns = rewards.shape
    if groups.order is not None and groups.offsets is not None:
        begin = (torch.arange(columns, device=rewards.device) * size)[:, None]
        offsets = torch.cat([(groups.offsets[:-1] + begin).view(-1), groups.offsets[-1:] + begin[-1]])
        groups = Groups((groups.order + begin).view(-1), offsets, 0)
    (advantages,) = _run(Answers(rewards.T.reshape(-1), None), groups, distance, backend)
    return advantages.view(columns, -1)


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
    rewards: Tensor, group_ids: Tensor, *, variant: str, eps: float = 1e-4, lengths: Tensor | None = None,
    k: int | None = None, reward_weights: Tensor | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """The advantages of a variant with groups by definition, differentiable any number of times."""
    r = rewards.to(check.compute_dtype(rewards.dtype))
    r = r if r.dim() == 2 else r[:, None]
    if variant == "pass_at_k":
        r = _right(r)
    order, group = in_order(group_ids)
    group = torch.empty_like(order).scatter(0, order, group)  # of every answer, from 0

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


def _check_rewards(rewards: Tensor, variant: str, eps: float) -> None:
    """Raises where the rewards or eps are not what the variant takes."""
    rule = VARIANTS[variant]
    check.floating("rewards", rewards)
    if rewards.dim() != (2 if rule.columns else 1) or (rule.columns and rewards.shape[1] < 1):
        shape = "(B, M) with M >= 1" if rule.columns else "(B,)"
        raise ValueError(f"rewards of variant {variant} must be {shape}, got {tuple(rewards.shape)}")
    if not (eps > 0 if rule.whitened else eps >= 0):
        raise ValueError(f"eps must be {'> 0' if rule.whitened else '>= 0'} for variant {variant}, got {eps}")


def _check_options(rewards: Tensor, variant: str, **options: Tensor | int | None) -> None:
    """Raises for an option that the variant needs and that is not given, or the other way round, or does not fit."""
    for name, value in options.items():
        if (value is not None) != (name == VARIANTS[variant].needs):
            raise ValueError(f"variant {variant} {'needs' if value is None else 'takes no'} {name}")
        if isinstance(value, Tensor):
            check.shaped(name, value, rewards.shape, "(B,)")
            check.same_device(("rewards", rewards), (name, value))


def _check_lengths(lengths: Tensor | None) -> None:
    """Raises ValueError on the CPU; elsewhere the entries are not read, which would wait for the device."""
    if lengths is None or torch.compiler.is_compiling() or not check.looks_at_values(lengths.device):
        return
    if (lengths < 0).any():
        raise ValueError(f"lengths must be >= 0, got {lengths.min().item()}")


class Answers(NamedTuple):
    rewards: Tensor  # (B,), contiguous
    weights: Tensor | None  # (B,), of the results' type: of each answer in the mean of its group


class Distance(NamedTuple):
    """What the distance to the group's mean is divided by."""

    divisor: str  # one of DIVISORS
    parameter: float


def _cpu(answers: Answers, groups: Groups, distance: Distance, outputs: list[Tensor]) -> None:
    rewards, weights = answers
    native().group_advantages(
        packed(rewards), DTYPE_CODES[rewards.dtype], packed(weights), groups.count(rewards), groups.size,
        packed(groups.order), packed(groups.offsets), list(DIVISORS).index(distance.divisor), distance.parameter,
        packed(outputs[0]), threads(),
    )  # fmt: skip


def _triton(answers: Answers, groups: Groups, distance: Distance, outputs: list[Tensor]) -> None:
    triton_kernels("group_advantages").group_advantages(*answers, *groups, *distance, *outputs)


IMPLS = {"cpu": _cpu, "triton": _triton}
OPS = {"group_advantages": tuple(IMPLS)}


def _empty(answers: Answers, groups: Groups, distance: Distance, backend: str) -> list[Tensor]:
    return [torch.empty_like(answers.rewards, dtype=check.compute_dtype(answers.rewards.dtype))]


def _compute(answers: Answers, *others: Any) -> list[Tensor]:
    _check_lengths(answers.weights)
    return _filled(answers, *others)


_filled = registration.filled(IMPLS, _empty)
_run = registration.op_without_gradient("group_advantages", (Answers, Groups, Distance), _compute, fake=_empty)
