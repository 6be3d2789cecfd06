"""The one way in which a kernel of this package is launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """kernel[grid](*arguments, **options) on the device of its first tensor, whichever one is current.

    a * b + c may be rounded once (FMA) in every kernel, whatever the default of the installed Triton is.
    """
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    with torch.accelerator.device_index(None if device.type == "cpu" else device.index):
        kernel[grid](*arguments, enable_fp_fusion=True, **options)
