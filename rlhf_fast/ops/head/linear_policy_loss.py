"""linear_policy_loss: a policy loss straight from hidden states; the logits never exist as a whole.

    logprobs, entropy = linear_logprobs(hidden, weight, targets, ...)
    loss = policy_loss(logprobs, old_logprobs, advantages, entropy=entropy, ...)

with the same result, but the gradient is made while the logits are there: the coefficients c_t = d loss / d logprob_t
and e_t = d loss / d entropy_t are functions of log-probabilities, so that with z the transformed logits, p = softmax(z)

    d loss / d z_tj = c_t (1[j = y_t] - p_tj) - e_t p_tj (log p_tj + entropy_t)
    d loss / d hidden = (d loss / d logits) @ weight,          d loss / d weight = (d loss / d logits)^T @ hidden

Cost, with P = one N x D x V product (2 N D V FLOPs): a trained head 3P, where linear_logprobs and a loss take 4P
(or keep all N x V numbers); a frozen one 2P; without gradients P. Losses whose coefficients depend on other tokens (a
sequence's ratio, or a selection from the batch) take the rows of whole sequences (of the batch) at a time: 3P while
`scratch_bytes` holds their logits (for gspo, luspo and dro without a term per token: or a gradient of the head and a
tile), up to 4P beyond that. See _linear_sweep for scratch and for rows that cost nothing.

Numerics: those of linear_logprobs and policy_loss. Parameter gradients are accumulated in float32, and rounded once.

Sources: policy_loss; gradients in forward as in Liger Kernel, Hsu et al. 2024 (arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops.core import check
from rlhf_fast.ops.head import _loss as _linear_loss
from rlhf_fast.ops.head import tiles as _head
from rlhf_fast.ops.head.linear_logprobs import linear_logprobs
from rlhf_fast.ops.policy import policy_loss as policy
from rlhf_fast.ops.policy.policy_loss import Inputs, Plan, PolicyObjective

Result = tuple[Tensor, dict[str, Tensor]] | tuple[Tensor, dict[str, Tensor], Tensor]


@check.takes_numbers
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    objective: str | PolicyObjective = "ppo_clip",
    bias: Tensor | None = None,
    head_lora: tuple[Tensor, Tensor, float] | None = None,
    mask: Tensor | None = None,
    mask_count: int | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    overlong: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    denominator: Tensor | float | None = None,
    sequences: Tensor | float | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_logprobs: bool = False,
    chunk_tokens: int | None = None,
    scratch_bytes: int | None = None,
    backend: str | None = None,
) -> Result:
    """The policy loss `objective` and its metrics, with gradients to hidden, weight, bias and head_lora.

    hidden: (B, T, D), or packed (N, D); weight: (V, D); bias: (V,) or None; head_lora: (A (R, D), B (V, R), scale) or
    None, added to the weight as scale B A. All of one type, float32, bfloat16, float16 or float64; a gradient is made
    for each of them that requires one. targets: (B, T) or (N,) integer ids in [0, V).
    temperature, logit_scale, softcap: as in linear_logprobs. All else: as in policy_loss, whose `logprobs` and, where
    the objective looks at it, `entropy` are made here. old_logprobs: None on policy, as there.
    mask_count: how many rows the mask counts, or an upper bound: lets a GPU leave the others out (the CPU does so in
    any case). return_logprobs: also the log-probabilities, without gradient.
    chunk_tokens: rows of logits in one product (default: from TILE_BYTES in _head.py). scratch_bytes: the most that is
    allocated at a time beside results and gradients, 1 GiB by default; losses that take whole sequences hold as many
    rows of logits as fit.

    Returns (loss, metrics) as policy_loss, or (loss, metrics, logprobs). Raises ValueError or TypeError for what does
    not fit, IndexError on the CPU for a counted target outside [0, V).
    """
    objective = PolicyObjective.of(objective)
    hidden, weight, bias, head_lora = _head.operands(hidden, weight, bias, head_lora)
    call = _linear_loss.checked(
        hidden, weight, targets, bias, head_lora, temperature, logit_scale, softcap, mask, mask_count,
        chunk_tokens, scratch_bytes,
    )  # fmt: skip
    shape, like = targets.shape, hidden.detach()[..., 0]
    reads_entropy = objective.entropy_coef > 0 or objective.entropy_fraction < 1
    inputs = Inputs(like, like if old_logprobs is None else old_logprobs, policy.per_token(advantages, shape),
                    ref_logprobs, sampler_logprobs, like if reads_entropy else None)  # fmt: skip
    inputs.check(objective)
    plan = Plan.of(objective, like, mask=mask, overlong=overlong, cu_seqlens=cu_seqlens, denominator=denominator,
                   sequences=sequences)  # fmt: skip
    inputs = inputs.planes()
    constants = [None if old_logprobs is None else inputs.old_logprobs, *inputs[2:5]]
    name = resolve(f"linear_policy_loss of {objective.variant}", objective.kernels, hidden.device, backend)
    if name == "reference" or (call.frozen and objective.entropy_coef == 0):
        found = linear_logprobs(
            hidden, weight, targets, bias=bias, mask=None if plan.flags is None else plan.flags.view(shape),
            mask_count=mask_count, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
            head_lora=head_lora, return_entropy=reads_entropy, chunk_tokens=call.tile_rows, backend=name,
        )  # fmt: skip
        logprobs, entropy = found if reads_entropy else (found, None)
        loss, metrics = reference(objective, constants, plan, logprobs, entropy, backend=name)
    else:
        loss, values, logprobs, *_ = call.run(
            _run, None if plan.flags is None else plan.flags.view(-1), [*constants, *plan],
            _linear_loss.encoded(objective), coupling(objective), one_slope(objective, inputs), shape, plan.cu_seqlens,
            reads_entropy, name,
        )  # fmt: skip
        metrics = policy.named_metrics(objective, inputs, values)
    return (loss, metrics, logprobs.detach().view(shape)) if return_logprobs else (loss, metrics)


def reference(
    objective: PolicyObjective, constants: list[Any], plan: Plan, logprobs: Tensor, entropy: Tensor | None, *,
    backend: str = "reference",
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """(loss, metrics) by definition, from what linear_logprobs gives; with a frozen head nothing is faster."""
    return policy.evaluate(objective, _inputs(constants, logprobs, entropy), plan, backend=backend)


def _inputs(constants: list[Any], logprobs: Tensor, entropy: Tensor | None) -> Inputs:
    """constants: planes of old_logprobs (None: those of `logprobs`), advantages, ref_logprobs, sampler_logprobs."""
    old_logprobs, advantages, ref_logprobs, sampler_logprobs = constants
    logprobs = logprobs.view(advantages.shape)
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    return Inputs(logprobs, old_logprobs, advantages, ref_logprobs, sampler_logprobs,
                  None if entropy is None else entropy.view(advantages.shape))  # fmt: skip


def coupling(objective: PolicyObjective) -> str:
    """Which rows the coefficient of a token depends on, see _linear_plan."""
    if objective.marks_tokens:
        return "batch"
    return "sequence" if objective.needs_sequences else "token"


def one_slope(objective: PolicyObjective, inputs: Inputs) -> bool:
    """Whether d loss / d logprob is the same for all counted tokens of a sequence."""
    of_token = inputs.sampler_logprobs is not None and objective.correction_level == "token"
    others = objective.kl_coef > 0 or objective.entropy_coef > 0 or objective.off_policy_max_kl is not None
    return objective.function in ("gspo", "dro") and coupling(objective) == "sequence" and not (of_token or others)


def _evaluate(objective: str, tensors: list[Any], backend: str, logprobs: Tensor,
              entropy: Tensor | None) -> list[Tensor]:  # fmt: skip
    """tensors: the constants of `_inputs` and the fields of a Plan."""
    chosen = PolicyObjective(**json.loads(objective))
    inputs = _inputs(tensors[:4], logprobs, entropy)
    selected = policy.select(chosen, inputs, Plan(*tensors[4:]))
    loss, metrics, *coefficients = torch.ops.rlhf_fast.policy_loss(*inputs, *selected, *policy.numbers(chosen), backend)
    return [loss, metrics, *(c.view(-1) for c in coefficients)]


OPS = {"linear_policy_loss": tuple(policy.IMPLS)}
_run = _linear_loss.register("linear_policy_loss", _evaluate, len(policy.METRICS))
