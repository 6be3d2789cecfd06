"""What the losses from hidden states share: their arguments, their scratch budget, and the op around a sweep.

The gradient is made in forward (_sweep, which has the costs), so backward is a scale. Where linear_logprobs takes no
more products and memory, it makes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import without_autocast
from rlhf_fast.ops.core import check, masked_loss, registration
from rlhf_fast.ops.core.loss import Loss
from rlhf_fast.ops.head import _plan, _products
from rlhf_fast.ops.head._logprobs_op import bytes_of_gradients, kept_bytes
from rlhf_fast.ops.head._sweep import Sweep, empty
from rlhf_fast.ops.head.head import VOCABULARY_BLOCK, Head, HeadLora, checked_head, operands, row_stride
from rlhf_fast.ops.head.linear_logprobs import scored
from rlhf_fast.ops.head.tiles import Rows, Tiles, checked_rows
from rlhf_fast.ops.tokens.token_logprobs import Wanted
from rlhf_fast.ops.tokens.transform import Transform, checked_transform

SCRATCH_BYTES = 1 << 30
_ROW_BYTES = 128  # per row of the call: log-probabilities, statistics, and what the loss makes of them
_DIFFERENTIABLE = ("hidden", "weight", "bias", "lora_a", "lora_b")


class Coupling(NamedTuple):
    """Which rows a loss takes together, and how many at a time: arguments of _plan.make."""

    coupling: str
    shape: list[int]  # (B, T) or (N,)
    bounds: Tensor | None  # cu_seqlens
    held_rows: int
    summed_rows: int = 0


class _Wanted(NamedTuple):
    want_entropy: bool
    needs: list[bool]  # whether each of hidden and the head's parameters wants a gradient


def register(
    name: str, takes: Sequence[type], evaluate: Callable[..., list[Tensor]], metrics: int
) -> Callable[..., list[Tensor]]:
    """Registers ``rlhf_fast::<name>``, a loss of log-probabilities and of the inputs that it `takes`.

    evaluate(logprobs (N,), entropy (N,) or None, *inputs, backend) -> [loss (), metrics (`metrics`,),
    d loss / d logprobs (N,), and d loss / d entropy (N,) where it has a weight]
    """

    @without_autocast
    def compute(
        head: Head, rows: Rows, transform: Transform, coupling: Coupling, wanted: _Wanted, *others: Any
    ) -> list[Tensor]:
        *inputs, backend = others
        rows.check_values(transform, head.weight.shape[0])
        kind, shape, bounds, held_rows, summed_rows = coupling
        heights = rows.chunk_tokens, held_rows, summed_rows
        plan = _plan.make(kind, shape, bounds, rows.mask, rows.hidden.device, *heights, rows.mask_count)
        tiles = Tiles(head, rows, transform, plan.order, plan.slices, backend)

        def loss(logprobs: Tensor, entropy: Tensor | None) -> list[Tensor]:
            return evaluate(logprobs, entropy, *inputs, backend)

        return Sweep(head, tiles, loss, *wanted, backend).run(plan)

    def fake(head: Head, rows: Rows, _: Transform, coupling: Coupling, wanted: _Wanted, *inputs: Any) -> list[Tensor]:
        numbers = [rows.hidden.new_empty(s, dtype=check.compute_dtype(rows.hidden.dtype)) for s in ((), (metrics,))]
        logprobs, entropy, grad_hidden, head_gradients = empty(head, rows.hidden, *wanted)
        return [*numbers, logprobs, entropy, grad_hidden, *head_gradients.sums()]

    return registration.op(
        name, (Head, Rows, Transform, Coupling, _Wanted, *takes), compute, fake=fake, differentiable=_DIFFERENTIABLE,
        saves_results=slice(4, None), backward=masked_loss.scaled_gradients(_DIFFERENTIABLE), returned=4,
    )  # fmt: skip


class LossAndLogprobs(NamedTuple):
    """What a loss from hidden states returns with return_logprobs."""

    loss: Tensor  # 0-d
    metrics: dict[str, Tensor]  # by name: 0-d, detached
    logprobs: Tensor  # in the shape of targets, without gradient


class Call(NamedTuple):
    """The checked arguments of a loss from hidden states, but for those of the loss."""

    head: Head
    rows: Rows  # chunk_tokens: of what is taken row by row
    transform: Transform
    shape: torch.Size  # (B, T) or (N,)
    held_rows: int  # how many rows of logits the scratch budget holds
    scratch_bytes: int

    def mask(self) -> Tensor | None:
        return None if self.rows.mask is None else self.rows.mask.view(self.shape)

    def of_mask(self, flags: Tensor | None) -> Call:
        """The call in which the rows count that `flags` says."""
        return self._replace(rows=self.rows._replace(mask=None if flags is None else flags.reshape(-1)))

    def coupling(self, kind: str, cu_seqlens: Tensor | None, one_slope: bool) -> Coupling:
        """one_slope: whether d loss / d logprob is the same for all rows of a sequence, and nothing else has one."""
        summed_rows = self._summed_rows({"sequence": 1, "pair": 2}[kind]) if one_slope else 0
        return Coupling(kind, list(self.shape), cu_seqlens, self.held_rows, summed_rows)

    def _summed_rows(self, sequences: int) -> int:
        """The rows in a tile beside the head's gradients of so many sequences; 0 where few would be left."""
        trained = [p.numel() for p in self.head.parameters if p is not None and p.requires_grad]
        sums = sequences * sum(trained) * check.compute_dtype(self.rows.hidden.dtype).itemsize
        fixed, row = _scratch(self.head, self.rows.hidden.shape[0])
        left, most = (self.scratch_bytes - fixed - sums) // row, self.rows.chunk_tokens
        return min(left, most) if 2 * left >= most else 0


def checked(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, head_lora: HeadLora | None,
    temperature: float | Tensor, logit_scale: float, softcap: float | None, mask: Tensor | None,
    mask_count: int | None, chunk_tokens: int | None, scratch_bytes: int | None,
) -> Call:  # fmt: skip
    """Raises ValueError or TypeError for what does not fit."""
    hidden, weight, bias, head_lora = operands(hidden, weight, bias, head_lora)
    head, shape = checked_head(hidden, weight, bias, head_lora), hidden.shape[:-1]
    rows = checked_rows(hidden, weight, targets, mask, mask_count, chunk_tokens)
    check.that(len(shape) in (1, 2), "hidden", "(B, T, D) or (N, D)", hidden)
    transform = checked_transform(temperature, logit_scale, softcap, shape, ("hidden", hidden)).of_rows()
    scratch_bytes = SCRATCH_BYTES if scratch_bytes is None else scratch_bytes
    held = rows_that_fit(head, shape.numel(), scratch_bytes)
    rows = rows._replace(chunk_tokens=min(held, rows.chunk_tokens))
    return Call(head, rows, transform, shape, held, scratch_bytes)


def loss_and_logprobs(
    call: Call, op: Callable[..., list[Tensor]], inputs: tuple[Any, ...], coupling: Coupling,
    of_logprobs: Callable[[Tensor, Tensor | None], Loss],
    named: Callable[[Tensor, Tensor, Tensor | None], dict[str, Tensor]], backend: str, *, want_entropy: bool = False,
    weighs_entropy: bool = False,
) -> LossAndLogprobs:  # fmt: skip
    """The loss of `op`, which `register` made, and of its `inputs`.

    of_logprobs(logprobs, entropy): the same loss for autograd. named(values, logprobs, entropy): the op's metrics.
    """
    head, rows, transform, *_ = call
    if backend == "reference" or not (weighs_entropy or (head.trained and not keeps_gradients(call, backend))):
        # linear_logprobs takes as many products, and in its sweep no row waits for another.
        logprobs, entropy, *_ = scored(head, rows, transform, Wanted(want_entropy, False, False), backend)
        loss, metrics = of_logprobs(logprobs, entropy if want_entropy else None)
    else:
        needs = [p is not None and p.requires_grad and torch.is_grad_enabled() for p in (rows.hidden, *head.parameters)]
        wanted = _Wanted(want_entropy, needs)
        loss, values, logprobs, entropy = op(head, rows, transform, coupling, wanted, *inputs, backend)[:4]
        metrics = named(values.detach(), logprobs.detach(), entropy.detach() if want_entropy else None)
    return LossAndLogprobs(loss, metrics, logprobs.detach().view(call.shape))


def keeps_gradients(call: Call, backend: str) -> bool:
    """Whether linear_logprobs may keep the gradient of all logits from forward to backward, on a GPU.

    Where it takes no more than what it stands for, the sum in float32 of a bfloat16 weight's gradient, and what a tile
    leaves of the scratch budget. The weight's gradient is then one product, with no sum over tiles in memory.
    """
    head, rows = call.head, call.rows
    weight = head.weight
    if not _products.takes(weight):
        return False
    in_float32 = 4 * weight.numel() if weight.requires_grad and weight.dtype == torch.bfloat16 else 0
    fixed, row = _scratch(head, rows.hidden.shape[0])
    left = call.scratch_bytes - fixed - rows.chunk_tokens * row
    return bytes_of_gradients(head, rows, backend) <= min(kept_bytes(weight.device), in_float32 + left)


def rows_that_fit(head: Head, count: int, scratch_bytes: int) -> int:
    """How many rows of logits fit `scratch_bytes` in a call of `count` rows. Raises ValueError where not one does."""
    fixed, row = _scratch(head, count)
    if scratch_bytes < fixed + row:
        raise ValueError(
            f"scratch_bytes must be >= {fixed + row} for {count} tokens and a head {tuple(head.weight.shape)} of "
            f"{head.weight.dtype}, got {scratch_bytes}"
        )
    return (scratch_bytes - fixed) // row


def _scratch(head: Head, count: int) -> tuple[int, int]:
    """(bytes of a call of `count` rows, bytes per row of a tile)"""
    vocabulary, width = head.weight.shape
    size, wide = head.weight.dtype.itemsize, check.compute_dtype(head.weight.dtype).itemsize
    fixed = count * _ROW_BYTES
    stride = row_stride(vocabulary, head.weight.device)
    row = stride * wide + 2 * width * size  # logits; rows of hidden and of its gradient
    if head.lora_a is not None:
        row += (2 * head.lora_a.shape[0] + width) * wide
    if size < wide and head.lora_a is not None:
        fixed += head.lora_a.shape[0] * (vocabulary + width) * wide  # A and B, widened
    if _products.takes(head.weight):
        fixed += _products.scratch_bytes()
        row += stride * size  # the gradient
    elif size < wide:
        block = min(vocabulary, VOCABULARY_BLOCK)
        fixed += block * width * wide
        row += (block + 2 * width) * wide  # a block of products; rows of hidden and of its gradient, widened
    return fixed, row
