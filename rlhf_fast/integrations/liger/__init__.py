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

PEER = "liger-kernel"
TESTED = "0.8.5"


def replacements() -> dict[str, Any]:
    """The peer's defining modules and names -> our objects."""
    places: dict[str, tuple[Any, ...]] = {
        "ops.cross_entropy": (LigerCrossEntropyFunction,),
        "ops.fused_linear_cross_entropy": (LigerFusedLinearCrossEntropyFunction,),
        "ops.fused_linear_scaled_cross_entropy": (
            LigerFusedLinearScaledCrossEntropyFunction, LigerFusedLinearScaledCrossEntropyTPFunction,
        ),
        "ops.grpo_loss": (GrpoLossFunction, fused_selective_log_softmax),
        "transformers.cross_entropy": (LigerCrossEntropyLoss,),
        "transformers.functional": (CrossEntropyOutput,),
        "transformers.fused_linear_cross_entropy": (LigerFusedLinearCrossEntropyLoss,),
        "transformers.grpo_loss": (triton_grpo_loss,),
        "chunked_loss.cpo_loss": (LigerFusedLinearCPOLoss, FUNCTIONS["CPO"]),
        "chunked_loss.dpo_loss": (LigerFusedLinearDPOLoss, FUNCTIONS["DPO"]),
        "chunked_loss.grpo_loss": (LigerFusedLinearGRPOLoss, FUNCTIONS["GRPO"]),
        "chunked_loss.jsd_loss": (LigerFusedLinearJSDLoss, FUNCTIONS["JSD"]),
        "chunked_loss.kto_loss": (LigerFusedLinearKTOLoss, FUNCTIONS["KTO"]),
        "chunked_loss.orpo_loss": (LigerFusedLinearORPOLoss, FUNCTIONS["ORPO"]),
        "chunked_loss.simpo_loss": (LigerFusedLinearSimPOLoss, FUNCTIONS["SimPO"]),
    }  # fmt: skip
    names = {f"{place}.{ours.__name__}": ours for place, objects in places.items() for ours in objects}
    names |= {f"chunked_loss.functional.{name}": apply for name, apply in FUNCTIONAL.items()}
    return {f"liger_kernel.{name}": ours for name, ours in names.items()}
