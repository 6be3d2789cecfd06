"""The registered op behind linear_kl, whose docstring has the formulas and the costs.

Forward goes once over the tiles of logits and saves both U (N, D), or the logits (2 N, V), or nothing for the backward
pass; backward reads the logits, or makes the tiles again. (With U it is two row scales, and no op of its own.)
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
from rlhf_fast.ops.head._logprobs_op import KEPT_BYTES
from rlhf_fast.ops.tokens import token_kl as divergences
from rlhf_fast.ops.tokens import token_logprobs as rows


class Call(NamedTuple):
    """What forward and backward have in common, in the order of the registered ops' arguments."""

    hidden: Tensor  # (N, D)
    ref_hidden: Tensor  # (N, E)
    weight: Tensor
    bias: Tensor | None
    ref_weight: Tensor | None  # None: the reference uses weight and bias
    ref_bias: Tensor | None
    targets: Tensor | None  # (N,)
    mask: Tensor | None
    temperatures: Tensor | None
    temperature: float
    logit_scale: float
    softcap: float
    divergence: str
    js_weight: float
    top_k: int | None
    mask_count: int | None
    chunk_tokens: int
    backend: str

    def head(self) -> _head.Head:
        return _head.Head(self.weight, self.bias)


_CALL = (
    "Tensor hidden, Tensor ref_hidden, Tensor weight, Tensor? bias, Tensor? ref_weight, Tensor? ref_bias, "
    "Tensor? targets, Tensor? mask, Tensor? temperatures, float temperature, float logit_scale, float softcap, "
    "str divergence, float js_weight, SymInt? top_k, SymInt? mask_count, SymInt chunk_tokens, "
    "str backend"
)
_FIELDS, _TENSORS = len(Call._fields), 9


def to_save(call: Call) -> str:
    """What the forward pass makes for the backward pass: "U", "logits" or nothing."""
    trained = any(p is not None and p.requires_grad for p in call.head()[:2])
    if not torch.is_grad_enabled() or not (trained or call.hidden.requires_grad):
        return ""
    if not trained:
        return "U"
    size = 2 * call.hidden.shape[0] * call.weight.shape[0] * check.compute_dtype(call.weight.dtype).itemsize
    return "logits" if size <= KEPT_BYTES.get(call.weight.device.type, KEPT_BYTES["cuda"]) else ""


class _Tile(NamedTuple):
    """n rows. The gradients' places may be those of the logits: whoever writes one has no more need of the other."""

    where: Tensor | slice  # which of the N rows
    hidden: Tensor  # (n, D)
    logits: Tensor  # (1, n, V)
    ref_logits: Tensor  # (1, n, V)
    gradients: Tensor  # (2 n, V): of what is made of the logits alone, then of the divergence
    targets: Tensor  # (1, n), zeros where there are none
    mask: Tensor | None  # (1, n)
    transform: rows.Transform

    def gradient(self, k: int) -> Tensor:
        """The first or second half of `gradients` as (1, n, V)."""
        n = self.hidden.shape[0]
        return self.gradients[None, k * n : (k + 1) * n]


def _tiles(call: Call, kept: Tensor | None = None, made: bool = False) -> Iterator[_Tile]:
    """The rows that count. kept: (2 N, V), a place for the logits of all of them; made: they are there."""
    vocabulary, index = call.weight.shape[0], _head.counted_rows(call.mask, call.mask_count)
    count = call.hidden.shape[0] if index is None else index.shape[0]
    chunks = _head.chunks(count, call.chunk_tokens)
    dtype, height = check.compute_dtype(call.weight.dtype), chunks[0].stop if chunks else 0
    buffer = _head.tile_buffer(call.hidden, 2 * height, vocabulary, dtype)
    gradients = torch.empty_like(buffer, dtype=call.weight.dtype) if call.weight.is_cuda else buffer
    if kept is not None and not made:
        kept[2 * count :].zero_()
    for chunk in chunks:
        n, where = chunk.stop - chunk.start, chunk if index is None else index[chunk]
        hidden, ref_hidden, mask = call.hidden[where], call.ref_hidden[where], None
        if call.mask is not None:
            mask = call.mask[where]
            hidden, ref_hidden = (torch.where(mask[:, None] != 0, h, torch.zeros_like(h)) for h in (hidden, ref_hidden))
        logits = buffer[: 2 * n] if kept is None else kept[2 * chunk.start : 2 * chunk.stop]
        if not made:
            _make_logits(call, hidden, ref_hidden, logits)
        ids = hidden.new_zeros(n, dtype=torch.int64) if call.targets is None else call.targets[where]
        temperatures = None if call.temperatures is None else call.temperatures[where]
        transform = rows.Transform(call.temperature, temperatures, call.logit_scale, call.softcap)
        yield _Tile(
            where, hidden, logits[None, :n], logits[None, n:], gradients[: 2 * n], ids[None],
            None if mask is None else mask[None], transform,
        )  # fmt: skip


