"""The registered op behind linear_logprobs, whose docstring has the formulas and the costs.

Forward goes once over the tiles of logits and saves U (N, D) or G (N, V) for the backward pass, or nothing; backward
reads G, or makes the tiles again. (With U it is a row scale, and no op of its own.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import prefer_huge_pages, without_autocast
from rlhf_fast.ops.core import check
from rlhf_fast.ops.core import registration_by_schema as registration
from rlhf_fast.ops.head import tiles as _head
from rlhf_fast.ops.head._shards import Shards
from rlhf_fast.ops.tokens import token_logprobs as rows

KEPT_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # the most that G = d logprob / d logits of all rows may take


class Call(NamedTuple):
    """What forward and backward have in common, in the order of the registered ops' arguments."""

    hidden: Tensor  # (N, D)
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    targets: Tensor  # (N,) or (N, K)
    mask: Tensor | None
    temperatures: Tensor | None
    lora_scale: float
    temperature: float
    logit_scale: float
    softcap: float
    mask_count: int | None
    chunk_tokens: int
    group: str
    ranks: int
    rank: int
    backend: str

    def head(self) -> _head.Head:
        return _head.Head(self.weight, self.bias, self.lora_a, self.lora_b, self.lora_scale)

    def shards(self) -> Shards:
        return Shards(self.group, self.ranks, self.rank)

    def narrow(self) -> bool:
        """Whether gradients of logits are written in the weight's type: the CUDA row kernels know only the logits'."""
        return self.weight.device.type == "cuda" and self.backend != "cuda"

    def tiles(self, mask: Tensor | None, kept: Tensor | None = None) -> _head.Tiles:
        options: dict[str, Any] = {"narrow": self.narrow(), "kept": kept}
        return _head.Tiles(self.hidden, self.head(), mask, self.chunk_tokens, self.mask_count, **options)

    def transform(self, tiles: _head.Tiles, chunk: slice) -> rows.Transform:
        per_row = None if self.temperatures is None else tiles.take(self.temperatures, chunk)
        return rows.Transform(self.temperature, per_row, self.logit_scale, self.softcap)


_CALL = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor targets, Tensor? mask, "
    "Tensor? temperatures, float lora_scale, float temperature, float logit_scale, float softcap, SymInt? mask_count, "
    "SymInt chunk_tokens, str group, int ranks, int rank, str backend"
)
_FIELDS, _TENSORS = len(Call._fields), 8


def to_save(call: Call, want_lse: bool) -> str:
    """What the forward pass makes for the backward pass: "U", "G" or nothing. Neither gives the gradient of lse."""
    trained = any(p is not None and p.requires_grad for p in call.head()[:4])
    if not torch.is_grad_enabled() or not (trained or call.hidden.requires_grad) or call.targets.dim() > 1 or want_lse:
        return ""
    if not trained:
        return "U"
    (count, vocabulary), dtype = _kept(call)
    budget = KEPT_BYTES.get(call.weight.device.type, KEPT_BYTES["cuda"])
    return "G" if count * vocabulary * dtype.itemsize <= budget else ""


def _kept(call: Call) -> tuple[tuple[int, int], torch.dtype]:
    """Shape and type of G: one row for each of hidden, or for each of the at most mask_count that are taken."""
    count = call.hidden.shape[0] if call.mask_count is None else min(call.mask_count, call.hidden.shape[0])
    dtype = call.weight.dtype if call.narrow() else check.compute_dtype(call.weight.dtype)
    return (count, call.weight.shape[0]), dtype


def _empty_results(call: Call, want_entropy: bool, want_squares: bool, save: str) -> list[Tensor]:
    """[logprobs (N,) or (N, K), entropy, row_max, row_logsum, sum_p_squared (N,), U or G], those not wanted empty."""
    new = call.hidden.new_empty
    stats = rows.empty_stats(call.hidden[None], want_entropy, want_squares, call.targets.shape[1:])
    kept, dtype = _kept(call)
    saved = new(kept, dtype=dtype) if save == "G" else new(call.hidden.shape if save == "U" else (0,))
    return [*(s[0] if s.dim() > 1 else s for s in stats), saved]


