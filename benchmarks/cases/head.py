"""Ops on hidden states: under a head frozen or trained, beside the bare products they cannot do without; adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, logsigmoid

import rlhf_fast
from benchmarks import peers
from benchmarks.cases.build import Job, backward, both, first_rows, forward, partly_valid
from benchmarks.cases.sizes import (
    SEQUENCES,
    VALID,
    Sizes,
    by_rows,
    generator,
    ids,
    normal,
    of_hidden,
    published,
    short,
    wide,
    with_gradient,
)
from benchmarks.harness import Bar, Case, Contender, Inputs
from benchmarks.peers import BETA, CLIP
from rlhf_fast.ops.head._loss import SCRATCH_BYTES
from rlhf_fast.ops.head.tiles import TILE_BYTES
from rlhf_fast.ops.tokens.token_logprobs import reference

RANK = 16
DPO = rlhf_fast.PreferenceObjective("sigmoid", beta=BETA, reference_free=True)
TRAINED = ("hidden", "weight")


def draw_tokens(sizes: Sizes, device: str) -> Inputs:
    return {
        "hidden": normal(device, sizes.N, sizes.D, seed=0, dtype=sizes.dtype),
        "weight": normal(device, sizes.V, sizes.D, seed=9, dtype=sizes.dtype) / sizes.D**0.5,
        "targets": ids(sizes, device),
    }


def eager_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return wide(hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def exact_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return by_rows(lambda rows, ids: reference(rows @ weight.T, ids)[0], hidden, targets)


def logprobs(sizes: Sizes, device: str) -> Job:
    return Job(
        "linear_logprobs", *of_hidden(sizes), lambda: draw_tokens(sizes, device), eager_logprobs,
        rlhf_fast.linear_logprobs, ("hidden",), exact=exact_logprobs, peers="linear_logprobs", first=first_rows,
    )  # fmt: skip


def draw_samples(sizes: Sizes, device: str) -> Inputs:
    """Tokens of 8 sequences with their old log-probabilities and an advantage for each sequence."""
    old = -torch.rand(sizes.N, generator=generator(device, 2), device=device) - 10
    advantages = normal(device, SEQUENCES, seed=3).repeat_interleave(sizes.N // SEQUENCES)
    return draw_tokens(sizes, device) | {"old_logprobs": old, "advantages": advantages}


def surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()


def eager_policy_loss(hidden: Tensor, weight: Tensor, targets: Tensor, **rest: Tensor) -> Tensor:
    return surrogate(eager_logprobs(hidden, weight, targets), **rest)


def exact_policy_loss(hidden: Tensor, weight: Tensor, targets: Tensor, **rest: Tensor) -> Tensor:
    return surrogate(exact_logprobs(hidden, weight, targets), **rest)


def policy_loss(sizes: Sizes, device: str) -> Job:
    """The clipped policy loss of one batch of 8 sequences."""
    return Job(
        "linear_policy_loss", *of_hidden(sizes), lambda: draw_samples(sizes, device), eager_policy_loss,
        rlhf_fast.linear_policy_loss, ("hidden",), exact=exact_policy_loss, peers="linear_policy_loss",
    )  # fmt: skip


def products(sizes: Sizes, device: str, trained: bool) -> Contender:
    """The products alone, into buffers that are already there: logits, through the head, and the weight's gradient."""

    @cache
    def buffers() -> list[Tensor]:
        shapes = (sizes.N, sizes.V), (sizes.N, sizes.D), (sizes.V if trained else 0, sizes.D)
        return [torch.zeros(shape, device=device, dtype=sizes.dtype) for shape in shapes]

    def run(inputs: Inputs) -> list[Tensor]:
        logits, hidden_out, weight_out = buffers()
        torch.mm(inputs["hidden"], inputs["weight"].T, out=logits)
        torch.mm(logits, inputs["weight"], out=hidden_out)
        if trained:
            torch.mm(logits.T, inputs["hidden"], out=weight_out)
        return []

    return run


def bars(sizes: Sizes, device: str) -> list[Case]:
    return [case for size in published(sizes, device) for case in of_shape(size, device)]


def of_shape(sizes: Sizes, device: str) -> list[Case]:
    others = ("torch.compile", *peers.find("linear_logprobs"))
    row_bytes = 2 * sizes.D * sizes.dtype.itemsize + 256  # of U, and some numbers for each row
    in_float32 = 4 * sizes.V * sizes.D if sizes.dtype.itemsize < 4 else 0  # the head's gradient before it is rounded
    frozen = replace(
        logprobs(sizes, device), label="frozen head", floors={"two products": products(sizes, device, trained=False)},
        bars=(
            Bar("cpu", "two products", 1 / 1.08), Bar("cpu", "trl", 2.5), Bar("cpu", "torch.compile", 1),
            Bar("triton", "two products", 1 / 1.15), *(Bar("triton", name, 1) for name in others),
        ),
        scratch=TILE_BYTES[device] + sizes.N * row_bytes, group="bars",
    )  # fmt: skip
    trained = replace(
        policy_loss(sizes, device), label="trained head", leaves=TRAINED,
        floors={"three products": products(sizes, device, trained=True)},
        bars=(
            Bar("cpu", "three products", 1 / 1.10), Bar("cpu", "liger", 1.8),
            Bar("triton", "three products", 1 / 1.15), Bar("triton", "liger", 1),
        ),
        scratch=SCRATCH_BYTES + in_float32, group="bars",
    )  # fmt: skip
    return [backward(frozen, device), backward(trained, device)]


