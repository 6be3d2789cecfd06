"""linear_preference_loss: a loss of chosen and rejected sequences straight from hidden states, without their logits.

    logprobs = linear_logprobs(hidden, weight, targets, ...)
    chosen, rejected = the sums of logprobs over each sequence
    loss = preference_loss(chosen, rejected, ref_chosen, ref_rejected, ...)

with the same result, but the gradient is made while the logits are there. With c_s = d loss / d (sum of sequence s),
z the transformed logits and p = softmax(z), for a token t of sequence s

    d loss / d z_tj = c_s (1[j = y_t] - p_tj)
    d loss / d hidden = (d loss / d logits) @ weight,          d loss / d weight = (d loss / d logits)^T @ hidden

Cost, with P = one N x D x V product (2 N D V FLOPs): c_s is known once both sequences of a pair are, so whole pairs are
taken at a time. A trained head takes 3P while `scratch_bytes` holds the logits of a pair, or two gradients of the head
and a tile, and up to 4P beyond that; a frozen one 2P; without gradients P. aot, aot_unpaired and bco_pair (without a
given reward_shift) couple the pairs of the call: all of them are taken at a time. See _sweep for scratch and for
rows that cost nothing, linear_policy_loss for what a GPU does with a trained head of half precision.

Numerics: those of linear_logprobs and preference_loss; the sums are made in float64 and in a fixed order.

Sources: preference_loss; gradients in forward as in Liger Kernel, Hsu et al. 2024 (arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops.core import check, masked_loss
from rlhf_fast.ops.core.loss import Loss
from rlhf_fast.ops.core.sequences import check_bounds, sequence_ids
from rlhf_fast.ops.head import _loss
from rlhf_fast.ops.head._loss import LossAndLogprobs
from rlhf_fast.ops.head.head import Head, HeadLora, HeadOptions, checked_head, operands
from rlhf_fast.ops.head.linear_logprobs import scored
from rlhf_fast.ops.preference import preference_loss as preference
from rlhf_fast.ops.preference.objective import PairConstants
from rlhf_fast.ops.preference.preference_loss import Pairs, PreferenceObjective
from rlhf_fast.ops.tokens.token_logprobs import Wanted

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(HeadOptions, total=False):
    """The options that do not change what linear_preference_loss returns."""

    objective: str | PreferenceObjective
    cu_seqlens: Tensor | None
    ref_chosen: Tensor | None
    ref_rejected: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    weights: Tensor | None
    reward_shift: Tensor | None
    chosen_advantages: Tensor | None
    rejected_advantages: Tensor | None
    denominator: Tensor | float | None
    scratch_bytes: int | None


# fmt: off
@overload
def linear_preference_loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, return_logprobs: Literal[False] = ...,
                           **options: Unpack[Options]) -> Loss: ...
@overload
def linear_preference_loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, return_logprobs: Literal[True],
                           **options: Unpack[Options]) -> LossAndLogprobs: ...
# fmt: on
@check.takes_numbers
def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    objective: str | PreferenceObjective = "sigmoid",
    bias: Tensor | None = None,
    head_lora: HeadLora | None = None,
    mask: Tensor | None = None,
    mask_count: int | None = None,
    cu_seqlens: Tensor | None = None,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    weights: Tensor | None = None,
    reward_shift: Tensor | None = None,
    chosen_advantages: Tensor | None = None,
    rejected_advantages: Tensor | None = None,
    denominator: Tensor | float | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_logprobs: bool = False,
    chunk_tokens: int | None = None,
    scratch_bytes: int | None = None,
    backend: str | None = None,
) -> Loss | LossAndLogprobs:
    """The preference loss `objective` of B pairs and its metrics, with gradients to hidden, weight, bias, head_lora.

    hidden: (2 B, T, D), the B chosen sequences and then the rejected ones in the same order, or packed (N, D) with
    cu_seqlens (2 B + 1,) int64 or int32. targets: (2 B, T) or (N,) integer ids in [0, V). mask: the shape of targets,
    nonzero counts: the tokens of the answers. weight, bias, head_lora, mask_count, temperature, logit_scale, softcap:
    as in linear_policy_loss.
    ref_chosen, ref_rejected: (B,) sums of the reference's log-probabilities, in nats; or ref_hidden, of the shape of
    hidden, to make them here with ref_weight and ref_bias (weight and bias where ref_weight is not given). Variants
    without a reference need none. weights, reward_shift, chosen_advantages, rejected_advantages, denominator: as in
    preference_loss, whose chosen, rejected and lengths are made here.
    return_logprobs: also the log-probabilities per token, without gradient.
    chunk_tokens: rows of logits in one product (default: from tiles.TILE_BYTES). scratch_bytes: the most that is
    allocated at a time beside results and gradients, 1 GiB by default; it decides how many pairs are taken at a time.

    Returns (loss, metrics) as preference_loss, with return_logprobs (loss, metrics, logprobs). Raises ValueError or
    TypeError for what does not fit, IndexError on the CPU for a counted target outside [0, V).
    """
    objective = PreferenceObjective.of(objective)
    name = resolve(f"linear_preference_loss of {objective.name}", objective.kernels, hidden.device, backend)
    call = _loss.checked(
        hidden, weight, targets, bias, head_lora, temperature, logit_scale, softcap, mask, mask_count, chunk_tokens,
        scratch_bytes,
    )  # fmt: skip
    check.same_device(("hidden", hidden), ("cu_seqlens", cu_seqlens))
    cu_seqlens = _checked_sequences(call.shape, cu_seqlens)
    if ref_hidden is not None:
        ref_logprobs = _reference_logprobs(call, ref_hidden, ref_weight, ref_bias, name)
        ref_chosen, ref_rejected = sequence_sums(ref_logprobs, cu_seqlens).chunk(2)
    counts = call.mask()
    counts = torch.ones_like(targets) if counts is None else counts
    chosen_lengths, rejected_lengths = sequence_sums(counts.double(), cu_seqlens).chunk(2)
    constants = preference.checked_constants(
        PairConstants(ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, weights, reward_shift,
                      chosen_advantages, rejected_advantages),
        ("the pairs", chosen_lengths), objective,
    )  # fmt: skip
    total = masked_loss.denominator_tensor(denominator, hidden)
    kind = coupling(objective, constants.reward_shift)

    def of_logprobs(logprobs: Tensor, entropy: Tensor | None) -> Loss:
        sums = _reference_sums if name == "reference" else sequence_sums
        chosen, rejected = sums(logprobs.view(call.shape), cu_seqlens).chunk(2)
        pairs = Pairs(chosen, rejected, *constants)
        return preference.evaluate(pairs, objective, total, backend=name)

    def named(values: Tensor, logprobs: Tensor, entropy: Tensor | None) -> dict[str, Tensor]:
        return dict(zip(preference.METRICS, values.unbind(0), strict=True))

    sequences = _Sequences(2 * chosen_lengths.shape[0], cu_seqlens, total)
    together = call.coupling(kind, cu_seqlens, one_slope=kind == "pair")
    result = _loss.loss_and_logprobs(
        call, _run, (constants, sequences, objective), together, of_logprobs, named, name
    )  # fmt: skip
    return result if return_logprobs else Loss(*result[:2])


def coupling(objective: PreferenceObjective, reward_shift: Tensor | None) -> str:
    """Which rows the derivative of a token depends on, see _plan."""
    names = dict(objective.terms)
    shifted = "bco_pair" in names and reward_shift is None
    return "batch" if shifted or "aot" in names or "aot_unpaired" in names else "pair"


def _checked_sequences(shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor | None:
    """cu_seqlens as int64. Raises where `shape` is not that of chosen and rejected sequences."""
    if cu_seqlens is None:
        if len(shape) != 2 or shape[0] % 2:
            raise ValueError(f"targets must be (2 B, T), chosen then rejected, or have cu_seqlens, got {tuple(shape)}")
        return None
    if len(shape) != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] % 2 == 0:
        raise ValueError(
            f"cu_seqlens must be (2 B + 1,) and targets (N,), got {tuple(cu_seqlens.shape)} and {tuple(shape)}"
        )
    cu_seqlens = check.ids("cu_seqlens", cu_seqlens)
    check_bounds(cu_seqlens, shape[0], cover_all=True)
    return cu_seqlens


def _reference_logprobs(
    call: _loss.Call, ref_hidden: Tensor, ref_weight: Tensor | None, ref_bias: Tensor | None, backend: str
) -> Tensor:
    """In the shape of targets, without gradient."""
    if ref_weight is None:
        ref_weight, ref_bias = call.head[:2]
    ref_hidden, ref_weight, ref_bias, _ = operands(ref_hidden, ref_weight, ref_bias, None)
    ref_head: Head = checked_head(ref_hidden, ref_weight, ref_bias, prefix="ref_")
    check.shaped("ref_hidden", ref_hidden, (*call.shape, ref_hidden.shape[-1]), "(*hidden.shape[:-1], D)")
    check.same_device(("hidden", call.rows.hidden), ("ref_hidden", ref_hidden))
    rows = call.rows._replace(hidden=check.rows(ref_hidden))
    with torch.no_grad():
        return scored(ref_head, rows, call.transform, Wanted(False, False, False), backend)[0].view(call.shape)


def sequence_sums(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(2 B,) sums of x (2 B, T) or packed (N,), made in float64; in one order, unlike index_add on a GPU."""
    if cu_seqlens is None:
        return x.sum(1, dtype=torch.float64).to(x.dtype)
    return torch.segment_reduce(x.double(), "sum", offsets=cu_seqlens, unsafe=True).to(x.dtype)


