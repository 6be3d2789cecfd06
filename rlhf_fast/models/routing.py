"""One traversal of the decoder for several roles: which layers run, on which rows, and how they are recomputed.

The layers below the first adapted one see each sequence once. At the first adapted layer the batch becomes one row
segment per role, and stays so to the top.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_fast.errors import UserError
from rlhf_fast.models.lora import LoRALinear, Route, routed


@dataclass
class Traversal:
    """State of one forward through the decoder layers; lives as long as that forward.

    route: the roles' adapters. batch: rows B of the input, before they become one segment per role.
    first: index of the first adapted layer. start: (B, T, D), the known input of that layer; the layers below are
    then skipped. stop: leave at layer `first` and keep its input in `reached`. recompute: activation checkpointing.
    """

    route: Route
    batch: int
    first: int
    start: Tensor | None = None
    stop: bool = False
    recompute: bool = False
    reached: Tensor | None = None
    _expanded: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def expand(self, value: Any) -> Any:
        """Repeat the batch rows of a tensor (or of the tensors of a tuple) once per role; the rest as it is."""
        if isinstance(value, tuple):
            return tuple(self.expand(item) for item in value)
        # One-dimensional arguments (cache positions) count time, not sequences; a first size of 1 broadcasts.
        copies = len(self.route.adapters)
        if copies == 1 or not isinstance(value, Tensor) or value.dim() < 2:
            return value
        if value.shape[0] != self.batch:
            if value.shape[0] == 1:
                return value
            raise UserError(
                f"unsupported architecture: a decoder layer takes an argument of shape {tuple(value.shape)}, "
                f"which cannot be split into {self.batch} sequences"
            )
        # Every layer gets the same mask and rotary tables: repeat them once. The original is kept beside the copy
        # so that its id stays taken.
        if id(value) not in self._expanded:
            self._expanded[id(value)] = (value, value.repeat(copies, *[1] * (value.dim() - 1)))
        return self._expanded[id(value)][1]


_TRAVERSAL: ContextVar[Traversal | None] = ContextVar("rlhf_fast_traversal", default=None)


@contextmanager
def traversing(traversal: Traversal) -> Iterator[None]:
    """The decoder called inside follows this traversal and its route."""
    token = _TRAVERSAL.set(traversal)
    try:
        with routed(traversal.route):
            yield
    finally:
        _TRAVERSAL.reset(token)


@dataclass
class LayerOutput:
    """Whether the layers of a decoder return a tuple (hidden states first); None until one has run."""

    is_tuple: bool | None = None


class RoutedLayer:
    """The forward of one decoder layer under a `Traversal`; without one, the layer's own.

    It takes the place of the instance's `forward`, like `LoRALinear`. `output` is shared by the layers of a decoder.
    """

    def __init__(self, layer: nn.Module, index: int, output: LayerOutput) -> None:
        self.layer = layer
        self.index = index
        self.output = output
        self.layer_forward = layer.forward
        layer.forward = self  # type: ignore[assignment, method-assign]

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        traversal = _TRAVERSAL.get()
        if traversal is None:
            return self.layer_forward(hidden_states, *args, **kwargs)
        below = self.index < traversal.first
        if traversal.stop and self.index == traversal.first:
            traversal.reached = hidden_states
        skipped = traversal.start is not None if below else traversal.stop
        # Before any layer has run, the form in which a skipped one hands its input on is not known: run this one.
        if skipped and self.output.is_tuple is not None:
            return (hidden_states,) if self.output.is_tuple else hidden_states
        if not below:
            if self.index == traversal.first:
                hidden_states = traversal.expand(hidden_states if traversal.start is None else traversal.start)
            args = traversal.expand(args)
            kwargs = {name: traversal.expand(value) for name, value in kwargs.items()}
        if traversal.recompute:
            output = self._recomputed(traversal.route, hidden_states, args, kwargs)
        else:
            output = self.layer_forward(hidden_states, *args, **kwargs)
        self.output.is_tuple = isinstance(output, tuple)
        return output

    def _recomputed(self, route: Route, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep only the layer's input; the backward computes the layer again, in the route of this forward."""
        pairs = [
            lora.bank[name]
            for lora in adapted_linears(self.layer).values()
            for name in route.adapters
            if name in lora.bank
        ]
        parameters = [p for pair in pairs for p in pair.parameters.values()]
        versions = [p._version for p in parameters]

        def forward(hidden: Tensor) -> Any:
            if [p._version for p in parameters] != versions:
                raise RuntimeError(
                    f"an adapter of layer {self.index} was changed between its forward and its backward: "
                    "call backward before the optimizer step, copy_adapter, lerp_adapter or restore"
                )
            with routed(route):
                return self.layer_forward(hidden, *args, **kwargs)

        # The base has no dropout, and an adapter's comes from the route's seed: there is no random state to preserve.
        return checkpoint(forward, hidden_states, use_reentrant=False, preserve_rng_state=False)


def adapted_linears(module: nn.Module) -> dict[str, LoRALinear]:
    """Name -> adapted linear, for every linear inside that has had an adapter."""
    found = ((name, child.__dict__.get("forward")) for name, child in module.named_modules())
    return {name: forward for name, forward in found if isinstance(forward, LoRALinear)}
