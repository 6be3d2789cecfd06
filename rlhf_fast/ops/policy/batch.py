"""What a policy loss knows of its batch before its kernel runs: the tokens that count, their weights and sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops.core import check, masked_loss
from rlhf_fast.ops.core.sequences import check_bounds, checked_cu_seqlens, sequence_ids
from rlhf_fast.ops.policy.objective import PolicyObjective, clip_bounds, not_none

COUNTS, DROPPED, SELECTED = 1, 2, 4  # bits of Plan.flags after `select`


class Inputs(NamedTuple):
    """The tensors of one value per token."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    entropy: Tensor | None = None

    def check(self, objective: PolicyObjective) -> None:
        """Raises where a tensor does not fit, or one that the objective needs is missing."""
        masked_loss.floats(self.logprobs.shape, "the shape of logprobs", **self._asdict())
        check_reference(objective, self.ref_logprobs)
        if (objective.entropy_coef > 0 or objective.entropy_fraction < 1) and self.entropy is None:
            raise ValueError(
                f"entropy must be given for entropy_coef {objective.entropy_coef}, "
                f"entropy_fraction {objective.entropy_fraction}"
            )

    def planes(self) -> Inputs:
        """(rows, columns) views; only logprobs and entropy keep their graph."""
        planes = self if self.logprobs.dim() == 2 else self.map(masked_loss.plane)
        constants = planes.map(masked_loss.constant)
        return constants._replace(logprobs=planes.logprobs, entropy=planes.entropy)

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """`function` of every tensor that is there."""
        return Inputs(*[None if x is None else function(x) for x in self])  # type: ignore[arg-type]


def check_reference(objective: PolicyObjective, ref_logprobs: Tensor | None) -> None:
    if objective.kl_coef > 0 and objective.exact_kl is None and ref_logprobs is None:
        raise ValueError(f"ref_logprobs must be given for kl_coef {objective.kl_coef}")


class Plan(NamedTuple):
    """Which tokens count and what for: made once for a batch, by shapes and masks alone."""

    flags: Tensor | None  # (rows, columns) uint8, not 0 where a token counts; None: every token does
    weights: Tensor | None  # (rows, columns), any strides: of a token in the loss; None: 1 / denominator
    denominator: Tensor | None  # (): tokens, at least 1; None: those that count here
    cu_seqlens: Tensor | None  # (S + 1,) int64, the packed sequences; None: the rows are

    @classmethod
    def of(
        cls, objective: PolicyObjective, logprobs: Tensor, *, mask: Tensor | None = None,
        overlong: Tensor | None = None, cu_seqlens: Tensor | None = None, denominator: Tensor | float | None = None,
        sequences: Tensor | float | None = None,
    ) -> Plan:  # fmt: skip
        """The plan of a batch of the shape, dtype and device of `logprobs`; arguments as those of policy_loss."""
        shape = tuple(logprobs.shape)
        check.same_device(("logprobs", logprobs), ("mask", mask), ("overlong", overlong), ("cu_seqlens", cu_seqlens))
        if mask is not None and mask.dtype in (torch.uint8, torch.bool) and mask.shape == logprobs.shape:
            flags: Tensor | None = mask.contiguous().view(torch.uint8)
        else:
            flags = check.mask_bytes(mask, shape, "the shape of logprobs")
        if cu_seqlens is not None:
            cu_seqlens = checked_cu_seqlens(cu_seqlens, "logprobs", shape)
            check_bounds(cu_seqlens, shape[0])
        elif len(shape) == 1 and (objective.weighs_sequences or objective.needs_sequences or overlong is not None):
            raise ValueError(
                f"cu_seqlens must be given for packed logprobs {shape} with {objective.variant}, "
                f"{objective.aggregation}"
            )
        if cu_seqlens is not None or overlong is not None:
            flags = _without(flags, logprobs, overlong, cu_seqlens)
        tokens = masked_loss.denominator_tensor(denominator, logprobs)
        sequences = masked_loss.denominator_tensor(sequences, logprobs, "sequences")
        plan = Plan(
            flags=None if flags is None else masked_loss.plane(flags), weights=None,
            denominator=None if tokens is None else torch.where(tokens == 0, 1, tokens), cu_seqlens=cu_seqlens,
        )  # fmt: skip
        if objective.aggregation == "token_mean":
            return plan
        return plan._replace(weights=_weights(objective, plan, masked_loss.plane(logprobs), sequences))

    def tokens(self, like: Tensor) -> Tensor:
        """The denominator, (), in the type in which `like` is computed."""
        dtype = check.compute_dtype(like.dtype)
        if self.denominator is not None:
            return self.denominator
        if self.flags is None:
            return like.new_full((), max(like.numel(), 1), dtype=dtype)
        return (self.flags != 0).sum(dtype=dtype).clamp(min=1)

    def counts(self, like: Tensor) -> Tensor:
        """(rows, columns) bool"""
        return torch.ones_like(like, dtype=torch.bool) if self.flags is None else self.flags != 0

    def lengths(self, like: Tensor) -> Tensor:
        """(S,) int64: the counted tokens of each sequence."""
        counts = self.counts(like)
        if self.cu_seqlens is None:
            return counts.sum(1)
        before = torch.nn.functional.pad(counts[0].cumsum(0), (1, 0))
        return before[self.cu_seqlens].diff()

    def with_flag(self, tokens: Tensor, flag: int) -> Plan:
        """The plan with `flag` set on `tokens`, (rows, columns) bool, where they count."""
        flags = tokens.new_ones(tokens.shape, dtype=torch.uint8) if self.flags is None else self.flags
        return self._replace(flags=flags | torch.where(tokens & (flags != 0), flag, 0).to(torch.uint8))


