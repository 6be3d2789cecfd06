"""Liger's cross-entropies, from logits and from hidden states: the autograd functions by `apply`, and the modules.

    loss = (1 - s) w_y (lse - z_y) + s / V sum_v w_v (lse - z_v) + lse_square_scale lse^2

with z the logits, softcap tanh(z / softcap) where a softcap is given, y the label, w the class weights and s the label
smoothing; 0 for an ignored label. A mean divides by the sum of w_y, the last term by the number of labels that count,
and is 0 where none does. With use_token_scaling a token's loss is weighed by its probability, a constant there.

From hidden states the logits never exist as a whole. With label smoothing they are made in float32 a tile at a time, in
forward and again in backward, from copies of hidden states and head in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from rlhf_fast import linear_logprobs
from rlhf_fast.integrations._cross_entropy import Options, check_weight, cross_entropy, from_logprobs, reduced
from rlhf_fast.integrations._tensors import wide
from rlhf_fast.integrations._trl_heads import by_tiles, logit_tiles
from rlhf_fast.integrations.liger._head import Head

Result = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
REDUCTIONS = ("mean", "sum", "none")


class LigerCrossEntropyFunction:
    """`apply` alone, as the peer's; runs on the CPU as well."""

    @staticmethod
    def apply(
        _input: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100,
        lse_square_scale: float = 0.0, label_smoothing: float = 0.0, reduction: str = "mean",
        softcap: float | None = None, return_z_loss: bool = False, return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> Result:  # fmt: skip
        """(loss, z_loss, token accuracy, predicted ids (N,)) of logits (N, V), None for those that are not asked for.

        target: (N,) ids or ignore_index; weight: (V,) of the classes. loss and z_loss: () or, for "none", (N,), in the
        type of the logits, which stay as they are. Raises ValueError for what does not fit, IndexError on the CPU for a
        label outside the vocabulary.
        """
        _check(reduction, softcap)
        options = Options(weight, label_smoothing, lse_square_scale, ignore_index=ignore_index)
        logits = _input if softcap is None else softcap * torch.tanh(wide(_input) / softcap)
        loss, z_loss = reduced(*cross_entropy(logits, target, options), target, options, reduction)
        predictions = _predictions(
            lambda: _input.detach().argmax(1), target, ignore_index, reduction, return_token_accuracy,
            return_predicted_tokens,
        )  # fmt: skip
        return loss.to(_input.dtype), z_loss.to(_input.dtype) if return_z_loss else None, *predictions


class LigerFusedLinearCrossEntropyFunction:
    """`apply` alone, as the peer's; runs on the CPU as well."""

    @staticmethod
    def apply(
        _input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ce_weight: Tensor | None = None,
        ignore_index: int = -100, lse_square_scale: float = 0.0, label_smoothing: float = 0.0, reduction: str = "mean",
        softcap: float | None = None, return_z_loss: bool = False, accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False, return_token_accuracy: bool = False, return_predicted_tokens: bool = False,
        ce_impl: Any = None, ce_mode: Any = None, chunk_mem_const: int = 1,
    ) -> Result:  # fmt: skip
        """The same from hidden states _input (N, D), weight (V, D) and bias (V,); ce_weight: (V,) of the classes.

        loss is float32, z_loss of the type of _input. accum_dtype, the last three and their like are settings of the
        peer's kernel and change nothing: sums are float32.
        """
        _check(reduction, softcap)
        head = Head.of(_input, weight, bias)
        options = Options(ce_weight, label_smoothing, lse_square_scale, ignore_index=ignore_index)
        losses, z_losses, logprobs = _from_head(head, target, options, softcap)
        if use_token_scaling:
            losses, z_losses = losses * logprobs.exp(), z_losses * logprobs.exp()
        loss, z_loss = reduced(losses, z_losses, target, options, reduction)
        predictions = _predictions(
            lambda: _greatest(head), target, ignore_index, reduction, return_token_accuracy, return_predicted_tokens
        )
        return loss, z_loss.to(_input.dtype) if return_z_loss else None, *predictions


def _from_head(head: Head, target: Tensor, options: Options, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, z_losses, log-probabilities without gradient), (N,) each."""
    check_weight(options, head.weight.shape[0])
    counts = target != options.ignore_index
    score = partial(linear_logprobs, *head[:2], target, bias=head.bias, mask=counts, softcap=softcap)
    if options.label_smoothing == 0:
        return from_logprobs(score, target, options)
    with torch.no_grad():
        logprobs = score()
    return *_smoothed(head, target, options, softcap), logprobs


def _smoothed(head: Head, target: Tensor, options: Options, softcap: float | None) -> tuple[Tensor, Tensor]:
    """(losses, z_losses): a tile of logits at a time, in float32, whose gradients are rounded once, at the end."""
    hidden, weight, bias = (None if x is None else wide(x) for x in head)
    assert hidden is not None

    def tile(rows: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = linear(rows, weight, bias)
        return cross_entropy(logits if softcap is None else softcap * torch.tanh(logits / softcap), ids, options)

    return by_tiles(tile, (hidden, target), weight, bias)


@torch.no_grad()
def _greatest(head: Head) -> Tensor:
    """(N,): the id of the greatest logit, which a softcap leaves the greatest."""
    tiles = [logits.argmax(1) for _, logits in logit_tiles(head.hidden, head.weight, head.bias)]
    return torch.cat(tiles) if tiles else head.hidden.new_zeros(0, dtype=torch.int64)


def _check(reduction: str, softcap: float | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap}")


def _predictions(
    predict: Callable[[], Tensor], target: Tensor, ignore_index: int, reduction: str, accuracy: bool, ids: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(accuracy, predicted ids (N,), -1 for an ignored label), None for what is not asked for."""
    if not (accuracy or ids):
        return None, None
    predicted, counts = predict(), target != ignore_index
    right = ((predicted == target) & counts).float()
    mean = right if reduction == "none" else right.sum() / counts.sum().clamp(min=1)
    return mean if accuracy else None, torch.where(counts, predicted, -1) if ids else None


# --- The modules ------------------------------------------------------------------------------------------------------


@dataclass
class CrossEntropyOutput:
    """What the modules return where more than the loss is asked for."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class _CrossEntropyLoss(torch.nn.Module):
    """A module whose fields are the options of its function, in that order."""

    reduction: str
    softcap: float | None
    return_z_loss: bool
    return_token_accuracy: bool
    return_predicted_tokens: bool

    def __post_init__(self) -> None:
        super().__init__()
        _check(self.reduction, self.softcap)

    def _options(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]

    def _asked_for(self, result: Result) -> Any:
        more = self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens
        return CrossEntropyOutput(*result) if more else result[0]


@dataclass(eq=False, repr=False)
class LigerCrossEntropyLoss(_CrossEntropyLoss):
    """The cross-entropy of logits; options as in LigerCrossEntropyFunction."""

    weight: Tensor | None = None
    ignore_index: int = -100
    lse_square_scale: float = 0.0
    label_smoothing: float = 0.0
    reduction: str = "mean"
    softcap: float | None = None
    return_z_loss: bool = False
    return_token_accuracy: bool = False
    return_predicted_tokens: bool = False

    def forward(self, _input: Tensor, target: Tensor) -> Any:
        """The loss of logits (N, V) and labels (N,), or a CrossEntropyOutput."""
        return self._asked_for(LigerCrossEntropyFunction.apply(_input, target, *self._options()))


@dataclass(eq=False, repr=False)
class LigerFusedLinearCrossEntropyLoss(_CrossEntropyLoss):
    """The same from hidden states; options as in LigerFusedLinearCrossEntropyFunction."""

    ce_weight: Tensor | None = None
    ignore_index: int = -100
    lse_square_scale: float = 0.0
    label_smoothing: float = 0.0
    reduction: str = "mean"
    softcap: float | None = None
    return_z_loss: bool = False
    accum_dtype: torch.dtype | None = None
    use_token_scaling: bool = False
    return_token_accuracy: bool = False
    return_predicted_tokens: bool = False

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Any:
        """The loss of hidden states (N, D), head (V, D) and labels (N,), or a CrossEntropyOutput."""
        result = LigerFusedLinearCrossEntropyFunction.apply(_input, lin_weight, target, bias, *self._options())
        return self._asked_for(result)
