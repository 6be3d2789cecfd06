"""What is done to rows of logits before their softmax: z = softcap(logit_scale * logits) / temperature.

With softcap(u) = c tanh(u / c), or u where there is none. For every op that has these three numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops.core import check

COLDEST = 1e-30  # a float32 temperature below it counts as this: logits of up to 1e8 over it are still numbers


class Transform(NamedTuple):
    """The three numbers as the kernels take them."""

    temperature: float = 1.0
    temperatures: Tensor | None = None  # one per row, contiguous float32, in place of `temperature`
    logit_scale: float = 1.0
    softcap: float = 0.0  # 0 for none

    def of_rows(self) -> Transform:
        """The transform with the temperatures as (N,)."""
        return self if self.temperatures is None else self._replace(temperatures=self.temperatures.view(-1))

    def at(self, rows: slice | Tensor) -> Transform:
        """The transform of n of the rows, its temperatures (1, n)."""
        return self if self.temperatures is None else self._replace(temperatures=self.temperatures[rows][None])

    def options(self) -> dict[str, Any]:
        """The arguments that callers give: temperature, logit_scale, softcap."""
        temperature = self.temperature if self.temperatures is None else self.temperatures
        return {"temperature": temperature, "logit_scale": self.logit_scale, "softcap": self.softcap or None}


def checked_transform(
    temperature: float | Tensor, logit_scale: float, softcap: float | None, shape: torch.Size,
    beside: tuple[str, Tensor],
) -> Transform:  # fmt: skip
    """The transform of rows of `shape`; `beside` names the device. Raises ValueError or TypeError."""
    rest = check.positive("logit_scale", logit_scale), 0.0 if softcap is None else check.positive("softcap", softcap)
    dtype = check.compute_dtype(beside[1].dtype)
    if not isinstance(temperature, Tensor):
        return Transform(_warm(check.positive("temperature", temperature), dtype), None, *rest)
    check.shaped("temperature", check.floating("temperature", temperature), shape, "one number or one per row")
    check.same_device(beside, ("temperature", temperature))
    return Transform(1.0, _warm(temperature.detach().to(torch.float32), dtype).contiguous(), *rest)


def _warm(temperature: Any, dtype: torch.dtype) -> Any:
    """A float32 temperature (a number or a tensor) of at least COLDEST, but no bad one."""
    if dtype == torch.float64:
        return temperature
    if isinstance(temperature, Tensor):
        return torch.where(temperature > 0, temperature.clamp_min(COLDEST), temperature)
    return max(temperature, COLDEST)


def transformed(
    logits: Tensor, *, temperature: float | Tensor = 1.0, logit_scale: float = 1.0, softcap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """z = softcap(logit_scale * logits) / temperature in the type of computation; 0 in masked rows: NaN ends there."""
    z = logits.to(check.compute_dtype(logits.dtype)) * logit_scale
    if mask is not None:
        z = torch.where((mask != 0)[..., None], z, torch.zeros_like(z))
    if softcap is not None:
        z = softcap * _tanh(z / softcap)
    temperature = _warm(temperature, z.dtype)
    if isinstance(temperature, Tensor):
        if mask is not None:
            temperature = torch.where(mask != 0, temperature, torch.ones_like(temperature))
        temperature = temperature.detach().to(z.dtype)[..., None]
    return z / temperature


def _tanh(x: Tensor) -> Tensor:
    """tanh(x), whose derivative away from 0 is 4 s (1 - s) of s = sigmoid(-2 |x|): 1 - tanh^2 would cancel."""
    return torch.where(x.abs() < 1, torch.tanh(x), x.sign() * (1 - 2 * torch.sigmoid(-2 * x.abs())))
