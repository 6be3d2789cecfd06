"""What Liger's losses from hidden states share: the head, and the mean of its logits without the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast import linear_logprobs


class Head(NamedTuple):
    """hidden (..., D), weight (V, D) and bias (V,) or None, all of hidden's type."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
        """The head in hidden's type; what autocast leaves in float32 is converted, its gradient back."""
        return cls(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))

    def rows(self, rows: slice) -> Head:
        return self._replace(hidden=self.hidden[rows])

    def logprobs(self, targets: Tensor, mask: Tensor | None, temperature: float = 1.0) -> Tensor:
        return linear_logprobs(
            self.hidden, self.weight, targets, bias=self.bias, mask=mask, temperature=float(temperature)
        )

    def logits_sums(self) -> Tensor:
        """(B,) of hidden (B, T, D): the sum of a sequence's logits, which is linear in its hidden states.

        Accumulated in float32, where the peer sums logits that are rounded to their own type.
        """
        hidden, weight = self.hidden.detach(), self.weight.detach()
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        sums = hidden.sum(1, dtype=dtype) @ weight.sum(0, dtype=dtype)
        return sums if self.bias is None else sums + hidden.shape[1] * self.bias.detach().sum(dtype=dtype)
