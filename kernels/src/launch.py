"""The one way in which a kernel of this package is launched."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """kernel[grid](*arguments, **options) on the device of its first tensor, whichever one is current.

    a * b + c may be rounded once (FMA) in every kernel, whatever the default of the installed Triton is.
    Raises ValueError for a tensor whose layout the kernel does not get to know.
    """
    given = list(_flat(arguments))
    for x in given:
        if isinstance(x, Tensor) and (x.is_neg() or not x.is_contiguous()):
            _check_layout(x, given)
    if os.environ.get("TRITON_INTERPRET") == "1":
        _check_floats(kernel, arguments)
    device = next(x.device for x in given if isinstance(x, Tensor))
    with torch.accelerator.device_index(None if device.type == "cpu" else device.index):
        kernel[grid](*arguments, enable_fp_fusion=True, **options)


def _check_floats(kernel: Any, arguments: tuple[Any, ...]) -> None:
    """Triton takes a Python float as float32 where its parameter does not say tl.float64; its interpreter does not."""
    parameters = list(inspect.signature(kernel.fn).parameters.values())
    for parameter, x in zip(parameters, arguments, strict=False):
        if isinstance(x, float) and "float64" not in str(parameter.annotation):
            raise TypeError(f"{kernel.fn.__name__} takes {parameter.name} as float32: it must be tl.float64")


def _flat(arguments: tuple[Any, ...]) -> Iterator[Any]:
    for x in arguments:
        if isinstance(x, tuple):
            yield from _flat(x)
        else:
            yield x


def _check_layout(x: Tensor, given: list[Any]) -> None:
    """A kernel gets an address: strides other than those of a contiguous tensor must be among the numbers given."""
    strides = {stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1 and stride != 1}
    if x.is_neg() or (x.numel() and strides - {n for n in given if isinstance(n, int)}):
        kind = "a negated view" if x.is_neg() else "a tensor"
        raise ValueError(f"a kernel gets {kind} {tuple(x.shape)} without its strides {x.stride()}")
