"""Liger's preference losses from hidden states: DPO and its relatives, CPO, SimPO, ORPO for pairs, KTO for answers.

Hidden states and targets of pairs are (2 B, T, D) and (2 B, T): the chosen sequences, then the rejected ones; a target
of ignore_index does not count. With c and r the log-probabilities of the two answers (sums, or averages over their
tokens), less those of the reference, count the chosen answers' tokens and h = beta (c - r):

    DPO, CPO, SimPO   mean of preference_loss's variant + alpha nll,              nll = -sum of chosen logprobs / count
    ORPO              mean of beta softplus(-log(odds(c) / odds(r))) + nll,       odds(x) = exp(x) / (1 - exp(x))
    KTO               mean of 1 - sigmoid(+-beta (logprob - ref logprob - kl)),   + for a desirable answer

forward returns (loss, metrics) as the peer does, the metrics without gradient. The means of logits, which the peer has
among them, run over padding too. An answer without a token has an average of 0, where the peer's is NaN.

Sources: those of preference_loss and unpaired_preference_loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fast import (
    PreferenceObjective,
    UnpairedPreferenceObjective,
    linear_preference_loss,
    preference_loss,
    unpaired_preference_loss,
)
from rlhf_fast.integrations.liger._head import Head

Result = tuple[Tensor, tuple[Tensor, ...]]
DPO_TYPES = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
)  # fmt: skip
CERTAIN = -1e-6  # the highest average log-probability whose odds are finite, as in preference_loss


class Pairs(NamedTuple):
    """Log-probabilities of B chosen and B rejected answers, (B,) each."""

    chosen: Tensor
    rejected: Tensor


class _PairLoss(torch.nn.Module):
    """What the losses of pairs share; the subclasses are dataclasses of the peer's options."""

    ignore_index: int
    beta: float
    compute_nll_loss: bool

    def __post_init__(self) -> None:
        super().__init__()

    def _preference(
        self, head: Head, target: Tensor, objective: PreferenceObjective, *, average: bool, alpha: float,
        reference: Pairs | None = None,
    ) -> Result:  # fmt: skip
        """average: whether the loss is of averages over tokens."""
        mask = self._mask(target)
        ref_chosen, ref_rejected = (None, None) if reference is None else reference
        shared: dict[str, Any] = {
            "ref_chosen": ref_chosen, "ref_rejected": ref_rejected,
            "reward_shift": head.hidden.new_zeros((), dtype=torch.float32),  # bco_pair's, of which the peer has none
        }  # fmt: skip
        if not self.compute_nll_loss and (objective.variant == "simpo" or not average):
            loss, _, logprobs = linear_preference_loss(  # type: ignore[misc]  # return_logprobs makes it three
                *head[:2], target, objective=objective, bias=head.bias, mask=mask,
                return_logprobs=True, **shared,
            )  # fmt: skip
            nll, answers = torch.zeros_like(loss), self._answers(logprobs, mask, average)
        else:
            logprobs = head.logprobs(target, mask)
            nll, answers = self._nll(head, target, logprobs), self._answers(logprobs, mask, average)
            one = torch.ones_like(answers.chosen)  # the averages are taken already
            loss, _ = preference_loss(*answers, objective=objective, chosen_lengths=one, rejected_lengths=one, **shared)
            loss = loss + alpha * nll
        return loss, self._metrics(head, answers, reference, nll)

    def _mask(self, target: Tensor) -> Tensor:
        if target.dim() != 2 or target.shape[0] % 2:
            raise ValueError(f"target must be (2 B, T), chosen then rejected, got {tuple(target.shape)}")
        return target != self.ignore_index

    def _answers(self, logprobs: Tensor, mask: Tensor, average: bool) -> Pairs:
        return Pairs(*_answer_logprobs(logprobs, mask, average).chunk(2))

    def _nll(self, head: Head, target: Tensor, logprobs: Tensor, nll_target: Tensor | None = None) -> Tensor:
        """(): over the chosen answers' tokens, or over the labels of nll_target for the chosen hidden states."""
        pairs = target.shape[0] // 2
        if not self.compute_nll_loss:
            return torch.zeros_like(logprobs[0, 0])
        if nll_target is None:
            labels, rows = target[:pairs], logprobs[:pairs]
        else:
            labels = nll_target[:pairs]
            rows = head.rows(slice(pairs)).logprobs(labels, labels != self.ignore_index)
        return -rows.sum() / (labels != self.ignore_index).sum().clamp(min=1)

    def _metrics(self, head: Head, answers: Pairs, reference: Pairs | None, nll: Tensor) -> tuple[Tensor, ...]:
        sums = head.logits_sums().chunk(2)
        logits = sums[0].shape[0] * head.hidden.shape[1] * head.weight.shape[0]
        zero = torch.zeros_like(answers.chosen)
        ref_chosen, ref_rejected = reference or (zero, zero)
        rewards = [self.beta * (answers.chosen - ref_chosen), self.beta * (answers.rejected - ref_rejected)]
        metrics = (*answers, *(x.sum() / logits for x in sums), nll, *rewards)
        return tuple(x.detach() for x in metrics)


