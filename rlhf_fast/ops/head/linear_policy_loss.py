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
tile), up to 4P beyond that. See _sweep for scratch and for rows that cost nothing.

On a GPU a trained head of half precision takes the way of linear_logprobs, also 3P, in which no row waits for another,
unless the entropy has a weight: while d logprob / d logits of all rows (N x V), which are kept from forward to
backward, take no more than the float32 gradient of a bfloat16 weight that they stand for and what a tile leaves of
`scratch_bytes`. With such a weight trained that is up to N = 2 D rows in any case.

Numerics: those of linear_logprobs and policy_loss. Parameter gradients are accumulated in float32, and rounded once.

Sources: policy_loss; gradients in forward as in Liger Kernel, Hsu et al. 2024 (arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops.core import check, masked_loss
from rlhf_fast.ops.core.loss import Loss
from rlhf_fast.ops.head import _loss
from rlhf_fast.ops.head._loss import LossAndLogprobs
from rlhf_fast.ops.head.head import HeadLora, HeadOptions
from rlhf_fast.ops.policy import policy_loss as policy
from rlhf_fast.ops.policy.batch import check_reference
from rlhf_fast.ops.policy.policy_loss import Inputs, Plan, PolicyObjective

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(HeadOptions, total=False):
    """The options that do not change what linear_policy_loss returns."""

    objective: str | PolicyObjective
    ref_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    overlong: Tensor | None
    cu_seqlens: Tensor | None
    denominator: Tensor | float | None
    sequences: Tensor | float | None
    scratch_bytes: int | None


# fmt: off
@overload
def linear_policy_loss(hidden: Tensor, weight: Tensor, targets: Tensor, old_logprobs: Tensor | None, advantages: Tensor,
                       *, return_logprobs: Literal[False] = ..., **options: Unpack[Options]) -> Loss: ...
@overload
def linear_policy_loss(hidden: Tensor, weight: Tensor, targets: Tensor, old_logprobs: Tensor | None, advantages: Tensor,
                       *, return_logprobs: Literal[True], **options: Unpack[Options]) -> LossAndLogprobs: ...
# fmt: on
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
    head_lora: HeadLora | None = None,
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
) -> Loss | LossAndLogprobs:
    """The policy loss `objective` and its metrics, with gradients to hidden, weight, bias and head_lora.

    hidden: (B, T, D), or packed (N, D); weight: (V, D); bias: (V,) or None; head_lora: (A (R, D), B (V, R), scale) or
    None, added to the weight as scale B A. All but these of one type, float32, bfloat16, float16 or float64; a gradient
    is made for each tensor that requires one. targets: (B, T) or (N,) integer ids in [0, V).
    temperature, logit_scale, softcap: as in linear_logprobs. All else: as in policy_loss, whose `logprobs` and, where
    the objective looks at it, `entropy` are made here. old_logprobs: None on policy, as there.
    mask_count: how many rows the mask counts, or an upper bound: lets a GPU leave the others out (the CPU does so in
    any case). return_logprobs: also the log-probabilities, without gradient.
    chunk_tokens: rows of logits in one product (default: from tiles.TILE_BYTES). scratch_bytes: the most that is
    allocated at a time beside results and gradients, those of a head in float32 until the backward pass, 1 GiB by
    default; losses that take whole sequences hold as many rows of logits as fit.

    Returns (loss, metrics) as policy_loss, with return_logprobs (loss, metrics, logprobs). Raises ValueError or
    TypeError for what does not fit, IndexError on the CPU for a counted target outside [0, V).
    """
    objective = PolicyObjective.of(objective)
    if objective.exact_kl is not None:
        raise ValueError(f"kl_variant {objective.kl_variant} takes linear_kl and policy_loss: here are no hidden "
                         "states of the reference")  # fmt: skip
    name = resolve(f"linear_policy_loss of {objective.variant}", objective.kernels, hidden.device, backend)
    call = _loss.checked(
        hidden, weight, targets, bias, head_lora, temperature, logit_scale, softcap, mask, mask_count, chunk_tokens,
        scratch_bytes,
    )  # fmt: skip
    constants = _Constants(policy.per_token(advantages, call.shape), old_logprobs, ref_logprobs, sampler_logprobs)
    check.same_device(("hidden", hidden), ("advantages", advantages))
    constants = constants.planes(call.shape)
    check_reference(objective, ref_logprobs)
    plan = Plan.of(
        objective, hidden.detach()[..., 0], mask=call.mask(), overlong=overlong, cu_seqlens=cu_seqlens,
        denominator=denominator, sequences=sequences,
    )  # fmt: skip
    call = call.of_mask(plan.flags)
    together = call.coupling(coupling(objective), plan.cu_seqlens, one_slope(objective, sampler_logprobs))

    def of_logprobs(logprobs: Tensor, entropy: Tensor | None) -> Loss:
        return reference(logprobs, entropy, constants, plan, objective, name)

    def named(values: Tensor, logprobs: Tensor, entropy: Tensor | None) -> dict[str, Tensor]:
        return policy.named_metrics(objective, constants.inputs(logprobs, entropy), values)

    result = _loss.loss_and_logprobs(
        call, _run, (constants, plan, objective), together, of_logprobs, named, name,
        want_entropy=objective.entropy_coef > 0 or objective.entropy_fraction < 1,
        weighs_entropy=objective.entropy_coef > 0,
    )  # fmt: skip
    return result if return_logprobs else Loss(*result[:2])


