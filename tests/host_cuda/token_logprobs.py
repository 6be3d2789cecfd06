"""What the host tests of the token_logprobs kernels share: their arguments and what they are judged by."""

from __future__ import annotations

import ctypes

import torch

from rlhf_fast.backends import DTYPE_CODES

DEFAULTS = {"temperature": 1.0, "logit_scale": 1.0, "softcap": 0.0}


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def row_sizes(tensor):
    """(outer, inner, outer_stride, inner_stride) of (outer, inner, V)."""
    return (*tensor.shape[:2], *tensor.stride()[:2])


def arguments(logits, targets, mask, transform, stats):
    pointer = ctypes.c_void_p
    rows = (ctypes.c_int64 * 4)(*row_sizes(logits))
    per_row = targets.shape[2] if targets.dim() == 3 else 1
    given = (ctypes.c_double * 3)(*(transform.get(k, d) for k, d in DEFAULTS.items()))
    return (
        pointer(address(logits)), DTYPE_CODES[logits.dtype], rows, ctypes.c_int64(logits.shape[-1]),
        pointer(address(targets)), ctypes.c_int64(per_row), pointer(address(mask)), given,
        (pointer * 5)(*(s.data_ptr() if s.numel() else None for s in stats)),
    )  # fmt: skip


def eager(logits, targets, temperature=1.0, logit_scale=1.0, softcap=0.0):
    logits = logits * logit_scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, -1)
    return log_p.gather(-1, targets), -(log_p.exp() * log_p).sum(-1), torch.logsumexp(logits / temperature, -1)


def with_gradients(logits, targets, transform, grad_logprobs, grad_entropy, grad_lse):
    leaf = logits.clone().requires_grad_()
    logprobs, entropy, _ = results = eager(leaf, targets, **transform)
    upstream = [g.to(logprobs.dtype) for g in (grad_logprobs, grad_entropy, grad_lse)]
    (gradient,) = torch.autograd.grad(results, [leaf], upstream)
    return logprobs.detach(), entropy.detach(), gradient
