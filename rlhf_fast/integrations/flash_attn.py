"""flash-attn's cross-entropy of logits, the one call of its that trainers make for log-probabilities.

With z = logit_scale * logits, lse = log sum exp z, y the label, s the label smoothing and V the vocabulary:

    loss = lse - (1 - s) z_y - s / V sum z + z_loss,    z_loss = lse_square_scale lse^2,    0 for an ignored label

patch("flash_attn") puts it in the place of an installed flash-attn's. Where there is none, `install` offers it under
the name that verl and OpenRLHF import.

Numerics: those of token_logprobs: the loss of a confident token is not lost in the rounding of lse.

Source of names and behaviour: flash-attn 2.8.3, flash_attn/ops/triton/cross_entropy.py; z-loss: PaLM, Chowdhery et al.
2022 (arXiv 2204.02311, section 5).
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.integrations._cross_entropy import Options, cross_entropy, reduced

PEER = "flash-attn"
TESTED = "2.8.3"
MODULE = "flash_attn.ops.triton.cross_entropy"


def replacements() -> dict[str, Any]:
    """The peer's defining modules and names -> our objects."""
    return {
        f"{MODULE}.cross_entropy_loss": cross_entropy_loss,
        "flash_attn.losses.cross_entropy.CrossEntropyLoss": CrossEntropyLoss,
    }


def install() -> None:
    """Make `from flash_attn.ops.triton.cross_entropy import cross_entropy_loss` give ours where flash-attn is absent.

    That module alone comes into being: `import flash_attn` fails as before, and whoever asks whether flash-attn is
    installed hears that it is not. Raises RuntimeError where it is installed.
    """
    if find_spec("flash_attn") is not None:
        raise RuntimeError('flash-attn is installed: use rlhf_fast.integrations.patch("flash_attn")')
    module = module_from_spec(ModuleSpec(MODULE, None))
    module.cross_entropy_loss = cross_entropy_loss  # type: ignore[attr-defined]
    sys.modules[MODULE] = module


def uninstall() -> None:
    """Take the module of `install` away again; nothing where there is none."""
    if getattr(sys.modules.get(MODULE), "cross_entropy_loss", None) is cross_entropy_loss:
        del sys.modules[MODULE]


def cross_entropy_loss(
    logits: Tensor, labels: Tensor, precomputed_lse: Tensor | None = None, label_smoothing: float = 0.0,
    logit_scale: float = 1.0, lse_square_scale: float = 0.0, ignore_index: int = -100, inplace_backward: bool = False,
    process_group: torch.distributed.ProcessGroup | None = None, *, weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(losses, z_losses), (N,) each, float32 (float64 for float64 logits); z_losses are in losses and have no gradient.

    logits: (N, V); with a process_group this rank's V / ranks columns, in rank order. labels: (N,), ids of the whole
    vocabulary or ignore_index. logit_scale > 0. inplace_backward: the gradient is written over the logits.
    precomputed_lse: not looked at; the lse is made in the same read of the logits as the rest.
    label_smoothing and process_group cost a pass of plain PyTorch over tiles of the gradient, made in float32 and
    rounded once. weight: (V,) of a floating type, or None: class weights as in torch's cross_entropy, which flash-attn
    lacks; not with a process_group.
    Raises ValueError for shapes and values that do not fit, IndexError on the CPU for a label outside the vocabulary,
    where the peer's loss is 0 and its gradient is not; on a GPU the loss is NaN.
    """
    options = Options(
        weight, label_smoothing, lse_square_scale, logit_scale, ignore_index, inplace_backward, process_group
    )
    losses, z_losses = cross_entropy(logits, labels, options)
    return losses + z_losses, z_losses.detach()


class CrossEntropyLoss(torch.nn.Module):
    """flash_attn.losses.cross_entropy.CrossEntropyLoss, on the CPU as well; weight as in `cross_entropy_loss`."""

    def __init__(
        self, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0, logit_scale: float = 1.0,
        lse_square_scale: float = 0.0, inplace_backward: bool = False,
        process_group: torch.distributed.ProcessGroup | None = None, return_z_loss: bool = False, *,
        weight: Tensor | None = None,
    ):  # fmt: skip
        super().__init__()
        if reduction not in ("mean", "none", "sum"):
            raise NotImplementedError(f"reduction must be mean, none or sum, got {reduction!r}")
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss
        self.weight: Tensor | None
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None) -> Any:
        """The loss of logits (N, V) and labels (N,), () or (N,) by reduction; with return_z_loss (loss, z_loss).

        A mean is over the labels that count, by their class weights, and 0 where none does; that of z_loss is over
        their number.
        """
        options = Options(
            self.weight, self.label_smoothing, self.lse_square_scale, self.logit_scale, self.ignore_index,
            self.inplace_backward, self.process_group,
        )  # fmt: skip
        loss, z_loss = reduced(*cross_entropy(input, target, options), target, options, self.reduction)
        return (loss, z_loss) if self.return_z_loss else loss
