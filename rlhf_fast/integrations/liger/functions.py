"""Liger's `...Function` classes and its `liger_fused_linear_*`, which are their `apply`: the losses by positions.

The peer's are autograd functions whose options stand behind the tensors; each of ours makes the loss and calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from rlhf_fast.integrations.liger.distillation import LigerFusedLinearJSDLoss
from rlhf_fast.integrations.liger.grpo import LigerFusedLinearGRPOLoss
from rlhf_fast.integrations.liger.preference import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)


@dataclass(eq=False, repr=False)
class _GRPOByPosition(LigerFusedLinearGRPOLoss):
    """Looks at sapo's temperatures for sapo alone, as the peer's function does and its module does not."""

    def __post_init__(self) -> None:
        if self.loss_type != "sapo":
            self.sapo_temperature_pos = self.sapo_temperature_neg = 1.0
        super().__post_init__()


# name -> (loss, the names of apply's arguments, those that must be given before the /)
_SIGNATURES: dict[str, tuple[type, str]] = {
    "CPO": (LigerFusedLinearCPOLoss, "_input lin_weight target / bias ignore_index beta alpha label_smoothing"
            " compute_nll_loss compiled average_log_prob chunk_size"),
    "DPO": (LigerFusedLinearDPOLoss, "_input lin_weight target / bias ref_input ref_weight ref_bias ignore_index beta"
            " compute_nll_loss compiled use_ref_model average_log_prob chunk_size loss_type label_smoothing"
            " discopop_tau alpha"),
    "SimPO": (LigerFusedLinearSimPOLoss, "_input lin_weight target / bias ignore_index beta alpha label_smoothing"
              " compute_nll_loss compiled gamma chunk_size"),
    "ORPO": (LigerFusedLinearORPOLoss, "_input lin_weight target / bias ignore_index beta compute_nll_loss nll_target"
             " compiled chunk_size"),
    "KTO": (LigerFusedLinearKTOLoss, "_input lin_weight target preference_labels / bias ref_input ref_weight ref_bias"
            " kl ignore_index beta compiled use_ref_model average_log_prob chunk_size"),
    "JSD": (LigerFusedLinearJSDLoss, "student_input student_weight teacher_input teacher_weight true_labels"
            " student_bias teacher_bias / weight_hard_loss weight_soft_loss beta ignore_index temperature compiled"
            " chunk_size return_soft_hard_loss"),
    "GRPO": (_GRPOByPosition, "_input lin_weight selected_token_ids attention_mask advantages / bias"
             " ref_per_token_logps old_per_token_logps ref_input ref_weight ref_bias beta epsilon_low epsilon_high"
             " loss_type max_completion_length importance_sampling_level sapo_temperature_pos sapo_temperature_neg"
             " temperature compiled use_ref_model chunk_size vllm_is_ratio delta use_bias_correction_kl vespo_k_pos"
             " vespo_lambda_pos vespo_k_neg vespo_lambda_neg num_items_in_batch"),
}  # fmt: skip
_OTHER_DEFAULTS: dict[str, dict[str, Any]] = {"SimPO": {"compute_nll_loss": False}, "KTO": {"use_ref_model": True}}


def _function(name: str) -> type:
    loss, arguments = _SIGNATURES[name]
    needed, more = (part.split() for part in arguments.split("/"))
    names, options = [*needed, *more], {field.name for field in fields(loss)}
    title = f"LigerFusedLinear{name}Function"

    def apply(*given: Any) -> Any:
        if not len(needed) <= len(given) <= len(names):
            raise TypeError(f"{title}.apply takes {len(needed)} to {len(names)} arguments, got {len(given)}")
        bound = {**_OTHER_DEFAULTS.get(name, {}), **dict(zip(names, given, strict=False))}
        module = loss(**{key: value for key, value in bound.items() if key in options})
        return module(**{key: value for key, value in bound.items() if key not in options})

    doc = f"`apply` alone: LigerFusedLinear{name}Loss by positions."
    return type(title, (), {"__doc__": doc, "apply": staticmethod(apply)})


FUNCTIONS: dict[str, type] = {name: _function(name) for name in _SIGNATURES}
# Of their own: the peer has these beside its classes.
FUNCTIONAL: dict[str, Callable[..., Any]] = {
    f"liger_fused_linear_{name.lower()}": function.apply  # type: ignore[attr-defined]
    for name, function in FUNCTIONS.items()
}
