"""Log-probabilities, KL and samples from logits, and KL estimates from log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import rlhf_fast
from benchmarks.cases.build import Job, backward, both, first_rows, forward, partly_valid
from benchmarks.cases.sizes import VALID, Sizes, backends_of, by_rows, ids, normal, of_logits, of_planes, planes, wide
from benchmarks.harness import Bar, Case, Contender, Inputs
from rlhf_fast.ops.tokens.token_logprobs import IMPLS, Transform, empty_stats, reference

TOP_P = 0.95


def eager_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return wide(logits).log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def eager_with_entropy(logits: Tensor, targets: Tensor) -> list[Tensor]:
    log_p = torch.log_softmax(logits.float(), -1)
    return [log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)]


def logprobs(sizes: Sizes, device: str) -> Job:
    def draw() -> Inputs:
        logits = normal(device, sizes.N, sizes.V, seed=0, dtype=sizes.dtype)
        return {"logits": logits, "targets": ids(sizes, device)}

    return Job(
        "token_logprobs", *of_logits(sizes), draw, eager_logprobs, rlhf_fast.token_logprobs, peers="token_logprobs",
        exact=lambda logits, targets: reference(logits, targets)[0], first=first_rows,
    )  # fmt: skip


def row_kernel(backend: str, logits: Tensor, targets: Tensor, gradient: Tensor) -> Callable[[], Tensor]:
    """As ops with a linear head call it: the log-probabilities, and the gradient of their sum in the same call."""
    stats = empty_stats(logits, want_entropy=False)

    def run() -> Tensor:
        IMPLS[backend][0](logits, targets, None, Transform(), False, stats, gradient)
        return stats[0]

    return run


def gradient_in_forward(backend: str) -> Contender:
    """The row kernel with its gradient over the logits."""

    def run(x: Inputs) -> list[Tensor]:
        logits = x["logits"][None]
        return [row_kernel(backend, logits, x["targets"][None], logits)()[0], logits[0]]

    return run


def logprobs_jobs(sizes: Sizes, device: str) -> list[Job]:
    """Forward, with the entropy, and with a backward pass over the logits."""
    job = replace(logprobs(sizes, device), group="bars")
    in_full = sizes.dtype == torch.float32
    against_eager, against_trl = Bar("cpu", "eager", 8), Bar("cpu", "trl", 4)
    return [
        replace(
            job, name="token_logprobs forward", bars=(against_eager, against_trl) if in_full else (against_eager,),
        ),
        replace(
            job, name="token_logprobs forward + entropy", eager=eager_with_entropy, exact=reference,
            ours=partial(rlhf_fast.token_logprobs, return_entropy=True), peers="token_logprobs and entropy",
        ),
        replace(
            job, name="token_logprobs forward + backward in place", leaves=("logits",),
            ours=partial(rlhf_fast.token_logprobs, inplace_backward=True), peers="token_logprobs, differentiable",
            bars=(against_eager,) if in_full else (),
        ),
    ]  # fmt: skip


def made_in_forward(case: Case, device: str) -> Case:
    """The case of the row kernel that makes its gradient in forward, from that of both passes."""
    ours = {name: gradient_in_forward(name) for name in backends_of("token_logprobs", device)}
    return replace(
        case, name="token_logprobs forward with its gradient", op="", passes="forward", sizes={}, peers={},
        contenders={"eager": case.contenders["eager"], **ours},
    )  # fmt: skip


def bars(sizes: Sizes, device: str) -> list[Case]:
    cases = []
    for dtype in (torch.float32, torch.bfloat16) if device == "cpu" else (sizes.dtype,):
        *without_gradient, in_place = logprobs_jobs(replace(sizes, dtype=dtype), device)
        cases += [*(forward(job, device) for job in without_gradient), backward(in_place, device)]
    return [*cases, made_in_forward(cases[-1], device)] if device == "cuda" else cases


def ragged(sizes: Sizes, device: str) -> list[Case]:
    """Log-probabilities of which a part counts."""

    job = replace(logprobs(sizes, device), exact=None, leaves=("logits",))
    return [case for valid in VALID for case in both(partly_valid(job, sizes.N, valid, device), device)]


def logits_jobs(sizes: Sizes, device: str) -> list[Job]:
    def drawn(*names: str) -> Inputs:
        return {n: 2 * normal(device, sizes.N, sizes.V, seed=i, dtype=sizes.dtype) for i, n in enumerate(names)}

    def kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
        p, q = (wide(x).log_softmax(-1) for x in (logits, ref_logits))
        return (p.exp() * (p - q)).sum(-1)

    def nucleus(logits: Tensor) -> list[Tensor]:
        log_p = wide(logits).log_softmax(-1)
        ordered, order = log_p.sort(descending=True)
        p = ordered.exp()
        truncated = torch.where(p.cumsum(-1) - p < TOP_P, p, 0)
        chosen = order.gather(-1, truncated.multinomial(1))
        return [log_p.gather(-1, chosen)[:, 0], chosen[:, 0]]

    def ours(logits: Tensor, backend: str) -> list[Tensor]:
        sample = rlhf_fast.sample_tokens(logits, seed=0, top_p=TOP_P, backend=backend)
        return [sample.full_logprobs, sample.ids]

    def error_of_logprobs(inputs: Inputs, sample: list[Tensor]) -> list[Tensor]:
        """Everybody draws other tokens; what they say of theirs can be checked."""
        exact = by_rows(lambda x, ids: eager_logprobs(x.double(), ids), inputs["logits"], sample[1])
        return [(sample[0].double() - exact).to(sample[0].dtype)]

    return [
        Job(
            "token_kl", *of_logits(sizes), lambda: drawn("logits", "ref_logits"), kl, rlhf_fast.token_kl, ("logits",),
            first=first_rows,
        ),
        Job(
            "sample_tokens", *of_logits(sizes), lambda: drawn("logits"), nucleus, ours, label=f"top_p {TOP_P}",
            compared=error_of_logprobs, compiles=False,
        ),
    ]  # fmt: skip


def estimate(sizes: Sizes, device: str) -> Job:
    def near() -> Inputs:
        """Nearer than where the estimates of some libraries are clipped."""
        drawn = planes(sizes, device, "logprobs", "ref_logprobs")
        logprobs = -drawn["logprobs"].abs() - 0.1
        return {"logprobs": logprobs, "ref_logprobs": logprobs + 0.3 * drawn["ref_logprobs"]}

    def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        log_ratio = ref_logprobs - logprobs
        return log_ratio.exp() - 1 - log_ratio

    return Job(
        "kl_estimate", *of_planes(sizes), near, k3, partial(rlhf_fast.kl_estimate, variant="k3"), ("logprobs",),
        label="k3", peers="kl_estimate",
    )  # fmt: skip


def ops(sizes: Sizes, device: str) -> list[Case]:
    return [case for job in [estimate(sizes, device), *logits_jobs(sizes, device)] for case in both(job, device)]
