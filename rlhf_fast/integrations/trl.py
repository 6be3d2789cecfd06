"""TRL's log-probabilities, entropies and divergences on our ops: after `rlhf_fast.patch("trl")` its trainers use them.

Every trainer of TRL that scores tokens goes through one of these: SFT, DPO, KTO, GRPO and RLOO through the LM head that
`add_fused_lm_head` puts on the model, which calls ChunkedLogProbFunction; distillation through
ChunkedDivergenceFunction; the experimental trainers through the functions of logits.

Source: TRL 1.16.0, trl/trainer/utils.py and trl/kernels/.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import token_logprobs
from rlhf_fast.integrations import _trl_heads
from rlhf_fast.integrations._zero3 import with_whole_heads

PEER = "trl"
TESTED = "1.16.0"

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def replacements() -> dict[str, Any]:
    """What `rlhf_fast.patch("trl")` replaces, under the names that define it."""
    from trl.trainer import utils

    names = {
        "trl.trainer.utils.selective_log_softmax": selective_log_softmax,
        "trl.trainer.utils.entropy_from_logits": entropy_from_logits,
        "trl.trainer.utils.selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
        "trl.kernels.chunked_logprob.ChunkedLogProbFunction": ChunkedLogProbFunction,
        "trl.kernels.chunked_divergence.ChunkedDivergenceFunction": ChunkedDivergenceFunction,
    }
    if hasattr(utils, "_fused_logprob_entropy"):  # TRL has it only where Triton is installed
        names["trl.kernels.logprob_entropy.selective_log_softmax_and_entropy"] = fused_logprob_entropy
    return names


# --- From logits -----------------------------------------------------------------------------------------------------


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities (...) or (..., K) of the ids `index` under softmax(logits / temperature), 0 in masked rows.

    In the type of the logits, as TRL's; but computed in float32, also where the logits are bfloat16, and exact for
    confident tokens. Logits behind the mask are not read. Raises ValueError for a temperature that is not positive.
    """
    logprobs, _ = _logprobs_and_entropy(logits, index, temperature, row_mask, want_entropy=False)
    return logprobs.to(_result_type(logits, index))


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy (...) of softmax(logits), in nats, in the type of the logits; chunk_size changes nothing."""
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    _, entropy = _logprobs_and_entropy(logits, index, 1.0, None)
    return entropy.to(_result_type(logits, index))


def selective_log_softmax_and_entropy(
    logits: Tensor, index: Tensor, entropy_requires_grad: bool = True, temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`selective_log_softmax` and the entropy of the same distribution, from one read of the logits."""
    logprobs, entropy = _logprobs_and_entropy(logits, index, temperature, row_mask)
    dtype = _result_type(logits, index)
    return logprobs.to(dtype), (entropy if entropy_requires_grad else entropy.detach()).to(dtype)


def fused_logprob_entropy(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`trl.kernels.selective_log_softmax_and_entropy`: the same in float32, whatever the logits' type."""
    return _logprobs_and_entropy(logits, index, temperature, row_mask)


def _logprobs_and_entropy(
    logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None, *, want_entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy) in float32 (float64); entropy is logprobs where it is not wanted."""
    one_per_row = index.dim() == logits.dim() - 1
    mask = row_mask if one_per_row else None
    scored = token_logprobs(logits, index, temperature=temperature, mask=mask, return_entropy=want_entropy)
    logprobs, entropy = (scored, scored) if isinstance(scored, Tensor) else scored
    if row_mask is not None and not one_per_row:  # TRL's mask then has the shape of the ids, one entry for each
        logprobs = logprobs.masked_fill(row_mask == 0, 0.0)
    return logprobs, entropy


def _result_type(logits: Tensor, index: Tensor) -> torch.dtype:
    """float32 from TRL's kernels, which take one id per row on a GPU; from its eager code the type of the logits."""
    kernel = logits.device.type in ("cuda", "xpu") and index.dim() == logits.dim() - 1 and logits.dim() <= 3
    return torch.float32 if kernel and logits.dtype != torch.float64 else logits.dtype


# --- From hidden states ----------------------------------------------------------------------------------------------


class ChunkedLogProbFunction:
    """TRL's autograd function of the LM head, of which only `apply` is ever used."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
        final_logit_softcapping: float | None = None, logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1), each (N,), None for those not in `outputs`.

        hidden (N, D); weight (V, D); bias (V,) or None; targets (N,) ids in [0, V). The products are made in the type
        of autocast where it is on, else in that of hidden. logprobs and entropy have a gradient; all but is_top1 (bool)
        are float32. chunk_size changes nothing: our tiles follow from a byte budget. Logits stay in float32, where TRL
        rounds them to the type of hidden, so that in bfloat16 it has ties that are none here.
        Raises IndexError on the CPU for a target outside [0, V), which TRL scores as a logit of 0.
        """
        compute = partial(
            _trl_heads.scored, targets=targets, dtype=_trl_heads.compute_type(hidden), temperature=temperature,
            transform=_trl_heads.Transform(logit_scale, final_logit_softcapping), outputs=outputs,
        )  # fmt: skip
        return with_whole_heads(compute, 2, hidden, weight, bias)


class ChunkedDivergenceFunction:
    """TRL's autograd function of the distillation loss, of which only `apply` is ever used."""

    @staticmethod
    def apply(
        student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, teacher_hidden: Tensor,
        teacher_weight: Tensor, teacher_bias: Tensor | None, beta: float, temperature: float = 1.0,
        student_logit_scale: float = 1.0, student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0, teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(divergence, the student's entropy), each (N,) float32. The divergence has a gradient, to the student alone.

        hidden (N, D) and weight (V, D) of each, with a D of its own; bias (V,) or None. beta: 0 for KL(teacher ||
        student), 1 for KL(student || teacher), between them the Jensen-Shannon divergence with the teacher's share
        beta. Where both models agree it keeps its digits, which a difference of two means of logits does not.
        Where scale or softcap of the two differ, autograd makes tiles of both logits, in forward and in backward.
        """
        transforms = (
            _trl_heads.Transform(student_logit_scale, student_final_logit_softcapping),
            _trl_heads.Transform(teacher_logit_scale, teacher_final_logit_softcapping),
        )
        compute = partial(
            _trl_heads.diverged, transforms=transforms, temperature=temperature,
            types=(_trl_heads.compute_type(student_hidden), _trl_heads.compute_type(teacher_hidden)),
            variant={0.0: "forward", 1.0: "reverse"}.get(beta, "js"), js_weight=0.5 if beta in (0, 1) else beta,
        )  # fmt: skip
        student = (student_hidden, student_weight, student_bias)
        return with_whole_heads(compute, 1, *student, teacher_hidden, teacher_weight, teacher_bias)
