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
trained head 4P while the logits of both fit KEPT_BYTES, which backward reads again, else 6P (the tiles are made again);
a gradient through the entropy adds 3P to a frozen head. A policy and a reference with the same head take one product
of [hidden; ref_hidden] per tile, so that the head is read once for both; U is one product as well. Scratch is one tile
of 2 `chunk_tokens` x V float32 (and its bfloat16 gradient on a GPU), beside both U (N x D each, in hidden's type) or
the logits that are kept (2 N x V, float32). Rows with mask 0: as in linear_logprobs.

Numerics: logits are accumulated and kept in float32, then as in token_logprobs and token_kl: a small KL does not
cancel. The head's gradient is accumulated in float32 across tiles. No atomics: the same inputs give the same bits,
with gradients or without; logprobs have the bits of a linear_logprobs whose products have those shapes.

Sources: Agarwal et al. 2024, "On-Policy Distillation of Language Models" (arXiv 2306.13649) for the divergences;
tiling over tokens as in Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import operands, resolve, without_autocast
from rlhf_fast.ops.core import check
from rlhf_fast.ops.head import _kl_op
from rlhf_fast.ops.head._kl_op import Options, Reference, what_to_save
from rlhf_fast.ops.head.head import Head, checked_head
from rlhf_fast.ops.head.tiles import Rows, checked_rows, zero_behind
from rlhf_fast.ops.tokens import token_kl, token_logprobs
from rlhf_fast.ops.tokens.token_kl import Divergence
from rlhf_fast.ops.tokens.transform import Transform, checked_transform


class LinearKl(NamedTuple):
    """What linear_kl returns, each (...) in nats; None for what was not asked for."""

    kl: Tensor
    logprobs: Tensor | None
    ref_logprobs: Tensor | None  # without gradient
    entropy: Tensor | None


@check.takes_numbers
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
    mask_count: int | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    variant: str = "reverse",
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
    mask: (...) any dtype, nonzero counts; elsewhere results and gradients are 0 and nothing is read. mask_count: as in
    linear_logprobs, how many rows count, or an upper bound, with which a GPU leaves the others out.
    temperature (one number or (...) one per row), logit_scale, softcap: as in token_logprobs, for both.
    variant, js_weight, top_k: as in token_kl. return_entropy: also the policy's entropy, differentiable.
    chunk_tokens: rows of both logits held at a time (default: from the byte budget tiles.TILE_BYTES).
    Whether the head is frozen is read from weight.requires_grad and bias.requires_grad.

    Returns a LinearKl, float32 (float64 for float64).
    Raises ValueError or TypeError for what does not fit, IndexError on the CPU for a counted target outside [0, V);
    on a GPU its logprobs are NaN, unless RLHF_FAST_DEBUG=1 makes it raise.
    """
    hidden, ref_hidden, weight, ref_weight, bias, ref_bias = operands(
        hidden, ref_hidden, weight, ref_weight, bias, ref_bias
    )
    name = resolve("linear_kl", token_kl.IMPLS, hidden.device, backend)
    head, shape = checked_head(hidden, weight, bias), hidden.shape[:-1]
    reference_head = _checked_reference(hidden, head, ref_hidden, ref_weight, ref_bias)
    rows = checked_rows(hidden, weight, targets, mask, mask_count, chunk_tokens)
    rows = rows._replace(chunk_tokens=chunk_tokens or max(8, rows.chunk_tokens // 2))
    divergence = token_kl.checked_divergence(variant, js_weight, top_k, weight.shape[0])
    transform = checked_transform(temperature, logit_scale, softcap, shape, ("hidden", hidden)).of_rows()
    options = Options(top_k, return_entropy, what_to_save(head, rows))
    run = reference if name == "reference" else _kl_op.run
    kl, logprobs, ref_logprobs, entropy, *_ = run(head, rows, transform, reference_head, divergence, options, name)
    return LinearKl(
        kl.view(shape), None if targets is None else logprobs.view(shape),
        None if targets is None else ref_logprobs.detach().view(shape), entropy.view(shape) if return_entropy else None,
    )  # fmt: skip


def _checked_reference(
    hidden: Tensor, head: Head, ref_hidden: Tensor, ref_weight: Tensor | None, ref_bias: Tensor | None
) -> Reference:
    """A constant. Raises ValueError or TypeError for what does not fit."""
    own = ref_weight is not None or ref_bias is not None
    ref_weight, ref_bias = (head.weight if ref_weight is None else ref_weight, ref_bias) if own else head[:2]
    checked_head(ref_hidden, ref_weight, ref_bias, prefix="ref_")
    check.shaped("ref_hidden", ref_hidden, (*hidden.shape[:-1], ref_hidden.shape[-1]), "(*hidden.shape[:-1], D)")
    check.shaped("ref_weight", ref_weight, (head.weight.shape[0], ref_weight.shape[1]), "(V, D)")
    if ref_hidden.dtype != hidden.dtype:
        raise TypeError(f"ref_hidden must have the type of hidden, {hidden.dtype}, got {ref_hidden.dtype}")
    check.same_device(("hidden", hidden), ("ref_hidden", ref_hidden))
    constants = [x.detach() if own and x is not None else None for x in (ref_weight, ref_bias)]
    return Reference(check.rows(ref_hidden.detach()), *constants)


@without_autocast
def reference(
    head: Head, rows: Rows, transform: Transform, reference: Reference, divergence: Divergence, options: Options,
    backend: str = "reference",
) -> list[Tensor]:  # fmt: skip
    """[kl, logprobs, ref_logprobs, entropy] by definition, through all the logits, differentiable at any order."""
    ref_weight, ref_bias = head[:2] if reference.ref_weight is None else reference[1:]
    ref_head = Head(*(None if p is None else p.detach() for p in (ref_weight, ref_bias)))  # type: ignore[arg-type]
    both = [
        h.reference_logits(zero_behind(rows.mask, x))
        for h, x in ((head, rows.hidden), (ref_head, reference.ref_hidden))
    ]
    given: dict[str, Any] = {**transform.options(), "mask": rows.mask}
    kl = token_kl.reference(both[0], both[1], **divergence._asdict(), top_k=options.top_k, **given)
    ids = torch.zeros(kl.shape, dtype=torch.int64, device=kl.device) if rows.targets is None else rows.targets
    (logprobs, entropy), (ref_logprobs, _) = (token_logprobs.reference(x, ids, **given) for x in both)
    return [kl, logprobs, ref_logprobs, entropy]


OPS = {"linear_kl": tuple(token_kl.IMPLS)}
