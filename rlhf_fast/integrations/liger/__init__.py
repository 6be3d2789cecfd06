"""Liger Kernel's losses under their own names: constructors, arguments and results are the peer's, the work is ours.

`chunk_size` and `compiled` are accepted and change nothing: our kernels choose their tiles and compile nothing in a
call. float64 inputs are computed and returned in float64, where the peer rounds to float32.

Source of names and behaviour: Liger Kernel 0.8.5, Hsu et al. 2024 (arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any

from rlhf_fast.integrations.liger.cross_entropy import (
    LigerFusedLinearScaledCrossEntropyFunction,
    LigerFusedLinearScaledCrossEntropyTPFunction,
)
from rlhf_fast.integrations.liger.distillation import LigerFusedLinearJSDLoss
from rlhf_fast.integrations.liger.functions import FUNCTIONAL, FUNCTIONS
from rlhf_fast.integrations.liger.grpo import LigerFusedLinearGRPOLoss
from rlhf_fast.integrations.liger.label_losses import (
    CrossEntropyOutput,
    LigerCrossEntropyFunction,
    LigerCrossEntropyLoss,
    LigerFusedLinearCrossEntropyFunction,
    LigerFusedLinearCrossEntropyLoss,
)
from rlhf_fast.integrations.liger.logits import GrpoLossFunction, fused_selective_log_softmax, triton_grpo_loss
from rlhf_fast.integrations.liger.preference import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

__all__ = [
    "PEER",
    "TESTED",
    "CrossEntropyOutput",
    "GrpoLossFunction",
    "LigerCrossEntropyFunction",
    "LigerCrossEntropyLoss",
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCrossEntropyFunction",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearScaledCrossEntropyFunction",
    "LigerFusedLinearScaledCrossEntropyTPFunction",
    "LigerFusedLinearSimPOLoss",
    "fused_selective_log_softmax",
    "replacements",
    "triton_grpo_loss",
]

PEER = "liger-kernel"
TESTED = "0.8.5"


def replacements() -> dict[str, Any]:
    """The peer's defining modules and names -> our objects."""
    chunked = {
        "CPO": LigerFusedLinearCPOLoss,
        "DPO": LigerFusedLinearDPOLoss,
        "GRPO": LigerFusedLinearGRPOLoss,
        "JSD": LigerFusedLinearJSDLoss,
        "KTO": LigerFusedLinearKTOLoss,
        "ORPO": LigerFusedLinearORPOLoss,
        "SimPO": LigerFusedLinearSimPOLoss,
    }
    places: dict[str, Any] = {
        "ops.cross_entropy": LigerCrossEntropyFunction,
        "ops.fused_linear_cross_entropy": LigerFusedLinearCrossEntropyFunction,
        "transformers.cross_entropy": LigerCrossEntropyLoss,
        "transformers.fused_linear_cross_entropy": LigerFusedLinearCrossEntropyLoss,
        "ops.grpo_loss": GrpoLossFunction,
        "transformers.grpo_loss": triton_grpo_loss,
    }
    names = {f"{place}.{ours.__name__}": ours for place, ours in places.items()}
    names["ops.grpo_loss.fused_selective_log_softmax"] = fused_selective_log_softmax
    ours: type
    for ours in (LigerFusedLinearScaledCrossEntropyFunction, LigerFusedLinearScaledCrossEntropyTPFunction):
        names[f"ops.fused_linear_scaled_cross_entropy.{ours.__name__}"] = ours
    for name, loss in chunked.items():
        for ours in (loss, FUNCTIONS[name]):
            names[f"chunked_loss.{name.lower()}_loss.{ours.__name__}"] = ours
    names["transformers.functional.CrossEntropyOutput"] = CrossEntropyOutput
    names |= {f"chunked_loss.functional.{name}": apply for name, apply in FUNCTIONAL.items()}
    return {f"liger_kernel.{name}": ours for name, ours in names.items()}
