"""lora_linear: one linear layer for rows that use different LoRA or DoRA adapters, or none.

The rows of x form segments; those of a segment with adapter (A, B, scale) get

    y = bias + x @ weight^T + delta,    delta = scale * (drop(x) @ A^T) @ B^T,

those of a segment whose adapter has a magnitude m as well (DoRA)

    y = bias + f * (x @ weight^T + delta),    f = m / c,    c = ||weight + scale * B @ A|| of every row,

and those without an adapter only the first two terms. Without a weight, y is delta alone: what is added to the product
of a layer whose weight is quantised.

drop(x) = x / (1 - dropout) where an element is kept, else 0: at (row n, column k) where word k % 4 of Philox with the
counter (k // 4, n) and the seed is at least dropout * 2^32, to 24 bits. The mask is never stored; every backend, and a
pass that is made again, finds the same one.

With dy the gradient of y, du = f * dy (dy without a magnitude), g = du @ B and h = drop(x) @ A^T,

    dx = du @ weight + scale * drop(g @ A)
    dA = scale * g^T @ drop(x),  dB = scale * du^T @ h,  dm = sum of dy * (y - bias) / f / c    (the adapter's rows)
    dweight = du^T @ x, dbias = sum of dy: only where they are asked for; a frozen base costs nothing but dx

c is a constant for the gradient, as its paper has it. (PEFT drops x under the base weight too where there is a
magnitude; here dropout is on the adapter alone, with and without one.)

Cost for N rows: forward one product over all rows, 2 N in out FLOPs, and for the n rows with an adapter of rank R
another 2 n R (in + out), reading x once more and reading and writing y once more. Backward: the same for dx, the same
small products again for dA and dB. h (N, R) is kept. A magnitude adds one read of the weight and 2 R in out FLOPs to
every forward, and keeps y - bias before f where m is trained (N out).

Numerics: products accumulate in float32; Triton keeps h in float32, the CPU in the type of x. Adapters can stay in
float32 beside a bfloat16 base: the native CPU kernels read them in float32 (float64 beside a float64 x), Triton in
TF32, and PyTorch's products, which the CPU uses past _lora_cpu.NATIVE_LIMITS, in the type of x. Their gradients come
back in their own type.

In a CUDA graph: run once before the capture, which copies the table of rows to the device. Between replays the values
of every tensor may change, `seed` among them where it is a tensor; segments, ranks, scales and dropout may not.

Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685, section 4.1); scale = alpha / sqrt(R): rsLoRA, Kalajdzievski 2023
(arXiv 2312.03732); magnitudes: DoRA, Liu et al. 2024 (arXiv 2402.09353, eq. 5, and eq. 11 in section 4.3 for the
constant norm); one batch for many adapters: Chen et al. 2023, "Punica" (arXiv 2310.18547), there for inference; Philox:
Salmon et al. 2011.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.backends import custom_op, operands, resolve, without_autocast
from rlhf_fast.ops.core import check
from rlhf_fast.ops.core import registration_by_schema as registration
from rlhf_fast.ops.core.philox import philox
from rlhf_fast.ops.core.registration_by_schema import only_autograd_looks


class Adapter(NamedTuple):
    """The parameters of one adapter on one layer.

    a: (R, in) and b: (out, R), of any float type and rank; scale: alpha / R, or alpha / sqrt(R) for rsLoRA.
    magnitude: (out,), of any float type, for DoRA; it starts as the row norms of the weight.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None


Layout = tuple[list[Tensor], list[Tensor], list[Tensor], list[int], list[float], list[int]]
Entry = Adapter | tuple[Tensor, Tensor, float] | tuple[Tensor, Tensor, float, Tensor | None]


