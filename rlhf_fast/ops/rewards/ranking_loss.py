"""ranking_loss: the loss of a reward model on K ranked answers to a prompt, ties included.

With r the rewards of a prompt's answers, rank 1 the best, equal ranks a tie:

    plackett_luce:  L = sum over answers j of log(sum over i of w_ij exp(r_i)) - r_j
                    w_ij = 1 where i is ranked worse than j, 1 - k_j / m_j where i is tied with j (or is j), else 0
                    m_j: the size of j's tie, k_j = 0, 1, ..., m_j - 1: the place of j in it (Efron's ties)
    breslow:        the same with k_j = 0
    pairwise:       L = mean over the pairs of answers of different ranks of softplus(r_worse - r_better)
    loss = sum over the prompts of L / denominator

Without ties plackett_luce and breslow are the likelihood of the ranking, drawn best first. In a tie, Efron's form
takes out of the rest's sum, for each answer drawn, an average one of the tie; Breslow's takes none.

Derivative. With P_ij = w_ij exp(r_i) / sum over i' of w_i'j exp(r_i') (pairwise: sigmoid(r_i - r_j) / pairs, for i
ranked worse than j), j is pulled up by what it pulls the others i down:
d L / d r_i = sum over j != i of P_ij - sum over i' != i of P_i'i.

Metric: accuracy, the mean over the prompts of the share of pairs of different ranks whose better answer has the greater
reward (0 for a prompt without such a pair).

Numerics. All exponentials are of differences to the greatest reward that counts, whose own term is left out of the sum
and put back through log1p: the loss and the gradient of a ranking told with confidence keep their digits. Nothing is
subtracted in the sums, ties included. Computed in float32 (float64 for float64).

Cost: 2 K^2 exponentials per prompt; K rewards and ranks read, three numbers written per answer; two launches, sums.

Sources: Plackett 1975; Luce 1959; for K-wise rewards Zhu et al. 2023 (arXiv 2301.11270); ties: Efron 1977, "The
efficiency of Cox's likelihood function for censored data", and Breslow 1974, "Covariance analysis of censored survival
data", whose partial likelihood is this one; all pairs of a prompt as one element: InstructGPT, Ouyang et al. 2022
(arXiv 2203.02155, eq. 1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlhf_fast.backends import DTYPE_CODES, native, packed, resolve, threads, triton_kernels
from rlhf_fast.ops.core import check, masked_loss, registration
from rlhf_fast.ops.core.groups import Groups, check_groups, ids_of
from rlhf_fast.ops.core.loss import Loss


@check.takes_numbers
def ranking_loss(
    rewards: Tensor,
    ranks: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    variant: str = "plackett_luce",
    denominator: Tensor | float | None = None,
    backend: str | None = None,
) -> Loss:
    """The mean loss over the prompts and its metrics; `rewards` gets a gradient.

    rewards: (N,) of all answers of all prompts; float32, bfloat16, float16 or float64, any strides.
    ranks: (N,) int64 or int32, smaller is better, equal is a tie; only their order within a prompt counts.
    group_size: the answers of a prompt are consecutive, N a multiple of it; or else
    group_ids: (N,) int64 or int32, any values in any order; equal ids make a prompt, of any number of answers.
    variant: one of VARIANTS. denominator: what the sums are divided by, a number or a 0-d tensor: the prompts of the
    whole batch, where this call is a part of it. Default: the prompts of this call.

    Returns (loss, metrics): 0-d, float32 (float64 for float64), the metric detached. No answer gives a loss of 0.
    Raises ValueError or TypeError for what does not fit.
    """
    check.that(rewards.dim() == 1, "rewards", "(N,)", rewards)
    check.floating("rewards", rewards)
    check.shaped("ranks", ranks, tuple(rewards.shape), "(N,)")
    ranks = check.ids("ranks", ranks)
    check.one_of("variant", variant, VARIANTS)
    check.same_device(("rewards", rewards), ("ranks", ranks))
    check_groups(("rewards", rewards), group_size, group_ids)
    groups = Groups.of(group_size, group_ids)
    total = masked_loss.denominator_tensor(denominator, rewards)
    if total is None and groups.offsets is not None:
        total = (groups.offsets[:-1] < rewards.shape[0]).sum().to(check.compute_dtype(rewards.dtype))
    function = Function(variant, total)
    name = resolve("ranking_loss", IMPLS, rewards.device, backend)
    if name == "reference":
        loss, accuracy = reference(rewards, ranks, ids_of(rewards, group_size, group_ids), variant=variant)
        divisor = function.divisor(groups.count(rewards))
        divisor = divisor if isinstance(divisor, Tensor) else loss.new_full((), divisor)
        return Loss(loss / divisor, {"accuracy": (accuracy / divisor).detach()})
    loss, accuracy, _ = _run(Answers(rewards.contiguous(), ranks), groups, function, name)
    return Loss(loss, {"accuracy": accuracy.detach()})


class Answers(NamedTuple):
    rewards: Tensor  # (N,)
    ranks: Tensor  # (N,) int64


class Function(NamedTuple):
    variant: str
    denominator: Tensor | None  # (): what the sums are divided by; the number of prompts where it is None

    def divisor(self, prompts: int) -> Tensor | int:
        """What the sums are divided by, 1 for 0: where there is no answer, every sum is 0."""
        return max(prompts, 1) if self.denominator is None else torch.where(self.denominator == 0, 1, self.denominator)


def reference(rewards: Tensor, ranks: Tensor, group_ids: Tensor, *, variant: str) -> tuple[Tensor, Tensor]:
    """The sums over the prompts of loss and accuracy by definition, differentiable any number of times."""
    r = rewards.to(check.compute_dtype(rewards.dtype))
    same = group_ids[:, None] == group_ids[None, :]
    worse = same & (ranks[:, None] > ranks[None, :])  # [i, j]: i is ranked worse than j
    tied = same & (ranks[:, None] == ranks[None, :])
    gap = torch.where(r[:, None] == r[None, :], 0.0, r[:, None] - r[None, :])  # equal ones of -inf are no NaN apart
    pairs = torch.where(same, worse.sum(0)[None, :], 0).sum(1).clamp_min(1)  # of every answer's prompt
    accuracy = (torch.where(worse & (gap < 0), 1.0, 0.0).to(r.dtype) / pairs).sum()
    return VARIANTS[variant](gap, worse, tied, pairs).sum(), accuracy


def plackett_luce(gap: Tensor, worse: Tensor, tied: Tensor, pairs: Tensor) -> Tensor:
    left = 1 - tied.triu(1).sum(0).to(gap.dtype) / tied.sum(0)
    return _log_total(gap, torch.where(tied, left, worse.to(gap.dtype)))


def breslow(gap: Tensor, worse: Tensor, tied: Tensor, pairs: Tensor) -> Tensor:
    return _log_total(gap, (worse | tied).to(gap.dtype))


def _log_total(gap: Tensor, weight: Tensor) -> Tensor:
    """log sum_i weight_ij exp(gap_ij); a weight of 0 takes an infinite gap out."""
    return torch.logsumexp(torch.where(weight > 0, gap + weight.log(), -torch.inf), 0)


def pairwise(gap: Tensor, worse: Tensor, tied: Tensor, pairs: Tensor) -> Tensor:
    return (torch.where(worse, softplus(gap), 0) / pairs).sum(0)


# (gap, worse, tied, pairs), [i, j] for answers i and j of all prompts, pairs (N,) -> the loss of every answer
VARIANTS = {"plackett_luce": plackett_luce, "breslow": breslow, "pairwise": pairwise}


def _cpu(answers: Answers, groups: Groups, function: Function, outputs: list[Tensor]) -> None:
    rewards, ranks = answers
    native().ranking_loss(
        function.variant, packed(rewards), DTYPE_CODES[rewards.dtype], packed(ranks), packed(groups.order),
        packed(groups.offsets), groups.size, groups.count(rewards), packed(function.denominator),
        [packed(x) for x in outputs], threads(),
    )  # fmt: skip


def _triton(answers: Answers, groups: Groups, function: Function, outputs: list[Tensor]) -> None:
    loss, accuracy, gradient = outputs
    of_groups = gradient.new_empty(2, groups.count(gradient))
    triton_kernels("ranking_loss").ranking_loss(*answers, *groups, function.variant, [*of_groups, gradient])
    divisor = function.divisor(groups.count(gradient))
    for mean, parts in zip((loss, accuracy), of_groups, strict=True):
        torch.div(parts.sum(), divisor, out=mean)
    gradient.div_(divisor)


IMPLS = {"cpu": _cpu, "triton": _triton}
OPS = {"ranking_loss": tuple(IMPLS)}


def _outputs(answers: Answers, *_: object) -> list[Tensor]:
    """[loss (), accuracy (), d loss / d rewards (N,)]"""
    rewards, dtype = answers.rewards, check.compute_dtype(answers.rewards.dtype)
    return [rewards.new_empty(shape, dtype=dtype) for shape in ((), (), rewards.shape)]


_run = registration.op(
    "ranking_loss", (Answers, Groups, Function), registration.filled(IMPLS, _outputs), fake=_outputs,
    differentiable=("rewards",), saves_results=slice(2, None), backward=masked_loss.scaled_gradients(("rewards",)),
    returned=2,
)  # fmt: skip
