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
from rlhf_fast.integrations.liger.grpo import LigerFusedLinearGRPOLoss
from rlhf_fast.integrations.liger.logits import fused_selective_log_softmax, triton_grpo_loss
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
    "LigerFusedLinearCPOLoss",
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
        "cpo_loss": LigerFusedLinearCPOLoss,
        "dpo_loss": LigerFusedLinearDPOLoss,
        "grpo_loss": LigerFusedLinearGRPOLoss,
        "jsd_loss": LigerFusedLinearJSDLoss,
        "kto_loss": LigerFusedLinearKTOLoss,
        "orpo_loss": LigerFusedLinearORPOLoss,
        "simpo_loss": LigerFusedLinearSimPOLoss,
    }
    scaled = (LigerFusedLinearScaledCrossEntropyFunction, LigerFusedLinearScaledCrossEntropyTPFunction)
    return {
        **{f"liger_kernel.chunked_loss.{module}.{ours.__name__}": ours for module, ours in chunked.items()},
        **{f"liger_kernel.ops.fused_linear_scaled_cross_entropy.{ours.__name__}": ours for ours in scaled},
        "liger_kernel.ops.grpo_loss.fused_selective_log_softmax": fused_selective_log_softmax,
        "liger_kernel.transformers.grpo_loss.triton_grpo_loss": triton_grpo_loss,
    }