@check.takes_numbers
def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bank: Sequence[Entry],
    segments: Sequence[tuple[int, int]],
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer with a low-rank term per row segment.

    x: (..., in) float32, bfloat16, float16 or float64; its rows are its leading dimensions flattened.
    weight: (out, in), the type of x, any strides; bias: (out,) or None. Without a weight the low-rank term alone, for
    one or more adapters and neither bias nor magnitude.
    bank: an Adapter, or a tuple of its first three or four fields, for each adapter.
    segments: (adapter index, or -1 for none; number of rows), in row order, covering all rows.
    dropout: probability, in [0, 1), that an adapter does not see an element of x. It needs a seed, an int or a 0-d
    int64 tensor on the device of x: the same seed drops the same elements, so give each layer and step its own.

    Returns (..., out) in the type of x. Raises ValueError or TypeError for what does not fit.
    """
    x, weight, bias = operands(x, weight, bias)
    adapters = [Adapter(*entry) for entry in bank]
    _checked(x, weight, adapters, segments, bias)
    noise = _seed_tensor(dropout, seed, x.device)
    name = resolve("lora_linear", IMPLS, x.device, backend)
    if name == "reference":
        return reference(x, weight, adapters, segments, bias=bias, dropout=dropout, seed=noise)
    _, _, magnitudes, *_ = layout = _layout(adapters, segments)
    keep_unscaled = torch.is_grad_enabled() and any(m.requires_grad for m in magnitudes)
    y = _differentiable(check.rows(x), weight, bias, *layout, dropout, noise, keep_unscaled, name)[0]
    return y.view(*x.shape[:-1], y.shape[1])


def may_prepare(x: Tensor) -> bool:
    """Whether what `prepare` makes may take x now: contiguous, no gradient, autocast, compiler, mode or subclass."""
    if torch.is_grad_enabled() or not x.is_contiguous() or not only_autograd_looks((x,)):
        return False
    device = x.device.type
    return device != "meta" and not torch.is_autocast_enabled(device)


def prepare(
    x: Tensor, weight: Tensor | None, bank: Sequence[Entry], segments: Sequence[tuple[int, int]], backend: str
) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
    """f(x, weight, bias): lora_linear without dropout and gradient, its checks and its tables of adapters made before.

    For arguments that lora_linear has taken, with the backend that it resolved. f serves as long as x and weight keep
    their shapes, types and device and the tensors of the bank their addresses, types, shapes and strides; what they
    hold may change. While tokens are generated, what it leaves out takes longer than the products.
    """
    adapters = [Adapter(*entry) for entry in bank]
    downs, ups, magnitudes, _, scales, segment_list = layout = _layout(adapters, segments)
    if backend == "reference" or not only_autograd_looks((*downs, *ups)):
        return lambda x, weight, bias: lora_linear(x, weight, adapters, segments, bias=bias, backend=backend)
    outer = (ups[0] if weight is None else weight).shape[0]
    shape = (*x.shape[:-1], outer)
    add = None if backend != "cpu" or magnitudes else _cpu().prepare(x, outer, downs, ups, scales, _spans(segment_list))
    if add is None:
        rest = (*layout, 0.0, None, False, backend)
        return lambda x, weight, bias: _run(check.rows(x), weight, bias, *rest)[0].view(shape)

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = x.new_zeros(shape) if weight is None else F.linear(x, weight, bias)
        add(x, y)
        return y

    return run


@without_autocast
def reference(
    x: Tensor,
    weight: Tensor | None,
    bank: Sequence[Entry],
    segments: Sequence[tuple[int, int]],
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The definition, differentiable any number of times (the norm of a DoRA adapter is a constant)."""
    segments = segments or [(-1, 0)]  # no row
    rows, counts = check.rows(x), [count for _, count in segments]
    dropped = rows if seed is None else torch.where(_kept(rows, dropout, seed), rows / (1 - dropout), 0)
    base = x.new_zeros(bank[0][1].shape[0], x.shape[-1]) if weight is None else weight
    parts = []
    for part, source, (index, _) in zip(rows.split(counts), dropped.split(counts), segments, strict=True):
        if index < 0:
            parts.append(F.linear(part, base, bias))
            continue
        down, up, scale, magnitude = Adapter(*bank[index])
        delta = scale * F.linear(F.linear(source, down.to(x.dtype)), up.to(x.dtype))
        if magnitude is None:
            parts.append(F.linear(part, base, bias) + delta)
            continue
        dtype = check.compute_dtype(x.dtype)
        norm = torch.linalg.vector_norm(base.to(dtype) + scale * (up.to(dtype) @ down.to(dtype)), dim=1).detach()
        y = (magnitude.to(dtype) / norm).to(x.dtype) * (F.linear(part, base) + delta)
        parts.append(y if bias is None else y + bias)
    return torch.cat(parts).view(*x.shape[:-1], base.shape[0])


