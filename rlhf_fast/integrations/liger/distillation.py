"""Liger's distillation loss from hidden states: cross-entropy of the labels and a divergence from a teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_fast import linear_kl
from rlhf_fast.integrations.liger._head import Head


@dataclass(eq=False, repr=False)
class LigerFusedLinearJSDLoss(torch.nn.Module):
    """weight_hard_loss * cross-entropy + weight_soft_loss * divergence, each a mean over the labels that count.

    beta: 0 for KL(teacher || student), 1 for KL(student || teacher), between them the generalised Jensen-Shannon
    divergence, all at `temperature`; the cross-entropy is taken at temperature 1. return_soft_hard_loss: forward
    returns (loss, soft loss, hard loss), the last two without gradient. Raises ValueError for values that do not fit.
    """

    weight_hard_loss: float = 0.5
    weight_soft_loss: float = 0.5
    beta: float = 0.5
    ignore_index: int = -100
    temperature: float = 1.0
    compiled: bool = True
    chunk_size: int = 1024
    return_soft_hard_loss: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {self.beta}")

    def forward(
        self, student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor,
        true_labels: Tensor, student_bias: Tensor | None = None, teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """student_input: (N, D), student_weight: (V, D), teacher_input: (N, E), teacher_weight: (>= V, E), labels (N,).

        A student with a smaller vocabulary has logits of 0 for the teacher's further tokens, in the divergence alone.
        """
        student = Head.of(student_input, student_weight, student_bias)
        teacher = Head.of(teacher_input.to(student_input.dtype), teacher_weight.to(student_input.dtype), teacher_bias)
        mask = true_labels != self.ignore_index
        count = mask.sum().clamp(min=1)
        missing = teacher.weight.shape[0] - student.weight.shape[0]
        wants_hard = self.weight_hard_loss != 0 or self.return_soft_hard_loss
        one_pass = wants_hard and self.temperature == 1 and missing == 0
        variant = "forward" if self.beta == 0 else "reverse" if self.beta == 1 else "js"
        divergence = linear_kl(
            student.hidden, teacher.hidden, pad(student.weight, (0, 0, 0, missing)), true_labels if one_pass else None,
            ref_weight=teacher.weight, bias=None if student.bias is None else pad(student.bias, (0, missing)),
            ref_bias=teacher.bias, mask=mask, temperature=self.temperature, variant=variant,
            js_weight=self.beta if variant == "js" else 0.5,
        )  # fmt: skip
        soft, hard = divergence.kl.sum() / count, torch.zeros_like(divergence.kl[:0].sum())
        if wants_hard:
            logprobs = divergence.logprobs if one_pass else student.logprobs(true_labels, mask)
            assert logprobs is not None
            hard = -logprobs.sum() / count
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss
