"""How the next tokens are drawn from logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops.tokens.sample_tokens import Samples, sample_tokens


class Drawing:
    """Draws the next tokens from what one role, or several, say of them, each in an equal share of the rows.

    spread: mean standard deviation, over the vocabulary and at the temperature, of what the first tokens were drawn
    from since `begin`.
    """

    def __init__(self, roles: Sequence[str | None], temperature: float, top_k: int, top_p: float) -> None:
        self.roles = list(roles)
        self.temperature = temperature
        self.rule: dict[str, Any] = {"temperature": temperature, "top_k": top_k or None, "top_p": top_p}
        self.seed: int | Tensor = 0
        self.spread: float | None = None

    def begin(self, seed: int | Tensor) -> None:
        self.seed, self.spread = seed, None

    def combined(self, logits: Sequence[Tensor]) -> Tensor:
        """(B, V), what tokens are drawn from, before temperature, top_k and top_p; logits: fp32, of each role."""
        return logits[0]

    def draw(self, logits: Tensor, row_ids: Tensor, steps: Tensor | int) -> Samples:
        """logits: (roles x B, V), the first role's rows first. row_ids, steps: (B,) int64, or one step for all: a
        row's number and that of its token, which with the seed decide what is drawn."""
        mixed = self.combined(logits.float().chunk(len(self.roles)))
        if self.spread is None:
            self.spread = float(spread_of(mixed / self.temperature))
        return sample_tokens(mixed, seed=self.seed, row_ids=row_ids + (steps << 32), **self.rule)


class Mixing(Drawing):
    """The geometric mixture of policy and reference."""

    def __init__(self, mixture: float, temperature: float, top_k: int, top_p: float) -> None:
        super().__init__(["policy", "reference"], temperature, top_k, top_p)
        self.mixture = mixture

    def combined(self, logits: Sequence[Tensor]) -> Tensor:
        first, second = (part.log_softmax(-1) for part in logits)
        return torch.lerp(first, second, self.mixture)


def spread_of(logits: Tensor) -> Tensor:
    """(..., V) -> (): mean standard deviation over the vocabulary, less the entries that a model masks out."""
    open_entries = logits.where(logits > torch.finfo(torch.float16).min, torch.nan)
    return (open_entries - open_entries.nanmean(-1, keepdim=True)).square().nanmean(-1).sqrt().mean()