def _make_logits(call: Call, hidden: Tensor, ref_hidden: Tensor, out: Tensor) -> None:
    """out (2 n, V): the policy's logits, then the reference's; one product where they have the same head."""
    n = hidden.shape[0]
    if call.ref_weight is None:
        call.head().logits(torch.cat([hidden, ref_hidden]), out)
    else:
        call.head().logits(hidden, out[:n])
        _head.Head(call.ref_weight, call.ref_bias).logits(ref_hidden, out[n:])


class _Divergence:
    """The divergence of a tile, over the reference's top_k tokens where the call asks for it."""

    def __init__(self, call: Call, tile: _Tile) -> None:
        self.tile, self.index = tile, None
        self.logits, self.ref_logits = tile.logits, tile.ref_logits
        if call.top_k is not None:
            self.logits, self.ref_logits, self.index = divergences.restricted(self.logits, self.ref_logits, call.top_k)
        self.options = (tile.mask, tile.transform, call.divergence, call.js_weight)
        self.backend = call.backend

    def forward(self, stats: list[Tensor]) -> list[Tensor]:
        """[kl, mean, logsum, ref_logsum]; `stats` are the last two over the whole vocabulary."""
        if self.index is not None:
            stats = [divergences.logsum(x, *self.options[:2], self.backend) for x in (self.logits, self.ref_logits)]
        stats = [torch.empty_like(stats[0]), torch.empty_like(stats[0]), *stats]
        divergences.IMPLS[self.backend][0](self.logits, self.ref_logits, *self.options, stats)
        return stats

    def backward(self, stats: list[Tensor], grad_kl: Tensor) -> None:
        """Writes grad_kl * d kl / d logits to the tile's second place."""
        place = self.tile.gradient(1)
        out = place if self.index is None else self.logits
        arguments = (self.logits, self.ref_logits, *self.options, stats, grad_kl, out)
        divergences.IMPLS[self.backend][1](*arguments)
        if self.index is not None:
            place.zero_().scatter_(-1, self.index, out.to(place.dtype))


def _zero_results(call: Call, want_entropy: bool, save: str) -> list[Tensor]:
    """[kl, logprobs, ref_logprobs, entropy, row_max, row_logsum, mean, logsum, ref_logsum (N,), U_kl, U_logprob (N, D),
    logits (2 N, V), which are unwritten]

    with those not wanted empty; `mean` and the last two logsums are the divergence's.
    """
    targets, dtype = call.targets is not None, check.compute_dtype(call.hidden.dtype)
    wanted = [True, targets, targets, want_entropy, *[True] * 5]
    stats = [call.hidden.new_zeros(call.hidden.shape[0] if w else 0, dtype=dtype) for w in wanted]
    shapes = [call.hidden.shape if save == "U" and w else (0,) for w in (True, targets)]
    kept = (2 * call.hidden.shape[0], call.weight.shape[0]) if save == "logits" else (0,)
    through = [call.hidden.new_zeros(shape) for shape in shapes]
    return [*stats, *through, call.hidden.new_empty(kept, dtype=dtype)]


@without_autocast
def _forward(*arguments: Any) -> list[Tensor]:
    call, (want_entropy, save) = Call(*arguments[:_FIELDS]), arguments[_FIELDS:]
    if call.targets is not None:
        check.targets_inside(call.targets, call.mask, call.weight.shape[0])
    check.counted_within(call.mask, call.mask_count)
    check.positive_rows("temperature", call.temperatures, call.mask)
    *results, kept = _zero_results(call, want_entropy, save)
    forward, backward = rows.IMPLS[call.backend]
    for tile in _tiles(call, prefer_huge_pages(kept) if save == "logits" else None):
        shared = (tile.targets, tile.mask, tile.transform)
        stats, ref_stats = rows.empty_stats(tile.logits, want_entropy), rows.empty_stats(tile.logits, False)
        forward(tile.logits, *shared, want_entropy, stats, None)
        forward(tile.ref_logits, *shared, False, ref_stats, None)
        divergence = _Divergence(call, tile)
        kl, *centring = kl_stats = divergence.forward([stats[3], ref_stats[3]])
        parts = [kl, stats[0], ref_stats[0], *stats[1:4], *centring]
        if save == "U":
            ones = torch.ones_like(kl)
            divergence.backward(kl_stats, ones)
            n = tile.hidden.shape[0]
            if call.targets is not None:
                backward(tile.logits, *shared, stats, ones, None, None, tile.gradient(0))
                u_logprob, u_kl = call.head().through(tile.gradients).view(2, n, -1)
                parts += [u_kl[None], u_logprob[None]]
            else:
                parts.append(call.head().through(tile.gradients[n:])[None])
        for whole, part in zip(results, parts, strict=False):
            if whole.numel():
                whole[tile.where] = part[0]
    return [*results, kept]


