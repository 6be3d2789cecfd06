"""The cross-entropy of logits that flash-attn and Liger have: class weights, ignored labels, label smoothing, z-loss.

With z the logits (N, V), y the label, w the class weights, s the label smoothing and lse = log sum exp z:

    loss = (1 - s) w_y (lse - z_y) + s / V sum_v w_v (lse - z_v) + z_loss,    z_loss = lse_square_scale lse^2
    d loss / d z_v = (sum c + 2 lse_square_scale lse) p_v - c_v,    c_v = s / V w_v, and (1 - s) w_y more for v = y

both 0 for an ignored label. Without smoothing it is token_logprobs and its lse. With it, and where the vocabulary is
spread over ranks, the gradient is made here: one float32 sum, rounded once, over tiles of rows.

Numerics: those of token_logprobs: neither the loss nor the gradient of a confident token is lost in rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import token_logprobs

_TILE_ELEMENTS = 2**24  # of a tile of the gradient in float32


class Options(NamedTuple):
    """What the loss is made of, but logits and labels."""

    weight: Tensor | None = None  # (V,), of the classes
    label_smoothing: float = 0.0
    lse_square_scale: float = 0.0
    logit_scale: float = 1.0
    ignore_index: int = -100
    inplace_backward: bool = False
    process_group: torch.distributed.ProcessGroup | None = None

    @property
    def ranks(self) -> int:
        return 1 if self.process_group is None else self.process_group.size()


def cross_entropy(logits: Tensor, labels: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(the loss without z_loss, z_loss), (N,) each, float32 (float64 for float64 logits), both differentiable.

    logits: (N, V); with a process_group this rank's V / ranks columns, in rank order. labels: (N,), ids of the whole
    vocabulary or ignore_index. Raises ValueError for shapes and values that do not fit, IndexError on the CPU for a
    label outside the vocabulary; on a GPU its loss is NaN.
    """
    _check(logits, labels, options)
    counts = labels != options.ignore_index
    if options.ranks > 1 or options.label_smoothing != 0:
        return _Smoothed.apply(logits, labels, counts, options)
    score = partial(
        token_logprobs, logits, labels, mask=counts, logit_scale=options.logit_scale,
        inplace_backward=options.inplace_backward,
    )  # fmt: skip
    return from_logprobs(score, labels, options)[:2]


def from_logprobs(score: Callable[..., Any], labels: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, z_losses, log-probabilities without gradient), (N,) each, not smoothed.

    score: an op that is given all but `return_lse`, with a mask of what counts.
    """
    if options.lse_square_scale == 0:
        logprobs = score()
        z_losses = torch.zeros_like(logprobs)
    else:
        logprobs, lse = score(return_lse=True)
        z_losses = options.lse_square_scale * lse.square()
    losses = -logprobs
    if options.weight is not None:
        losses = losses * of_labels(options.weight, labels, labels != options.ignore_index).to(losses.dtype)
    return losses, z_losses, logprobs.detach()


def reduced(
    losses: Tensor, z_losses: Tensor, labels: Tensor, options: Options, reduction: str
) -> tuple[Tensor, Tensor]:
    """(loss with z_loss, z_loss without gradient), () or, for "none", (N,).

    A mean of losses divides by the class weights of the labels that count, that of z_losses by their number; both are 0
    where none does.
    """
    if reduction == "none":
        return losses + z_losses, z_losses.detach()
    loss, z_loss = losses.sum(), z_losses.sum()
    if reduction == "mean":
        counts = labels != options.ignore_index
        weights = counts if options.weight is None else of_labels(options.weight, labels, counts).to(loss.dtype)
        total = weights.sum()
        loss, z_loss = loss / torch.where(total == 0, 1, total), z_loss / counts.sum().clamp(min=1)
    return loss + z_loss, z_loss.detach()


def of_labels(weight: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """(N,): the label's class weight, 0 where it does not count."""
    return torch.where(counts, weight.detach()[torch.where(counts, labels, 0)], 0)


def _check(logits: Tensor, labels: Tensor, options: Options) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits must be (N, V) and labels (N,), got {tuple(logits.shape)} and {tuple(labels.shape)}")
    if not 0 <= options.label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {options.label_smoothing}")
    check_weight(options, logits.shape[1])


