"""lora_linear: one linear layer for rows that use different LoRA adapters, or none.

The rows of x form segments; the rows of a segment with adapter (A, B, scale) get

    y = x @ weight^T + bias + scale * (x @ A^T) @ B^T

and those of a segment without one only the first two terms. With dy the gradient of y, g = dy @ B and h = x @ A^T,

    dx = dy @ weight + scale * g @ A
    dA = scale * g^T @ x,  dB = scale * dy^T @ h                            (summed over the adapter's rows)
    dweight = dy^T @ x, dbias = sum of dy: only where they are asked for; a frozen base costs nothing but dx

Cost for N rows: forward one product over all rows, 2 N in out FLOPs, and for the n rows with an adapter of rank R
another 2 n R (in + out), reading x once more and reading and writing y once more. Backward: the same for dx, the same
small products again for dA and dB. h (N, R) is kept.

Numerics: products accumulate in float32; h is kept in the type of x. Adapters can stay in float32 beside a bfloat16
base: the native CPU kernels read them in float32 (float64 beside a float64 x), Triton in TF32, and PyTorch's products,
which the CPU uses past NATIVE_LIMITS, in the type of x. Their gradients come back in their own type.

Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685); one batch for many adapters: Chen et al. 2023, "Punica"
(arXiv 2310.18547), there for inference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.backends import DTYPE_CODES, address, native, resolve, threads
from rlhf_fast.ops import _check


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bank: Sequence[tuple[Tensor, Tensor, float]],
    segments: Sequence[tuple[int, int]],
    *,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer with a low-rank term per row segment.

    x: (..., in) float32, bfloat16, float16 or float64; its rows are its leading dimensions flattened.
    weight: (out, in), the type of x, any strides; bias: (out,) or None.
    bank: for each adapter A (R, in), B (out, R), of any float type and rank, and its scale (alpha / R).
    segments: (adapter index, or -1 for none; number of rows), in row order, covering all rows.

    Returns (..., out) in the type of x. Raises ValueError or TypeError for what does not fit.
    """
    rows = _checked(x, weight, bank, segments, bias)
    name = resolve("lora_linear", IMPLS, x.device, backend)
    if name == "reference":
        return reference(x, weight, bank, segments, bias=bias)
    downs, ups, scales = [a for a, _, _ in bank], [b for _, b, _ in bank], [float(scale) for *_, scale in bank]
    spans = [number for segment in segments for number in segment]
    # While tokens are generated the products are small and the way through the dispatcher is most of the cost.
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, *downs, *ups)
    )
    run = torch.ops.rlhf_fast.lora_linear if differentiable or torch.compiler.is_compiling() else _run
    y = run(x.reshape(rows, -1), weight, bias, downs, ups, scales, spans, name)[0]
    return y.view(*x.shape[:-1], weight.shape[0])


def reference(
    x: Tensor,
    weight: Tensor,
    bank: Sequence[tuple[Tensor, Tensor, float]],
    segments: Sequence[tuple[int, int]],
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """The definition, differentiable any number of times."""
    rows = x.reshape(-1, x.shape[-1]).split([count for _, count in segments])
    parts = []
    for part, (index, _) in zip(rows, segments, strict=True):
        y = F.linear(part, weight, bias)
        if index >= 0:
            down, up, scale = bank[index]
            y = y + scale * F.linear(F.linear(part, down.to(x.dtype)), up.to(x.dtype))
        parts.append(y)
    return torch.cat(parts).view(*x.shape[:-1], weight.shape[0])


def _checked(x: Tensor, weight: Tensor, bank: Sequence[tuple[Tensor, Tensor, float]],
             segments: Sequence[tuple[int, int]], bias: Tensor | None) -> int:  # fmt: skip
    """The number of rows, once everything fits."""
    _check.floating("x", x)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., in) and weight (out, in), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        given = f"weight {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise TypeError(f"weight and bias must have the type of x, got x {x.dtype}, {given}")
    if bias is not None:
        _check.shaped("bias", bias, weight.shape[:1], "(out,)")
    for i, (down, up, _) in enumerate(bank):
        _check.floating(f"A of adapter {i}", down)
        _check.floating(f"B of adapter {i}", up)
        if down.dim() != 2 or up.shape != (weight.shape[0], down.shape[0]) or down.shape[1] != weight.shape[1]:
            raise ValueError(
                f"adapter {i} must have A (R, {weight.shape[1]}) and B ({weight.shape[0]}, R), "
                f"got {tuple(down.shape)} and {tuple(up.shape)}"
            )
        _check.same_device(("x", x), (f"A of adapter {i}", down), (f"B of adapter {i}", up))
    _check.same_device(("x", x), ("weight", weight), ("bias", bias))
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    for index, count in segments:
        if not -1 <= index < len(bank) or count < 0:
            raise ValueError(f"segments must be (-1..{len(bank) - 1}, rows >= 0), got ({index}, {count})")
    if sum(count for _, count in segments) != rows:
        raise ValueError(f"segments must cover the {rows} rows of x, got {[count for _, count in segments]}")
    return rows


