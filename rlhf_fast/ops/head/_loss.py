"""What the losses from hidden states share: their arguments, their scratch budget, and the op around a sweep.

The gradient is made in forward (_linear_sweep, which has the costs), so backward is a scale.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.backends import without_autocast
from rlhf_fast.ops.core import check, masked_loss
from rlhf_fast.ops.core import registration_by_schema as registration
from rlhf_fast.ops.head import _products
from rlhf_fast.ops.head._plan import make
from rlhf_fast.ops.head._sweep import Sweep, differentiate, empty_results
from rlhf_fast.ops.head.tiles import VOCABULARY_BLOCK, Head
from rlhf_fast.ops.head.tiles import chunk_tokens as default_chunk_tokens
from rlhf_fast.ops.tokens import token_logprobs as rows

SCRATCH_BYTES = 1 << 30
_ROW_BYTES = 128  # per row of the call: log-probabilities, statistics, and what the loss makes of them

# (objective, tensors, backend, logprobs (N,), entropy (N,) or None)
#   -> [loss (), metrics, d loss / d logprobs (N,), and d loss / d entropy (N,) where it has a weight]
Evaluate = Callable[[str, list[Any], str, Tensor, Tensor | None], list[Tensor]]


def register(op: str, evaluate: Evaluate, metrics: int) -> Callable[..., list[Tensor]]:
    """Registers ``rlhf_fast::<op>`` and returns how to call it.

    Its loss has gradients to hidden, weight, bias, lora_a, lora_b, as `needs` says.

    coupling, shape, cu_seqlens, mask_count, tile_rows, held_rows, summed_rows: see _linear_plan.make. tensors,
    objective: what `evaluate` takes. Returns what `differentiate` does.
    """

    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
        lora_scale: float, targets: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None,
        logit_scale: float, softcap: float, tensors: list[Tensor | None], objective: str, coupling: str,
        shape: list[int], cu_seqlens: Tensor | None, mask_count: int | None, tile_rows: int, held_rows: int,
        summed_rows: int, want_entropy: bool, needs: list[bool], backend: str,
    ) -> list[Tensor]:  # fmt: skip
        check.targets_inside(targets, mask, weight.shape[0])
        check.counted_within(mask, mask_count)
        check.positive_rows("temperature", temperatures, mask)
        head = Head(weight, bias, lora_a, lora_b, lora_scale)
        transform = rows.Transform(temperature, temperatures, logit_scale, softcap)
        heights = (tile_rows, held_rows, summed_rows)
        plan = make(coupling, shape, cu_seqlens, mask, hidden.device, *heights, mask_count)
        behind = mask if plan.masked else None
        sweep = Sweep(head, hidden, targets, behind, transform, plan, want_entropy, backend)
        return differentiate(sweep, partial(evaluate, objective, tensors, backend), needs)

    def fake(hidden, weight, bias, lora_a, lora_b, lora_scale, targets, mask, temperature, temperatures, logit_scale,
             softcap, tensors, objective, coupling, shape, cu_seqlens, mask_count, tile_rows, held_rows, summed_rows,
             want_entropy, needs, backend):  # fmt: skip
        return empty_results(Head(weight, bias, lora_a, lora_b, lora_scale), hidden, want_entropy, needs, metrics)

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:5]]
        ctx.save_for_backward(*output[4:])

    def autograd(ctx, grads):
        results: list[Any] = [None] * 5
        if grads[0] is not None:
            for k, (gradient, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
                if ctx.needs_input_grad[k]:
                    results[k] = masked_loss.scaled_gradient(gradient, grads[0], dtype)
        return results

    return registration.op(
        op,
        torch.library.infer_schema(forward, mutates_args=()),
        without_autocast(forward),
        fake=fake,
        differentiable=range(5),
        setup_context=setup_context,
        backward=autograd,
        returned=4,
    )


# --- What the public functions share ----------------------------------------------------------------------------------


def encoded(objective: Any) -> str:
    """The fields of a dataclass as JSON, which an op can take as an argument."""
    return _json({name: getattr(objective, name) for name in objective.__dataclass_fields__})


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields)


# json is opaque to torch.compile; the plain values that it gets here are constants of the graph (see backends.resolve).
_json._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Call:
    """The arguments of every loss from hidden states, checked: rows (N, ...), and how many of them a tile has."""

    hidden: Tensor
    head: Head
    targets: Tensor
    transform: rows.Transform
    tile_rows: int
    held_rows: int
    scratch_bytes: int
    mask_count: int | None

    @property
    def needs(self) -> list[bool]:
        """Whether each of (hidden, *head[:4]) wants a gradient."""
        wanted = [x is not None and x.requires_grad for x in (self.hidden, *self.head[:4])]
        return [x and torch.is_grad_enabled() for x in wanted]

    @property
    def frozen(self) -> bool:
        """Whether no part of the head is trained, whatever the grad mode: both modes must give the same bits."""
        return not any(p is not None and p.requires_grad for p in self.head[:4])

    def run(
        self, op: Callable[..., list[Tensor]], mask: Tensor | None, tensors: list[Tensor | None], objective: str,
        coupling: str, one_slope: bool, shape: Sequence[int], cu_seqlens: Tensor | None, want_entropy: bool,
        backend: str,
    ) -> list[Tensor]:  # fmt: skip
        """The results of `op`, see `register`.

        one_slope: whether d loss / d logprob is the same for all rows of a sequence, and nothing else has a derivative.
        """
        summed_rows = self._summed_rows({"sequence": 1, "pair": 2}[coupling]) if one_slope else 0
        # In a list with a None among them, the dispatcher leaves a negated view as it is.
        tensors = [None if x is None else x.resolve_neg() for x in tensors]
        return op(
            self.hidden, *self.head, self.targets, mask, *self.transform, tensors, objective, coupling, list(shape),
            cu_seqlens, self.mask_count, self.tile_rows, self.held_rows, summed_rows, want_entropy, self.needs, backend,
        )  # fmt: skip

    def _summed_rows(self, sequences: int) -> int:
        """The rows in a tile beside the head's gradients of so many sequences; 0 where few would be left."""
        trained = [p.numel() for p in self.head[:4] if p is not None and p.requires_grad]
        sums = sequences * sum(trained) * check.compute_dtype(self.hidden.dtype).itemsize
        fixed, row = _scratch(self.head, self.hidden.shape[0])
        left = (self.scratch_bytes - fixed - sums) // row
        return min(left, self.tile_rows) if 2 * left >= self.tile_rows else 0


