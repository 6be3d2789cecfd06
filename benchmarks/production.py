"""Calls of every Triton kernel at the shapes of training: vocabulary 151,936, hidden size 4096, 8192 tokens, bfloat16.

A kernel is specialised by strides, types and the divisibility of sizes, not by the number of its programs: where rows
are programs, ROWS of them stand for all. benchmarks/aot.py compiles these calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from rlhf_fast.kernels import lora_linear

from benchmarks.cases import advantages, head, losses, tokens
from benchmarks.cases.build import Job
from benchmarks.cases.sizes import GPU, results, with_gradient

LABEL = "production: "
ROWS = 16
FEW = replace(GPU, N=ROWS)
WIDE = replace(FEW, dtype=torch.float32)  # the logits that a linear head makes

Call = Callable[[str], object]


def of_job(job: Job) -> Call:
    """The op with the gradients that its job asks for."""

    def run(backend: str) -> object:
        ours = partial(job.ours, backend=backend)
        return (with_gradient(ours, *job.leaves) if job.leaves else results(ours))(job.draw())

    return run


def row_kernel(backend: str) -> None:
    """As ops with a linear head call it: float32 logits, their gradient in bfloat16 in the same call."""
    wide = torch.empty(1, WIDE.N, WIDE.V)
    gradient = torch.empty_like(wide, dtype=FEW.dtype)
    tokens.row_kernel(backend, wide, torch.zeros(1, WIDE.N, dtype=torch.int64), gradient)()


def adapters(backend: str) -> None:
    """Two roles with half of the tokens each; the base product is none of our kernels."""
    half, outputs = GPU.N // 2, 4 * GPU.D
    spans, dtype = [(0, 0, half), (1, half, GPU.N)], GPU.dtype
    x, y = torch.zeros(GPU.N, GPU.D, dtype=dtype), torch.zeros(GPU.N, outputs, dtype=dtype)
    downs = [torch.zeros(head.RANK, GPU.D, dtype=dtype)] * 2
    ups = [torch.zeros(outputs, head.RANK, dtype=dtype)] * 2
    h = torch.zeros(GPU.N, head.RANK)
    lora_linear.shrink(x, downs, spans, None, h)
    lora_linear.expand(h, ups, [2.0, 2.0], spans, None, y)
    for wide, rank_first in ((x, True), (y, False)):
        total = torch.zeros(2 * head.RANK * wide.shape[1])
        lora_linear.gradients(h, wide, [head.RANK] * 2, [2.0, 2.0], spans, None, rank_first, total)


def named(job: Job) -> str:
    return f"{job.op}, {job.label}" if job.label else job.op


def calls() -> dict[str, Call]:
    """Name -> the call, by backend."""
    jobs = [
        *tokens.logits_jobs(FEW, "cpu"),
        tokens.estimate(GPU, "cpu"),
        head.values(GPU, "cpu"),
        *losses.of_tokens(GPU, "cpu"),
        *losses.of_answers(GPU, "cpu"),
        *(job for family in (advantages.scans, advantages.others) for job in family(GPU, "cpu")),
    ]
    of_a_head = tokens.logits_jobs(WIDE, "cpu")[0]
    plain, with_entropy, in_place = tokens.logprobs_jobs(FEW, "cpu")
    return {
        "token_logprobs": of_job(plain),
        "token_logprobs, entropy": of_job(with_entropy),
        "token_logprobs, backward in place": of_job(in_place),
        "token_logprobs of a head, gradient in forward": row_kernel,
        "gae, ragged mask": of_job(advantages.ragged_gae(GPU, "cpu")),
        "lora_linear": adapters,
        "token_kl of a head": of_job(of_a_head),
        **{named(job): of_job(job) for job in jobs},
    }
