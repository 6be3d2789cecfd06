"""Weights of which each of several ranks holds a piece (a DTensor), gathered where they are used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def whole_tensor(weight: Tensor) -> Tensor:
    """A weight that may be split over ranks, gathered: a new tensor, which lives as long as it is needed."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def local_tensor(weight: Tensor) -> Tensor:
    """What this rank holds of a weight that may be split over ranks."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


@contextmanager
def whole_weight(module: nn.Module) -> Iterator[None]:
    """The module has its whole weight inside, gathered once."""
    piece = module._parameters["weight"]
    assert piece is not None
    # A plain tensor in the place of the parameter: what reads it meanwhile saves it, and so it lives for its backward.
    module._parameters["weight"] = whole_tensor(piece)  # type: ignore[assignment]
    try:
        yield
    finally:
        module._parameters["weight"] = piece


@contextmanager
def of_whole_shapes(model: nn.Module) -> Iterator[None]:
    """Every weight has the shape of the whole one inside, and no values: for code that takes a piece for all of it."""
    pieces = [
        (module._parameters, name, p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if isinstance(p, DTensor)
    ]
    for held, name, piece in pieces:
        assert piece is not None
        shape = torch.zeros((), dtype=piece.dtype, device=piece.device).expand(piece.shape)
        held[name] = nn.Parameter(shape, requires_grad=False)
    try:
        yield
    finally:
        for held, name, piece in pieces:
            held[name] = piece


def with_whole_weight(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def gathered(*args: Any, **kwargs: Any) -> Any:
        with whole_weight(module):
            return forward(*args, **kwargs)

    return gathered