Spans = list[tuple[int, int, int]]


# (rank, rows) up to which the CPU uses the native kernels, PyTorch's products past either. Measured on one thread of a
# CPU with AVX-512 and its bfloat16 products, layers of 576 and 1536, shrink and expand together: PyTorch's time is, of
# the native one, in float32 1.0 to 4.0 at rank 8 and 32 to 4096 rows, 0.7 to 1.1 at rank 16; in bfloat16 at rank 8
# 1.7 to 2.4 at 32 rows, 0.9 to 1.5 at 128, 0.5 to 0.7 at 1024; in float64 0.7 to 2.3 at ranks 8 and 16; in float16 4
# to 16 at ranks 8 and 64.
NATIVE_LIMITS = {
    torch.float32: (8, math.inf),
    torch.float64: (16, math.inf),
    torch.bfloat16: (8, 128),
    torch.float16: (math.inf, math.inf),
}


def _is_native(h: Tensor) -> bool:
    rank, rows = NATIVE_LIMITS[h.dtype]
    return h.shape[1] <= rank and h.shape[0] <= rows


def _cpu_shrink(x: Tensor, downs: list[Tensor], spans: Spans, h: Tensor) -> None:
    if _is_native(h):
        x = x if x.stride(1) == 1 else x.contiguous()
        bank = [((address(a), DTYPE_CODES[a.dtype], *a.stride()), a.shape[0], 1.0) for a in downs]
        native().lora_shrink(*_native_arguments(x, h), bank, spans, threads())
        return
    for i, start, stop in spans:
        torch.mm(x[start:stop], downs[i].to(x.dtype).t(), out=h[start:stop, : downs[i].shape[0]])


def _cpu_expand(h: Tensor, ups: list[Tensor], scales: list[float], spans: Spans, y: Tensor) -> None:
    if _is_native(h):
        bank = [
            ((address(b), DTYPE_CODES[b.dtype], b.stride(1), b.stride(0)), b.shape[1], scale)  # B^T
            for b, scale in zip(ups, scales, strict=True)
        ]
        native().lora_expand(*_native_arguments(y, h), bank, spans, threads())
        return
    for i, start, stop in spans:
        y[start:stop].addmm_(h[start:stop, : ups[i].shape[1]], ups[i].to(y.dtype).t(), alpha=scales[i])


def _native_arguments(wide: Tensor, h: Tensor) -> tuple[int, int, int, tuple[int, int, int]]:
    return address(wide), address(h), DTYPE_CODES[wide.dtype], (wide.shape[1], wide.stride(0), h.stride(0))


def _triton_shrink(*args: Any) -> None:
    from rlhf_fast.kernels import lora_linear as kernels

    kernels.shrink(*args)


def _triton_expand(*args: Any) -> None:
    from rlhf_fast.kernels import lora_linear as kernels

    kernels.expand(*args)


# shrink(x, downs, spans, h): h[rows] = x[rows] @ down^T, for every span (adapter, start, stop).
# expand(h, ups, scales, spans, y): y[rows] += scale * h[rows] @ up^T. Downs (R, in) and ups (out, R) may be views.
# The product with the base weight, dA and dB are PyTorch's everywhere.
IMPLS = {
    "cpu": (_cpu_shrink, _cpu_expand),
    "triton": (_triton_shrink, _triton_expand),
}
OPS = {"lora_linear": tuple(IMPLS)}


def _spans(segments: list[int]) -> Spans:
    """(adapter, start, stop) of the segments that have an adapter and rows."""
    spans, start = [], 0
    for index, count in zip(segments[::2], segments[1::2], strict=True):
        if index >= 0 and count:
            spans.append((index, start, start + count))
        start += count
    return spans


