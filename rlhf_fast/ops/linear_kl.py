"""linear_kl: log-probabilities, entropy and the exact divergence from a reference, straight from both hidden states.

With logits = hidden @ weight^T + bias and ref_logits = ref_hidden @ ref_weight^T + ref_bias, which never exist as a
whole, logprob and entropy are those of token_logprobs(logits, targets), ref_logprob that of the reference's, and kl is
token_kl(logits, ref_logits): `reverse` is KL(policy || reference), the penalty of RL, `forward` is
KL(reference || policy), the loss of distillation with the reference as the teacher, `js` lies between them. Then

    d logprob / d hidden = (weight[y] - softmax(z) @ weight) / temperature =: U_logprob
    d kl / d hidden      = (d kl / d z) @ weight / temperature              =: U_kl          (d kl / d z: see token_kl)

Neither depends on the loss above. With a frozen head the forward pass makes both in the same sweep over the tiles of
logits, and the backward pass is two row scales: grad_hidden = grad_logprob U_logprob + grad_kl U_kl. The reference is
a constant: neither ref_hidden nor a head that only it uses gets a gradient, nor a shared head through it.

Cost, with P = one N x D x V product (2 N D V FLOPs): without gradients 2P; frozen head 4P in all, 3P without targets;
trained head 6P (the tiles are made again in backward); a gradient through the entropy adds that to a frozen head (7P).
A policy and a reference with the same head take one product of [hidden; ref_hidden] per tile, so that the head is read
once for both; U is one product as well. Scratch is one tile of 2 `chunk_tokens` x V float32 (and its bfloat16 gradient
on a GPU), beside both U (N x D each, in hidden's type). Rows with mask 0 cost nothing on the CPU; on a GPU, where
leaving them out would need a host synchronisation, their products are made and their results are 0.

Numerics: logits are accumulated and kept in float32, then as in token_logprobs and token_kl: a small KL does not
cancel. The head's gradient is accumulated in float32 across tiles. No atomics: the same inputs give the same bits,
with gradients or without; logprobs have the bits of a linear_logprobs whose products have those shapes.

Sources: Agarwal et al. 2024, "On-Policy Distillation of Language Models" (arXiv 2306.13649) for the divergences;
tiling over tokens as in Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops import _check, _head
from rlhf_fast.ops import token_kl as divergences
from rlhf_fast.ops import token_logprobs as rows


class LinearKl(NamedTuple):
    """What linear_kl returns, each (...) in nats; None for what was not asked for."""

    kl: Tensor
    logprobs: Tensor | None
    ref_logprobs: Tensor | None  # without gradient
    entropy: Tensor | None


def linear_kl(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    *,
    ref_weight: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    divergence: str = "reverse",
    js_weight: float = 0.5,
    top_k: int | None = None,
    return_entropy: bool = False,
    chunk_tokens: int | None = None,
    backend: str | None = None,
) -> LinearKl:
    """Per token: the divergence from the reference over the whole vocabulary, logprobs, ref_logprobs and entropy.

    hidden, ref_hidden: (..., D); weight: (V, D); bias: (V,) or None; all of one type, float32, bfloat16, float16 or
    float64. ref_weight: (V, E) for ref_hidden (..., E), and ref_bias (V,) or None; without both the policy's are used.
    targets: (...) int64 or int32 ids in [0, V), or None for the divergence (and entropy) alone.
    mask: (...) any dtype, nonzero counts; elsewhere results and gradients are 0 and nothing is read.
    temperature (one number or (...) one per row), logit_scale, softcap: as in token_logprobs, for both.
    divergence, js_weight, top_k: as in token_kl. return_entropy: also the policy's entropy, differentiable.
    chunk_tokens: rows of both logits held at a time (default: from the byte budget TILE_BYTES in _head.py).
    Whether the head is frozen is read from weight.requires_grad and bias.requires_grad.

    Returns a LinearKl, float32 (float64 for float64).
    Raises ValueError or TypeError for what does not fit, IndexError on the CPU for a counted target outside [0, V);
    on a GPU its logprobs are NaN, unless RLHF_FAST_DEBUG=1 makes it raise.
    """
    name = resolve("linear_kl", divergences.IMPLS, hidden.device, backend)
    shape = _checked(hidden, ref_hidden, weight, ref_weight, bias, ref_bias, targets, mask, chunk_tokens)
    divergences.checked_divergence(divergence, js_weight, top_k, weight.shape[0])
    transform = rows.checked_transform(temperature, logit_scale, softcap, shape, ("hidden", hidden))
    ids = None if targets is None else _check.ids("targets", targets)
    mask = _check.mask_bytes(mask, shape, "hidden.shape[:-1]")
    if ref_weight is None and ref_bias is not None:
        ref_weight = weight
    constants = [None if x is None else x.detach() for x in (ref_weight, ref_bias)]
    if name == "reference":
        kl, logprobs, ref_logprobs, entropy = reference(
            hidden, ref_hidden, weight, ids, ref_weight=constants[0], bias=bias, ref_bias=constants[1], mask=mask,
            temperature=temperature, logit_scale=logit_scale, softcap=softcap, divergence=divergence,
            js_weight=js_weight, top_k=top_k,
        )  # fmt: skip
        return LinearKl(kl, logprobs, ref_logprobs, entropy if return_entropy else None)
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    call = _Call(
        hidden.reshape(-1, hidden.shape[-1]), ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]), weight, bias,
        *constants, None if ids is None else ids.view(-1), None if mask is None else mask.view(-1),
        None if transform.temperatures is None else transform.temperatures.view(-1), transform.temperature,
        transform.logit_scale, transform.softcap, divergence, js_weight, top_k,
        chunk_tokens or max(8, _head.chunk_tokens(weight) // 2), name,
    )  # fmt: skip
    row_gradients = frozen and hidden.requires_grad and torch.is_grad_enabled()
    found = torch.ops.rlhf_fast.linear_kl(*call, return_entropy, row_gradients)
    kl, logprobs, ref_logprobs, entropy = (x.view(shape) if x.numel() == call.hidden.shape[0] else x for x in found[:4])
    return LinearKl(
        kl,
        None if targets is None else logprobs,
        None if targets is None else ref_logprobs.detach(),
        entropy if return_entropy else None,
    )


def reference(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    *,
    ref_weight: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    divergence: str = "reverse",
    js_weight: float = 0.5,
    top_k: int | None = None,
) -> LinearKl:
    """The same by definition, through all the logits, differentiable any number of times."""
    if ref_weight is None:
        ref_weight, ref_bias = weight.detach(), None if bias is None else bias.detach()
    transform: dict[str, Any] = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
    both = []
    for h, w, b in ((hidden, weight, bias), (ref_hidden.detach(), ref_weight, ref_bias)):
        if mask is not None:
            h = torch.where((mask != 0)[..., None], h, torch.zeros_like(h))
        dtype = _check.compute_dtype(h.dtype)
        both.append(torch.nn.functional.linear(h.to(dtype), w.to(dtype), None if b is None else b.to(dtype)))
    kl = divergences.reference(
        *both, divergence=divergence, js_weight=js_weight, top_k=top_k, mask=mask, **transform
    )  # fmt: skip
    ids = torch.zeros(kl.shape, dtype=torch.int64, device=kl.device) if targets is None else targets
    (logprobs, entropy), (ref_logprobs, _) = (rows.reference(x, ids, mask=mask, **transform) for x in both)
    return LinearKl(kl, *((None, None) if targets is None else (logprobs, ref_logprobs)), entropy)


def _checked(
    hidden: Tensor, ref_hidden: Tensor, weight: Tensor, ref_weight: Tensor | None, bias: Tensor | None,
    ref_bias: Tensor | None, targets: Tensor | None, mask: Tensor | None, chunk: int | None,
) -> torch.Size:  # fmt: skip
    _check.floating("hidden", hidden)
    ref_head = weight if ref_weight is None else ref_weight
    for h, w, names in ((hidden, weight, "hidden weight"), (ref_hidden, ref_head, "ref_hidden ref_weight")):
        if h.dim() < 1 or w.dim() != 2 or h.shape[-1] != w.shape[1] or w.shape[0] < 1:
            first, second = names.split()
            raise ValueError(
                f"{first} must be (..., D) and {second} (V, D) with V >= 1, got {tuple(h.shape)} and {tuple(w.shape)}"
            )
    shape = hidden.shape[:-1]
    _check.shaped("ref_hidden", ref_hidden, (*shape, ref_hidden.shape[-1]), "(*hidden.shape[:-1], D)")
    _check.shaped("ref_weight", ref_head, (weight.shape[0], ref_head.shape[1]), "(V, D)")
    others = {"ref_hidden": ref_hidden, "weight": weight, "ref_weight": ref_weight, "bias": bias, "ref_bias": ref_bias}
    for name, x in others.items():
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the type of hidden, {hidden.dtype}, got {x.dtype}")
        if x is not None and name.endswith("bias"):
            _check.shaped(name, x, (weight.shape[0],), "(V,)")
    if targets is not None:
        _check.shaped("targets", targets, shape, "hidden.shape[:-1]")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk_tokens must be >= 1, got {chunk}")
    _check.same_device(("hidden", hidden), *others.items(), ("targets", targets), ("mask", mask))
    return shape


OPS = {"linear_kl": tuple(divergences.IMPLS)}


# --- The tiles --------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
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
    chunk_tokens: int
    backend: str

    def head(self) -> _head.Head:
        return _head.Head(self.weight, self.bias)


_CALL = (
    "Tensor hidden, Tensor ref_hidden, Tensor weight, Tensor? bias, Tensor? ref_weight, Tensor? ref_bias, "
    "Tensor? targets, Tensor? mask, Tensor? temperatures, float temperature, float logit_scale, float softcap, "
    "str divergence, float js_weight, SymInt? top_k, SymInt chunk_tokens, str backend"
)
_FIELDS, _TENSORS = len(_Call._fields), 9


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


def _tiles(call: _Call) -> Iterator[_Tile]:
    head, vocabulary = call.head(), call.weight.shape[0]
    index = _head.counted_rows(call.mask, None)
    chunks = _head.chunks(call.hidden.shape[0] if index is None else index.shape[0], call.chunk_tokens)
    dtype, height = _check.compute_dtype(call.weight.dtype), chunks[0].stop if chunks else 0
    logits = call.hidden.new_empty(2 * height, vocabulary, dtype=dtype)
    gradients = torch.empty_like(logits, dtype=call.weight.dtype) if call.weight.is_cuda else logits
    for chunk in chunks:
        n, where = chunk.stop - chunk.start, chunk if index is None else index[chunk]
        hidden, ref_hidden, mask = call.hidden[where], call.ref_hidden[where], None
        if call.mask is not None:
            mask = call.mask[where]
            hidden, ref_hidden = (torch.where(mask[:, None] != 0, h, torch.zeros_like(h)) for h in (hidden, ref_hidden))
        if call.ref_weight is None:
            head.logits(torch.cat([hidden, ref_hidden]), logits[: 2 * n])
        else:
            head.logits(hidden, logits[:n])
            _head.Head(call.ref_weight, call.ref_bias).logits(ref_hidden, logits[n : 2 * n])
        ids = hidden.new_zeros(n, dtype=torch.int64) if call.targets is None else call.targets[where]
        temperatures = None if call.temperatures is None else call.temperatures[where]
        transform = rows.Transform(call.temperature, temperatures, call.logit_scale, call.softcap)
        yield _Tile(
            where, hidden, logits[None, :n], logits[None, n : 2 * n], gradients[: 2 * n], ids[None],
            None if mask is None else mask[None], transform,
        )  # fmt: skip


class _Divergence:
    """The divergence of a tile, over the reference's top_k tokens where the call asks for it."""

    def __init__(self, call: _Call, tile: _Tile) -> None:
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