def check_weight(options: Options, columns: int) -> None:
    """Raises ValueError for class weights that do not fit."""
    weight = options.weight
    if weight is None:
        return
    if options.ranks > 1:
        raise ValueError(f"weight must be None with a process_group, got {tuple(weight.shape)}")
    if weight.shape != (columns,) or not weight.is_floating_point():
        raise ValueError(f"weight must be ({columns},) of a floating type, got {tuple(weight.shape)} {weight.dtype}")


class _Smoothed(torch.autograd.Function):
    """What cross_entropy returns, with the gradient as one sum."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, counts: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        scale, (rows, columns) = options.logit_scale, logits.shape
        ids, owned = labels, counts
        if options.process_group is not None:
            ids = labels - options.process_group.rank() * columns
            owned = counts & (ids >= 0) & (ids < columns)
        ids = torch.where(owned, ids, 0)
        logprobs = token_logprobs(logits, ids, logit_scale=scale, mask=counts)
        z = scale * logits.gather(1, ids.clamp(0, columns - 1)[:, None])[:, 0].to(logprobs.dtype)
        lse, weight = z - logprobs, None if options.weight is None else options.weight.to(logprobs.dtype)
        if options.ranks > 1:
            assert options.process_group is not None
            others = _lse_of_others(lse, options.process_group)
            logprobs = torch.where(owned, logprobs - torch.nn.functional.softplus(others - lse), 0.0)
            lse = torch.logaddexp(lse, others)
        each = options.label_smoothing / (options.ranks * columns)
        if weight is None:
            total, at_label = lse.new_tensor(options.ranks * columns), torch.ones_like(lse)
            sums = logits.sum(1, dtype=lse.dtype)
        else:
            total, at_label = weight.sum(), of_labels(weight, ids, owned)
            sums = torch.cat([logits[tile].to(lse.dtype) @ weight for tile in _tiles(rows, columns)])
        sums = scale * sums
        if options.ranks > 1:
            for x in (logprobs, sums):
                torch.distributed.all_reduce(x, group=options.process_group)
        z_losses = torch.where(counts, options.lse_square_scale * lse.square(), 0.0)
        smooth = each * (total * lse - sums)
        losses = torch.where(counts, -(1 - options.label_smoothing) * at_label * logprobs + smooth, 0.0)
        ctx.save_for_backward(logits, ids, counts, owned, lse, logprobs, at_label, weight)
        ctx.options, ctx.each, ctx.total = options, each, total
        return losses, z_losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, upstream: Tensor, z_upstream: Tensor
    ) -> tuple[Tensor, None, None, None]:
        logits, ids, counts, owned, lse, logprobs, at_label, weight = ctx.saved_tensors
        options, each = ctx.options, ctx.each
        scale, zero = options.logit_scale, torch.zeros_like(lse)
        upstream, z_upstream = (torch.where(counts, scale * x, zero) for x in (upstream, z_upstream))
        hard = (1 - options.label_smoothing) * at_label
        others = each * ctx.total * upstream + 2 * options.lse_square_scale * lse * z_upstream
        by_softmax = hard * upstream + others
        by_class = upstream if weight is None else upstream * weight[ids]
        # hard (p - 1) as hard expm1(log p), exact for a confident token
        at_target = hard * torch.expm1(logprobs) * upstream + others * logprobs.exp() - each * by_class
        grad = logits if options.inplace_backward else torch.empty_like(logits)
        for tile in _tiles(*logits.shape):
            p = (scale * logits[tile].to(lse.dtype) - lse[tile, None]).exp_()
            smooth = each * upstream[tile, None] * (1 if weight is None else weight)
            row = p.mul_(by_softmax[tile, None]).sub_(smooth)
            target = torch.where(owned[tile, None], at_target[tile, None], row.gather(1, ids[tile, None]))
            row.scatter_(1, ids[tile, None], target)
            grad[tile] = torch.where(counts[tile, None], row, zero[tile, None]).to(logits.dtype)
        return grad, None, None, None


def _tiles(rows: int, columns: int) -> list[slice]:
    """At least one, also of no rows."""
    step = max(1, _TILE_ELEMENTS // max(1, columns))
    return [slice(start, start + step) for start in range(0, max(1, rows), step)]


def _lse_of_others(lse: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """(N,): the log-sum-exp of the other ranks' columns."""
    gathered = [torch.empty_like(lse) for _ in range(group.size())]
    torch.distributed.all_gather(gathered, lse.contiguous(), group=group)
    del gathered[group.rank()]
    return torch.logsumexp(torch.stack(gathered), 0)