@without_autocast
def _forward(*arguments: Any) -> list[Tensor]:
    call, (want_entropy, want_squares, want_lse, save) = Call(*arguments[:_FIELDS]), arguments[_FIELDS:]
    head, shards = call.head(), call.shards()
    ids = _local_ids(call)
    *results, saved = _empty_results(call, want_entropy, want_squares, save)
    tiles = call.tiles(call.mask, prefer_huge_pages(saved) if save == "G" else None)
    if tiles.index is not None:
        for r in (*results, saved if save == "U" else saved[tiles.index.shape[0] :]):
            r.zero_()
    forward, backward = rows.IMPLS[call.backend]
    for chunk, _, logits, gradient, mask in tiles:
        tile_ids, transform = tiles.take(ids, chunk)[None], call.transform(tiles, chunk)
        stats = rows.empty_stats(logits, want_entropy, want_squares, tile_ids.shape[2:])
        forward(logits, tile_ids, mask, transform, want_entropy, stats, gradient if save and not shards.group else None)
        if shards.group:
            stats = shards.merged(stats, mask)
            if save:
                backward(logits, tile_ids, mask, transform, stats, torch.ones_like(stats[0]), None, None, gradient)
        for whole, part in zip(results, stats, strict=True):
            if part.numel():
                tiles.put(whole, chunk, part[0])
        if save == "U":
            tiles.put(saved, chunk, _summed_through(head, shards, gradient[0]).to(saved.dtype))
    return [*rows.with_lse(results, want_lse), saved]


def _local_ids(call: Call) -> Tensor:
    """The targets counted from this rank's first id, after the checks of values."""
    check.counted_within(call.mask, call.mask_count)
    check.positive_rows("temperature", call.temperatures, call.mask)
    return call.shards().local_ids(call.targets, call.mask, call.weight.shape[0])


def _summed_through(head: _head.Head, shards: Shards, gradient: Tensor) -> Tensor:
    """d loss / d hidden of a tile, over all the vocabulary, in float32 (float64): rounded after its scale."""
    return shards.sum(head.through(gradient, check.compute_dtype(head.weight.dtype)))


@without_autocast
def _backward(*arguments: Any) -> list[Tensor]:
    """Gradients of (hidden, weight, bias, lora_a, lora_b), empty where not needed."""
    call, (stats, kept, *upstream, needs) = Call(*arguments[:_FIELDS]), arguments[_FIELDS:]
    head, shards = call.head(), call.shards()
    grad_hidden = torch.zeros_like(call.hidden) if needs[0] else call.hidden.new_empty(0)
    totals = _head.HeadGradients(head, needs[1:])
    tiles = _remade(call, stats, upstream) if kept is None else _remembered(call, kept, upstream[0])
    for where, hidden, gradient, scale in tiles:
        if needs[0]:
            through = _summed_through(head, shards, gradient)
            grad_hidden[where] = (through * scale[:, None]).to(grad_hidden.dtype)
        totals.add(gradient, hidden, scale)
    grad_weight, grad_bias, grad_lora_a, grad_lora_b = totals.results()
    if needs[3]:
        grad_lora_a = shards.sum(grad_lora_a)
    return [grad_hidden, grad_weight, grad_bias, grad_lora_a, grad_lora_b]


# Of some rows: which, their hidden states (n, D), gradient of the logits (n, V), and factors (n,) that it yet lacks.
_RowGradients = Iterator[tuple[Tensor | slice, Tensor, Tensor, Tensor]]


def _remade(call: Call, stats: list[Tensor], upstream: list[Tensor | None]) -> _RowGradients:
    """Makes the tiles of logits again, of the rows that count and have an upstream gradient."""
    ids, alive = _local_ids(call), _alive(call.mask, *upstream)
    tiles = call.tiles(alive)
    backward = rows.IMPLS[call.backend][1]
    for chunk, hidden, logits, gradient, mask in tiles:
        tile_stats = [tiles.take(s, chunk)[None] if s.numel() else s for s in stats]
        parts, scale = _head.by_row(mask, *(None if g is None else tiles.take(g, chunk) for g in upstream))
        of_tile = [None if part is None else part[None] for part in parts]
        transform = call.transform(tiles, chunk)
        backward(logits, tiles.take(ids, chunk)[None], mask, transform, tile_stats, *of_tile, gradient)
        yield chunk if tiles.index is None else tiles.index[chunk], hidden, gradient[0], scale


