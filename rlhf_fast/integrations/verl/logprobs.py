"""verl's log-probabilities and entropies, from logits and straight from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import linear_logprobs, token_logprobs
from rlhf_fast.integrations._tensors import entropy_of_logits

IGNORED = -100  # the label that flash-attn's cross-entropy, verl's choice on a GPU, counts as 0


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """log softmax(logits)[label], (...), of logits (..., V); 0 for the label -100; exact for confident tokens.

    On a GPU as verl with flash-attn: float32, and with `inplace_backward` the gradient overwrites the logits.
    Elsewhere as verl without: the type of the logits, which stay as they are.
    """
    on_gpu = logits.is_cuda
    logprobs = token_logprobs(logits, labels, mask=labels != IGNORED, inplace_backward=inplace_backward and on_gpu)
    return logprobs if on_gpu else logprobs.to(logits.dtype)


def logprobs_from_logits_v2(logits: Tensor, labels: Tensor) -> Tensor:
    """log softmax(logits)[label], (...), in the type of the logits (..., V); exact for confident tokens."""
    return token_logprobs(logits, labels).to(logits.dtype)


def logprobs_from_logits_naive(logits: Tensor, labels: Tensor) -> Tensor:
    """The same under verl's name for its log_softmax."""
    return token_logprobs(logits, labels).to(logits.dtype)


def logprobs_from_logits_flash_attn(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """log softmax(logits)[label], (N,) float32, of logits (N, V); 0 for the label -100; runs on the CPU as well.

    inplace_backward: the gradient is written over the logits.
    """
    return token_logprobs(logits, labels, mask=labels != IGNORED, inplace_backward=inplace_backward)


def calculate_sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
    """The sum of the squared probabilities, (...), in the type of the logits (..., V).

    One read of the logits where no gradient is asked for; with one, by its definition in plain PyTorch, in float32 at
    least.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        wide = torch.promote_types(logits.dtype, torch.float32)
        return logits.softmax(-1, dtype=wide).square().sum(-1).to(logits.dtype)
    any_id = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs(logits, any_id, return_stats=True)[1].sum_p_squared.to(logits.dtype)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, (...), in the type of the logits (..., V)."""
    return entropy_of_logits(logits).to(logits.dtype)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """The same in float32. chunk_size bounds verl's copies in float32; ours makes none and does not look at it."""
    return entropy_of_logits(logits).float()


# --- From hidden states -----------------------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, reduction: str = "none",
    dist_process_group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(log-probabilities, entropies) of hidden (..., D) under the head weight (V, D), both (N,) float32, in nats.

    labels: (...), N in all. reduction: none, or sum or mean of the log-probabilities, (); the entropies stay (N,).
    dist_process_group: weight is this rank's rows, labels are ids of the whole vocabulary. As in verl, the gradients of
    `hidden` add up over the ranks to the whole one; the caller sums them.
    Raises ValueError for another reduction, and what `linear_logprobs` raises.
    """
    reduce = _REDUCTIONS.get(reduction.lower())
    if reduce is None:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    rows = hidden.reshape(-1, hidden.shape[-1])
    if dist_process_group is not None:
        rows = _ShareOfGradient.apply(rows, dist_process_group.size())
    with torch.autocast(hidden.device.type, enabled=False):  # which would round the logits
        logprobs, entropy = linear_logprobs(
            rows, weight, labels.reshape(-1), temperature=temperature, return_entropy=True,
            process_group=dist_process_group,
        )  # fmt: skip
    return reduce(logprobs), entropy


class LinearCrossEntropy:
    """linear_cross_entropy under the name of verl's autograd function: `apply` alone."""

    apply = staticmethod(linear_cross_entropy)


_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "sum": torch.sum, "mean": torch.mean}


class _ShareOfGradient(torch.autograd.Function):
    """x, whose gradient is one rank's share: ours is whole on every rank, verl's is one to be summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world_size: int) -> Tensor:
        ctx.world_size = world_size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] / ctx.world_size, None


class FusedLinearForPPO(torch.nn.Module):
    """verl's LM head for PPO: (log-probabilities float32, entropies) without the logits.

    chunk_size: rows of logits that exist at a time. impl_backend: "torch" gives entropies in the type of the hidden
    states, "liger" in float32; the computation is the same.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(f"impl_backend must be torch or liger, got {impl_backend!r}")
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """hidden_states: (N, D) or (B, T, D); vocab_weights: (V, D); input_ids: (N,) or (B, T), the shape of both
        results."""
        logprobs, entropy = FusedLinearForPPOFunction.apply(
            hidden_states, vocab_weights, input_ids.to(torch.int64), temperature, self.chunk_size
        )
        return logprobs, entropy.float() if self.impl_backend == "liger" else entropy


class FusedLinearForPPOFunction:
    """What FusedLinearForPPO computes, under the name of verl's autograd function."""

    @staticmethod
    def apply(
        hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0,
        chunk_size: int = 512,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if hidden_states.dim() not in (2, 3):
            raise ValueError(f"hidden_states must be (N, D) or (B, T, D), got {tuple(hidden_states.shape)}")
        entropy_dtype = hidden_states.dtype
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):  # of the operands, as in verl, but not of the logits
            dtype = torch.get_autocast_dtype(device)
            hidden_states, vocab_weights = hidden_states.to(dtype), vocab_weights.to(dtype)
        with torch.autocast(device, enabled=False):
            logprobs, entropy = linear_logprobs(
                hidden_states, vocab_weights, input_ids, temperature=float(temperature), return_entropy=True,
                chunk_tokens=chunk_size,
            )  # fmt: skip
        return logprobs.float(), entropy.to(entropy_dtype)


FROM_LOGITS = (
    logprobs_from_logits, logprobs_from_logits_v2, logprobs_from_logits_naive, logprobs_from_logits_flash_attn,
    calculate_sum_pi_squared_from_logits, entropy_from_logits, entropy_from_logits_with_chunking,
)  # fmt: skip
FUSED_LINEAR = (FusedLinearForPPO, FusedLinearForPPOFunction)
LINEAR_CROSS_ENTROPY = (linear_cross_entropy, LinearCrossEntropy)
