"""LoRA on one linear layer, with the choice of adapter carried by the forward instead of by the module.

A *route* says which adapter each segment of rows uses. It is set for the duration of one forward (`routed`), so
switching roles costs nothing, no `requires_grad` is ever toggled, and a recomputation of the same forward can enter
the same route again. Source of the method: LoRA, Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_fast.backends import resolve
from rlhf_fast.models.architecture import linear_shape
from rlhf_fast.models.pieces import whole_tensor
from rlhf_fast.models.quantized import is_quantized
from rlhf_fast.ops.lora.lora_linear import (
    IMPLS,
    Adapter,
    FewRowsProduct,
    lora_linear,
    may_prepare,
    prepare,
    prepare_few_rows,
)


@dataclass(frozen=True)
class Route:
    """Adapters of the row segments of one forward.

    adapters: one name per segment, in row order; None is the base model. All segments have the same number of rows.
    tokens: rows of one segment (batch x time), which every linear is checked against; None leaves it open, as in
        generation, whose passes differ in length.
    dropout_seed: decides what the adapters' dropout drops, in a recomputation as well; None is without dropout.
    one_pass: products of few rows read each weight once, where that is faster (see `prepare`): for decoding, whose
        sums are then added in another order than a scoring pass adds them.
    """

    adapters: tuple[str | None, ...]
    tokens: int | None = None
    dropout_seed: int | None = None
    one_pass: bool = False


DROPOUT_STREAMS = 1 << 16  # linears of one model: seeds of different forwards and of different linears never meet

_ROUTE: ContextVar[Route | None] = ContextVar("rlhf_fast_route", default=None)


@contextmanager
def routed(route: Route | None) -> Iterator[None]:
    """Every adapted linear called inside follows this route; None is the base model."""
    token = _ROUTE.set(route)
    try:
        yield
    finally:
        _ROUTE.reset(token)


def current_route() -> Route | None:
    return _ROUTE.get()


@dataclass(frozen=True)
class LoRAShape:
    """What decides an adapter on one linear, besides its values.

    scale: alpha / R, or alpha / sqrt(R) (rsLoRA); use_rslora says which, for the files. use_dora: with a magnitude per
    output. dropout: of the adapter's input, in the forwards that have a dropout seed.
    """

    rank: int
    scale: float
    use_rslora: bool = False
    use_dora: bool = False
    dropout: float = 0.0

    @property
    def alpha(self) -> float:
        return self.scale * (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass
class LoRA:
    """One adapter on one linear: delta = scale * (x A^T) B^T, for DoRA with a magnitude (see lora_linear).

    a: (R, in), b: (out, R), magnitude: (out,) or None; leaf Parameters whose requires_grad never changes.
    """

    a: nn.Parameter
    b: nn.Parameter
    shape: LoRAShape
    magnitude: nn.Parameter | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters under their names in PEFT's files."""
        named = {"lora_A.weight": self.a, "lora_B.weight": self.b}
        return named if self.magnitude is None else {**named, "lora_magnitude_vector": self.magnitude}

    @property
    def adapter(self) -> Adapter:
        return Adapter(self.a, self.b, self.shape.scale, self.magnitude)

    @property
    def place(self) -> tuple[object, ...]:
        """Where and in which form the values lie, and the scale: all of a pair that a prepared call depends on."""
        a, b, m = self.a, self.b, self.magnitude
        pair = (a.data_ptr(), a.dtype, a.shape, a.stride(), b.data_ptr(), b.dtype, b.shape, b.stride())
        return (self.shape, *pair, None if m is None else m.data_ptr())


Prepared = Callable[[Tensor, Tensor | None], Tensor]  # (x, weight): see LoRALinear
KEPT = 16  # prepared calls of a linear


