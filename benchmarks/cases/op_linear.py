"""Ops on logits, on hidden states with a frozen and with a trained head, and adapters."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, logsigmoid

import rlhf_fast
from benchmarks.cases.build import Job, cases
from benchmarks.cases.linear import (
    costed,
    draw_samples,
    draw_tokens,
    eager_logprobs,
    eager_policy_loss,
    exact_logprobs,
    exact_policy_loss,
    shape,
)
from benchmarks.cases.sizes import Sizes, by_rows, normal, short
from benchmarks.harness import Case, Inputs
from benchmarks.peers import BETA, CLIP

RANK, TOP_P = 16, 0.95
DPO = rlhf_fast.PreferenceObjective("sigmoid", beta=BETA, reference_free=True)


def first_rows(inputs: Inputs, rows: int) -> Inputs:
    """Of logits, whose rows have nothing to do with each other."""
    return {name: x[:rows] for name, x in inputs.items()}


def wide(x: Tensor) -> Tensor:
    """At least float32, as trainers take a softmax."""
    return x if x.dtype == torch.float64 else x.float()


def both_heads(job: Job, device: str) -> list[Case]:
    """Forward, and forward + backward with the head frozen and with the head trained."""
    frozen = replace(job, label=f"{job.label}, frozen head".lstrip(", "))
    trained = replace(job, label=f"{job.label}, trained head".lstrip(", "), leaves=("hidden", "weight"), trained=True)
    return [cases(job, device)[0], cases(frozen, device)[1], cases(trained, device)[1]]


def hidden_jobs(sizes: Sizes, device: str) -> list[Job]:
    def drawn(*names: str) -> Inputs:
        states = {n: normal(device, sizes.N, sizes.D, seed=i, dtype=sizes.dtype) for i, n in enumerate(names)}
        weight = normal(device, sizes.V, sizes.D, seed=9, dtype=sizes.dtype) / sizes.D**0.5
        return states | {"weight": weight}

    def pairs() -> Inputs:
        given = draw_tokens(sizes, device)
        return {n: x if n == "weight" else x.view(8, sizes.N // 8, *x.shape[1:]) for n, x in given.items()}

    def exact_mean_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -exact_logprobs(hidden, weight, targets).mean()

    def mean_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(wide(linear(hidden, weight)), targets)

    def reverse_kl(hidden: Tensor, ref_hidden: Tensor, weight: Tensor) -> Tensor:
        p, q = (wide(linear(x, head)).log_softmax(-1) for x, head in ((hidden, weight), (ref_hidden, weight.detach())))
        return (p.exp() * (p - q)).sum(-1)

    def exact_reverse_kl(hidden: Tensor, ref_hidden: Tensor, weight: Tensor) -> Tensor:
        return by_rows(lambda rows, ref_rows: reverse_kl(rows, ref_rows, weight), hidden, ref_hidden)

    def sigmoid_loss(logprobs: Tensor) -> Tensor:
        chosen, rejected = logprobs.sum(-1).chunk(2)
        return -logsigmoid(BETA * (chosen - rejected)).mean()

    def dpo(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return sigmoid_loss(wide(linear(hidden, weight)).log_softmax(-1).gather(-1, targets[..., None])[..., 0])

    def exact_dpo(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logprobs = exact_logprobs(hidden.flatten(0, 1), weight, targets.flatten())
        return sigmoid_loss(logprobs.view(targets.shape))

    return [
        Job(
            "linear_policy_loss", shape(sizes), costed(sizes), lambda: draw_samples(sizes, device), eager_policy_loss,
            lambda backend, **x: rlhf_fast.linear_policy_loss(**x, backend=backend)[0], ("hidden",),
            exact=exact_policy_loss, peers="linear_policy_loss",
        ),
        Job(
            "linear_logprobs", shape(sizes), costed(sizes), lambda: draw_tokens(sizes, device), eager_logprobs,
            lambda backend, **x: rlhf_fast.linear_logprobs(**x, backend=backend), ("hidden",),
            exact=exact_logprobs, peers="linear_logprobs",
        ),
        Job(
            "linear_logprobs", shape(sizes), costed(sizes), lambda: draw_tokens(sizes, device), mean_nll,
            lambda backend, **x: -rlhf_fast.linear_logprobs(**x, backend=backend).mean(), ("hidden",),
            label="mean cross-entropy", peers="mean negative log-likelihood", exact=exact_mean_nll,
        ),
        Job(
            "linear_kl", shape(sizes), costed(sizes), lambda: drawn("hidden", "ref_hidden"), reverse_kl,
            lambda backend, **x: rlhf_fast.linear_kl(**x, targets=None, backend=backend).kl, ("hidden",),
            exact=exact_reverse_kl, peers="linear_kl",
        ),
        Job(
            "linear_preference_loss", shape(sizes), costed(sizes), pairs, dpo,
            lambda backend, **x: rlhf_fast.linear_preference_loss(**x, objective=DPO, backend=backend)[0], ("hidden",),
            exact=exact_dpo, peers="linear_preference_loss",
        ),
    ]  # fmt: skip


def values(sizes: Sizes, device: str) -> Job:
    def draw() -> Inputs:
        rows = {name: normal(device, sizes.N, seed=i) for i, name in enumerate(("old_values", "returns"))}
        states = normal(device, sizes.N, sizes.D, seed=2, dtype=sizes.dtype)
        return rows | {"hidden": states, "weight": normal(device, sizes.D, seed=3, dtype=sizes.dtype) / sizes.D**0.5}

    def eager(hidden: Tensor, weight: Tensor, old_values: Tensor, returns: Tensor) -> Tensor:
        found = wide(hidden @ weight)
        clipped = old_values + (found - old_values).clamp(-CLIP, CLIP)
        return 0.5 * torch.maximum((found - returns).square(), (clipped - returns).square()).mean()

    return Job(
        "linear_value_loss", f"N={sizes.N} D={sizes.D} {short(sizes.dtype)}",
        {"N": sizes.N, "D": sizes.D, "s": sizes.dtype.itemsize}, draw, eager,
        lambda backend, **x: rlhf_fast.linear_value_loss(**x, clip_eps=CLIP, backend=backend)[0],
        ("hidden", "weight"), trained=True,
    )  # fmt: skip


def adapters(sizes: Sizes, device: str) -> Job:
    """Two roles, each with half of the rows and its own LoRA on one frozen matrix."""
    outputs, half = 4 * sizes.D, sizes.N // 2

    def draw() -> Inputs:
        shapes = {
            "x": (sizes.N, sizes.D), "weight": (outputs, sizes.D), "a0": (RANK, sizes.D), "b0": (outputs, RANK),
            "a1": (RANK, sizes.D), "b1": (outputs, RANK),
        }  # fmt: skip
        scale = {"x": 1.0} | dict.fromkeys(("weight", "a0", "a1"), sizes.D**-0.5) | dict.fromkeys(("b0", "b1"), 0.1)
        return {
            name: scale[name] * normal(device, *shape, seed=seed, dtype=sizes.dtype)
            for seed, (name, shape) in enumerate(shapes.items())
        }

    def eager(x: Tensor, weight: Tensor, a0: Tensor, b0: Tensor, a1: Tensor, b1: Tensor) -> Tensor:
        parts = zip(x.split([half, sizes.N - half]), ((a0, b0), (a1, b1)), strict=True)
        return torch.cat([linear(rows, weight) + 2.0 * linear(linear(rows, a), b) for rows, (a, b) in parts])

    def ours(x: Tensor, weight: Tensor, a0: Tensor, b0: Tensor, a1: Tensor, b1: Tensor, backend: str) -> Tensor:
        bank = [rlhf_fast.Adapter(a0, b0, 2.0), rlhf_fast.Adapter(a1, b1, 2.0)]
        return rlhf_fast.lora_linear(x, weight, bank, [(0, half), (1, sizes.N - half)], backend=backend)

    return Job(
        "lora_linear", f"N={sizes.N} D={sizes.D} out={outputs} R={RANK} {short(sizes.dtype)}",
        {"N": sizes.N, "D": sizes.D, "V": outputs, "R": RANK, "s": sizes.dtype.itemsize}, draw, eager, ours,
        ("x", "a0", "b0", "a1", "b1"),
    )  # fmt: skip


def logits_jobs(sizes: Sizes, device: str) -> list[Job]:
    shape = f"N={sizes.N} V={sizes.V} {short(sizes.dtype)}"
    costed = {"N": sizes.N, "V": sizes.V, "s": sizes.dtype.itemsize}

    def drawn(*names: str) -> Inputs:
        return {n: 2 * normal(device, sizes.N, sizes.V, seed=i, dtype=sizes.dtype) for i, n in enumerate(names)}

    def kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
        p, q = (wide(x).log_softmax(-1) for x in (logits, ref_logits))
        return (p.exp() * (p - q)).sum(-1)

    def nucleus(logits: Tensor) -> list[Tensor]:
        log_p = wide(logits).log_softmax(-1)
        ordered, order = log_p.sort(descending=True)
        p = ordered.exp()
        kept = torch.where(p.cumsum(-1) - p < TOP_P, p, 0)
        ids = order.gather(-1, kept.multinomial(1))
        return [log_p.gather(-1, ids)[:, 0], ids[:, 0]]

    def ours(logits: Tensor, backend: str) -> list[Tensor]:
        found = rlhf_fast.sample_tokens(logits, seed=0, top_p=TOP_P, backend=backend)
        return [found.full_logprobs, found.ids]

    def error_of_logprobs(inputs: Inputs, found: list[Tensor]) -> list[Tensor]:
        """Everybody draws other tokens; what they say of theirs can be checked."""
        exact = by_rows(
            lambda x, ids: x.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0], inputs["logits"], found[1]
        )
        return [(found[0].double() - exact).to(found[0].dtype)]

    return [
        Job(
            "token_kl", shape, costed, lambda: drawn("logits", "ref_logits"), kl,
            lambda backend, **x: rlhf_fast.token_kl(**x, backend=backend), ("logits",), head=first_rows,
        ),
        Job(
            "sample_tokens", shape, costed, lambda: drawn("logits"), nucleus, ours, label=f"top_p {TOP_P}",
            compared=error_of_logprobs, compiles=False,
        ),
    ]  # fmt: skip


def op_cases(sizes: Sizes, device: str) -> list[Case]:
    rest = [*logits_jobs(sizes, device), values(sizes, device), adapters(sizes, device)]
    heads = [case for job in hidden_jobs(sizes, device) for case in both_heads(job, device)]
    return [*(case for job in rest for case in cases(job, device)), *heads]