# --- The registered op ------------------------------------------------------------------------------------------------


def _zero_results(call: _Call, want_entropy: bool, row_gradients: bool) -> list[Tensor]:
    """[kl, logprobs, ref_logprobs, entropy, row_max, row_logsum, mean, logsum, ref_logsum (N,), U_kl, U_logprob (N, D)]

    with those not wanted empty; `mean` and the last two logsums are the divergence's.
    """
    targets, dtype = call.targets is not None, _check.compute_dtype(call.hidden.dtype)
    wanted = [True, targets, targets, want_entropy, *[True] * 5]
    stats = [call.hidden.new_zeros(call.hidden.shape[0] if w else 0, dtype=dtype) for w in wanted]
    shapes = [call.hidden.shape if row_gradients and w else (0,) for w in (True, targets)]
    return [*stats, *(call.hidden.new_zeros(shape) for shape in shapes)]


def _forward(*arguments: Any) -> list[Tensor]:
    call, (want_entropy, row_gradients) = _Call(*arguments[:_FIELDS]), arguments[_FIELDS:]
    if call.targets is not None:
        _check.targets_inside(call.targets, call.mask, call.weight.shape[0])
    _check.positive_rows("temperature", call.temperatures, call.mask)
    results = _zero_results(call, want_entropy, row_gradients)
    forward, backward = rows.IMPLS[call.backend]
    for tile in _tiles(call):
        shared = (tile.targets, tile.mask, tile.transform)
        stats, ref_stats = rows.empty_stats(tile.logits, want_entropy), rows.empty_stats(tile.logits, False)
        forward(tile.logits, *shared, want_entropy, stats, None)
        forward(tile.ref_logits, *shared, False, ref_stats, None)
        divergence = _Divergence(call, tile)
        kl, *centring = kl_stats = divergence.forward([stats[3], ref_stats[3]])
        parts = [kl, stats[0], ref_stats[0], *stats[1:4], *centring]
        if row_gradients:
            ones = torch.ones_like(kl)
            divergence.backward(kl_stats, ones)
            n = tile.hidden.shape[0]
            if call.targets is not None:
                backward(tile.logits, *shared, stats, ones, None, tile.gradient(0))
                u_logprob, u_kl = call.head().through(tile.gradients).view(2, n, -1)
                parts += [u_kl[None], u_logprob[None]]
            else:
                parts.append(call.head().through(tile.gradients[n:])[None])
        for whole, part in zip(results, parts, strict=False):
            if whole.numel():
                whole[tile.where] = part[0]
    return results