class LoRALinear:
    """The forward of an `nn.Linear` or Conv1D that has adapters.

    It takes the place of the *instance's* `forward`, so the module, its Parameter objects, its type and its state_dict
    stay as they are. Rows without an adapter in the current route get the untouched forward, bit for bit when
    no row has one.
    """

    def __init__(self, base: nn.Module, stream: int) -> None:
        """stream: a number below DROPOUT_STREAMS that no other linear of the model has."""
        self.base = base
        self.stream = stream
        self.base_forward = base.forward
        self.quantized = is_quantized(base)
        self.bank: dict[str, LoRA] = {}
        self._calls: dict[tuple[Route, torch.Size], tuple[object, Prepared]] = {}  # what else a call depends on; itself
        # The last call in one pass. While its route is in force nothing but x changes: see `Backbone.using`.
        self._bound: tuple[Route, torch.Size, Callable[[Tensor], Tensor]] | None = None
        base.forward = self  # type: ignore[assignment, method-assign]

    @property
    def weight(self) -> Tensor:
        """(out, in), whichever way round the module stores it; no layer that is quantised has it."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight if isinstance(self.base, nn.Linear) else weight.t()

    @property
    def bias(self) -> Tensor | None:
        """(out,) or None."""
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def __call__(self, x: Tensor) -> Tensor:
        route, bound = _ROUTE.get(), self._bound
        if route is None:
            return self.base_forward(x)
        if bound is not None and bound[0] is route and bound[1] == x.shape and x.is_contiguous():
            return bound[2](x)
        if route.dropout_seed is not None or not may_prepare(x):
            return self._adapted(x, route)
        places = [self.bank[name].place if name in self.bank else None for name in route.adapters]
        if not any(places) and (self.quantized or not route.one_pass):
            return self.base_forward(x)
        # While tokens are generated each call is like the last, and finding out what to do takes longer than doing it.
        weight = None if self.quantized else self.weight
        backend = resolve("lora_linear", IMPLS, x.device)
        form = None if weight is None else (weight.shape, weight.dtype, weight.stride(), weight.data_ptr())
        key = (x.dtype, x.device, form, backend, places)
        last, call = self._calls.get((route, x.shape), (None, None))
        if call is not None and key == last:
            return call(x, weight)
        y = self._adapted(x, route)  # with all checks
        call = self._prepared(x, weight, route, backend)
        if len(self._calls) >= KEPT:
            self._calls.clear()
        self._calls[route, x.shape] = key, call
        if not route.one_pass:
            return y
        prepared = call
        self._bound = route, x.shape, lambda x: prepared(x, weight)
        return call(x, weight)  # the same bits each time

    def _adapted(self, x: Tensor, route: Route) -> Tensor:
        pairs, segments = self._layout(x, route)
        if not pairs:
            return self.base_forward(x)
        dropout, seed = 0.0, None
        if route.dropout_seed is not None:
            dropout, *others = {pair.shape.dropout for pair in pairs.values()}
            if others:
                raise ValueError(f"the adapters {list(pairs)} of one forward must have the same dropout")
            seed = route.dropout_seed * DROPOUT_STREAMS + self.stream
        bank = [pair.adapter for pair in pairs.values()]
        if self.quantized:
            return self.base_forward(x) + lora_linear(x, None, bank, segments, dropout=dropout, seed=seed)
        return lora_linear(x, self.weight, bank, segments, bias=self.bias, dropout=dropout, seed=seed)

    def _prepared(self, x: Tensor, weight: Tensor | None, route: Route, backend: str) -> Prepared:
        """`_adapted` for all x that have the key of this one."""
        pairs, segments = self._layout(x, route)
        segments = segments or [(-1, x.numel() // x.shape[-1])]
        bank = [pair.adapter for pair in pairs.values()]
        bias = None if weight is None else self.bias
        call = prepare(x, weight, bank, segments, backend, bias=bias, one_pass=route.one_pass)
        if weight is None:
            return lambda x, weight: self.base_forward(x) + call(x, None, None)
        return lambda x, weight: call(x, weight, self.bias)

    def product(self, x: Tensor, route: Route) -> FewRowsProduct | None:
        """The product of few rows for what has the shape and the type of x, in one pass over the weight; None where
        there is none. It serves as long as nothing moves."""
        pairs, segments = self._layout(x, route)
        if self.quantized or any(pair.magnitude is not None for pair in pairs.values()):
            return None
        bank = [pair.adapter for pair in pairs.values()]
        segments = segments or [(-1, x.numel() // x.shape[-1])]
        return prepare_few_rows(x, self.weight, bank, segments, bias=self.bias)

    def _layout(self, x: Tensor, route: Route) -> tuple[dict[str, LoRA], list[tuple[int, int]]]:
        """The adapters of the route that this linear has, and the segments with their places among them."""
        pairs = {name: self.bank[name] for name in route.adapters if name is not None and name in self.bank}
        if not pairs:
            return pairs, []
        rows, order = self._segment_rows(x, route), {name: i for i, name in enumerate(pairs)}
        return pairs, [(order.get(name, -1) if name else -1, rows) for name in route.adapters]

    def _segment_rows(self, x: Tensor, route: Route) -> int:
        rows = x.numel() // x.shape[-1]
        if rows != len(route.adapters) * (rows // len(route.adapters) if route.tokens is None else route.tokens):
            raise ValueError(
                f"a linear layer got {rows} rows, the route has {len(route.adapters)} segments of {route.tokens}: "
                "this layer sees its rows in an order of its own (a mixture of experts?), so it cannot be adapted"
            )
        return rows // len(route.adapters)

    def add(
        self,
        name: str,
        shape: LoRAShape,
        *,
        trainable: bool,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> LoRA:
        """A new adapter in its usual start: A uniform in +-1/sqrt(in), B zero, so the delta is zero; the magnitude is
        the norm of each row of the weight, so that it changes nothing either.

        A is drawn on the CPU, so a seed gives the same adapter on every device.
        """
        out_features, in_features = linear_shape(self.base)
        device = self.base.get_parameter("weight").device
        a = torch.empty(shape.rank, in_features, dtype=dtype, device=device)
        if device.type != "meta":
            bound = 1.0 / math.sqrt(in_features)
            a.copy_(torch.empty(shape.rank, in_features).uniform_(-bound, bound, generator=generator))
        b = torch.zeros(out_features, shape.rank, dtype=dtype, device=device)
        magnitude = None
        if shape.use_dora:
            weight = whole_tensor(self.weight).detach()
            norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
            magnitude = nn.Parameter(norms.to(dtype), requires_grad=trainable)
        pair = LoRA(
            nn.Parameter(a, requires_grad=trainable), nn.Parameter(b, requires_grad=trainable), shape, magnitude
        )
        self.bank[name] = pair
        return pair
