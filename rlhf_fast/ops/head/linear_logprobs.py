"""linear_logprobs: log-probabilities of given tokens straight from hidden states; the logits never exist as a whole.

With logits = hidden @ weight^T + lora_scale * (hidden @ A^T) @ B^T + bias and z = softcap(logit_scale * logits) /
temperature, logprob and entropy are those of token_logprobs(logits, targets), and for one target y per row

    d logprob / d logits = (onehot(y) - softmax(z)) * d z / d logits =: G,     d logprob / d hidden = G @ weight =: U

(with a LoRA: + lora_scale * (G @ B) @ A). Neither depends on the loss above. With a frozen head the forward pass makes
U in the same sweep over the tiles of logits, and the backward pass is a row scale for any loss: grad_hidden =
grad_logprob * U. With a trained one (weight, bias or LoRA) it keeps G while all of it fits KEPT_BYTES, and the backward
pass is two products; else the tiles are made again. On a GPU the two take all rows at once, and a weight of bfloat16
gets its gradient straight in that type: one of float32, summed over tiles, would be read and written once per tile.

Cost, with P = one N x D x V product (2 N D V FLOPs; a LoRA of rank R adds R / D of each), forward and backward:

                                             frozen head    trained weight    frozen weight, trained LoRA or bias
    without gradients                             1P              1P                    1P
    G fits KEPT_BYTES                             2P              3P                    2P
    G does not fit, or K targets per row          2P, K: 3P       4P                    3P
    also a gradient through the entropy           4P, K: 3P       4P                    3P
    with lse                                      3P              4P                    3P

Bytes: the head is read once per tile and product. Scratch is one tile of `chunk_tokens` x V float32 (plus its bfloat16
gradient on a GPU), U (N x D, in hidden's type), and G (N x V, in the head's type on a GPU, in float32 on the CPU, where
it takes the tile's place) up to KEPT_BYTES: 4 GiB on a GPU, 256 MiB on the CPU.

Rows that cost no product: on the CPU those with mask 0 and, in the backward pass of a trained head, those whose
upstream gradient is 0 (clipped tokens, groups of zero advantage). On a GPU finding them would need a host
synchronisation: there the row kernels write their zeros without reading, and with `mask_count` the counted rows are
sorted to the front and only that many are multiplied.

Vocabulary parallel (process_group): the shards' statistics are merged per tile, see _shards.py; U, grad_hidden and the
gradient of A are summed over the ranks, those of weight, bias and B stay local.

Numerics: logits are accumulated and kept in float32 (never rounded to bfloat16 before the softmax), then as in
token_logprobs; hidden @ A^T stays float32 as well. U = G @ weight has no cancellation for confident tokens; gradients
of the head are accumulated in float32. No atomics: the same inputs give the same bits, with gradients or without.

Sources: the loss-independent row gradient follows from d logsumexp = softmax; tiling over tokens as in
Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009); LoRA, Hu et al. 2021
(arXiv 2106.09685), eq. 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from rlhf_fast.backends import resolve, without_autocast
from rlhf_fast.ops.core import check
from rlhf_fast.ops.head import _logprobs_op
from rlhf_fast.ops.head._shards import Shards
from rlhf_fast.ops.head.head import Head, HeadLora, HeadOptions, checked_head, operands
from rlhf_fast.ops.head.tiles import Rows, checked_rows, zero_behind
from rlhf_fast.ops.tokens import results
from rlhf_fast.ops.tokens.results import Scored
from rlhf_fast.ops.tokens.token_logprobs import IMPLS, Wanted, Yes, reference_results
from rlhf_fast.ops.tokens.transform import Transform, checked_transform

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SHARD_CHUNK = 1024  # rows per tile of a sharded head: every rank must make the same tiles, whatever its shard's size


class Options(HeadOptions, total=False):
    """The options that do not change what linear_logprobs returns."""

    process_group: torch.distributed.ProcessGroup | None


# fmt: off
@overload
def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Unpack[Options]) -> Tensor: ...
@overload
def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, return_entropy: Yes,
                    **options: Unpack[Options]) -> results.WithEntropy: ...
@overload
def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, return_lse: Yes,
                    **options: Unpack[Options]) -> results.WithLse: ...
@overload
def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, return_stats: Yes,
                    **options: Unpack[Options]) -> results.WithStats: ...
@overload
def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, return_entropy: Yes, return_lse: Yes,
                    **options: Unpack[Options]) -> results.WithEntropyLse: ...
@overload
def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, return_entropy: Yes, return_stats: Yes,
                    **options: Unpack[Options]) -> results.WithEntropyStats: ...
@overload
def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, return_lse: Yes, return_stats: Yes,
                    **options: Unpack[Options]) -> results.WithLseStats: ...
@overload
def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, return_entropy: Yes, return_lse: Yes,
                    return_stats: Yes, **options: Unpack[Options]) -> results.WithAll: ...
@overload
def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, return_entropy: bool,
                    **options: Unpack[Options]) -> Tensor | results.WithEntropy: ...
@overload
def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, return_entropy: bool = ...,
                    return_lse: bool = ..., return_stats: bool = ..., **options: Unpack[Options]) -> Scored: ...
# fmt: on
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
) -> Scored:
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
    chunk_tokens: the most rows of logits held at a time (default: from a byte budget, tiles.TILE_BYTES; with a
    process_group 1024).
    Whether the head is frozen is read from requires_grad of weight, bias, A and B.

    Returns logprobs in the shape of `targets`, float32 (float64 for float64); with return_entropy, return_lse or
    return_stats a NamedTuple of those asked for, in the order (logprobs, entropy, lse, stats), entropy and lse (...).
    Raises ValueError or TypeError for what does not fit, IndexError on the CPU for a counted target outside [0, V).
    A GPU would have to wait for that: there such a target's result is NaN, unless RLHF_FAST_DEBUG=1 makes it raise.
    """
    name = resolve("linear_logprobs", IMPLS, hidden.device, backend)
    hidden, weight, bias, head_lora = operands(hidden, weight, bias, head_lora)
    head, shape = checked_head(hidden, weight, bias, head_lora), hidden.shape[:-1]
    rows = checked_rows(hidden, weight, targets, mask, mask_count, chunk_tokens, several_targets=True)
    transform = checked_transform(temperature, logit_scale, softcap, shape, ("hidden", hidden)).of_rows()
    shards = Shards()
    if process_group is not None:
        if name == "reference":
            raise ValueError("linear_logprobs: the reference needs the whole head, it takes no process_group")
        shards = Shards(process_group.group_name, process_group.size(), process_group.rank())
        rows = rows._replace(chunk_tokens=chunk_tokens or _SHARD_CHUNK)
    wanted = Wanted(return_entropy, return_stats, return_lse)
    results = scored(head, rows, transform, wanted, name, shards)
    return wanted.named(results, shape, targets.shape, None if rows.mask is None else rows.mask.view(shape))


def scored(
    head: Head, rows: Rows, transform: Transform, wanted: Wanted, backend: str, shards: Shards = Shards()  # noqa: B008
) -> list[Tensor]:  # fmt: skip
    """The results of the op, see Wanted.and_lse, of what is checked."""
    if backend == "reference":
        return reference(head, rows, transform, wanted)
    saves = _logprobs_op.what_to_save(head, rows, wanted, backend)
    return _logprobs_op.run(head, rows, transform, shards, wanted, saves, backend)[:6]


@without_autocast
def reference(head: Head, rows: Rows, transform: Transform, wanted: Wanted) -> list[Tensor]:
    """The same by definition, through all the logits, differentiable any number of times."""
    assert rows.targets is not None
    logits = head.reference_logits(zero_behind(rows.mask, rows.hidden))
    return reference_results(logits, rows.targets, rows.mask, transform, wanted)


OPS = {"linear_logprobs": tuple(IMPLS)}
