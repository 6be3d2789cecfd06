"""Losses per token from log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

import rlhf_fast
from benchmarks.cases.sizes import Sizes, backends_of, generator, ragged_mask, with_gradient
from benchmarks.harness import Bar, Case, Inputs
from benchmarks.peers import CLIP

LOW, HIGH = 1 - CLIP, 1 + CLIP


def eager(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The clipped surrogate with the metrics that policy_loss gives: clip fractions, approximate KL, ratio."""
    counts = mask.to(logprobs.dtype)
    total = counts.sum()
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(LOW, HIGH) * advantages
    loss = (-torch.minimum(unclipped, clipped) * counts).sum() / total
    with torch.no_grad():
        metrics["clip_fraction_low"] = (((ratio < LOW) & (advantages < 0)) * counts).sum() / total
        metrics["clip_fraction_high"] = (((ratio > HIGH) & (advantages > 0)) * counts).sum() / total
        metrics["clip_fraction"] = ((clipped < unclipped) * counts).sum() / total
        metrics["approx_kl"] = ((torch.expm1(log_ratio) - log_ratio) * counts).sum() / total
        metrics["ratio_mean"] = (ratio * counts).sum() / total
        metrics["ratio_max"] = torch.where(mask != 0, ratio, -torch.inf).max()
        metrics["ratio_min"] = torch.where(mask != 0, ratio, torch.inf).min()
    return loss


metrics: dict[str, Tensor] = {}  # where a trainer's log would take them


def cases(sizes: Sizes, device: str) -> list[Case]:
    def draw() -> Inputs:
        g = generator(device)
        old, change, advantages = (torch.randn(sizes.B, sizes.T, generator=g, device=device) for _ in range(3))
        old = -old.abs() - 0.1
        mask = ragged_mask(sizes.B, sizes.T, device)
        return {"logprobs": old + 0.1 * change, "old_logprobs": old, "advantages": advantages, "mask": mask}

    def exact(inputs: Inputs, rows: int) -> list[Tensor]:
        double = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        return [x[:rows] if x.dim() else x for x in with_gradient(eager, "logprobs")(double)]

    contenders = {"eager": with_gradient(eager, "logprobs")}
    for name in backends_of("policy_loss", device):
        contenders[name] = with_gradient(
            lambda name=name, **inputs: rlhf_fast.policy_loss(**inputs, backend=name)[0], "logprobs"
        )
    return [
        Case(
            "policy_loss, forward + backward, metrics", f"B={sizes.B} T={sizes.T} float32", draw, exact, contenders,
            bars=(Bar("cpu", "eager", 5),) if device == "cpu" else (),
            op="policy_loss", passes="backward", sizes={"N": sizes.B * sizes.T, "s": 4},
        )
    ]  # fmt: skip
