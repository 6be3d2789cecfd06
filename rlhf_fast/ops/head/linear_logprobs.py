"""linear_logprobs: log-probabilities of given tokens straight from hidden states; the logits never exist as a whole.

With logits = hidden @ weight^T + lora_scale * (hidden @ A^T) @ B^T + bias and z = softcap(logit_scale * logits) /
temperature, logprob and entropy are those of token_logprobs(logits, targets), and for one target y per row

    d logprob / d logits = (onehot(y) - softmax(z)) * d z / d logits =: G,     d logprob / d hidden = G @ weight =: U

(with a LoRA: + lora_scale * (G @ B) @ A). Neither depends on the loss above. With a frozen head the forward pass makes
U in the same sweep over the tiles of logits, and the backward pass is a row scale for any loss: grad_hidden =
grad_logprob * U. With a trained one (weight, bias or LoRA) it keeps G while all of it fits KEPT_BYTES, and the backward
pass is two products; else the tiles are made again.

Cost, with P = one N x D x V product (2 N D V FLOPs; a LoRA of rank R adds R / D of each), forward and backward:

                                             frozen head    trained weight    frozen weight, trained LoRA or bias
    without gradients                             1P              1P                    1P
    G fits KEPT_BYTES                             2P              3P                    2P
    G does not fit, or K targets per row          2P, K: 3P       4P                    3P
    also a gradient through the entropy           4P, K: 3P       4P                    3P
    with lse                                      3P              4P                    3P

Bytes: the head is read once per tile and product. Scratch is one tile of `chunk_tokens` x V float32 (plus its bfloat16
gradient on a GPU), U (N x D, in hidden's type), and G (N x V, in the head's type on a GPU, in float32 on the CPU, where
it takes the tile's place) up to KEPT_BYTES.

Rows that cost no product: on the CPU those with mask 0 and, in the backward pass of a trained head, those whose
upstream gradient is 0 (clipped tokens, groups of zero advantage). On a GPU finding them would need a host
synchronisation: there the row kernels write their zeros without reading, and with `mask_count` the counted rows are
sorted to the front and only that many are multiplied.

Vocabulary parallel (process_group): the shards' statistics are merged per tile, see _shards.py; U, grad_hidden and the
gradient of A are summed over the ranks, those of weight, bias and B stay local.

Numerics: logits are accumulated and kept in float32 (never rounded to bfloat16 before the softmax), then as in
token_logprobs; U = G @ weight has no cancellation for confident tokens; gradients of the head are accumulated in
float32 across tiles. No atomics: the same inputs give the same bits, with gradients or without.

Sources: the loss-independent row gradient follows from d logsumexp = softmax; tiling over tokens as in
Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009); LoRA, Hu et al. 2021
(arXiv 2106.09685), eq. 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.backends import resolve, without_autocast
from rlhf_fast.ops.core import check
from rlhf_fast.ops.head import _logprobs_op as _linear_call
from rlhf_fast.ops.head import tiles as _head
from rlhf_fast.ops.head._shards import Shards
from rlhf_fast.ops.tokens import token_logprobs as rows

_SHARD_CHUNK = 1024  # rows per tile of a sharded head: every rank must make the same tiles, whatever its shard's size

HeadLora = tuple[Tensor, Tensor, float]


@check.takes_numbers
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    mask_count: int | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    head_lora: HeadLora | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    return_stats: bool = False,
    process_group: torch.distributed.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    backend: str | None = None,
) -> Any:
    """Log-probabilities of `targets` under softmax(softcap(logit_scale * logits) / temperature), in nats.

    hidden: (..., D); weight: (V, D), the type of hidden (float32, bfloat16, float16, float64); bias: (V,) or None.
    Under autocast all are converted to its type, as by F.linear.
    targets: (...) integer ids in [0, V), or (..., K) for several ids per row.
    mask: (...) any dtype, nonzero counts; elsewhere results and gradients are 0 and nothing is read. mask_count: how
    many rows count, or an upper bound: lets a GPU leave the others out (the CPU does so in any case).
    temperature: > 0, one number or a tensor (...) of one per row. logit_scale: > 0. softcap: the bound c of
    c tanh(u / c), > 0, or None. None of the three gets a gradient.
    head_lora: (A (R, D), B (V, R), scale): a LoRA on the head, whose A and B may be trained on a frozen weight.
    return_entropy: also the entropy in nats, differentiable. return_lse: also log sum_j exp(z_j), differentiable.
    return_stats: also a RowStats, without gradient, which costs nothing.
    process_group: weight, bias and B are this rank's rows of the head, in rank order, of at least one row each; targets
    are ids of the whole vocabulary. Every rank makes the same call on the same rows, and the same backward pass.
    chunk_tokens: rows of logits held at a time (default: from a byte budget, TILE_BYTES in _head.py; with a
    process_group 1024).
    Whether the head is frozen is read from requires_grad of weight, bias, A and B.

    Returns logprobs in the shape of `targets`, float32 (float64 for float64); with return_entropy, return_lse or
    return_stats a tuple of those asked for, in the order (logprobs, entropy, lse, stats), entropy and lse (...).
    Raises ValueError or TypeError for what does not fit, IndexError on the CPU for a counted target outside [0, V).
    A GPU would have to wait for that: there such a target's result is NaN, unless RLHF_FAST_DEBUG=1 makes it raise.
    """
    name = resolve("linear_logprobs", rows.IMPLS, hidden.device, backend)
    hidden, weight, bias, head_lora = _head.operands(hidden, weight, bias, head_lora)
    lora_a, lora_b, lora_scale = head_lora or (None, None, 1.0)
    head = _head.Head(weight, bias, lora_a, lora_b, check.number("the scale of head_lora", lora_scale))
    shape = _checked(hidden, head, targets, mask, mask_count, chunk_tokens)
    transform = rows.checked_transform(temperature, logit_scale, softcap, shape, ("hidden", hidden))
    ids, mask = check.ids("targets", targets), check.mask_bytes(mask, shape, "hidden.shape[:-1]")
    if name == "reference":
        if process_group is not None:
            raise ValueError("linear_logprobs: the reference needs the whole head, it takes no process_group")
        return reference(
            hidden, weight, ids, bias=bias, mask=mask, temperature=temperature, logit_scale=logit_scale,
            softcap=softcap, head_lora=head_lora, return_entropy=return_entropy, return_lse=return_lse,
            return_stats=return_stats,
        )  # fmt: skip
    shards = Shards()
    if process_group is not None:
        shards = Shards(process_group.group_name, process_group.size(), process_group.rank())
    temperatures = None if transform.temperatures is None else transform.temperatures.view(-1)
    call = _linear_call.Call(
        check.rows(hidden), *head[:4], ids.view(shape.numel(), *targets.shape[len(shape) :]),
        None if mask is None else mask.view(-1), temperatures, head.lora_scale, transform.temperature,
        transform.logit_scale, transform.softcap, mask_count,
        chunk_tokens or (_SHARD_CHUNK if shards.group else _head.chunk_tokens(weight)), *shards, name,
    )  # fmt: skip
    wanted = (return_entropy, return_stats, return_lse, _linear_call.to_save(call, return_lse))
    logprobs, entropy, *stats, lse, _ = _linear_call.run(*call, *wanted)
    results: list[Any] = [logprobs.view(targets.shape)]
    if return_entropy:
        results.append(entropy.view(shape))
    if return_lse:
        results.append(lse.view(shape))
    if return_stats:
        row_max, row_logsum, squares = (s.detach().view(shape) for s in stats)
        results.append(rows.row_stats(row_max, row_logsum, squares, mask))
    return tuple(results) if len(results) > 1 else results[0]


@without_autocast
def reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    head_lora: HeadLora | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    return_stats: bool = False,
) -> Any:
    """The same by definition, through all the logits, differentiable any number of times."""
    dtype = check.compute_dtype(hidden.dtype)
    if mask is not None:
        hidden = torch.where((mask != 0)[..., None], hidden, torch.zeros_like(hidden))
    hidden = hidden.to(dtype)
    logits = torch.nn.functional.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
    if head_lora is not None:
        lora_a, lora_b, scale = head_lora
        logits = logits + scale * (hidden @ lora_a.to(dtype).t()) @ lora_b.to(dtype).t()
    return rows.token_logprobs(
        logits, targets, temperature=temperature, logit_scale=logit_scale, softcap=softcap, mask=mask,
        return_entropy=return_entropy, return_lse=return_lse, return_stats=return_stats, backend="reference",
    )  # fmt: skip


def _checked(
    hidden: Tensor, head: _head.Head, targets: Tensor, mask: Tensor | None, mask_count: int | None, chunk: int | None
) -> torch.Size:
    weight, bias, lora_a, lora_b, _ = head
    check.floating("hidden", hidden)
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or not weight.numel():
        raise ValueError(
            f"hidden must be (..., D) and weight (V, D) with V and D >= 1, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        given = f"weight {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise TypeError(f"weight and bias must have the type of hidden, got hidden {hidden.dtype}, {given}")
    if bias is not None:
        check.shaped("bias", bias, (weight.shape[0],), "(V,)")
    if lora_a is not None and lora_b is not None:
        check.floating("head_lora A", lora_a), check.floating("head_lora B", lora_b)
        rank = lora_a.shape[0] if lora_a.dim() else 0
        check.shaped("head_lora A", lora_a, (rank, weight.shape[1]), "(R, D)")
        check.shaped("head_lora B", lora_b, (weight.shape[0], rank), "(V, R)")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk_tokens must be >= 1, got {chunk}")
    check.mask_count(mask, mask_count)
    shape = hidden.shape[:-1]
    if targets.dim() != hidden.dim() or targets.shape[:-1] != shape or targets.shape[-1] == 0:
        check.shaped("targets", targets, shape, "hidden.shape[:-1] (or that and K)")
    check.same_device(
        ("hidden", hidden), ("weight", weight), ("targets", targets), ("bias", bias), ("mask", mask),
        ("head_lora A", lora_a), ("head_lora B", lora_b),
    )  # fmt: skip
    return shape


OPS = {"linear_logprobs": tuple(rows.IMPLS)}
