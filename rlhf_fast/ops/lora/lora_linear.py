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

On a CPU with AVX-512 up to 64 rows (_cpu.FEW_ROWS_LIMITS) can be one product that reads every byte of the weight once
(`prepare` with one_pass, without gradients). A sum of it is 16 partial ones of every 16th column (bfloat16: pair of
columns), then of the ranks, added in a fixed tree, so the bits of a row do not depend on the other rows.

Numerics: products accumulate in float32; Triton keeps h in float32, the CPU in the type of x. Adapters can stay in
float32 beside a bfloat16 base: the native CPU kernels read them in float32 (float64 beside a float64 x), Triton in
TF32, and PyTorch's products, which the CPU uses past _cpu.NATIVE_LIMITS, in the type of x. Their gradients come
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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.backends import operands, resolve, without_autocast
from rlhf_fast.ops.core import check
from rlhf_fast.ops.core.philox import philox
from rlhf_fast.ops.core.registration import only_autograd_looks
from rlhf_fast.ops.lora import _cpu
from rlhf_fast.ops.lora._cpu import FewRowsProduct
from rlhf_fast.ops.lora._op import IMPLS, Bank, Layer, Rows, few_rows, forward, run, threshold


class Adapter(NamedTuple):
    """The parameters of one adapter on one layer.

    a: (R, in) and b: (out, R), of any float type and rank; scale: alpha / R, or alpha / sqrt(R) for rsLoRA.
    magnitude: (out,), of any float type, for DoRA; it starts as the row norms of the weight.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None


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
    seed = _seed_tensor(dropout, seed, x.device)
    name = resolve("lora_linear", IMPLS, x.device, backend)
    if name == "reference":
        return reference(x, weight, adapters, segments, bias=bias, dropout=dropout, seed=seed)
    entries = _bank(adapters)
    keep_unscaled = torch.is_grad_enabled() and any(m.requires_grad for m in entries.magnitudes)
    rows = Rows(_flat(segments), dropout, seed, keep_unscaled)
    y = run(Layer(check.rows(x), weight, bias), entries, rows, name)[0]
    return y.view(*x.shape[:-1], y.shape[1])


def may_prepare(x: Tensor) -> bool:
    """Whether what `prepare` makes may take x now: contiguous, no gradient, autocast, compiler, mode or subclass."""
    if torch.is_grad_enabled() or not x.is_contiguous() or not only_autograd_looks((x,)):
        return False
    device = x.device.type
    return device != "meta" and not torch.is_autocast_enabled(device)


def prepare(
    x: Tensor,
    weight: Tensor | None,
    bank: Sequence[Entry],
    segments: Sequence[tuple[int, int]],
    backend: str,
    *,
    bias: Tensor | None = None,
    one_pass: bool = False,
) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
    """f(x, weight, bias): lora_linear without dropout and gradient, its checks and its tables of adapters made before.

    For arguments that lora_linear has taken, with the backend that it resolved. f serves as long as x and weight keep
    their shapes, strides, types and device and the tensors of the bank their addresses, types, shapes and strides; what
    they hold may change. While tokens are generated, what it leaves out takes longer than the products.

    one_pass: up to _cpu.FEW_ROWS_LIMITS rows by the one product for few rows, where the backend is cpu and it runs. Its
    bits are not those of lora_linear; without it they are. weight and bias must then stay where they are too.
    """
    adapters = [Adapter(*entry) for entry in bank]
    entries, rows = _bank(adapters), Rows(_flat(segments), 0.0, None, False)
    if backend == "reference" or not only_autograd_looks((*entries.downs, *entries.ups)):
        return lambda x, weight, bias: lora_linear(x, weight, adapters, segments, bias=bias, backend=backend)
    outer = (entries.ups[0] if weight is None else weight).shape[0]
    shape, add = (*x.shape[:-1], outer), None
    if one_pass and backend == "cpu":
        product = few_rows(Layer(check.rows(x), weight, bias), entries, rows, shape)
        if product is not None:
            return lambda x, weight, bias: product(x)
    if backend == "cpu" and not entries.magnitudes:
        add = _cpu.prepare(x, outer, entries.downs, entries.ups, entries.scales, rows.spans())
    if add is None:
        return lambda x, weight, bias: (
            forward(Layer(check.rows(x), weight, bias), entries, rows, backend)[0].view(shape)
        )  # fmt: skip

    def call(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = x.new_zeros(shape) if weight is None else F.linear(x, weight, bias)
        add(x, y)
        return y

    return call


def prepare_few_rows(
    x: Tensor, weight: Tensor, bank: Sequence[Entry], segments: Sequence[tuple[int, int]], *, bias: Tensor | None = None
) -> FewRowsProduct | None:
    """What `prepare` with one_pass calls on a CPU, for a caller that hands it to native code; None where it does not
    run. All tensors but x must stay where they are."""
    entries, rows = _bank([Adapter(*entry) for entry in bank]), Rows(_flat(segments), 0.0, None, False)
    return few_rows(Layer(check.rows(x), weight, bias), entries, rows, (*x.shape[:-1], weight.shape[0]))


@without_autocast
def reference(
    x: Tensor, weight: Tensor | None, bank: Sequence[Entry], segments: Sequence[tuple[int, int]], *,
    bias: Tensor | None = None, dropout: float = 0.0, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The definition, differentiable any number of times (the norm of a DoRA adapter is a constant)."""
    segments = segments or [(-1, 0)]  # no row
    rows, counts = check.rows(x), [count for _, count in segments]
    dropped = rows if seed is None else torch.where(_keeps(rows, dropout, seed), rows / (1 - dropout), 0)
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


def _bank(adapters: Sequence[Adapter]) -> Bank:
    owners = [i for i, adapter in enumerate(adapters) if adapter.magnitude is not None]
    magnitudes = [a.magnitude for a in adapters if a.magnitude is not None]
    scales = [check.number("scale", a.scale) for a in adapters]
    return Bank([a.a for a in adapters], [a.b for a in adapters], magnitudes, owners, scales)


def _flat(segments: Sequence[tuple[int, int]]) -> list[int]:
    return [number for segment in segments for number in segment]


def _keeps(rows: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """(N, in) bool: which elements dropout keeps."""
    n, width = rows.shape
    groups = torch.arange((width + 3) // 4, device=rows.device)
    words = torch.stack(philox(seed, groups[None], torch.arange(n, device=rows.device)[:, None]), -1)
    return (words >> 8).flatten(1)[:, :width] >= threshold(dropout)


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
    check.that(0 <= dropout < 1, "dropout", "in [0, 1)", dropout)
    if dropout == 0:
        return None
    if seed is None:
        raise ValueError(f"dropout={dropout} needs a seed, got None")
    if not isinstance(seed, Tensor):
        return torch.full((), seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be an int or an int64 tensor, got {seed.dtype}")
    return check.shaped("seed", seed, (), "an int or a 0-d tensor").to(device)


OPS = {"lora_linear": tuple(IMPLS)}