def _reference_sums(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The same, differentiable any number of times."""
    if cu_seqlens is None:
        return x.sum(1)
    return x.new_zeros(cu_seqlens.shape[0] - 1).index_add(0, sequence_ids(x, cu_seqlens), x)


class _Sequences(NamedTuple):
    sequences: int  # 2 B
    cu_seqlens: Tensor | None  # (2 B + 1,); None: the rows are of one length
    denominator: Tensor | None


def _evaluate(
    logprobs: Tensor, entropy: Tensor | None, constants: PairConstants, sequences: _Sequences,
    objective: PreferenceObjective, backend: str,
) -> list[Tensor]:  # fmt: skip
    count, cu_seqlens, denominator = sequences
    shape = count, logprobs.shape[0] // max(1, count)
    sums = sequence_sums(logprobs if cu_seqlens is not None else logprobs.view(shape), cu_seqlens)
    chosen, rejected = sums.chunk(2)
    pairs = Pairs(chosen, rejected, *constants)
    loss, metrics, *slopes = preference.coefficients(pairs, objective, denominator, backend)
    slope = torch.cat(slopes)
    if cu_seqlens is None:
        slope = slope[:, None].expand(shape).reshape(-1)
    else:
        slope = slope[sequence_ids(logprobs, cu_seqlens)]
    return [loss, torch.stack([metrics[name] for name in preference.METRICS]), slope]


OPS = {"linear_preference_loss": tuple(preference.IMPLS)}
_run = _loss.register(
    "linear_preference_loss", (PairConstants, _Sequences, PreferenceObjective), _evaluate, len(preference.METRICS)
)
