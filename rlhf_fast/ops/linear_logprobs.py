"""linear_logprobs: log-probabilities of given tokens straight from hidden states; the logits never exist as a whole.

With z = (hidden @ weight^T + bias) / temperature, logprob and entropy are those of token_logprobs(z, targets), and

    d logprob / d hidden = (weight[y] - softmax(z) @ weight) / temperature =: U
    d logprob / d weight = ((onehot(y) - softmax(z)) / temperature)^T @ hidden,    d / d bias = its sum over rows

U does not depend on the loss above. With a frozen head the forward pass therefore makes U in the same sweep over the
tiles of logits, and the backward pass is a row scale for any loss: grad_hidden = grad_logprob * U.

Cost, with P = one N x D x V product (2 N D V FLOPs): without gradients P; frozen head 2P in all; trained head 4P (the
tiles are recomputed in backward); a gradient through the entropy adds the recomputation to a frozen head as well (4P).
Bytes: the head is read once per tile; a tile of `chunk_tokens` x V float32 (plus its bfloat16 gradient on a GPU) is
the only scratch, beside U (N x D, in hidden's type). Rows with mask 0 cost nothing on the CPU; on a GPU, where
leaving them out would need a host synchronisation, their products are made and their results are 0.

Numerics: logits are accumulated and kept in float32 (never rounded to bfloat16 before the softmax), then as in
token_logprobs; U = (onehot - softmax) @ weight has no cancellation for confident tokens; the weight gradient is
accumulated in float32 across tiles. No atomics: the same inputs give the same bits, with gradients or without.

Source: the loss-independent row gradient follows from d logsumexp = softmax; tiling over tokens as in
Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops import _check
from rlhf_fast.ops import token_logprobs as rows

# Scratch for one tile of float32 logits: on the CPU near the caches, on a GPU enough rows to fill a matrix product.
TILE_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
_VOCABULARY_BLOCK = 8192  # half-precision heads are widened to float32 in blocks of this many rows on the CPU


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    chunk_tokens: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` under softmax((hidden @ weight^T + bias) / temperature), in nats.

    hidden: (..., D); weight: (V, D), the type of hidden (float32, bfloat16, float16, float64); bias: (V,) or None.
    targets: (...) int64 or int32 ids in [0, V). mask: (...) any dtype, nonzero counts; elsewhere results and
    gradients are 0 and nothing is read. return_entropy: also the entropy in nats, differentiable.
    chunk_tokens: rows of logits held at a time (default: from a byte budget, see TILE_BYTES).
    Whether the head is frozen is read from weight.requires_grad and bias.requires_grad.

    Returns (...) float32 (float64 for float64), or the pair (logprobs, entropy).
    Raises ValueError or TypeError for what does not fit, IndexError on the CPU for a counted target outside [0, V).
    """
    name = resolve("linear_logprobs", rows.IMPLS, hidden.device, backend)
    shape = _checked(hidden, weight, targets, bias, mask, chunk_tokens)
    temperature = _check.positive("temperature", temperature)
    ids, mask = _check.ids("targets", targets), _check.mask_bytes(mask, shape, "hidden.shape[:-1]")
    if name == "reference":
        logprobs, entropy = reference(hidden, weight, ids, bias=bias, mask=mask, temperature=temperature)
    else:
        frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        results = torch.ops.rlhf_fast.linear_logprobs(
            hidden.reshape(-1, hidden.shape[-1]), weight, bias, ids.view(-1), None if mask is None else mask.view(-1),
            temperature, return_entropy, frozen and hidden.requires_grad and torch.is_grad_enabled(),
            chunk_tokens or _chunk_tokens(hidden.device, weight), name,
        )  # fmt: skip
        logprobs, entropy = results[0].view(shape), results[1].view(shape if return_entropy else -1)
    return (logprobs, entropy) if return_entropy else logprobs


def reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy) by definition, through all the logits, differentiable any number of times."""
    dtype = _check.compute_dtype(hidden.dtype)
    if mask is not None:
        hidden = torch.where((mask != 0)[..., None], hidden, torch.zeros_like(hidden))
    logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return rows.reference(logits, targets, temperature=temperature, mask=mask)


def _checked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    chunk: int | None,
) -> torch.Size:
    _check.floating("hidden", hidden)
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (..., D) and weight (V, D), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        given = f"weight {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise TypeError(f"weight and bias must have the type of hidden, got hidden {hidden.dtype}, {given}")
    if bias is not None:
        _check.shaped("bias", bias, (weight.shape[0],), "(V,)")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk_tokens must be >= 1, got {chunk}")
    _check.shaped("targets", targets, hidden.shape[:-1], "hidden.shape[:-1]")
    _check.same_device(("hidden", hidden), ("weight", weight), ("targets", targets), ("bias", bias), ("mask", mask))
    return hidden.shape[:-1]


def _chunk_tokens(device: torch.device, weight: Tensor) -> int:
    budget = TILE_BYTES.get(device.type, TILE_BYTES["cuda"])
    fitting = budget // (weight.shape[0] * _check.compute_dtype(weight.dtype).itemsize)
    return max(16, fitting // 16 * 16)


OPS = {"linear_logprobs": tuple(rows.IMPLS)}


# --- The tiles -------------------------------------------------------------------------------------------------------


def _counted(mask: Tensor | None) -> Tensor | None:
    """Indices of the rows that count; None for all of them, and always on a GPU, where finding them would wait."""
    return mask.nonzero()[:, 0] if mask is not None and mask.device.type == "cpu" else None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, tile: Tensor) -> None:
    """tile = hidden @ weight^T + bias, accumulated and kept in the tile's float32 (float64)."""
    if weight.dtype == tile.dtype:
        torch.mm(hidden, weight.t(), out=tile)
    elif weight.is_cuda:
        torch.ops.aten.mm.dtype_out(hidden, weight.t(), tile.dtype, out=tile)
    else:
        hidden = hidden.to(tile.dtype)
        for start in range(0, weight.shape[0], _VOCABULARY_BLOCK):
            block = slice(start, start + _VOCABULARY_BLOCK)
            tile[:, block] = hidden @ weight[block].to(tile.dtype).t()
    if bias is not None:
        tile += bias


def _through_head(tile: Tensor, weight: Tensor) -> Tensor:
    """tile @ weight in the weight's type, accumulated in float32 (float64)."""
    if tile.dtype == weight.dtype:
        return tile @ weight
    total = tile.new_zeros(tile.shape[0], weight.shape[1])
    for start in range(0, weight.shape[0], _VOCABULARY_BLOCK):
        block = slice(start, start + _VOCABULARY_BLOCK)
        total.addmm_(tile[:, block], weight[block].to(tile.dtype))
    return total.to(weight.dtype)


def _accumulate(total: Tensor, tile: Tensor, hidden: Tensor) -> None:
    """total += tile^T @ hidden in the total's float32 (float64)."""
    if tile.dtype == total.dtype:
        total.addmm_(tile.t(), hidden.to(total.dtype))
    else:
        torch.ops.aten.addmm.dtype_out(total, tile.t(), hidden, total.dtype, out=total)


