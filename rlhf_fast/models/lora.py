"""LoRA on one linear layer, with the choice of adapter carried by the forward instead of by the module.

A *route* says which adapter each segment of rows uses. It is set for the duration of one forward (`routed`), so
switching roles costs nothing, no `requires_grad` is ever toggled, and a recomputation of the same forward can enter
the same route again. Source of the method: LoRA, Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_fast.ops.lora_linear import lora_linear


@dataclass(frozen=True)
class Route:
    """Adapters of the row segments of one forward.

    adapters: one name per segment, in row order; None is the base model. All segments have the same number of rows.
    tokens: rows of one segment (batch x time); None leaves it open, which is only possible with one segment.
    """

    adapters: tuple[str | None, ...]
    tokens: int | None = None


_ROUTE: ContextVar[Route | None] = ContextVar("rlhf_fast_route", default=None)


@contextmanager
def routed(route: Route | None) -> Iterator[None]:
    """Every adapted linear called inside follows this route; None is the base model."""
    token = _ROUTE.set(route)
    try:
        yield
    finally:
        _ROUTE.reset(token)


@dataclass
class LoRA:
    """The low-rank pair of one adapter on one linear: delta = scale * (x A^T) B^T.

    a: (R, in) and b: (out, R), leaf Parameters whose requires_grad never changes; scale: alpha / R.
    """

    a: nn.Parameter
    b: nn.Parameter
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class LoRALinear:
    """The forward of an `nn.Linear` or Conv1D that has adapters.

    It takes the place of the *instance's* `forward`, so the module, its Parameter objects, its type and its state_dict
    stay as they are. Rows without an adapter in the current route get the untouched forward, bit for bit when
    no row has one.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.base_forward = base.forward
        self.bank: dict[str, LoRA] = {}
        base.forward = self  # type: ignore[assignment, method-assign]

    @property
    def weight(self) -> Tensor:
        """(out, in), whichever way round the module stores it."""
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
        route = _ROUTE.get()
        if route is None:
            return self.base_forward(x)
        index: dict[str, int] = {}
        for name in route.adapters:
            if name is not None and name in self.bank:
                index.setdefault(name, len(index))
        if not index:
            return self.base_forward(x)
        bank = [(pair.a, pair.b, pair.scale) for pair in (self.bank[name] for name in index)]
        rows = self._segment_rows(x, route)
        segments = [(index.get(name, -1) if name else -1, rows) for name in route.adapters]
        return lora_linear(x, self.weight, bank, segments, bias=self.bias)

    def _segment_rows(self, x: Tensor, route: Route) -> int:
        rows = x.numel() // x.shape[-1]
        if len(route.adapters) > 1 and rows != len(route.adapters) * (route.tokens or 0):
            raise ValueError(
                f"a linear layer got {rows} rows, the route has {len(route.adapters)} segments of {route.tokens}: "
                "this layer sees its rows in an order of its own (a mixture of experts?), so it cannot be adapted"
            )
        return rows // len(route.adapters)

    def add(
        self,
        name: str,
        rank: int,
        scale: float,
        *,
        trainable: bool,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> LoRA:
        """A new pair in its usual start: A uniform in +-1/sqrt(in), B zero, so the delta is zero.

        A is drawn on the CPU, so a seed gives the same adapter on every device.
        """
        out_features, in_features = self.weight.shape
        device = self.weight.device
        a = torch.empty(rank, in_features, dtype=dtype, device=device)
        if device.type != "meta":
            bound = 1.0 / math.sqrt(in_features)
            a.copy_(torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator))
        b = torch.zeros(out_features, rank, dtype=dtype, device=device)
        pair = LoRA(nn.Parameter(a, requires_grad=trainable), nn.Parameter(b, requires_grad=trainable), scale)
        self.bank[name] = pair
        return pair
