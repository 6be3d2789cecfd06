"""What every op computes and at least costs: the one table from which cases, shares of the limit and pages are made.

A cost is a sum of products of sizes, in text that is also evaluated: "2 Ns + 9 N" is 2 * N * s + 9 * N, with N tokens,
elements or pairs, V vocabulary, D hidden size, R rank, K bins or answers, s bytes per input element, and P = 2 NDV, the
FLOPs of one product of hidden states and head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

PASSES = ("forward", "backward", "trained head")


class Work(NamedTuple):
    flops: int = 0
    bytes: int = 0


class Cost(NamedTuple):
    """(FLOPs, bytes read and written) of the forward pass, what backward adds, and what a trained head adds to that."""

    formula: str
    forward: tuple[str, str]
    backward: tuple[str, str] | None = None
    trained: tuple[str, str] | None = None


HEAD = (("P", "NDs + DVs"), ("P", "NDs"), ("P", "DVs"))  # a linear op's three products

COSTS: dict[str, Cost] = {
    "distributional_value_loss": Cost(
        "-Σ p log softmax(z), p a Gaussian's histogram", ("30 NK", "NKs + Ns + N"), ("NK", "NKs")
    ),
    "discounted_returns": Cost("R = r + γR'", ("3 N", "Ns + 5 N")),
    "gae": Cost("A = δ + γλA', δ = r + γV' - V", ("10 N", "2 Ns + 9 N")),
    "group_advantages": Cost("r - a baseline of its group, over a spread", ("6 N", "Ns + 4 N")),
    "kl_estimate": Cost("k1 = x, k2 = x²/2, k3 = exp(-x) - 1 + x; x = log p/q", ("40 N", "2 Ns + 4 N"), ("N", "4 N")),
    "linear_kl": Cost("D(softmax z, softmax z') of both heads", ("2 P", "2 NDs + DVs"), ("P", "NDs"), ("P", "DVs")),
    "linear_logprobs": Cost("log softmax(h Wᵀ)[y]", *HEAD),
    "linear_policy_loss": Cost("policy_loss(linear_logprobs(h, W))", *HEAD),
    "linear_preference_loss": Cost("preference_loss of its sums", *HEAD),
    "linear_value_loss": Cost("value_loss(h · w)", ("2 ND", "NDs"), ("ND", "NDs"), ("2 ND", "Ds")),
    "lora_linear": Cost(
        "x Wᵀ + s (x Aᵀ) Bᵀ by segment",
        ("P + 2 NDR + 2 NVR", "NDs + DVs + NVs"),
        ("P + 4 NDR + 4 NVR", "NDs + DVs + NVs"),
    ),
    "policy_loss": Cost("Σ w L(exp(logp - old), A)", ("40 N", "3 Ns + N"), ("N", "4 N")),
    "preference_loss": Cost("L(β (x - y)), x and y log-ratios", ("30 N", "4 Ns"), ("2 N", "8 N")),
    "ranking_loss": Cost("Plackett-Luce with ties", ("20 NK", "Ns + 8 N"), ("N", "4 N")),
    "reward_loss": Cost("softplus(r⁻ - r⁺ + margin)", ("15 N", "2 Ns"), ("2 N", "8 N")),
    "sample_tokens": Cost("draw from the truncated softmax(z)", ("10 NV", "NVs")),
    "shaped_rewards": Cost("-β KL per token, score at the last", ("3 N", "Ns + 5 N")),
    "step_reward_loss": Cost("BCE or squared error at steps", ("20 N", "2 Ns + N"), ("N", "4 N")),
    "token_kl": Cost("D(softmax z, softmax z')", ("40 NV", "2 NVs"), ("30 NV", "3 NVs")),
    "token_logprobs": Cost("z[y] - logsumexp(z), -Σ p log p", ("10 NV", "NVs"), ("6 NV", "2 NVs")),
    "unpaired_preference_loss": Cost("L(±(β x - shift))", ("20 N", "2 Ns + N"), ("N", "4 N")),
    "value_loss": Cost("½ max((v - R)², (clip(v) - R)²)", ("10 N", "3 Ns + N"), ("N", "4 N")),
    "vtrace": Cost("A = ρδ + γλcA'", ("25 N", "4 Ns + 9 N")),
    "whiten": Cost("(x - mean) / (std + ε)", ("6 N", "Ns + 5 N")),
}


def evaluated(amount: str, sizes: Mapping[str, int]) -> int:
    """The value of a sum such as "2 Ns + 9 N". Raises KeyError for a letter without a size."""
    total = 0
    for term in amount.split(" + "):
        parts = re.fullmatch(r"(?:(\d+) )?([A-Zs]+)", term)
        assert parts, f"{amount!r}: {term!r} is not a number and sizes"
        total += int(parts[1] or 1) * math.prod(product(sizes) if x == "P" else sizes[x] for x in parts[2])
    return total


def product(sizes: Mapping[str, int]) -> int:
    return 2 * sizes["N"] * sizes["D"] * sizes["V"]


def work(ops: str, passes: str, sizes: Mapping[str, int]) -> Work:
    """The FLOPs and bytes of `ops` ("gae", or "gae + whiten"), all passes up to `passes` of PASSES together."""
    total = Work()
    for op in ops.split(" + "):
        for part in COSTS[op][1 : 2 + PASSES.index(passes)]:
            if part is not None:
                flops, moved = (evaluated(amount, sizes) for amount in part)
                total = Work(total.flops + flops, total.bytes + moved)
    return total


def floor_seconds(cost: Work, limits: Mapping[str, Any]) -> float:
    """The least time: bytes at the copy bandwidth or FLOPs at the matrix rate, whichever takes longer."""
    matrix = next(rate for name, rate in limits.items() if name.endswith("flops_per_second"))
    return max(cost.bytes / limits["copy_bytes_per_second"], cost.flops / matrix)


def described(op: str, which: int) -> str:
    """The FLOPs (0) or bytes (1) of an op's passes, for the page of the kernels."""
    names = ("", "backward + ", "trained head + ")
    return "; ".join(f"{name}{part[which]}" for name, part in zip(names, COSTS[op][1:], strict=True) if part)