class _Tiles:
    """Tiles of logits over the counted rows, in one buffer; on a GPU their gradients in one of the head's type."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, chunk: int) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.index = _counted(mask)
        self.mask = mask if self.index is None else None
        count = hidden.shape[0] if self.index is None else self.index.shape[0]
        self.chunks = [slice(i, min(i + chunk, count)) for i in range(0, count, chunk)]
        dtype = _check.compute_dtype(weight.dtype)
        self.logits = hidden.new_empty(min(chunk, count), weight.shape[0], dtype=dtype)
        narrow = weight.is_cuda and weight.dtype != dtype
        self.gradient = torch.empty_like(self.logits, dtype=weight.dtype) if narrow else self.logits

    def take(self, x: Tensor, chunk: slice) -> Tensor:
        """The rows of x that `chunk` stands for, contiguous."""
        return x[chunk] if self.index is None else x[self.index[chunk]]

    def put(self, x: Tensor, chunk: slice, value: Tensor) -> None:
        x[chunk if self.index is None else self.index[chunk]] = value

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor | None]]:
        """chunk, its rows of hidden, logits (1, n, V), the place for their gradient, mask."""
        for chunk in self.chunks:
            n = chunk.stop - chunk.start
            hidden = self.take(self.hidden, chunk)
            _logits(hidden, self.weight, self.bias, self.logits[:n])
            mask = None if self.mask is None else self.mask[None, chunk]
            yield chunk, hidden, self.logits[None, :n], self.gradient[None, :n], mask


# --- The registered op -----------------------------------------------------------------------------------------------


def _empty_results(hidden: Tensor, want_entropy: bool, want_row_gradient: bool) -> list[Tensor]:
    """[logprobs, entropy, row_max, row_logsum (N,), row gradient U (N, D)], those not wanted empty."""
    stats = rows.empty_stats(hidden[None], want_entropy)
    row_gradient = hidden.new_empty(hidden.shape if want_row_gradient else (0,))
    return [*(s.view(-1) for s in stats), row_gradient]


@torch.library.custom_op("rlhf_fast::linear_logprobs", mutates_args=())
def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor | None,
             temperature: float, want_entropy: bool, want_row_gradient: bool, chunk_tokens: int,
             backend: str) -> list[Tensor]:  # fmt: skip
    _check.targets_inside(targets, mask, weight.shape[0])
    results = _empty_results(hidden, want_entropy, want_row_gradient)
    tiles = _Tiles(hidden, weight, bias, mask, chunk_tokens)
    if tiles.index is not None:
        for r in results:
            r.zero_()
    for chunk, _, logits, gradient, tile_mask in tiles:
        ids = tiles.take(targets, chunk)[None]
        stats = rows.empty_stats(logits, want_entropy)
        rows.IMPLS[backend][0](
            logits, ids, tile_mask, temperature, want_entropy, stats, gradient if want_row_gradient else None
        )
        for whole, part in zip(results, stats, strict=False):
            if part.numel():
                tiles.put(whole, chunk, part[0])
        if want_row_gradient:
            tiles.put(results[4], chunk, _through_head(gradient[0], weight))
    return results


@_forward.register_fake
def _(hidden, weight, bias, targets, mask, temperature, want_entropy, want_row_gradient, chunk_tokens, backend):
    return _empty_results(hidden, want_entropy, want_row_gradient)


@torch.library.custom_op("rlhf_fast::linear_logprobs_backward", mutates_args=())
def _backward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor | None,
              temperature: float, stats: list[Tensor], grad_logprobs: Tensor | None, grad_entropy: Tensor | None,
              needs: list[bool], chunk_tokens: int, backend: str) -> list[Tensor]:  # fmt: skip
    """Gradients of (hidden, weight, bias), empty where not needed: recomputes the logits tile by tile."""
    dtype = _check.compute_dtype(weight.dtype)
    grad_hidden, grad_weight, grad_bias = _empty_gradients(hidden, weight, bias, needs, dtype)
    for g in (grad_hidden, grad_weight, grad_bias):
        g.zero_()
    tiles = _Tiles(hidden, weight, bias, mask, chunk_tokens)
    for chunk, tile_hidden, logits, gradient, tile_mask in tiles:
        ids = tiles.take(targets, chunk)[None]
        tile_stats = [tiles.take(s, chunk)[None] if s.numel() else s for s in stats]
        upstream = [None if g is None else tiles.take(g, chunk)[None] for g in (grad_logprobs, grad_entropy)]
        rows.IMPLS[backend][1](logits, ids, tile_mask, temperature, tile_stats, *upstream, gradient)
        if needs[0]:
            tiles.put(grad_hidden, chunk, _through_head(gradient[0], weight))
        if needs[1]:
            _accumulate(grad_weight, gradient[0], tile_hidden)
        if needs[2]:
            grad_bias += gradient[0].sum(0, dtype=dtype)
    return [grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)]


def _empty_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool], dtype: torch.dtype):
    grad_hidden = hidden.new_empty(hidden.shape if needs[0] else (0,))
    grad_weight = weight.new_empty(weight.shape if needs[1] else (0,), dtype=dtype)
    grad_bias = weight.new_empty(weight.shape[0] if needs[2] else 0, dtype=dtype)
    return grad_hidden, grad_weight, grad_bias


@_backward.register_fake
def _(hidden, weight, bias, targets, mask, temperature, stats, grad_logprobs, grad_entropy, needs, chunk_tokens,
      backend):  # fmt: skip
    return list(_empty_gradients(hidden, weight, bias, needs, weight.dtype))


def _setup_context(ctx, inputs, output):
    (
        hidden,
        weight,
        bias,
        targets,
        mask,
        ctx.temperature,
        ctx.want_entropy,
        ctx.row_gradient,
        ctx.chunk_tokens,
        ctx.backend,
    ) = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, mask, *output)


def _autograd(ctx, grads):
    hidden, weight, bias, targets, mask, *stats, row_gradient = ctx.saved_tensors
    grad_logprobs, grad_entropy = (None if g is None else g.contiguous() for g in grads[:2])
    if not ctx.want_entropy:  # an empty output, not a result
        grad_entropy = None
    needs = list(ctx.needs_input_grad[:3])
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * 10
    if grad_entropy is None and ctx.row_gradient:
        assert grad_logprobs is not None
        return (grad_logprobs[:, None] * row_gradient).to(hidden.dtype), *(None,) * 9
    gradients = torch.ops.rlhf_fast.linear_logprobs_backward(
        hidden, weight, bias, targets, mask, ctx.temperature, stats, grad_logprobs, grad_entropy, needs,
        ctx.chunk_tokens, ctx.backend,
    )  # fmt: skip
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 7


_forward.register_autograd(_autograd, setup_context=_setup_context)
