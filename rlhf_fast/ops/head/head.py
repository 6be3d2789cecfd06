"""The matrix products of an LM head over tiles of tokens, for every op that never holds all the logits.

    logits = hidden @ weight^T + lora_scale * (hidden @ lora_a^T) @ lora_b^T + bias

With G = d loss / d logits of a tile:

    d loss / d hidden = G @ weight + lora_scale * (G @ lora_b) @ lora_a
    d loss / d weight = G^T @ hidden,                      d loss / d bias = G^T @ 1
    d loss / d lora_a = lora_scale * (G @ lora_b)^T @ hidden
    d loss / d lora_b = lora_scale * G^T @ (hidden @ lora_a^T)

Each of the three large products is 2 n D V FLOPs for a tile of n rows (P, when summed over all N rows); LoRA of rank R
adds R / D of that. Logits are accumulated and kept in float32 (float64 for float64). On a GPU G is of the weight's
type, on the CPU of the logits'; gradients of parameters are accumulated in float32, across tiles as well. What a LoRA
makes of rank R is float32 too; its product with lora_b follows PyTorch's setting for float32 (TF32 or not). No atomics.

Source: tiling over tokens as in Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models"
(arXiv 2411.09009); LoRA, Hu et al. 2021 (arXiv 2106.09685), eq. 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from rlhf_fast import backends
from rlhf_fast.ops.core import check
from rlhf_fast.ops.head import _products

VOCABULARY_BLOCK = 8192  # half-precision heads are widened to float32 in blocks of this many rows on the CPU

ROW_MULTIPLE = {"cpu": 1, "cuda": 16}  # elements: what products and row kernels want rows of logits to begin at

HeadLora = tuple[Tensor, Tensor, float]  # A (R, D), B (V, R), scale


class HeadOptions(TypedDict, total=False):
    """The options that most ops on a head take and that do not change what they return."""

    bias: Tensor | None
    head_lora: HeadLora | None
    mask: Tensor | None
    mask_count: int | None
    temperature: float | Tensor
    logit_scale: float
    softcap: float | None
    chunk_tokens: int | None
    backend: str | None


def operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, head_lora: HeadLora | None
) -> tuple[Tensor, Tensor, Tensor | None, HeadLora | None]:
    """The same in the types of their products, see backends.operands."""
    lora_a, lora_b, scale = head_lora or (None, None, 1.0)
    hidden, weight, bias, lora_a, lora_b = backends.operands(hidden, weight, bias, lora_a, lora_b)
    return hidden, weight, bias, None if head_lora is None else (lora_a, lora_b, scale)


class Head(NamedTuple):
    """weight (V, D); bias (V,) or None; lora_a (R, D) and lora_b (V, R), or both None."""

    weight: Tensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    lora_scale: float = 1.0

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        return self[:4]

    @property
    def trained(self) -> bool:
        """Whether a part of it is, whatever the grad mode: both modes must give the same bits."""
        return any(p is not None and p.requires_grad for p in self.parameters)

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """out (n, V) float32 (float64) = the logits of hidden (n, D)."""
        weight = self.weight
        if weight.dtype == out.dtype:
            torch.mm(hidden, weight.t(), out=out)
        elif _products.takes(weight):
            _products.multiply(hidden, weight.t(), out.dtype, out)
        else:
            wide = hidden.to(out.dtype)
            for block in _vocabulary_blocks(weight):
                out[:, block] = wide @ weight[block].to(out.dtype).t()
        if self.lora_b is not None:
            _accumulate(out, self.lora_hidden(hidden), self.lora_b.t(), self.lora_scale)
        if self.bias is not None:
            out += self.bias

    def reference_logits(self, hidden: Tensor) -> Tensor:
        """The same by definition, differentiable any number of times."""
        dtype = check.compute_dtype(hidden.dtype)
        weight, bias, lora_a, lora_b = (None if p is None else p.to(dtype) for p in self.parameters)
        hidden = hidden.to(dtype)
        logits = torch.nn.functional.linear(hidden, weight, bias)  # type: ignore[arg-type]
        if lora_a is not None and lora_b is not None:
            logits = logits + self.lora_scale * (hidden @ lora_a.t()) @ lora_b.t()
        return logits

    def lora_hidden(self, hidden: Tensor) -> Tensor:
        """hidden @ lora_a^T (n, R) in float32 (float64)."""
        assert self.lora_a is not None
        return _product(hidden, self.lora_a.t())

    def through(self, gradient: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """d loss / d hidden (n, D) in `dtype` (default: the weight's), of d loss / d logits (n, V)."""
        weight, dtype = self.weight, dtype or self.weight.dtype
        if _products.takes(weight):
            gradient = narrowed(gradient, weight.dtype)
            result = _products.multiply(gradient, weight, dtype)
        elif gradient.dtype == weight.dtype:
            result = gradient @ weight
        else:
            result = gradient.new_zeros(gradient.shape[0], weight.shape[1])
            for block in _vocabulary_blocks(weight):
                result.addmm_(gradient[:, block], weight[block].to(gradient.dtype))
        if self.lora_a is not None and self.lora_b is not None:
            _accumulate(result, _product(gradient, self.lora_b.to(gradient.dtype)), self.lora_a, self.lora_scale)
        return result.to(dtype)


def checked_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, head_lora: HeadLora | None = None, prefix: str = ""
) -> Head:
    """The head of `hidden` (..., D). Raises ValueError or TypeError for what does not fit; prefix: of their names."""
    check.floating(f"{prefix}hidden", hidden)
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or not weight.numel():
        raise ValueError(
            f"{prefix}hidden must be (..., D) and {prefix}weight (V, D) with V and D >= 1, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    for name, x in ((f"{prefix}weight", weight), (f"{prefix}bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the type of {prefix}hidden, {hidden.dtype}, got {x.dtype}")
    if bias is not None:
        check.shaped(f"{prefix}bias", bias, (weight.shape[0],), "(V,)")
    lora_a, lora_b, scale = head_lora or (None, None, 1.0)
    if lora_a is not None and lora_b is not None:
        check.floating("head_lora A", lora_a), check.floating("head_lora B", lora_b)
        rank = lora_a.shape[0] if lora_a.dim() else 0
        check.shaped("head_lora A", lora_a, (rank, weight.shape[1]), "(R, D)")
        check.shaped("head_lora B", lora_b, (weight.shape[0], rank), "(V, R)")
    check.same_device(
        (f"{prefix}hidden", hidden), (f"{prefix}weight", weight), (f"{prefix}bias", bias), ("head_lora A", lora_a),
        ("head_lora B", lora_b),
    )  # fmt: skip
    return Head(weight, bias, lora_a, lora_b, check.number("the scale of head_lora", scale))


class HeadGradients:
    """Sums over tiles of the gradients of (weight, bias, lora_a, lora_b), those that are needed."""

    def __init__(self, head: Head, needs: list[bool], *, at_once: bool = False) -> None:
        """needs: whether each of (weight, bias, lora_a, lora_b) wants a gradient.

        at_once: `add` is called once, with all rows: the product for a weight of bfloat16 is rounded to that, which
        saves two passes over a float32 sum of its size. One of float16 is too small for its type until it is scaled.
        """
        self.head, self.empty = head, True
        self.unit: Tensor | None = None  # what the totals are yet to be multiplied by, for float16, see `add`
        types = [None if p is None else check.compute_dtype(p.dtype) for p in head.parameters]
        if at_once and head.weight.dtype == torch.bfloat16:
            types[0] = torch.bfloat16
        self.totals = [
            None if p is None or not need else p.new_empty(p.shape, dtype=dtype)
            for p, need, dtype in zip(head.parameters, needs, types, strict=True)
        ]

    def add(self, gradient: Tensor, hidden: Tensor, scale: Tensor | None = None) -> None:
        """Add what d loss / d logits = scale (n,) * gradient (n, V) of the rows `hidden` (n, D) gives."""
        head = self.head
        weight, bias, lora_a, lora_b = self.totals
        if _products.takes(head.weight):
            gradient = narrowed(gradient, head.weight.dtype)
        if scale is None:
            scale = gradient.new_ones(gradient.shape[0])
        else:
            scale = self._in_units(scale) if head.weight.dtype == torch.float16 and scale.numel() else scale
            hidden = (hidden * scale[:, None]).to(hidden.dtype)  # (n, D) numbers to scale instead of (n, V)
        old, self.empty = (0.0 if self.empty else 1.0), False
        if weight is not None:
            _accumulate(weight, gradient.t(), hidden, old=old)
        if bias is not None:
            _accumulate(bias[:, None], gradient.t(), scale[:, None], old=old)
        if lora_a is not None and head.lora_b is not None:
            of_rank = _product(gradient, head.lora_b.to(gradient.dtype))
            _accumulate(lora_a, of_rank.t(), hidden, head.lora_scale, old)
        if lora_b is not None:
            _accumulate(lora_b, gradient.t(), head.lora_hidden(hidden), head.lora_scale, old)

    def _in_units(self, scale: Tensor) -> Tensor:
        """`scale` over the greatest one so far, which the totals are brought to: 1 / N and less are no float16."""
        greatest = scale.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        unit = greatest if self.unit is None or self.empty else torch.maximum(greatest, self.unit)
        if self.unit is not None and not self.empty:
            for total in self.totals:
                if total is not None:
                    total *= self.unit / unit
        self.unit = unit
        return scale / unit

    def _settle(self) -> None:
        """Brings the totals to their own unit."""
        if self.unit is not None and not self.empty:
            for total in self.totals:
                if total is not None:
                    total *= self.unit
        self.unit = None

    def add_sums(self, other: HeadGradients, scale: Tensor) -> None:
        """Add scale (1,) times what was added to `other`, of the same head."""
        if other.empty:
            return
        self._settle()
        other._settle()
        for total, part in zip(self.totals, other.totals, strict=True):
            if total is not None and part is not None:
                torch.mul(part, scale, out=total) if self.empty else total.addcmul_(part, scale)
        self.empty = False

    def sums(self) -> list[Tensor]:
        """The four gradients as they were accumulated, in float32 (float64), empty where not needed."""
        self._settle()
        if self.empty:
            for total in self.totals:
                if total is not None:
                    total.zero_()
        dtype = check.compute_dtype(self.head.weight.dtype)
        return [self.head.weight.new_empty(0, dtype=dtype) if total is None else total for total in self.totals]

    def results(self) -> list[Tensor]:
        """The four gradients in their parameters' types, empty where not needed."""
        types = [self.head.weight.dtype if p is None else p.dtype for p in self.head.parameters]
        return [total.to(dtype) for total, dtype in zip(self.sums(), types, strict=True)]


# Of some rows: which, their hidden states (n, D), d loss / d logits (n, V), and factors (n,) that it yet lacks.
RowGradients = tuple[slice | Tensor, Tensor, Tensor, Tensor]


def summed_gradients(
    head: Head, hidden: Tensor, needs: list[bool], each: Iterable[RowGradients],
    over_ranks: Callable[[Tensor], Tensor] = lambda x: x, *, at_once: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Gradients of hidden and of the head's parameters, empty where not needed.

    over_ranks: the sum over its shards. at_once: `each` has at most one element.
    """
    grad_hidden = torch.zeros_like(hidden) if needs[0] else hidden.new_empty(0)
    sums = HeadGradients(head, needs[1:], at_once=at_once)
    for where, of_rows, gradient, scale in each:
        if needs[0]:  # in float32 (float64): rounded after its scale
            through = over_ranks(head.through(gradient, check.compute_dtype(head.weight.dtype)))
            grad_hidden[where] = (through * scale[:, None]).to(grad_hidden.dtype)
        sums.add(gradient, of_rows, scale)
    grad_weight, grad_bias, grad_lora_a, grad_lora_b = sums.results()
    return [grad_hidden, grad_weight, grad_bias, over_ranks(grad_lora_a) if needs[3] else grad_lora_a, grad_lora_b]


def empty_gradients(head: Head, hidden: Tensor, needs: list[bool]) -> list[Tensor]:
    """The same, unwritten."""
    return [
        torch.empty_like(x) if need and x is not None else hidden.new_empty(0)
        for x, need in zip((hidden, *head.parameters), needs, strict=True)
    ]


def row_stride(columns: int, device: torch.device) -> int:
    """From one row of `columns` logits, or of their gradient, to the next, in elements."""
    multiple = ROW_MULTIPLE.get(device.type, ROW_MULTIPLE["cuda"])
    return -(-columns // multiple) * multiple


def narrowed(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """d loss / d logits (n, V) in `dtype`, with the row_stride of V."""
    if gradient.dtype == dtype:
        return gradient
    rows, columns = gradient.shape
    result = gradient.new_empty(rows, row_stride(columns, gradient.device), dtype=dtype)[:, :columns]
    return result.copy_(gradient)


def _vocabulary_blocks(weight: Tensor) -> Iterator[slice]:
    for start in range(0, weight.shape[0], VOCABULARY_BLOCK):
        yield slice(start, start + VOCABULARY_BLOCK)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (float64): what the rank of a LoRA goes through is not rounded in between."""
    dtype = check.compute_dtype(a.dtype)
    if _products.takes(a) and b.dtype == a.dtype:
        return _products.multiply(a, b, dtype)
    return a.to(dtype) @ b.to(dtype)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, old: float = 1.0) -> None:
    """total = old * total + scale * a @ b, accumulated in the total's type; with old = 0 it may be unwritten."""
    if not _products.takes(a):
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=old, alpha=scale)
        return
    for place, x, y, again in _products.parts(total, a, b):
        beta = 1.0 if again else old
        if x.dtype != total.dtype:
            _products.add(place, x, y.to(x.dtype), scale, beta)
        else:
            place.addmm_(x, y.to(total.dtype), beta=beta, alpha=scale)
