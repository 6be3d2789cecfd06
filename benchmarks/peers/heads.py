"""Other libraries' log-probabilities, and losses of hidden states and a head."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.settings import BETA, CLIP, Function
from rlhf_fast.testing.stand_ins import stand_ins


def need_gpu() -> None:
    if not torch.cuda.is_available():
        raise ImportError("needs a GPU")


def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def trl_token_logprobs() -> Function:
    from trl.trainer.utils import selective_log_softmax

    return lambda logits, targets: selective_log_softmax(logits, targets)


def trl_token_logprobs_and_entropy() -> Function:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return lambda logits, targets: selective_log_softmax_and_entropy(logits, targets)


def verl_token_logprobs() -> Function:
    from verl.utils.torch_functional import logprobs_from_logits

    return lambda logits, targets: logprobs_from_logits(logits, targets)


def openrlhf_token_logprobs() -> Function:
    with stand_ins():
        from openrlhf.models.utils import log_probs_from_logits

    return lambda logits, targets: log_probs_from_logits(logits, targets)


def torchtune_token_logprobs() -> Function:
    from torchtune.rlhf import logits_to_logprobs

    return lambda logits, targets: logits_to_logprobs(logits[None], targets[None])[0]


def quack_token_logprobs() -> Function:
    need_gpu()
    from quack import cross_entropy

    return lambda logits, targets: -cross_entropy(logits, targets, reduction="none", inplace_backward=True)


def trl_linear_logprobs() -> Function:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return lambda hidden, weight, targets: ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, 32_768, None, 1.0, ()
    )[0]


def verl_linear_logprobs() -> Function:
    from verl.utils.experimental.torch_functional import FusedLinearForPPOFunction

    return lambda hidden, weight, targets: FusedLinearForPPOFunction.apply(hidden, weight, targets, 1.0, 512)[0]


def liger_linear_logprobs() -> Function:
    need_gpu()
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return lambda hidden, weight, targets: (
        -first(LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets))
    )


def cce_linear_logprobs() -> Function:
    need_gpu()
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: -linear_cross_entropy(hidden, weight, targets, reduction="none")


def torch_mean_nll() -> Function:
    from torch.nn import LinearCrossEntropyOptions  # torch >= 2.13

    options = LinearCrossEntropyOptions()
    return lambda hidden, weight, targets: torch.nn.functional.linear_cross_entropy(
        hidden, weight, targets, options=options
    )


def cce_mean_nll() -> Function:
    need_gpu()
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets)


def quack_mean_nll() -> Function:
    need_gpu()
    from quack import chunked_linear_cross_entropy

    return lambda hidden, weight, targets: chunked_linear_cross_entropy(hidden, weight, targets)


def liger_mean_nll() -> Function:
    need_gpu()
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda hidden, weight, targets: first(LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets))


def trl_linear_kl() -> Function:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return lambda hidden, ref_hidden, weight: ChunkedDivergenceFunction.apply(
        hidden, weight, None, ref_hidden, weight.detach(), None, 1.0
    )[0]


def liger_linear_policy_loss() -> Function:
    """Of 8 sequences of equal length, one advantage each, mean over the tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="bnpo", temperature=1.0
    )

    def liger(hidden: Tensor, weight: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        padded = hidden.view(8, -1, hidden.shape[-1])
        ids, old, advantage = (x.view(8, -1) for x in (targets, old_logprobs, advantages))
        mask = torch.ones_like(ids)
        return loss(padded, weight, ids, mask, advantage[:, 0], old_per_token_logps=old)[0]

    return liger


def liger_linear_preference_loss() -> Function:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)
    return lambda hidden, weight, targets: loss(weight, hidden, targets)[0]