def _without(flags: Tensor | None, logprobs: Tensor, overlong: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """`flags` without overlong sequences and tokens after the last sequence."""
    flags = torch.ones_like(logprobs, dtype=torch.uint8) if flags is None else flags
    if cu_seqlens is not None:
        flags = flags * (torch.arange(logprobs.shape[0], device=logprobs.device) < cu_seqlens[-1])
    if overlong is not None:
        count = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check.shaped("overlong", overlong, (count,), "(B,)" if cu_seqlens is None else "(S,)")
        flags = flags * (overlong == 0)[sequence_ids(masked_loss.plane(logprobs), cu_seqlens)]
    return flags.contiguous()


def _weights(objective: PolicyObjective, plan: Plan, like: Tensor, sequences: Tensor | None) -> Tensor:
    """Plan.weights of the objective's aggregation, which is not token_mean."""
    dtype = check.compute_dtype(like.dtype)
    if objective.aggregation == "token_sum":
        return torch.ones((), dtype=dtype, device=like.device).expand(like.shape)
    lengths = plan.lengths(like)
    if sequences is None:
        sequences = (lengths > 0).sum().to(dtype)
    share = 1 / torch.where(sequences == 0, 1, sequences)
    if objective.aggregation == "seq_mean_token_sum":
        return share.expand(like.shape)
    if objective.aggregation == "seq_mean_token_sum_norm":
        return (share / not_none(objective.fixed_length)).expand(like.shape)
    each = share / lengths.clamp(min=1).to(dtype)
    return each[sequence_ids(like, plan.cu_seqlens)].expand(like.shape)


def select(objective: PolicyObjective, inputs: Inputs, plan: Plan) -> Plan:
    """`plan` with the tokens flagged that the objective drops by entropy or selects by covariance.

    Where objective.marks_tokens, the flags are then bits, COUNTS among them.
    """
    if not objective.marks_tokens:
        return plan
    if plan.flags is not None:
        plan = plan._replace(flags=(plan.flags != 0).to(torch.uint8))
    if objective.entropy_fraction < 1 and inputs.entropy is not None:
        counts = plan.counts(inputs.entropy)
        highest = _largest(inputs.entropy.detach(), counts, torch.ceil(objective.entropy_fraction * counts.sum()))
        plan = plan.with_flag(~highest, DROPPED)
    if objective.function in ("clip_cov", "kl_cov"):
        counts, dtype = plan.counts(inputs.logprobs), check.compute_dtype(inputs.logprobs.dtype)
        total = counts.sum()
        centred = []
        for x in (inputs.logprobs.detach(), inputs.advantages):
            x = torch.where(counts, x.to(dtype), 0)
            centred.append(x - x.sum() / total.clamp(min=1))
        covariance = centred[0] * centred[1]
        if objective.function == "clip_cov":
            counts = counts & (covariance > objective.cov_low) & (covariance < objective.cov_high)
            counts = counts & ~_clipped(objective, inputs)
        count = torch.floor(objective.cov_fraction * total).clamp(min=1)
        plan = plan.with_flag(_largest(covariance, counts, count), SELECTED)
    return plan


def _clipped(objective: PolicyObjective, inputs: Inputs) -> Tensor:
    """bool: the tokens that ppo_clip's bounds hold, whose gradient is 0 already."""
    dtype = check.compute_dtype(inputs.logprobs.dtype)
    ratio = (inputs.logprobs.detach().to(dtype) - inputs.old_logprobs.to(dtype)).exp()
    low, high, dual_clip = clip_bounds(objective)
    falls = (inputs.advantages < 0) & ((ratio < low) | (ratio > dual_clip))
    return ((inputs.advantages > 0) & (ratio > high)) | falls


def _largest(x: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """bool: the `count` largest of x `among` the tokens, and those equal to the last of them."""
    x = torch.where(among, x, -torch.inf)
    if x.numel() == 0:
        return among
    order = x.flatten().sort(descending=True).values
    last = (count.long() - 1).clamp(0, x.numel() - 1)
    return among & (x >= order.gather(0, last[None]))  # order[last] would read `last` on the host