@without_autocast
def _backward(*arguments: Any) -> list[Tensor]:
    """Gradients of (hidden, weight, bias), empty where not needed; kept: the logits, else made again tile by tile."""
    call, (stats, kept, grad_kl, grad_logprobs, grad_entropy, needs) = Call(*arguments[:_FIELDS]), arguments[_FIELDS:]
    head = call.head()
    grad_hidden = torch.zeros_like(call.hidden) if needs[0] else call.hidden.new_empty(0)
    totals = _head.HeadGradients(head, [*needs[1:], False, False])
    for tile in _tiles(call, kept, made=kept is not None):
        part = [x[tile.where][None] if x.numel() else x for x in stats]
        given = (grad_kl, grad_logprobs, grad_entropy)
        parts, scale = _head.by_row(tile.mask, *(None if g is None else g[tile.where] for g in given))
        upstream = [None if part is None else part[None] for part in parts]
        if upstream[0] is not None:
            _Divergence(call, tile).backward([part[0], *part[6:9]], upstream[0])
            gradient = tile.gradient(1)[0]
        if upstream[1] is not None or upstream[2] is not None:
            row_stats = [part[1], *part[3:6], part[1].new_empty(0)]
            alone = tile.gradient(0)
            rows.IMPLS[call.backend][1](
                tile.logits, tile.targets, tile.mask, tile.transform, row_stats, *upstream[1:], None, alone
            )
            gradient = alone[0] if upstream[0] is None else alone[0].add_(gradient)
        if needs[0]:
            through = head.through(gradient, check.compute_dtype(gradient.dtype))
            grad_hidden[tile.where] = (through * scale[:, None]).to(grad_hidden.dtype)
        totals.add(gradient, tile.hidden, scale)
    return [grad_hidden, *totals.results()[:2]]


def _backward_fake(*arguments: Any) -> list[Tensor]:
    call, needs = Call(*arguments[:_FIELDS]), arguments[-1]
    return [
        torch.empty_like(p) if need and p is not None else call.hidden.new_empty(0)
        for p, need in zip((call.hidden, call.weight, call.bias), needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    call = Call(*inputs[:_FIELDS])
    ctx.want_entropy, ctx.save = inputs[_FIELDS:]
    ctx.settings = call[_TENSORS:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*call[:_TENSORS], *output)


def _autograd(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    call, stats, (u_kl, u_logprob, kept) = Call(*saved[:_TENSORS], *ctx.settings), saved[_TENSORS:-3], saved[-3:]
    nothing = (None,) * 3
    grad_kl, grad_logprobs, _, grad_entropy = (None if g is None else g.contiguous() for g in grads[:4])
    if call.targets is None:  # empty outputs, not results
        grad_logprobs = None
    if not ctx.want_entropy:
        grad_entropy = None
    if grad_kl is None and grad_logprobs is None and grad_entropy is None:
        return nothing
    if grad_entropy is None and ctx.save == "U":
        total = torch.zeros_like(u_kl, dtype=stats[0].dtype)
        for g, u in ((grad_kl, u_kl), (grad_logprobs, u_logprob)):
            if g is not None:
                total += (g if call.mask is None else torch.where(call.mask != 0, g, 0))[:, None] * u
        return (total.to(u_kl.dtype), *nothing[1:])
    needs = list(ctx.needs_input_grad[:3])
    found = torch.ops.rlhf_fast.linear_kl_backward(
        *call, list(stats), kept if ctx.save == "logits" else None, grad_kl, grad_logprobs, grad_entropy, needs
    )
    return tuple(g if need else None for g, need in zip(found, needs, strict=True))


run = registration.op(
    "linear_kl",
    f"({_CALL}, bool want_entropy, str save) -> Tensor[]",
    _forward,
    fake=lambda *arguments: _zero_results(Call(*arguments[:_FIELDS]), *arguments[_FIELDS:]),
    differentiable=(0, 2, 3),
    setup_context=_setup_context,
    backward=_autograd,
    returned=4,
)
linear_kl_backward = torch.library.custom_op(
    "rlhf_fast::linear_kl_backward", _backward, mutates_args=(),
    schema=f"({_CALL}, Tensor[] stats, Tensor? kept, Tensor? grad_kl, Tensor? grad_logprobs, Tensor? grad_entropy, "
    "bool[] needs) -> Tensor[]",
)  # fmt: skip
linear_kl_backward.register_fake(_backward_fake)
