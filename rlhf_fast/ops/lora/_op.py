"""lora_linear as a registered op: forward and backward out of PyTorch's products and the steps of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.backends import triton_kernels, without_autocast
from rlhf_fast.ops.core import check, registration
from rlhf_fast.ops.lora import _cpu
from rlhf_fast.ops.lora._cpu import Dropout, Spans

# Modules with the same five steps: shrink, expand, gradients, norms, magnitude_backward.
# The product with the base weight is PyTorch's everywhere.
IMPLS = {"cpu": lambda: _cpu, "triton": lambda: triton_kernels("lora_linear")}


class Layer(NamedTuple):
    x: Tensor  # (N, in)
    weight: Tensor | None  # (out, in)
    bias: Tensor | None  # (out,)


class Bank(NamedTuple):
    """The adapters of a layer."""

    downs: list[Tensor]  # A (R, in)
    ups: list[Tensor]  # B (out, R)
    magnitudes: list[Tensor]  # (out,)
    owners: list[int]  # the adapters that the magnitudes belong to
    scales: list[float]

    @property
    def ranks(self) -> list[int]:
        return [down.shape[0] for down in self.downs]

    def empty_h(self, x: Tensor, backend: str) -> Tensor:
        """(N, widest rank), zeros."""
        dtype = check.compute_dtype(x.dtype) if backend == "triton" else x.dtype
        return x.new_zeros(x.shape[0], max(self.ranks, default=0), dtype=dtype)

    def empty_norms(self, y: Tensor) -> Tensor:
        return y.new_empty(len(self.magnitudes), y.shape[1], dtype=check.compute_dtype(y.dtype))

    def factors(self, norms: Tensor) -> Tensor | None:
        """f (adapters, out), 1 for an adapter without a magnitude; None where none has one."""
        if not self.magnitudes:
            return None
        rows = [torch.ones_like(norms[0])] * len(self.downs)
        for i, magnitude, norm in zip(self.owners, self.magnitudes, norms.unbind(), strict=True):
            rows[i] = magnitude.to(norm.dtype) / norm
        return torch.stack(rows)


class Rows(NamedTuple):
    """Which adapter the rows of x use, and what it sees of them."""

    segments: list[int]  # adapter or -1, number of rows, adapter, number of rows, ...
    dropout: float
    seed: Tensor | None  # None without dropout
    keep_unscaled: bool  # y - bias before f, for the gradient of a magnitude

    def spans(self, wanted: Sequence[bool] | None = None) -> Spans:
        """(adapter, start, stop) of the segments that have rows and an adapter, one of those `wanted`."""
        spans, start = [], 0
        for index, count in zip(self.segments[::2], self.segments[1::2], strict=True):
            if index >= 0 and count and (wanted is None or wanted[index]):
                spans.append((index, start, start + count))
            start += count
        return spans

    def covering(self) -> Spans:
        """`spans` with the rows that have no adapter, as adapter -1."""
        ends = list(accumulate(self.segments[1::2]))
        starts = [0, *ends[:-1]]
        return [each for each in zip(self.segments[::2], starts, ends, strict=True) if each[1] < each[2]]

    def noise(self) -> Dropout:
        return None if self.seed is None else (threshold(self.dropout), self.seed)

    def scales(self, bank: Bank) -> list[float]:
        """Those of what dropout keeps."""
        return [scale / (1 - self.dropout) for scale in bank.scales]


def threshold(dropout: float) -> int:
    """Of the upper 24 bits of a random word: below it, an element is dropped."""
    return round(dropout * (1 << 24))


@without_autocast
def forward(layer: Layer, bank: Bank, rows: Rows, backend: str) -> list[Tensor]:
    """[y, h, y - bias before f, c (magnitudes, out)]"""
    steps, spans = IMPLS[backend](), rows.spans()
    x, weight, bias = layer
    h = bank.empty_h(x, backend)
    y = x.new_zeros(x.shape[0], bank.ups[0].shape[0]) if weight is None else F.linear(x, weight, bias)
    unscaled = torch.zeros_like(y) if rows.keep_unscaled else y.new_empty(0)
    norms = bank.empty_norms(y)
    if weight is not None and bank.magnitudes:
        downs, ups, scales = ([each[i] for i in bank.owners] for each in (bank.downs, bank.ups, bank.scales))
        steps.norms(weight, downs, ups, scales, norms)
    steps.shrink(x, bank.downs, spans, rows.noise(), h)
    steps.expand(
        h, bank.ups, rows.scales(bank), spans, None, y, bank.factors(norms), bias,
        unscaled if rows.keep_unscaled else None,
    )  # fmt: skip
    return [y, h, unscaled, norms]


def few_rows(layer: Layer, bank: Bank, rows: Rows, shape: Sequence[int]) -> _cpu.FewRowsProduct | None:
    """See _cpu.few_rows; None also where there is dropout, a magnitude or no weight."""
    x, weight, bias = layer
    if weight is None or bank.magnitudes or rows.seed is not None:
        return None
    return _cpu.few_rows(x, weight, bias, bank.downs, bank.ups, bank.scales, rows.covering(), shape)


def _fake(layer: Layer, bank: Bank, rows: Rows, backend: str) -> list[Tensor]:
    outer = (bank.ups[0] if layer.weight is None else layer.weight).shape[0]
    y = layer.x.new_empty(layer.x.shape[0], outer)
    unscaled = y.new_empty(y.shape if rows.keep_unscaled else (0,))
    return [y, bank.empty_h(layer.x, backend), unscaled, bank.empty_norms(y)]


class Upstream(NamedTuple):
    """The gradient of y, contiguous, and the other results of forward."""

    grad: Tensor
    h: Tensor
    unscaled: Tensor
    norms: Tensor


class Wants(NamedTuple):
    """Whose gradients are asked for."""

    want_x: bool
    want_weight: bool
    want_downs: list[bool]
    want_ups: list[bool]
    want_magnitudes: bool


@without_autocast
def _gradients(upstream: Upstream, layer: Layer, bank: Bank, rows: Rows, wants: Wants, backend: str) -> list[Tensor]:
    """[dx, dweight, all dA one after the other, all dB, dm (magnitudes, out)], empty where not wanted."""
    steps, spans, scales, noise = IMPLS[backend](), rows.spans(), rows.scales(bank), rows.noise()
    x, weight, _ = layer
    grad, h, unscaled, norms = upstream
    dx, dweight, flat_downs, flat_ups, dmagnitudes = results = _empty_gradients(
        upstream, layer, bank, rows, wants, backend
    )
    factors = bank.factors(norms)
    if factors is not None:
        grad = grad.clone()
        sums = steps.magnitude_backward(grad, unscaled if wants.want_magnitudes else None, factors, bank.ranks, spans)
        if wants.want_magnitudes:
            for i, norm, gradient in zip(bank.owners, norms, dmagnitudes, strict=True):
                torch.div(sums[i], norm, out=gradient)
    g = bank.empty_h(x, backend)
    if wants.want_x or any(wants.want_downs):
        steps.shrink(grad, [up.t() for up in bank.ups], spans, None, g)
    if wants.want_x:
        if weight is None:
            dx.zero_()
        else:
            torch.mm(grad, weight, out=dx)
        steps.expand(g, [down.t() for down in bank.downs], scales, spans, noise, dx)
    if wants.want_weight:
        torch.mm(grad.t(), x, out=dweight)
    if any(wants.want_downs):
        steps.gradients(g, x, bank.ranks, scales, rows.spans(wants.want_downs), noise, True, flat_downs)
    if any(wants.want_ups):
        steps.gradients(h, grad, bank.ranks, scales, rows.spans(wants.want_ups), None, False, flat_ups)
    return results


def _empty_gradients(
    upstream: Upstream, layer: Layer, bank: Bank, rows: Rows, wants: Wants, backend: str
) -> list[Tensor]:
    x, dtype, ranks = layer.x, check.compute_dtype(layer.x.dtype), sum(bank.ranks)
    outer, inner = upstream.grad.shape[1], x.shape[1]
    return [
        x.new_empty(x.shape if wants.want_x else (0,)),
        x.new_empty((outer, inner) if wants.want_weight else (0,)),
        x.new_empty((ranks * inner,) if any(wants.want_downs) else (0,), dtype=dtype),
        x.new_empty((ranks * outer,) if any(wants.want_ups) else (0,), dtype=dtype),
        x.new_empty(upstream.norms.shape if wants.want_magnitudes else (0,), dtype=dtype),
    ]


def _backward(saved: registration.Saved, upstream: Sequence[Tensor | None]) -> dict[str, registration.Gradient]:
    assert upstream[0] is not None  # of the only result that callers see
    grad, needs = upstream[0].contiguous(), saved.needs
    layer, bank, rows = saved.inputs
    wants = Wants(needs["x"], needs["weight"], needs["downs"], needs["ups"], any(needs["magnitudes"]))
    results = gradients(Upstream(grad, *saved.results), layer, bank, rows, wants, saved.backend)
    dx, dweight, flat_downs, flat_ups, dmagnitudes = results
    return {
        "x": dx,
        "weight": dweight,
        "bias": grad.sum(0) if needs["bias"] else None,
        "downs": _taken_apart(flat_downs, bank.downs, needs["downs"]),
        "ups": _taken_apart(flat_ups, bank.ups, needs["ups"]),
        "magnitudes": _taken_apart(dmagnitudes.view(-1), bank.magnitudes, needs["magnitudes"]),
    }


def _taken_apart(flat: Tensor, parameters: list[Tensor], wanted: list[bool]) -> list[Tensor | None] | None:
    """The gradient of each parameter that has one, out of all of them one after the other."""
    if not any(wanted):
        return None
    parts = flat.split([p.numel() for p in parameters])
    return [
        part.view(p.shape).to(p.dtype) if needed else None
        for part, p, needed in zip(parts, parameters, wanted, strict=True)
    ]


gradients = registration.op_without_gradient(
    "lora_linear_backward", (Upstream, Layer, Bank, Rows, Wants), _gradients, fake=_empty_gradients
)
run = registration.op(
    "lora_linear", (Layer, Bank, Rows), forward, fake=_fake,
    differentiable=("x", "weight", "bias", "downs", "ups", "magnitudes"),
    saves=("x", "weight", "downs", "ups", "magnitudes", "seed"), saves_results=slice(1, None), backward=_backward,
    returned=1,
)  # fmt: skip