def checked(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None,
    head_lora: tuple[Tensor, Tensor, float] | None, temperature: float | Tensor, logit_scale: float,
    softcap: float | None, mask: Tensor | None, mask_count: int | None, chunk_tokens: int | None,
    scratch_bytes: int | None,
) -> Call:  # fmt: skip
    """Raises ValueError or TypeError for what does not fit."""
    check.mask_count(mask, mask_count)
    head = _checked_head(hidden, weight, bias, head_lora)
    shape = hidden.shape[:-1]
    check.shaped("targets", targets, shape, "hidden.shape[:-1]")
    check.same_device(("hidden", hidden), ("targets", targets))
    transform = rows.checked_transform(temperature, logit_scale, softcap, shape, ("hidden", hidden))
    if transform.temperatures is not None:
        transform = transform._replace(temperatures=transform.temperatures.view(-1))
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be >= 1, got {chunk_tokens}")
    scratch_bytes = SCRATCH_BYTES if scratch_bytes is None else scratch_bytes
    held = rows_that_fit(head, shape.numel(), scratch_bytes)
    tile = min(held, chunk_tokens or default_chunk_tokens(weight))
    ids = check.ids("targets", targets).view(-1)
    return Call(check.rows(hidden), head, ids, transform, tile, held, scratch_bytes, mask_count)


def _checked_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, head_lora: tuple[Tensor, Tensor, float] | None
) -> Head:
    check.floating("hidden", hidden)
    if hidden.dim() not in (2, 3) or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or not weight.numel():
        raise ValueError(
            "hidden must be (B, T, D) or (N, D) and weight (V, D) with V and D >= 1, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    lora_a, lora_b, scale = (None, None, 1.0) if head_lora is None else head_lora
    parameters = {"weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
    for name, x in parameters.items():
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the type of hidden, {hidden.dtype}, got {x.dtype}")
    if bias is not None:
        check.shaped("bias", bias, (weight.shape[0],), "(V,)")
    if lora_a is not None and lora_b is not None:
        rank = lora_a.shape[0] if lora_a.dim() else 0
        check.shaped("lora_a", lora_a, (rank, weight.shape[1]), "(R, D)")
        check.shaped("lora_b", lora_b, (weight.shape[0], rank), "(V, R)")
    check.same_device(("hidden", hidden), *parameters.items())
    return Head(weight, bias, lora_a, lora_b, check.number("the scale of head_lora", scale))


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
    row = vocabulary * wide + 2 * width * size  # logits; rows of hidden and of its gradient
    if head.lora_a is not None:
        row += (2 * head.lora_a.shape[0] + width) * wide
    if size < wide and head.weight.is_cuda:
        fixed += _products.scratch_bytes()
        row += vocabulary * size  # the gradient
    elif size < wide:
        block = min(vocabulary, VOCABULARY_BLOCK)
        fixed += block * width * wide
        row += (block + 2 * width) * wide  # a block of products; rows of hidden and of its gradient, widened
    return fixed, row