def _remembered(call: Call, kept: Tensor, grad_logprobs: Tensor) -> _RowGradients:
    """Reads G, whose rows are those that forward took, in its order; leaves out the same rows as _remade."""
    alive = _alive(call.mask, grad_logprobs)
    upstream = torch.where(alive != 0, grad_logprobs, 0)
    taken = _head.counted_rows(call.mask, call.mask_count)
    alive_taken = alive if taken is None else alive[taken]
    within = _head.counted_rows(alive_taken, None)
    for chunk in _head.chunks((alive_taken if within is None else within).shape[0], call.chunk_tokens):
        at = chunk if within is None else within[chunk]
        where = at if taken is None else taken[at]
        hidden = torch.where(alive[where][:, None] != 0, call.hidden[where], 0)
        yield where, hidden, kept[at], upstream[where]


def _alive(mask: Tensor | None, *upstream: Tensor | None) -> Tensor:
    """(N,) uint8: the rows that count and have an upstream gradient other than 0."""
    given = [(g != 0) if g.dim() == 1 else (g != 0).any(1) for g in upstream if g is not None]
    alive = torch.stack(given).any(0)
    return (alive if mask is None else alive & (mask != 0)).to(torch.uint8)


def _forward_fake(*arguments: Any) -> list[Tensor]:
    call, (want_entropy, want_squares, want_lse, save) = Call(*arguments[:_FIELDS]), arguments[_FIELDS:]
    *results, saved = _empty_results(call, want_entropy, want_squares, save)
    return [*rows.with_lse(results, want_lse), saved]


def _backward_fake(*arguments: Any) -> list[Tensor]:
    call, needs = Call(*arguments[:_FIELDS]), arguments[-1]
    parameters = (call.hidden, *call.head()[:4])
    return [
        torch.empty_like(p) if need and p is not None else call.hidden.new_empty(0)
        for p, need in zip(parameters, needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    call = Call(*inputs[:_FIELDS])
    ctx.want_entropy, _, ctx.want_lse, ctx.save = inputs[_FIELDS:]
    ctx.settings = call[_TENSORS:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*call[:_TENSORS], *output)


def _autograd(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    *tensors, logprobs, entropy, row_max, row_logsum, squares, _, saved = ctx.saved_tensors
    call = Call(*tensors, *ctx.settings)
    nothing = (None,) * 5
    upstream = rows.upstream(grads[:6], ctx.want_entropy, ctx.want_lse)
    grad_logprobs, grad_entropy, _ = upstream
    if all(g is None for g in upstream):
        return nothing
    if grad_logprobs is not None and grad_entropy is None and ctx.save == "U":
        if call.mask is not None:
            grad_logprobs = torch.where(call.mask != 0, grad_logprobs, 0)
        return ((grad_logprobs[:, None] * saved).to(saved.dtype), *nothing[1:])
    kept = saved if ctx.save == "G" and grad_entropy is None else None
    stats = [logprobs, entropy, row_max, row_logsum, squares]
    needs = list(ctx.needs_input_grad[:5])
    gradients = torch.ops.rlhf_fast.linear_logprobs_backward(*call, stats, kept, *upstream, needs)
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)),)


run = registration.op(
    "linear_logprobs",
    f"({_CALL}, bool want_entropy, bool want_squares, bool want_lse, str save) -> Tensor[]",
    _forward,
    fake=_forward_fake,
    differentiable=range(5),
    setup_context=_setup_context,
    backward=_autograd,
    returned=2,
)
linear_logprobs_backward = torch.library.custom_op(
    "rlhf_fast::linear_logprobs_backward", _backward, mutates_args=(),
    schema=f"({_CALL}, Tensor[] stats, Tensor? kept, Tensor? grad_logprobs, Tensor? grad_entropy, "
    "Tensor? grad_lse, bool[] needs) -> Tensor[]",
)  # fmt: skip
linear_logprobs_backward.register_fake(_backward_fake)