def _empty_h(x: Tensor, downs: list[Tensor]) -> Tensor:
    return x.new_zeros(x.shape[0], max((down.shape[0] for down in downs), default=0))


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, downs: list[Tensor], ups: list[Tensor],
         scales: list[float], segments: list[int], backend: str) -> list[Tensor]:  # fmt: skip
    """[y, h] for x (N, in); segments: index, rows, index, rows, ..."""
    shrink, expand = IMPLS[backend]
    spans, h = _spans(segments), _empty_h(x, downs)
    y = F.linear(x, weight, bias)
    shrink(x, downs, spans, h)
    expand(h, ups, scales, spans, y)
    return [y, h]


_forward = torch.library.custom_op("rlhf_fast::lora_linear", mutates_args=())(_run)


@_forward.register_fake
def _(x, weight, bias, downs, ups, scales, segments, backend):
    return [x.new_empty(x.shape[0], weight.shape[0]), _empty_h(x, downs)]


@torch.library.custom_op("rlhf_fast::lora_linear_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, h: Tensor, weight: Tensor, downs: list[Tensor], ups: list[Tensor],
              scales: list[float], segments: list[int], wants_x: bool, wants: list[bool],
              backend: str) -> list[Tensor]:  # fmt: skip
    """[dx] + dA of every adapter + dB of every adapter; wants: which of the latter two; empty where not wanted."""
    shrink, expand = IMPLS[backend]
    spans = _spans(segments)
    gradients = _empty_gradients(x, downs, ups, wants_x, wants)
    grad_downs, grad_ups = gradients[1 : len(downs) + 1], gradients[len(downs) + 1 :]
    g = _empty_h(x, downs)
    shrink(grad, [up.t() for up in ups], spans, g)
    if wants_x:
        torch.mm(grad, weight, out=gradients[0])
        expand(g, [down.t() for down in downs], scales, spans, gradients[0])
    for i, start, stop in spans:
        rank = downs[i].shape[0]
        if grad_downs[i].numel():
            grad_downs[i] += scales[i] * (g[start:stop, :rank].t() @ x[start:stop])
        if grad_ups[i].numel():
            grad_ups[i] += scales[i] * (grad[start:stop].t() @ h[start:stop, :rank])
    return gradients


def _empty_gradients(x: Tensor, downs: list[Tensor], ups: list[Tensor], wants_x: bool,
                     wants: list[bool]) -> list[Tensor]:  # fmt: skip
    pairs = zip([*downs, *ups], wants, strict=True)
    return [
        x.new_empty(x.shape if wants_x else (0,)),
        *(torch.zeros_like(tensor, memory_format=torch.contiguous_format) if wanted else tensor.new_empty(0)
          for tensor, wanted in pairs),
    ]  # fmt: skip


@_backward.register_fake
def _(grad, x, h, weight, downs, ups, scales, segments, wants_x, wants, backend):
    return _empty_gradients(x, downs, ups, wants_x, wants)


def _setup_context(ctx, inputs, output):
    x, weight, _, downs, ups, ctx.scales, ctx.segments, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.count = len(downs)
    ctx.save_for_backward(x, output[1], weight, *downs, *ups)


def _autograd(ctx, grads):
    x, h, weight, *pairs = ctx.saved_tensors
    downs, ups = pairs[: ctx.count], pairs[ctx.count :]
    wants_x, wants_weight, wants_bias, wants_downs, wants_ups = ctx.needs_input_grad[:5]
    if grads[0] is None:
        return (None, None, None, [None] * ctx.count, [None] * ctx.count, None, None, None)
    grad = grads[0].contiguous()
    wants = [*wants_downs, *wants_ups]
    gradients = _backward(grad, x, h, weight, downs, ups, ctx.scales, ctx.segments, wants_x, wants, ctx.backend)
    kept = [g if wanted else None for g, wanted in zip(gradients, [wants_x, *wants], strict=True)]
    return (
        kept[0],
        grad.t() @ x if wants_weight else None,
        grad.sum(0) if wants_bias else None,
        kept[1 : ctx.count + 1],
        kept[ctx.count + 1 :],
        None, None, None,
    )  # fmt: skip


_forward.register_autograd(_autograd, setup_context=_setup_context)
