"""One traversal of the decoder: which layers run, on what, how they are recomputed, and what reaches the head.

Where the layers below the first adapted one give the same for every role, they see each sequence once: one traversal
stops at the first adapted layer, and the next, with one row segment per role, starts there with what the first reached.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from rlhf_fast.models.lora import LoRALinear, Route, routed
from rlhf_fast.models.packing import Layout, packed


@dataclass
class Traversal:
    """State of one forward of the model; lives as long as that forward.

    route: the roles' adapters. first: index of the first adapted layer. start: the known input of that layer; the
    layers below are then skipped. stop: skip that layer and those above, and keep its input in `reached`.
    recompute: activation checkpointing. layout: of the packed rows, where they are. hidden: what the head was given.
    """

    route: Route
    first: int = 0
    start: Tensor | None = None
    stop: bool = False
    recompute: bool = False
    layout: Layout | None = None
    reached: Tensor | None = None
    hidden: Tensor | None = None


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


class HeadInput:
    """The forward of the output head under a `Traversal`, which keeps the hidden states and makes no logits."""

    def __init__(self, head: nn.Module) -> None:
        self.head_forward = head.forward
        head.forward = self  # type: ignore[assignment, method-assign]

    def __call__(self, hidden_states: Tensor) -> Tensor:
        traversal = _TRAVERSAL.get()
        if traversal is None:
            return self.head_forward(hidden_states)
        traversal.hidden = hidden_states
        # Whatever the model makes of its logits, it makes of one column.
        return hidden_states.detach()[..., :1]


class RoutedLayer:
    """The forward of one decoder layer under a `Traversal`; without one, the layer's own.

    It takes the place of the instance's `forward`, like `LoRALinear`.
    """

    def __init__(self, layer: nn.Module, index: int, config: PretrainedConfig) -> None:
        """config: names the attention of the layer."""
        self.layer = layer
        self.index = index
        self.config = config
        self.returns: tuple[type, int] | None = (
            None  # the kind of what it returns and its length; None until it has run
        )
        self.layer_forward = layer.forward
        self.hidden_name = next(iter(inspect.signature(layer.forward).parameters))
        layer.forward = self  # type: ignore[assignment, method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        traversal = _TRAVERSAL.get()
        if traversal is None:
            return self.layer_forward(*args, **kwargs)
        hidden_states = args[0] if args else kwargs[self.hidden_name]
        if self.index == traversal.first:
            traversal.reached = hidden_states
            hidden_states = hidden_states if traversal.start is None else traversal.start
        skipped = traversal.stop if self.index >= traversal.first else traversal.start is not None
        # Before the layer has run, the form in which it hands its result on is not known: run it.
        if skipped and self.returns is not None:
            kind, length = self.returns
            return hidden_states if kind is Tensor else kind([hidden_states, *[None] * (length - 1)])

        def forward(hidden: Tensor) -> Any:
            if args:
                return self.layer_forward(hidden, *args[1:], **kwargs)
            return self.layer_forward(**{**kwargs, self.hidden_name: hidden})

        output = self._recomputed(traversal, hidden_states, forward) if traversal.recompute else forward(hidden_states)
        self.returns = (type(output), len(output)) if isinstance(output, (tuple, list)) else (Tensor, 1)
        return output

    def _recomputed(self, traversal: Traversal, hidden_states: Tensor, layer_forward: Callable[[Tensor], Any]) -> Any:
        """Keep only the layer's input; the backward computes the layer again, in the route and layout of this
        forward."""
        route, layout = traversal.route, traversal.layout
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
            with routed(route), packed(self.config, layout):
                return layer_forward(hidden)

        # The base has no dropout, and an adapter's comes from the route's seed: there is no random state to preserve.
        return checkpoint(forward, hidden_states, use_reentrant=False, preserve_rng_state=False)


def adapted_linears(module: nn.Module) -> dict[str, LoRALinear]:
    """Name -> adapted linear, for every linear inside that has had an adapter."""
    found = ((name, child.__dict__.get("forward")) for name, child in module.named_modules())
    return {name: forward for name, forward in found if isinstance(forward, LoRALinear)}
