"""preference_loss of pairs whose data say by how much, or how surely, chosen is better.

    margin m:      L(h - m), for a loss L of the gap h of the implicit rewards alone; m in units of reward
    preference p:  p L(chosen, rejected) + (1 - p) L(rejected, chosen), the mean over a label of chance p

Sources: margins: Amini et al. 2024 (2402.10571, eq. 8); soft labels: for DPO the cross-entropy with p, for IPO the mean
over Bernoulli labels of Azar et al. 2023 (2310.12036, section 5).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.batches import Batch
from rlhf_fast.errors import UserError
from rlhf_fast.ops.core.loss import Loss
from rlhf_fast.ops.preference.objective import VARIANTS, PreferenceObjective
from rlhf_fast.ops.preference.preference_loss import preference_loss
from rlhf_fast.ops.preference.preference_weights import length_desensitized_weights, wpo_weights
from rlhf_fast.training.job import Job
from rlhf_fast.training.pairs import Pair
from rlhf_fast.training.supervised import hidden_of


def check_labels(pairs: Sequence[Pair], objective: PreferenceObjective) -> None:
    """UserError where the pairs have a margin or a preference that `objective` cannot take."""
    margins, preferences = (any(getattr(pair, name) is not None for pair in pairs) for name in ("margin", "preference"))
    if margins and preferences:
        raise UserError("the data has both a margin and a preference; drop one of the columns")
    fixed = [name for name, _ in objective.terms if not VARIANTS[name].diverges or not VARIANTS[name].reference]
    if margins and (fixed or len(objective.terms) > 1 or objective.reference_free):
        raise UserError(f"the data has a margin, which objective {objective.name} cannot take; drop the column")
    if margins and objective.divergence_variant != "reverse_kl":
        raise UserError(f"the data has a margin, which is of divergence_variant reverse_kl, not "
                        f"{objective.divergence_variant}; drop the column")  # fmt: skip
    if preferences and objective.looks_at("ranks"):
        raise UserError(f"the data has a preference, which objective {objective.name} cannot take: it takes its pairs "
                        "apart; drop the column")  # fmt: skip


def pair_loss(
    objective: PreferenceObjective,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    *,
    pairs: Sequence[Pair],
    lengths: Tensor,
    denominator: float,
    weights: Tensor | None = None,
) -> Loss:
    """The sum over B pairs, over `denominator`.

    logprobs, ref_logprobs: (2 B,) of the chosen answers, then the rejected ones; those of the reference None where the
    objective looks at none. lengths: (2 B,) tokens. weights: (B,), what each pair's loss is multiplied by.
    """
    margins = _numbers([pair.margin for pair in pairs], logprobs)
    preferences = _numbers([pair.preference for pair in pairs], logprobs)

    def evaluated(refs: Tensor | None, weights: Tensor | None, *, swapped: bool = False) -> Loss:
        chosen, rejected = _halves(logprobs, swapped)
        ref_chosen, ref_rejected = (None, None) if refs is None else _halves(refs, swapped)
        chosen_lengths, rejected_lengths = _halves(lengths, swapped)
        return preference_loss(
            chosen, rejected, ref_chosen, ref_rejected, objective=objective, chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths, weights=weights, denominator=denominator,
        )  # fmt: skip

    if preferences is not None:
        sure, unsure = (x if weights is None else x * weights for x in (preferences, 1 - preferences))
        loss, metrics = evaluated(ref_logprobs, sure)
        return Loss(loss + evaluated(ref_logprobs, unsure, swapped=True).loss, metrics)
    if margins is None:
        return evaluated(ref_logprobs, weights)
    assert ref_logprobs is not None  # check_labels
    counts = lengths.chunk(2)[0].clamp_min(1) if objective.looks_at("averaged") else 1
    raised = ref_logprobs + torch.cat([margins / objective.beta * counts, torch.zeros_like(margins)])
    return Loss(evaluated(raised, weights).loss, evaluated(ref_logprobs, weights).metrics)


def answer_logprobs(job: Job, config: Any, role: str, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """(2 B,): log-probabilities of the chosen, then the rejected answers, tokens weighed by config.ld_alpha; and (B,),
    the weights of their pairs by config.wpo."""
    hidden, weights = hidden_of(job, config, role, batch), None
    if config.wpo and role == "policy":
        logprobs, collisions = job.backbone.logprobs_and_collisions(
            hidden, batch.input_ids, batch.mask, mask_count=batch.count
        )
        weights = wpo_weights(logprobs, collisions, mask=batch.mask)
    else:
        logprobs = job.backbone.logprobs(hidden, batch.input_ids, batch.mask, mask_count=batch.count)
    if config.ld_alpha < 1:
        others = batch.mask.sum(1).roll(len(batch) // 2)
        logprobs = logprobs * length_desensitized_weights(batch.mask, others, alpha=config.ld_alpha)
    return logprobs.sum(1), weights


def _halves(x: Tensor, swapped: bool) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2)
    return (second, first) if swapped else (first, second)


def _numbers(column: Sequence[float | None], like: Tensor) -> Tensor | None:
    return None if column[0] is None else torch.tensor(column, dtype=torch.float32, device=like.device)
