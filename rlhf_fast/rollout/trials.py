"""Whether another way to make a step of decoding gives what the model's own pass gives."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rlhf_fast.data.notes import say
from rlhf_fast.models.backbone import Backbone

# How far, of the largest logit, it may be from the model's own: sums are added in another order.
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Trials:
    """What the first step of each backbone showed."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._agrees: WeakKeyDictionary[Backbone, bool] = WeakKeyDictionary()

    def has_failed(self, backbone: Backbone) -> bool:
        return not self._agrees.get(backbone, True)

    def is_due(self, backbone: Backbone) -> bool:
        return backbone not in self._agrees

    def agree(self, backbone: Backbone, logits: Tensor, theirs: Tensor) -> bool:
        """Whether it may make the other steps, said where it may not. theirs: of the model's own pass; (rows, V)."""
        gap = float((logits.float() - theirs.float()).abs().max())
        agrees = gap <= CLOSE[logits.dtype] * float(theirs.abs().max())  # False for NaN
        self._agrees[backbone] = agrees
        if not agrees:
            say(f"sampling by the model's own passes: {self.what} gave logits that differ by up to {gap:.2g}")
        return agrees
