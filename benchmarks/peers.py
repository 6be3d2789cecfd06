"""Other libraries' functions for the same jobs, with our signatures; a library that is not installed is left out.

Versions as pinned in the extra `peers`. Imports are made here, not at the top: each of them takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from benchmarks.harness import Contender

PACKAGES = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")


def installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def versions() -> dict[str, str]:
    """The version of every peer that is installed."""
    return {package: version(package) for package in PACKAGES if installed(package)}


def token_logprobs() -> dict[str, Contender]:
    if not installed("trl"):
        return {}
    from trl.trainer.utils import selective_log_softmax

    return {"trl": lambda x: [selective_log_softmax(x["logits"], x["targets"])]}


def token_logprobs_and_entropy() -> dict[str, Contender]:
    if not installed("trl"):
        return {}
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return {"trl": lambda x: list(selective_log_softmax_and_entropy(x["logits"], x["targets"]))}


def differentiable_token_logprobs() -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {}
    if installed("trl"):
        from trl.trainer.utils import selective_log_softmax

        found["trl"] = lambda logits, targets: selective_log_softmax(logits, targets)
    if installed("quack-kernels") and torch.cuda.is_available():
        from quack import cross_entropy

        found["quack"] = lambda logits, targets: (
            -cross_entropy(logits, targets, reduction="none", inplace_backward=True)
        )
    return found


def linear_logprobs() -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {}
    if installed("trl"):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32_768, None, 1.0, ())[0]

        found["trl"] = trl
    if torch.cuda.is_available() and installed("liger-kernel"):
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

        found["liger"] = lambda hidden, weight, targets: (
            -first(LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets))
        )
    if torch.cuda.is_available() and installed("cut-cross-entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["cce"] = lambda hidden, weight, targets: -linear_cross_entropy(hidden, weight, targets, reduction="none")
    return found


def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def linear_policy_loss(clip: float, sequences: int = 8) -> dict[str, Callable[..., Tensor]]:
    """Of `sequences` sequences of equal length, one advantage each, mean over the tokens."""
    if not installed("liger-kernel"):
        return {}
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=clip, epsilon_high=clip, loss_type="bnpo", temperature=1.0
    )

    def liger(hidden: Tensor, weight: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        padded = hidden.view(sequences, -1, hidden.shape[-1])
        ids, old, advantage = (x.view(sequences, -1) for x in (targets, old_logprobs, advantages))
        mask = torch.ones_like(ids)
        return loss(padded, weight, ids, mask, advantage[:, 0], old_per_token_logps=old)[0]

    return {"liger": liger}
