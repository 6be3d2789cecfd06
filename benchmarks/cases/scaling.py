"""The same job at growing sizes: contexts from 1k to 128k tokens, vocabularies from 32k to 262k."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import rlhf_fast
from benchmarks.cases import advantages, op_losses
from benchmarks.cases.build import Job, case
from benchmarks.cases.linear import costed, draw_tokens, eager_logprobs, exact_logprobs, shape
from benchmarks.cases.ragged import draw_ids
from benchmarks.cases.sizes import Sizes, normal, planes, results, short, with_gradient
from benchmarks.harness import Case, Inputs, free_bytes
from benchmarks.peers import GAMMA, LAM

EAGER_COPIES = 4  # of the logits in float32 that eager log-probabilities and their backward hold
PEER_LOGITS = 1 << 28  # beyond it a CPU spends minutes on other libraries, whose time grows with the logits as before


def eager_fits(rows: int, vocabulary: int, device: str) -> bool:
    return EAGER_COPIES * 4 * rows * vocabulary < free_bytes(device)


def head(sizes: Sizes, device: str) -> Case:
    """linear_logprobs with a frozen head, forward and backward."""

    def first(inputs: Inputs, rows: int) -> Inputs:
        return {name: x if name == "weight" else x[:rows] for name, x in inputs.items()}

    peers = "linear_logprobs" if device != "cpu" or sizes.N * sizes.V <= PEER_LOGITS else ""
    job = Job(
        "linear_logprobs", shape(sizes), costed(sizes), lambda: draw_tokens(sizes, device), eager_logprobs,
        lambda backend, **x: rlhf_fast.linear_logprobs(**x, backend=backend), ("hidden",), label="frozen head",
        exact=exact_logprobs, peers=peers, fits=eager_fits(sizes.N, sizes.V, device), head=first,
    )  # fmt: skip
    return case(job, device, "backward", lambda function: with_gradient(function, "hidden"))


def logits(sizes: Sizes, device: str) -> Case:
    def draw() -> Inputs:
        drawn = normal(device, sizes.N, sizes.V, seed=0, dtype=sizes.dtype)
        return {"logits": drawn, "targets": draw_ids(sizes, device)}

    def eager(logits: Tensor, targets: Tensor) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return wide.log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    job = Job(
        "token_logprobs", f"N={sizes.N} V={sizes.V} {short(sizes.dtype)}",
        {"N": sizes.N, "V": sizes.V, "s": sizes.dtype.itemsize}, draw, eager,
        lambda backend, **x: rlhf_fast.token_logprobs(**x, backend=backend),
        peers="token_logprobs", head=lambda inputs, rows: {name: x[:rows] for name, x in inputs.items()},
    )  # fmt: skip
    return case(job, device, "forward", results)


def scan(sizes: Sizes, device: str) -> Case:
    """gae of long sequences; eager is the loop over time."""
    job = Job(
        "gae", f"B={sizes.B} T={sizes.T} float32", {"N": sizes.B * sizes.T, "s": 4},
        lambda: planes(sizes, device, "rewards", "values"),
        lambda rewards, values: advantages.eager(
            {"rewards": rewards, "values": values, "mask": torch.ones_like(rewards)}
        ),
        lambda backend, **x: rlhf_fast.gae(**x, gamma=GAMMA, lam=LAM, backend=backend),
        label="no mask", peers="gae", compiles=False,
    )  # fmt: skip
    return case(job, device, "forward", results)


def loss(sizes: Sizes, device: str) -> Case:
    job = next(job for job in op_losses.of_tokens(sizes, device) if job.op == "policy_loss")
    return case(job, device, "backward", lambda function: with_gradient(function, *job.leaves))


def scaling_cases(sizes: Sizes, device: str) -> list[Case]:
    """Contexts double from sizes.N to sizes.T with a quarter of the vocabulary, vocabularies three times from sizes.V.

    D and the dtype stay.
    """
    contexts = [sizes.N << k for k in range((sizes.T // sizes.N).bit_length())]
    by_context = [replace(sizes, N=n, V=sizes.V // 4) for n in contexts]
    by_vocabulary = [replace(sizes, V=sizes.V << k) for k in range(4)]
    made = [head(size, device) for size in [*by_context, *by_vocabulary]]
    made += [logits(size, device) for size in by_vocabulary]
    for family in (scan, loss):
        for size in (replace(sizes, T=n) for n in contexts):
            found = family(size, device)
            made.append(replace(found, sizes={**found.sizes, "T": size.T}))
    return [replace(found, group="scaling") for found in made]