def _layout(adapters: Sequence[Adapter], segments: Sequence[tuple[int, int]]) -> Layout:
    """What the op takes in their place; see `_run`."""
    owners = [i for i, adapter in enumerate(adapters) if adapter.magnitude is not None]
    magnitudes = [a.magnitude for a in adapters if a.magnitude is not None]
    downs, ups, scales = (
        [a.a for a in adapters],
        [a.b for a in adapters],
        [check.number("scale", a.scale) for a in adapters],
    )
    return downs, ups, magnitudes, owners, scales, [number for segment in segments for number in segment]


def _threshold(dropout: float) -> int:
    """Of the upper 24 bits of a random word: below it, an element is dropped."""
    return round(dropout * (1 << 24))


def _kept(rows: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """(N, in) bool: which elements dropout keeps."""
    n, width = rows.shape
    groups = torch.arange((width + 3) // 4, device=rows.device)
    words = torch.stack(philox(seed, groups[None], torch.arange(n, device=rows.device)[:, None]), -1)
    return (words >> 8).flatten(1)[:, :width] >= _threshold(dropout)


def _checked(x: Tensor, weight: Tensor | None, bank: Sequence[Adapter], segments: Sequence[tuple[int, int]],
             bias: Tensor | None) -> None:  # fmt: skip
    """Raises for what does not fit."""
    check.floating("x", x)
    if weight is None:
        if not bank or bias is not None or any(adapter.magnitude is not None for adapter in bank):
            raise ValueError("without a weight there must be one or more adapters, no bias and no magnitude")
        shape = torch.Size((bank[0].b.shape[0], x.shape[-1] if x.dim() else 0))
    else:
        shape = _checked_base(x, weight, bias)
    for i, (down, up, _, magnitude) in enumerate(bank):
        check.floating(f"A of adapter {i}", down)
        check.floating(f"B of adapter {i}", up)
        if down.dim() != 2 or up.shape != (shape[0], down.shape[0]) or down.shape[1] != shape[1]:
            raise ValueError(
                f"adapter {i} must have A (R, {shape[1]}) and B ({shape[0]}, R), "
                f"got {tuple(down.shape)} and {tuple(up.shape)}"
            )
        if magnitude is not None:
            check.shaped(f"magnitude of adapter {i}", check.floating("magnitude", magnitude), up.shape[:1], "(out,)")
        check.same_device(("x", x), (f"A of adapter {i}", down), (f"B of adapter {i}", up), ("magnitude", magnitude))
    check.same_device(("x", x), ("weight", weight), ("bias", bias))
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    for index, count in segments:
        if not -1 <= index < len(bank) or count < 0:
            raise ValueError(f"segments must be (-1..{len(bank) - 1}, rows >= 0), got ({index}, {count})")
    if sum(count for _, count in segments) != rows:
        raise ValueError(f"segments must cover the {rows} rows of x, got {[count for _, count in segments]}")


def _checked_base(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.Size:
    """(out, in)."""
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., in) and weight (out, in), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        given = f"weight {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise TypeError(f"weight and bias must have the type of x, got x {x.dtype}, {given}")
    if bias is not None:
        check.shaped("bias", bias, weight.shape[:1], "(out,)")
    return weight.shape


def _seed_tensor(dropout: float, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    """The seed as a 0-d int64 tensor, without synchronising; None without dropout."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if dropout == 0:
        return None
    if seed is None:
        raise ValueError(f"dropout={dropout} needs a seed, got None")
    if not isinstance(seed, Tensor):
        return torch.full((), seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be an int or an int64 tensor, got {seed.dtype}")
    return check.shaped("seed", seed, (), "an int or a 0-d tensor").to(device)


def _cpu() -> ModuleType:
    from rlhf_fast.ops.lora import _cpu as _lora_cpu

    return _lora_cpu


def _triton() -> ModuleType:
    from rlhf_fast.kernels import lora_linear as kernels

    return kernels


# Modules with the same five steps: shrink, expand, gradients, norms, magnitude_backward.
# The product with the base weight is PyTorch's everywhere.
IMPLS = {"cpu": _cpu, "triton": _triton}
OPS = {"lora_linear": tuple(IMPLS)}


# --- The registered op -----------------------------------------------------------------------------------------------

Spans = list[tuple[int, int, int]]


def _spans(segments: list[int], wanted: Sequence[bool] | None = None) -> Spans:
    """(adapter, start, stop) of the segments that have rows and an adapter, one of those `wanted`."""
    spans, start = [], 0
    for index, count in zip(segments[::2], segments[1::2], strict=True):
        if index >= 0 and count and (wanted is None or wanted[index]):
            spans.append((index, start, start + count))
        start += count
    return spans


def _empty_h(x: Tensor, downs: list[Tensor], backend: str) -> Tensor:
    rank = max((down.shape[0] for down in downs), default=0)
    return x.new_zeros(x.shape[0], rank, dtype=check.compute_dtype(x.dtype) if backend == "triton" else x.dtype)


def _empty_norms(magnitudes: list[Tensor], y: Tensor) -> Tensor:
    return y.new_empty(len(magnitudes), y.shape[1], dtype=check.compute_dtype(y.dtype))


def _factors(magnitudes: list[Tensor], owners: list[int], norms: Tensor, adapters: int) -> Tensor | None:
    """f (adapters, out), 1 for an adapter without a magnitude; None where none has one."""
    if not magnitudes:
        return None
    rows = [torch.ones_like(norms[0])] * adapters
    for i, magnitude, norm in zip(owners, magnitudes, norms.unbind(), strict=True):
        rows[i] = magnitude.to(norm.dtype) / norm
    return torch.stack(rows)


def _run(x: Tensor, weight: Tensor | None, bias: Tensor | None, downs: list[Tensor], ups: list[Tensor],
         magnitudes: list[Tensor], owners: list[int], scales: list[float], segments: list[int], dropout: float,
         seed: Tensor | None, keep_unscaled: bool, backend: str) -> list[Tensor]:  # fmt: skip
    """[y, h, y - bias before f, c (magnitudes, out)] for x (N, in); owners: the adapters that the magnitudes belong
    to; segments: index, rows, index, rows, ..."""
    steps = IMPLS[backend]()
    spans, h = _spans(segments), _empty_h(x, downs, backend)
    y = x.new_zeros(x.shape[0], ups[0].shape[0]) if weight is None else F.linear(x, weight, bias)
    unscaled = torch.zeros_like(y) if keep_unscaled else y.new_empty(0)
    norms = _empty_norms(magnitudes, y)
    if weight is not None and magnitudes:
        steps.norms(weight, [downs[i] for i in owners], [ups[i] for i in owners], [scales[i] for i in owners], norms)
    steps.shrink(x, downs, spans, None if seed is None else (_threshold(dropout), seed), h)
    steps.expand(
        h, ups, [scale / (1 - dropout) for scale in scales], spans, None, y,
        _factors(magnitudes, owners, norms, len(downs)), bias, unscaled if keep_unscaled else None,
    )  # fmt: skip
    return [y, h, unscaled, norms]


def _fake(x, weight, bias, downs, ups, magnitudes, owners, scales, segments, dropout, seed, keep_unscaled, backend):
    y = x.new_empty(x.shape[0], (ups[0] if weight is None else weight).shape[0])
    return [
        y,
        _empty_h(x, downs, backend),
        y.new_empty(y.shape if keep_unscaled else (0,)),
        _empty_norms(magnitudes, y),
    ]


@custom_op("rlhf_fast::lora_linear_backward")
def _backward(grad: Tensor, x: Tensor, h: Tensor, unscaled: Tensor, norms: Tensor, weight: Tensor | None,
              downs: list[Tensor], ups: list[Tensor], magnitudes: list[Tensor], owners: list[int], scales: list[float],
              segments: list[int], dropout: float, seed: Tensor | None, wants: list[bool], wants_downs: list[bool],
              wants_ups: list[bool], backend: str) -> list[Tensor]:  # fmt: skip
    """[dx, dweight, all dA one after the other, all dB, dm (magnitudes, out)]; wants: those, empty where not wanted."""
    steps = IMPLS[backend]()
    spans, ranks = _spans(segments), [down.shape[0] for down in downs]
    noise = None if seed is None else (_threshold(dropout), seed)
    scales = [scale / (1 - dropout) for scale in scales]
    dx, dweight, flat_downs, flat_ups, dmagnitudes = results = _empty_gradients(grad, x, downs, norms, wants)
    factors = _factors(magnitudes, owners, norms, len(downs))
    if factors is not None:
        grad = grad.clone()
        sums = steps.magnitude_backward(grad, unscaled if wants[4] else None, factors, ranks, spans)
        if wants[4]:
            for i, norm, gradient in zip(owners, norms, dmagnitudes, strict=True):
                torch.div(sums[i], norm, out=gradient)
    g = _empty_h(x, downs, backend)
    if wants[0] or wants[2]:
        steps.shrink(grad, [up.t() for up in ups], spans, None, g)
    if wants[0]:
        if weight is None:
            dx.zero_()
        else:
            torch.mm(grad, weight, out=dx)
        steps.expand(g, [down.t() for down in downs], scales, spans, noise, dx)
    if wants[1]:
        torch.mm(grad.t(), x, out=dweight)
    if wants[2]:
        steps.gradients(g, x, ranks, scales, _spans(segments, wants_downs), noise, True, flat_downs)
    if wants[3]:
        steps.gradients(h, grad, ranks, scales, _spans(segments, wants_ups), None, False, flat_ups)
    return results


def _empty_gradients(grad: Tensor, x: Tensor, downs: list[Tensor], norms: Tensor, wants: list[bool]) -> list[Tensor]:
    dtype, ranks = check.compute_dtype(x.dtype), sum(down.shape[0] for down in downs)
    outer, inner = grad.shape[1], x.shape[1]
    shapes = (x.shape, (outer, inner), (ranks * inner,), (ranks * outer,), norms.shape)
    return [
        x.new_empty(shape if wanted else (0,), dtype=x.dtype if i < 2 else dtype)
        for i, (shape, wanted) in enumerate(zip(shapes, wants, strict=True))
    ]


@_backward.register_fake
def _(grad, x, h, unscaled, norms, weight, downs, ups, magnitudes, owners, scales, segments, dropout, seed, wants,
      wants_downs, wants_ups, backend):  # fmt: skip
    return _empty_gradients(grad, x, downs, norms, wants)


def _setup_context(ctx, inputs, output):
    x, weight, _, downs, ups, magnitudes, *ctx.layout, seed, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.adapters = len(downs)
    ctx.save_for_backward(x, *output[1:], weight, seed, *downs, *ups, *magnitudes)


def _autograd(ctx, grads):
    x, h, unscaled, norms, weight, seed, *parameters = ctx.saved_tensors
    n = ctx.adapters
    downs, ups, magnitudes = parameters[:n], parameters[n : 2 * n], parameters[2 * n :]
    needs = ctx.needs_input_grad[: 3 + len(parameters)]
    if grads[0] is None:
        return [None] * len(needs)
    grad = grads[0].contiguous()
    wanted = list(needs[3:])
    wants_downs, wants_ups, wants_magnitudes = wanted[:n], wanted[n : 2 * n], wanted[2 * n :]
    wants = [needs[0], needs[1], any(wants_downs), any(wants_ups), any(wants_magnitudes)]
    dx, dweight, flat_downs, flat_ups, dmagnitudes = _backward(
        grad, x, h, unscaled, norms, weight, downs, ups, magnitudes, *ctx.layout, seed, wants, wants_downs, wants_ups,
        ctx.backend,
    )  # fmt: skip
    return (
        dx if needs[0] else None,
        dweight if needs[1] else None,
        grad.sum(0) if needs[2] else None,
        *_taken_apart(flat_downs, downs, wants_downs),
        *_taken_apart(flat_ups, ups, wants_ups),
        *_taken_apart(dmagnitudes.view(-1), magnitudes, wants_magnitudes),
    )


def _taken_apart(flat: Tensor, parameters: list[Tensor], wants: list[bool]) -> list[Tensor | None]:
    """The gradient of each parameter that has one, out of all of them one after the other."""
    if not any(wants):
        return [None] * len(parameters)
    parts = flat.split([p.numel() for p in parameters])
    return [
        part.view(p.shape).to(p.dtype) if wanted else None
        for part, p, wanted in zip(parts, parameters, wants, strict=True)
    ]


_differentiable = registration.op(
    "lora_linear",
    torch.library.infer_schema(_run, mutates_args=()),
    without_autocast(_run),
    fake=_fake,
    differentiable=range(6),
    setup_context=_setup_context,
    backward=_autograd,
    returned=1,
)
