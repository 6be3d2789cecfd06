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
the logits that are kept (2 N x V, float32). Rows with mask 0 cost nothing on the CPU; on a GPU, where leaving them out
would need a host synchronisation, their products are made and their results are 0.

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
from rlhf_fast.ops.head import _kl_op as _linear_kl_call
from rlhf_fast.ops.head import tiles as _head
from rlhf_fast.ops.tokens import token_kl as divergences
from rlhf_fast.ops.tokens import token_logprobs as rows


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
    mask: (...) any dtype, nonzero counts; elsewhere results and gradients are 0 and nothing is read. mask_count: as in
    linear_logprobs, how many rows count, or an upper bound, with which a GPU leaves the others out.
    temperature (one number or (...) one per row), logit_scale, softcap: as in token_logprobs, for both.
    divergence, js_weight, top_k: as in token_kl. return_entropy: also the policy's entropy, differentiable.
    chunk_tokens: rows of both logits held at a time (default: from the byte budget TILE_BYTES in _head.py).
    Whether the head is frozen is read from weight.requires_grad and bias.requires_grad.

    Returns a LinearKl, float32 (float64 for float64).
    Raises ValueError or TypeError for what does not fit, IndexError on the CPU for a counted target outside [0, V);
    on a GPU its logprobs are NaN, unless RLHF_FAST_DEBUG=1 makes it raise.
    """
    hidden, ref_hidden, weight, ref_weight, bias, ref_bias = operands(
        hidden, ref_hidden, weight, ref_weight, bias, ref_bias
    )
    name = resolve("linear_kl", divergences.IMPLS, hidden.device, backend)
    shape = _checked(hidden, ref_hidden, weight, ref_weight, bias, ref_bias, targets, mask, chunk_tokens)
    check.mask_count(mask, mask_count)
    divergences.checked_divergence(divergence, js_weight, top_k, weight.shape[0])
    transform = rows.checked_transform(temperature, logit_scale, softcap, shape, ("hidden", hidden))
    ids = None if targets is None else check.ids("targets", targets)
    mask = check.mask_bytes(mask, shape, "hidden.shape[:-1]")
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
    call = _linear_kl_call.Call(
        check.rows(hidden), check.rows(ref_hidden.detach()), weight, bias,
        constants[0], constants[1], None if ids is None else ids.view(-1), None if mask is None else mask.view(-1),
        None if transform.temperatures is None else transform.temperatures.view(-1), transform.temperature,
        transform.logit_scale, transform.softcap, divergence, js_weight, top_k, mask_count,
        chunk_tokens or max(8, _head.chunk_tokens(weight) // 2), name,
    )  # fmt: skip
    found = _linear_kl_call.run(*call, return_entropy, _linear_kl_call.to_save(call))
    kl, logprobs, ref_logprobs, entropy = (x.view(shape) if x.numel() == call.hidden.shape[0] else x for x in found[:4])
    return LinearKl(
        kl,
        None if targets is None else logprobs,
        None if targets is None else ref_logprobs.detach(),
        entropy if return_entropy else None,
    )


@without_autocast
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
        dtype = check.compute_dtype(h.dtype)
        both.append(torch.nn.functional.linear(h.to(dtype), w.to(dtype), None if b is None else b.to(dtype)))
    kl = divergences.reference(
        *both, divergence=divergence, js_weight=js_weight, top_k=top_k, mask=mask, **transform
    )  # fmt: skip
    ids = torch.zeros(kl.shape, dtype=torch.int64, device=kl.device) if targets is None else targets
    (logprobs, entropy), (ref_logprobs, _) = (rows.reference(x, ids, mask=mask, **transform) for x in both)
    if targets is None:
        return LinearKl(kl, None, None, entropy)
    return LinearKl(kl, logprobs, ref_logprobs, entropy)


def _checked(
    hidden: Tensor, ref_hidden: Tensor, weight: Tensor, ref_weight: Tensor | None, bias: Tensor | None,
    ref_bias: Tensor | None, targets: Tensor | None, mask: Tensor | None, chunk: int | None,
) -> torch.Size:  # fmt: skip
    check.floating("hidden", hidden)
    ref_head = weight if ref_weight is None else ref_weight
    for h, w, names in ((hidden, weight, "hidden weight"), (ref_hidden, ref_head, "ref_hidden ref_weight")):
        if h.dim() < 1 or w.dim() != 2 or h.shape[-1] != w.shape[1] or not w.numel():
            first, second = names.split()
            raise ValueError(
                f"{first} must be (..., D) and {second} (V, D) with V and D >= 1, "
                f"got {tuple(h.shape)} and {tuple(w.shape)}"
            )
    shape = hidden.shape[:-1]
    check.shaped("ref_hidden", ref_hidden, (*shape, ref_hidden.shape[-1]), "(*hidden.shape[:-1], D)")
    check.shaped("ref_weight", ref_head, (weight.shape[0], ref_head.shape[1]), "(V, D)")
    others = {"ref_hidden": ref_hidden, "weight": weight, "ref_weight": ref_weight, "bias": bias, "ref_bias": ref_bias}
    for name, x in others.items():
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the type of hidden, {hidden.dtype}, got {x.dtype}")
        if x is not None and name.endswith("bias"):
            check.shaped(name, x, (weight.shape[0],), "(V,)")
    if targets is not None:
        check.shaped("targets", targets, shape, "hidden.shape[:-1]")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk_tokens must be >= 1, got {chunk}")
    check.same_device(("hidden", hidden), *others.items(), ("targets", targets), ("mask", mask))
    return shape


OPS = {"linear_kl": tuple(divergences.IMPLS)}
