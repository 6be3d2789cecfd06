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

from rlhf_fast import token_logprobs

PEER = "flash-attn"
TESTED = "2.8.3"
MODULE = "flash_attn.ops.triton.cross_entropy"


def replacements() -> dict[str, Any]:
    """The peer's defining module and name -> our function."""
    return {f"{MODULE}.cross_entropy_loss": cross_entropy_loss}


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
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """(losses, z_losses), (N,) each, float32 (float64 for float64 logits); z_losses are in losses and have no gradient.

    logits: (N, V); with a process_group this rank's V / ranks columns, in rank order. labels: (N,), ids of the whole
    vocabulary or ignore_index. logit_scale > 0. inplace_backward: the gradient is written over the logits.
    precomputed_lse: not looked at; the lse is made in the same read of the logits as the rest.
    label_smoothing, lse_square_scale and process_group cost passes of plain PyTorch over the logits' gradient.
    Raises ValueError for shapes and values that do not fit, IndexError on the CPU for a label outside the vocabulary,
    where the peer's loss is 0 and its gradient is not; on a GPU the loss is NaN.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits must be (N, V) and labels (N,), got {tuple(logits.shape)} and {tuple(labels.shape)}")
    counts = labels != ignore_index
    ranks = 1 if process_group is None else process_group.size()
    options: dict[str, Any] = {"logit_scale": logit_scale, "mask": counts, "inplace_backward": inplace_backward}
    if ranks == 1 and label_smoothing == 0 and lse_square_scale == 0:
        losses = -token_logprobs(logits, labels, **options)
        return losses, torch.zeros_like(losses)
    owned, ids = counts, labels
    if process_group is not None:
        ids = labels - process_group.rank() * logits.shape[1]
        owned = counts & (ids >= 0) & (ids < logits.shape[1])
    ids = torch.where(owned, ids, 0)
    nll = -token_logprobs(logits, ids, **options)
    scaled = logit_scale * logits.gather(1, ids.clamp(0, logits.shape[1] - 1)[:, None])[:, 0].to(nll.dtype)
    target = torch.where(counts, scaled, 0.0)
    lse, smoothed = target + nll, logit_scale * logits.sum(1, dtype=nll.dtype) / (ranks * logits.shape[1])
    if process_group is not None and ranks > 1:
        others = _lse_of_others(lse.detach(), process_group)
        whole = torch.logaddexp(lse, others)
        nll = _summed(torch.where(owned, nll + torch.nn.functional.softplus(others - lse), 0.0), process_group)
        nll = nll + torch.where(owned, 0.0, whole - whole.detach())  # the label's rank has this in its own term
        target, smoothed = (_summed(x, process_group) for x in (torch.where(owned, target, 0.0), smoothed))
        lse = whole
    z_losses = torch.where(counts, lse_square_scale * lse.square(), 0.0)
    losses = torch.where(counts, nll + label_smoothing * (target - smoothed), 0.0) + z_losses
    return losses, z_losses.detach()


def _lse_of_others(lse: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """(N,): the log-sum-exp of the other ranks' columns."""
    gathered = [torch.empty_like(lse) for _ in range(group.size())]
    torch.distributed.all_gather(gathered, lse.contiguous(), group=group)
    del gathered[group.rank()]
    return torch.logsumexp(torch.stack(gathered), 0)


def _summed(x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """The sum over the ranks, whose gradient is this rank's own."""
    total = x.detach().clone()
    torch.distributed.all_reduce(total, group=group)
    return total + (x - x.detach())