def _backward(*arguments: Any) -> list[Tensor]:
    """Gradients of (hidden, weight, bias), empty where not needed: makes the logits again, tile by tile."""
    call, (stats, grad_kl, grad_logprobs, grad_entropy, needs) = _Call(*arguments[:_FIELDS]), arguments[_FIELDS:]
    head = call.head()
    grad_hidden = torch.zeros_like(call.hidden) if needs[0] else call.hidden.new_empty(0)
    totals = _head.HeadGradients(head, [*needs[1:], False, False])
    for tile in _tiles(call):
        part = [x[tile.where][None] if x.numel() else x for x in stats]
        upstream = [None if g is None else g[tile.where][None] for g in (grad_kl, grad_logprobs, grad_entropy)]
        if upstream[0] is not None:
            _Divergence(call, tile).backward([part[0], *part[6:9]], upstream[0])
            gradient = tile.gradient(1)[0]
        if upstream[1] is not None or upstream[2] is not None:
            row_stats = [part[1], *part[3:6], part[1].new_empty(0)]
            alone = tile.gradient(0)
            rows.IMPLS[call.backend][1](
                tile.logits, tile.targets, tile.mask, tile.transform, row_stats, *upstream[1:], alone
            )
            gradient = alone[0] if upstream[0] is None else alone[0].add_(gradient)
        if needs[0]:
            grad_hidden[tile.where] = head.through(gradient)
        totals.add(gradient, tile.hidden)
    return [grad_hidden, *totals.results()[:2]]