def reference(
    logprobs: Tensor, entropy: Tensor | None, constants: _Constants, plan: Plan, objective: PolicyObjective,
    backend: str = "reference",
) -> Loss:  # fmt: skip
    """By definition, from what linear_logprobs gives; with a frozen head nothing is faster."""
    return policy.evaluate(objective, constants.inputs(logprobs, entropy), plan, backend=backend)


class _Constants(NamedTuple):
    """What policy_loss takes beside logprobs and entropy, one value per token."""

    advantages: Tensor
    old_logprobs: Tensor | None  # None: the logprobs that are made here
    ref_logprobs: Tensor | None
    sampler_logprobs: Tensor | None

    def planes(self, shape: torch.Size) -> _Constants:
        """(rows, columns) views. Raises where a tensor is not of `shape`."""
        masked_loss.floats(tuple(shape), "the shape of targets", **self._asdict())
        return _Constants(*[None if x is None else masked_loss.plane(masked_loss.constant(x)) for x in self])  # type: ignore[arg-type]

    def inputs(self, logprobs: Tensor, entropy: Tensor | None) -> Inputs:
        logprobs = logprobs.view(self.advantages.shape)
        old_logprobs = logprobs.detach() if self.old_logprobs is None else self.old_logprobs
        entropy = None if entropy is None else entropy.view(logprobs.shape)
        return Inputs(logprobs, old_logprobs, self.advantages, self.ref_logprobs, self.sampler_logprobs, entropy)


def coupling(objective: PolicyObjective) -> str:
    """Which rows the derivative of a token depends on, see _plan."""
    if objective.marks_tokens:
        return "batch"
    return "sequence" if objective.needs_sequences else "token"


def one_slope(objective: PolicyObjective, sampler_logprobs: Tensor | None) -> bool:
    """Whether d loss / d logprob is the same for all counted tokens of a sequence."""
    of_token = sampler_logprobs is not None and objective.correction_level == "token"
    others = objective.kl_coef > 0 or objective.entropy_coef > 0 or objective.off_policy_max_kl is not None
    return objective.function in ("gspo", "dro") and coupling(objective) == "sequence" and not (of_token or others)


def _evaluate(
    logprobs: Tensor, entropy: Tensor | None, constants: _Constants, plan: Plan, objective: PolicyObjective,
    backend: str,
) -> list[Tensor]:  # fmt: skip
    inputs = constants.inputs(logprobs, entropy)
    arguments = (*inputs, *policy.select(objective, inputs, plan), *policy.numbers(objective), backend)
    loss, metrics, *coefficients = torch.ops.rlhf_fast.policy_loss(*arguments)
    return [loss, metrics, *(c.view(-1) for c in coefficients)]


OPS = {"linear_policy_loss": tuple(policy.IMPLS)}
_run = _loss.register("linear_policy_loss", (_Constants, Plan, PolicyObjective), _evaluate, len(policy.METRICS))