def _answer_logprobs(logprobs: Tensor, mask: Tensor, average: bool) -> Tensor:
    """(B,) sums over the tokens of each answer, or averages."""
    sums = logprobs.sum(1)
    return sums / mask.sum(1).clamp(min=1) if average else sums


def _reference_logprobs(
    target: Tensor, mask: Tensor, average: bool, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """(B,) of the reference's answers."""
    if hidden is None or weight is None:
        raise ValueError("use_ref_model needs ref_input and ref_weight")
    with torch.no_grad():
        return _answer_logprobs(Head.of(hidden, weight, bias).logprobs(target, mask), mask, average)


@dataclass(eq=False, repr=False)
class LigerFusedLinearDPOLoss(_PairLoss):
    """DPO and its relatives (DPO_TYPES). average_log_prob: of averages over tokens instead of sums.

    label_smoothing is exo_pair's and robust's, in [0, 0.5); alpha weighs the NLL of compute_nll_loss. Raises ValueError
    for a loss_type or a smoothing that does not fit. Metrics: log-probabilities of chosen and rejected answers (B,),
    mean logits of both, NLL, rewards of both (B,).
    """

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    compute_nll_loss: bool = False
    compiled: bool = True
    use_ref_model: bool = True
    average_log_prob: bool = False
    chunk_size: int = 1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type not in DPO_TYPES:
            raise ValueError(f"Unsupported loss_type: {self.loss_type}. It must be one of {', '.join(DPO_TYPES)}")
        if self.loss_type == "exo_pair" and self.label_smoothing <= 0:
            raise ValueError(f"label_smoothing must be > 0 for loss_type='exo_pair', got {self.label_smoothing}")
        if self.loss_type == "robust" and not 0 <= self.label_smoothing < 0.5:
            message = f"label_smoothing must lie in [0.0, 0.5) for loss_type='robust', got {self.label_smoothing}"
            raise ValueError(message)
        smoothing = self.label_smoothing if self.loss_type in ("exo_pair", "robust") else 0.0
        self._objective = PreferenceObjective(
            self.loss_type, self.beta, smoothing, reference_free=not self.use_ref_model, discopop_tau=self.discopop_tau
        )

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None,
        ref_input: Tensor | None = None, ref_weight: Tensor | None = None, ref_bias: Tensor | None = None,
    ) -> Result:  # fmt: skip
        """lin_weight: (V, D); _input: (2 B, T, D); target: (2 B, T); ref_input: (2 B, T, E); ref_weight: (V, E)."""
        reference = None
        if self.use_ref_model:
            scored = _reference_logprobs(
                target, self._mask(target), self.average_log_prob, ref_input, ref_weight, ref_bias
            )  # fmt: skip
            reference = Pairs(*scored.chunk(2))
        head = Head.of(_input, lin_weight, bias)
        loss, metrics = self._preference(
            head, target, self._objective, average=self.average_log_prob, alpha=self.alpha, reference=reference
        )
        return loss + 1 if self.loss_type.startswith("apo") else loss, metrics  # ours leaves APO's constant out