def _backward_fake(*arguments: Any) -> list[Tensor]:
    call, needs = _Call(*arguments[:_FIELDS]), arguments[-1]
    return [
        torch.empty_like(p) if need and p is not None else call.hidden.new_empty(0)
        for p, need in zip((call.hidden, call.weight, call.bias), needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    call = _Call(*inputs[:_FIELDS])
    ctx.want_entropy, ctx.row_gradients = inputs[_FIELDS:]
    ctx.settings = call[_TENSORS:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*call[:_TENSORS], *output)


def _autograd(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    call, stats, (u_kl, u_logprob) = _Call(*saved[:_TENSORS], *ctx.settings), saved[_TENSORS:-2], saved[-2:]
    nothing = (None,) * (_FIELDS + 2)
    grad_kl, grad_logprobs, _, grad_entropy = (None if g is None else g.contiguous() for g in grads[:4])
    if call.targets is None:  # empty outputs, not results
        grad_logprobs = None
    if not ctx.want_entropy:
        grad_entropy = None
    if grad_kl is None and grad_logprobs is None and grad_entropy is None:
        return nothing
    if grad_entropy is None and ctx.row_gradients:
        grad_hidden = torch.zeros_like(u_kl, dtype=stats[0].dtype)
        for g, u in ((grad_kl, u_kl), (grad_logprobs, u_logprob)):
            if g is not None:
                grad_hidden += (g if call.mask is None else torch.where(call.mask != 0, g, 0))[:, None] * u
        return (grad_hidden.to(u_kl.dtype), *nothing[1:])
    needs = [ctx.needs_input_grad[k] for k in (0, 2, 3)]
    found = torch.ops.rlhf_fast.linear_kl_backward(*call, list(stats), grad_kl, grad_logprobs, grad_entropy, needs)
    grad_hidden, grad_weight, grad_bias = (g if need else None for g, need in zip(found, needs, strict=True))
    return (grad_hidden, None, grad_weight, grad_bias, *nothing[4:])


_forward_op = torch.library.custom_op(
    "rlhf_fast::linear_kl", _forward, mutates_args=(),
    schema=f"({_CALL}, bool want_entropy, bool row_gradients) -> Tensor[]",
)  # fmt: skip
_forward_op.register_fake(lambda *arguments: _zero_results(_Call(*arguments[:_FIELDS]), *arguments[_FIELDS:]))
_forward_op.register_autograd(_autograd, setup_context=_setup_context)
_backward_op = torch.library.custom_op(
    "rlhf_fast::linear_kl_backward", _backward, mutates_args=(),
    schema=f"({_CALL}, Tensor[] stats, Tensor? grad_kl, Tensor? grad_logprobs, Tensor? grad_entropy, bool[] needs) "
    "-> Tensor[]",
)  # fmt: skip
_backward_op.register_fake(_backward_fake)
