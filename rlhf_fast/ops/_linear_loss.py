"""What the losses from hidden states share: one sweep over the logits that makes the gradient in forward.

The sweep takes groups of rows that hold every row their coefficients depend on (_linear_plan). For each group it makes
the logits and their statistics, asks the loss for its derivatives by all log-probabilities known so far, turns the
logits in place into their gradient, and multiplies that into grad_hidden and the gradients of the head. Backward is a
scale. With P = one N x D x V product (2 N D V FLOPs):

    no gradient                                     P
    a group whose logits fit the scratch budget     3P, 2P where the weight is frozen: nothing is made twice
    a unit of rows that does not fit                up to 4P, tile by tile; the logits of the last tile are still there

On the CPU rows behind the mask cost nothing, and rows whose coefficients are 0 (clipped tokens, advantages of 0) cost
P. The loss is asked about all rows for every group: what it says of rows that are not known yet is not used, and some
100 FLOPs per row are nothing beside 6 D V. So loss, metrics and derivatives are those of the loss's own op on these
log-probabilities, whatever the tiles.

Scratch is the logits of one tile (on a GPU also their gradient in the head's type, on the CPU a widened block of a
half-precision head) and some numbers per row. The gradients are outputs, those of the head in float32 (float64):
rounded once, after the upstream scale.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import _check, _losses
from rlhf_fast.ops import token_logprobs as rows
from rlhf_fast.ops._head import VOCABULARY_BLOCK, Head, HeadGradients, tile_buffer
from rlhf_fast.ops._head import chunk_tokens as default_chunk_tokens
from rlhf_fast.ops._linear_plan import Plan, make

SCRATCH_BYTES = 1 << 30
_TENSORS = 12  # the place of `tensors` among the arguments of the registered ops
_ROW_BYTES = 128  # per row of the call: log-probabilities, statistics, and what the loss makes of them

# (objective, tensors, backend, logprobs (N,), entropy (N,) or None)
#   -> [loss (), metrics, d loss / d logprobs (N,), and d loss / d entropy (N,) where it has a weight]
Evaluate = Callable[[str, list[Any], str, Tensor, Tensor | None], list[Tensor]]


class Sweep:
    """The rows of a plan, and one buffer for the logits of a tile."""

    def __init__(self, head: Head, hidden: Tensor, targets: Tensor, mask: Tensor | None, transform: rows.Transform,
                 plan: Plan, want_entropy: bool, backend: str) -> None:  # fmt: skip
        self.head, self.hidden, self.targets, self.mask = head, hidden, targets, mask
        self.transform, self.plan, self.want_entropy = transform, plan, want_entropy
        self.forward, self.backward = rows.IMPLS[backend]
        dtype, weight = _check.compute_dtype(hidden.dtype), head.weight
        height = max((tile.stop - tile.start for group in plan.groups for tile in group), default=0)
        self.buffer = tile_buffer(hidden, height, weight.shape[0], dtype)
        narrow = weight.is_cuda and weight.dtype != dtype
        self.gradients = torch.empty_like(self.buffer, dtype=weight.dtype) if narrow else self.buffer
        self.held: slice | None = None  # the tile whose logits are in the buffer

    def statistics(self, tile: slice) -> list[Tensor]:
        """Statistics of the rows of `tile`, (1, n) each, see token_logprobs.empty_stats."""
        picked = self.plan.rows(tile)
        logits = self._logits(tile, picked)
        stats = rows.empty_stats(logits, self.want_entropy)
        self.forward(logits, *self._of_rows(picked), self.want_entropy, stats, None)
        return stats

    def gradient(self, tile: slice, stats: list[Tensor], upstream: Sequence[Tensor]) -> tuple[slice | Tensor, Tensor]:
        """(which rows, d loss / d logits of them) of `tile`; upstream: by logprob and by entropy, over all rows."""
        picked = self.plan.rows(tile)
        live = self._live(picked, upstream)
        if live is None:
            logits = self._logits(tile, picked)
        else:
            picked = live + tile.start if isinstance(picked, slice) else picked[live]
            logits = self._live_logits(tile, picked, live)
            stats = [s[:, live] if s.numel() else s for s in stats]
        self.held = None
        gradient = self.gradients[None, : logits.shape[1]]
        by_logprob, by_entropy, *_ = [*(u[picked][None] for u in upstream), None]
        self.backward(logits, *self._of_rows(picked), stats, by_logprob, by_entropy, gradient)
        return picked, gradient[0]

    def hidden_rows(self, picked: slice | Tensor) -> Tensor:
        """Some rows of hidden, 0 behind the mask: nothing there gets into a product."""
        hidden = self.hidden[picked]
        return hidden if self.mask is None else torch.where(self.mask[picked][:, None] != 0, hidden, 0)

    def _logits(self, tile: slice, picked: slice | Tensor) -> Tensor:
        logits = self.buffer[: tile.stop - tile.start]
        if self.held != tile:
            self.head.logits(self.hidden_rows(picked), logits)
            self.held = tile
        return logits[None]

    def _live(self, picked: slice | Tensor, upstream: Sequence[Tensor]) -> Tensor | None:
        """Where in a tile a coefficient is not 0; None for everywhere, and on a GPU, which would have to wait."""
        if self.hidden.device.type != "cpu":
            return None
        live = torch.stack([u[picked] != 0 for u in upstream]).any(0)
        return None if live.all() else live.nonzero()[:, 0]

    def _live_logits(self, tile: slice, picked: Tensor, live: Tensor) -> Tensor:
        """The logits of the rows `picked`, which stand at `live` in the tile."""
        logits = self.buffer[: live.shape[0]]
        if self.held == tile:
            for to, row in enumerate(live.tolist()):  # one by one, upwards: no second buffer
                if to != row:
                    logits[to] = self.buffer[row]
        else:
            self.head.logits(self.hidden_rows(picked), logits)
        return logits[None]

    def _of_rows(self, picked: slice | Tensor) -> tuple[Tensor, Tensor | None, rows.Transform]:
        """targets, mask and transform of some rows."""
        temperatures = self.transform.temperatures
        return (
            self.targets[picked][None],
            None if self.mask is None else self.mask[picked][None],
            self.transform._replace(temperatures=None if temperatures is None else temperatures[picked][None]),
        )


def differentiate(sweep: Sweep, loss: Callable[[Tensor, Tensor | None], list[Tensor]],
                  needs: list[bool]) -> list[Tensor]:  # fmt: skip
    """[loss, metrics, logprobs, entropy, and the gradients of (hidden, *head[:4])], those not wanted empty."""
    head, hidden, count = sweep.head, sweep.hidden, sweep.hidden.shape[0]
    dtype = _check.compute_dtype(hidden.dtype)
    logprobs, entropy = (hidden.new_zeros(n, dtype=dtype) for n in (count, count if sweep.want_entropy else 0))
    known = (logprobs, entropy if sweep.want_entropy else None)
    grad_hidden = torch.zeros_like(hidden) if needs[0] else hidden.new_empty(0)
    head_gradients = HeadGradients(head, needs[1:])
    for group in sweep.plan.groups:
        group_stats = [sweep.statistics(tile) for tile in group]
        for tile, stats in zip(group, group_stats, strict=True):
            for whole, part in zip((logprobs, entropy), stats, strict=False):
                if part.numel():
                    whole[sweep.plan.rows(tile)] = part[0]
        if not any(needs):
            continue
        upstream = loss(*known)[2:]
        for tile, stats in zip(reversed(group), reversed(group_stats), strict=True):
            picked, gradient = sweep.gradient(tile, stats, upstream)
            if needs[0]:
                grad_hidden[picked] = head.through(gradient)
            if any(needs[1:]):
                head_gradients.add(gradient, sweep.hidden_rows(picked))
    return [*loss(*known)[:2], logprobs, entropy, grad_hidden, *head_gradients.sums()]


def empty_results(head: Head, hidden: Tensor, want_entropy: bool, needs: list[bool], metrics: int) -> list[Tensor]:
    """What `differentiate` returns, unwritten, with `metrics` metrics."""
    dtype, count = _check.compute_dtype(hidden.dtype), hidden.shape[0]
    shapes = [(), (metrics,), (count,), (count if want_entropy else 0,)]
    numbers = [hidden.new_empty(shape, dtype=dtype) for shape in shapes]
    grad_hidden = hidden.new_empty(hidden.shape if needs[0] else (0,))
    sums = [
        hidden.new_empty((0,) if p is None or not need else p.shape, dtype=dtype)
        for p, need in zip(head[:4], needs[1:], strict=True)
    ]
    return [*numbers, grad_hidden, *sums]


def register(op: str, evaluate: Evaluate, metrics: int) -> None:
    """Registers ``rlhf_fast::<op>``, whose loss has gradients to hidden, weight, bias, lora_a, lora_b, as `needs` says.

    coupling, shape, cu_seqlens, tile_rows, held_rows: see _linear_plan.make. tensors, objective: what `evaluate` takes.
    Returns what `differentiate` does.
    """

    @torch.library.custom_op(f"rlhf_fast::{op}", mutates_args=())
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
        lora_scale: float, targets: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None,
        logit_scale: float, softcap: float, tensors: list[Tensor | None], objective: str, coupling: str,
        shape: list[int], cu_seqlens: Tensor | None, tile_rows: int, held_rows: int, want_entropy: bool,
        needs: list[bool], backend: str,
    ) -> list[Tensor]:  # fmt: skip
        _check.targets_inside(targets, mask, weight.shape[0])
        _check.positive_rows("temperature", temperatures, mask)
        head = Head(weight, bias, lora_a, lora_b, lora_scale)
        transform = rows.Transform(temperature, temperatures, logit_scale, softcap)
        plan = make(coupling, shape, cu_seqlens, mask, hidden.device, tile_rows, held_rows)
        compacted = None if hidden.device.type == "cpu" else mask
        sweep = Sweep(head, hidden, targets, compacted, transform, plan, want_entropy, backend)
        return differentiate(sweep, partial(evaluate, objective, tensors, backend), needs)

    @forward.register_fake
    def _(hidden, weight, bias, lora_a, lora_b, lora_scale, targets, mask, temperature, temperatures, logit_scale,
          softcap, tensors, objective, coupling, shape, cu_seqlens, tile_rows, held_rows, want_entropy, needs,
          backend):  # fmt: skip
        return empty_results(Head(weight, bias, lora_a, lora_b, lora_scale), hidden, want_entropy, needs, metrics)

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:5]]
        tensors = inputs[_TENSORS]  # autograd looks into a list of tensors, but not into one with a None among them
        ctx.no_gradients = None if any(x is None for x in tensors) else [None] * len(tensors)
        ctx.save_for_backward(*output[4:])

    def autograd(ctx, grads):
        results: list[Any] = [None] * 22
        results[_TENSORS] = ctx.no_gradients
        if grads[0] is not None:
            for k, (gradient, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
                if ctx.needs_input_grad[k]:
                    results[k] = _losses.scaled_gradient(gradient, grads[0], dtype)
        return tuple(results)

    forward.register_autograd(autograd, setup_context=setup_context)


# --- What the public functions share ----------------------------------------------------------------------------------


def encoded(objective: Any) -> str:
    """The fields of a dataclass as JSON, which an op can take as an argument."""
    return _json({name: getattr(objective, name) for name in objective.__dataclass_fields__})


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields)


# json is opaque to torch.compile; the plain values that it gets here are constants of the graph (see backends.resolve).
_json._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Call(NamedTuple):
    """The arguments of every loss from hidden states, checked: rows (N, ...), and how many of them a tile has."""

    hidden: Tensor
    head: Head
    targets: Tensor
    transform: rows.Transform
    tile_rows: int
    held_rows: int

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
        self, op: str, mask: Tensor | None, tensors: list[Tensor | None], objective: str, coupling: str,
        shape: Sequence[int], cu_seqlens: Tensor | None, want_entropy: bool, backend: str,
    ) -> list[Tensor]:  # fmt: skip
        """The results of a registered op, see `register`."""
        return getattr(torch.ops.rlhf_fast, op)(
            self.hidden, *self.head, self.targets, mask, *self.transform, tensors, objective, coupling, list(shape),
            cu_seqlens, self.tile_rows, self.held_rows, want_entropy, self.needs, backend,
        )  # fmt: skip


def checked(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None,
    head_lora: tuple[Tensor, Tensor, float] | None, temperature: float | Tensor, logit_scale: float,
    softcap: float | None, chunk_tokens: int | None, scratch_bytes: int | None,
) -> Call:  # fmt: skip
    """Raises ValueError or TypeError for what does not fit."""
    head = _checked_head(hidden, weight, bias, head_lora)
    shape = hidden.shape[:-1]
    _check.shaped("targets", targets, shape, "hidden.shape[:-1]")
    _check.same_device(("hidden", hidden), ("targets", targets))
    transform = rows.checked_transform(temperature, logit_scale, softcap, shape, ("hidden", hidden))
    if transform.temperatures is not None:
        transform = transform._replace(temperatures=transform.temperatures.view(-1))
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be >= 1, got {chunk_tokens}")
    held = rows_that_fit(head, shape.numel(), SCRATCH_BYTES if scratch_bytes is None else scratch_bytes)
    tile = min(held, chunk_tokens or default_chunk_tokens(weight))
    ids = _check.ids("targets", targets).view(-1)
    return Call(hidden.reshape(-1, hidden.shape[-1]), head, ids, transform, tile, held)


def _checked_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, head_lora: tuple[Tensor, Tensor, float] | None
) -> Head:
    _check.floating("hidden", hidden)
    if hidden.dim() not in (2, 3) or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (B, T, D) or (N, D) and weight (V, D), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    lora_a, lora_b, scale = (None, None, 1.0) if head_lora is None else head_lora
    parameters = {"weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
    for name, x in parameters.items():
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the type of hidden, {hidden.dtype}, got {x.dtype}")
    if bias is not None:
        _check.shaped("bias", bias, (weight.shape[0],), "(V,)")
    if lora_a is not None and lora_b is not None:
        rank = lora_a.shape[0] if lora_a.dim() else 0
        _check.shaped("lora_a", lora_a, (rank, weight.shape[1]), "(R, D)")
        _check.shaped("lora_b", lora_b, (weight.shape[0], rank), "(V, R)")
    _check.same_device(("hidden", hidden), *parameters.items())
    return Head(weight, bias, lora_a, lora_b, float(scale))


def rows_that_fit(head: Head, count: int, scratch_bytes: int) -> int:
    """How many rows of logits fit `scratch_bytes` in a call of `count` rows. Raises ValueError where not one does."""
    vocabulary, width = head.weight.shape
    size, wide = head.weight.dtype.itemsize, _check.compute_dtype(head.weight.dtype).itemsize
    fixed = count * _ROW_BYTES
    row = vocabulary * wide + 2 * width * size  # logits; rows of hidden and of its gradient
    if head.lora_a is not None:
        row += (2 * head.lora_a.shape[0] + width) * wide
    if size < wide and head.weight.is_cuda:
        row += vocabulary * size  # the gradient
    elif size < wide:
        block = min(vocabulary, VOCABULARY_BLOCK)
        fixed += block * width * wide
        row += (block + 2 * width) * wide  # a block of products; rows of hidden and of its gradient, widened
    if scratch_bytes < fixed + row:
        raise ValueError(
            f"scratch_bytes must be >= {fixed + row} for {count} tokens and a head ({vocabulary}, {width}) of "
            f"{head.weight.dtype}, got {scratch_bytes}"
        )
    return (scratch_bytes - fixed) // row