def gathered(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` of the rows that count alone, as libraries without masks are called; waits for the GPU."""

    def of_rows(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        rows = mask.bool()
        logprobs = function(hidden[rows], weight, targets[rows])
        return torch.zeros(mask.shape, device=mask.device, dtype=logprobs.dtype).masked_scatter(rows, logprobs)

    return of_rows


def ragged(sizes: Sizes, device: str) -> list[Case]:
    """Log-probabilities of which a part counts."""
    cases = []
    without_masks = {"eager, gathered": eager_logprobs, **peers.find("linear_logprobs")}
    for valid in VALID:
        job = partly_valid(logprobs(sizes, device), sizes.N, valid, device)
        for label, leaves in (("frozen head", ("hidden",)), ("trained head", TRAINED)):
            case = backward(replace(job, label=label, leaves=leaves), device)
            others = {name: with_gradient(gathered(function), *leaves) for name, function in without_masks.items()}
            cases.append(replace(case, peers=case.peers | others))
    return cases


def both_heads(job: Job, device: str) -> list[Case]:
    """Forward, and forward + backward with the head frozen and with the head trained."""
    frozen = replace(job, label=f"{job.label}, frozen head".lstrip(", "))
    trained = replace(job, label=f"{job.label}, trained head".lstrip(", "), leaves=TRAINED)
    return [forward(job, device), backward(frozen, device), backward(trained, device)]


def hidden_jobs(sizes: Sizes, device: str) -> list[Job]:
    def two_policies() -> Inputs:
        drawn = draw_tokens(sizes, device)
        ref_hidden = normal(device, sizes.N, sizes.D, seed=1, dtype=sizes.dtype)
        return {"hidden": drawn["hidden"], "ref_hidden": ref_hidden, "weight": drawn["weight"]}

    def pairs() -> Inputs:
        return {
            name: x if name == "weight" else x.view(SEQUENCES, -1, *x.shape[1:])
            for name, x in draw_tokens(sizes, device).items()
        }

    def mean_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(wide(linear(hidden, weight)), targets)

    def reverse_kl(hidden: Tensor, ref_hidden: Tensor, weight: Tensor) -> Tensor:
        p, q = (wide(linear(x, head)).log_softmax(-1) for x, head in ((hidden, weight), (ref_hidden, weight.detach())))
        return (p.exp() * (p - q)).sum(-1)

    def sigmoid_loss(logprobs: Tensor) -> Tensor:
        chosen, rejected = logprobs.sum(-1).chunk(2)
        return -logsigmoid(BETA * (chosen - rejected)).mean()

    def dpo(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return sigmoid_loss(wide(linear(hidden, weight)).log_softmax(-1).gather(-1, targets[..., None])[..., 0])

    def exact_dpo(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logprobs = exact_logprobs(hidden.flatten(0, 1), weight, targets.flatten())
        return sigmoid_loss(logprobs.view(targets.shape))

    return [
        policy_loss(sizes, device),
        logprobs(sizes, device),
        Job(
            "linear_logprobs", *of_hidden(sizes), lambda: draw_tokens(sizes, device), mean_nll,
            lambda **x: -rlhf_fast.linear_logprobs(**x).mean(), ("hidden",),
            label="mean cross-entropy", peers="mean negative log-likelihood",
            exact=lambda **x: -exact_logprobs(**x).mean(),
        ),
        Job(
            "linear_kl", *of_hidden(sizes), two_policies, reverse_kl,
            lambda **x: rlhf_fast.linear_kl(**x, targets=None).kl, ("hidden",),
            exact=lambda hidden, ref_hidden, weight: by_rows(partial(reverse_kl, weight=weight), hidden, ref_hidden),
            peers="linear_kl",
        ),
        Job(
            "linear_preference_loss", *of_hidden(sizes), pairs, dpo,
            partial(rlhf_fast.linear_preference_loss, objective=DPO), ("hidden",),
            exact=exact_dpo, peers="linear_preference_loss",
        ),
    ]  # fmt: skip


def values(sizes: Sizes, device: str) -> Job:
    def draw() -> Inputs:
        rows = {name: normal(device, sizes.N, seed=i) for i, name in enumerate(("old_values", "returns"))}
        states = normal(device, sizes.N, sizes.D, seed=2, dtype=sizes.dtype)
        return rows | {"hidden": states, "weight": normal(device, sizes.D, seed=3, dtype=sizes.dtype) / sizes.D**0.5}

    def eager(hidden: Tensor, weight: Tensor, old_values: Tensor, returns: Tensor) -> Tensor:
        new = wide(hidden @ weight)
        clipped = old_values + (new - old_values).clamp(-CLIP, CLIP)
        return 0.5 * torch.maximum((new - returns).square(), (clipped - returns).square()).mean()

    return Job(
        "linear_value_loss", f"N={sizes.N} D={sizes.D} {short(sizes.dtype)}",
        {"N": sizes.N, "D": sizes.D, "s": sizes.dtype.itemsize}, draw, eager,
        partial(rlhf_fast.linear_value_loss, clip_eps=CLIP), TRAINED,
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


def ops(sizes: Sizes, device: str) -> list[Case]:
    rest = [values(sizes, device), adapters(sizes, device)]
    heads = [case for job in hidden_jobs(sizes, device) for case in both_heads(job, device)]
    return [*(case for job in rest for case in both(job, device)), *heads]