@dataclass(eq=False, repr=False)
class LigerFusedLinearCPOLoss(_PairLoss):
    """CPO; metrics as of LigerFusedLinearDPOLoss."""

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True
    average_log_prob: bool = False
    chunk_size: int = 1

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Result:
        """lin_weight: (V, D); _input: (2 B, T, D); target: (2 B, T)."""
        head = Head.of(_input, lin_weight, bias)
        objective = PreferenceObjective("sigmoid", self.beta, self.label_smoothing, reference_free=True)
        return self._preference(head, target, objective, average=self.average_log_prob, alpha=self.alpha)


@dataclass(eq=False, repr=False)
class LigerFusedLinearSimPOLoss(_PairLoss):
    """SimPO; metrics as of LigerFusedLinearDPOLoss."""

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True
    gamma: float = 0.5
    chunk_size: int = 1

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Result:
        """lin_weight: (V, D); _input: (2 B, T, D); target: (2 B, T)."""
        head = Head.of(_input, lin_weight, bias)
        objective = PreferenceObjective("simpo", self.beta, self.label_smoothing, gamma=self.gamma)
        return self._preference(head, target, objective, average=True, alpha=self.alpha)


@dataclass(eq=False, repr=False)
class LigerFusedLinearORPOLoss(_PairLoss):
    """ORPO; metrics as of LigerFusedLinearDPOLoss, then the means of log sigmoid(log odds ratio) and of the latter."""

    ignore_index: int = -100
    beta: float = 0.1
    compute_nll_loss: bool = True
    compiled: bool = True
    chunk_size: int = 1

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> Result:  # fmt: skip
        """lin_weight: (V, D); _input: (2 B, T, D); target, nll_target: (2 B, T); the NLL takes the latter's labels."""
        head, mask = Head.of(_input, lin_weight, bias), self._mask(target)
        logprobs = head.logprobs(target, mask)
        answers, nll = self._answers(logprobs, mask, True), self._nll(head, target, logprobs, nll_target)
        chosen, rejected = (x.clamp(max=CERTAIN) for x in answers)
        log_odds = chosen - rejected - torch.log(torch.expm1(chosen) / torch.expm1(rejected))
        ratio = logsigmoid(log_odds)
        metrics = self._metrics(head, answers, None, nll)
        return nll - self.beta * ratio.mean(), (*metrics, ratio.mean().detach(), log_odds.mean().detach())


@dataclass(eq=False, repr=False)
class LigerFusedLinearKTOLoss(torch.nn.Module):
    """KTO of answers that are each desirable or not. average_log_prob: of averages over tokens instead of sums.

    Metrics: over the desirable and the undesirable answers the sums of log-probabilities, of logits and of rewards.
    """

    ignore_index: int = -100
    beta: float = 0.1
    compiled: bool = True
    use_ref_model: bool = False
    average_log_prob: bool = False
    chunk_size: int = 1

    def __post_init__(self) -> None:
        super().__init__()

    def forward(
        self, _input: Tensor, lin_weight: Tensor, target: Tensor, bias: Tensor | None = None,
        preference_labels: Tensor | None = None, ref_input: Tensor | None = None, ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None, kl: Tensor | None = None,
    ) -> Result:  # fmt: skip
        """_input: (B, T, D); lin_weight: (V, D); target: (B, T); preference_labels: (B,) bool, True for desirable.

        ref_input: (B, T, E); ref_weight: (V, E). kl: (), (1,) or (B,) in nats, a constant; where it is (B,) every
        answer has its own, as in the peer with chunk_size >= B.
        """
        if preference_labels is None:
            raise ValueError("preference_labels must be given, got None")
        head, mask = Head.of(_input, lin_weight, bias), target != self.ignore_index
        logprobs = _answer_logprobs(head.logprobs(target, mask), mask, self.average_log_prob)
        reference = torch.zeros_like(logprobs)
        if self.use_ref_model:
            reference = _reference_logprobs(target, mask, self.average_log_prob, ref_input, ref_weight, ref_bias)
        shifted = reference if kl is None else reference + kl.detach()
        objective = UnpairedPreferenceObjective("apo_zero_unpaired", self.beta)
        loss, _ = unpaired_preference_loss(logprobs, shifted, preference_labels, objective=objective)
        each = logprobs.detach(), head.logits_sums(), self.beta * (logprobs.detach() - reference)
        return loss, tuple((x * side).sum() for x in each for side in (preference_labels, ~preference_labels))
