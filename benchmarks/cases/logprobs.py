"""Log-probabilities (and entropies) from logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import rlhf_fast
from benchmarks import peers
from benchmarks.cases.sizes import Sizes, backends_of, generator, results, short, with_gradient
from benchmarks.harness import Bar, Case, Contender, Inputs
from rlhf_fast.ops.tokens.token_logprobs import IMPLS, Transform, empty_stats, reference


def eager(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None])[:, 0]


def eager_entropy(logits: Tensor, targets: Tensor) -> list[Tensor]:
    log_p = torch.log_softmax(logits.float(), -1)
    return [log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)]


def exact(logits: Tensor, targets: Tensor) -> Tensor:
    return reference(logits.double(), targets)[0]


def first(inputs: Inputs, rows: int) -> Inputs:
    return {"logits": inputs["logits"][:rows].double(), "targets": inputs["targets"][:rows]}


def ours(backend: str, **options: bool) -> Callable[..., Tensor]:
    return lambda logits, targets: rlhf_fast.token_logprobs(logits, targets, backend=backend, **options)


def gradient_in_forward(backend: str) -> Contender:
    """The row kernel as ops with a linear head call it: the gradient of the sum, over the logits, in the same call."""

    def run(x: Inputs) -> list[Tensor]:
        logits = x["logits"][None]
        stats = empty_stats(logits, want_entropy=False)
        IMPLS[backend][0](logits, x["targets"][None], None, Transform(), False, stats, logits)
        return [stats[0][0], logits[0]]

    return run


def results_of(job: str) -> dict[str, Contender]:
    return {name: results(function) for name, function in peers.find(job).items()}


def of_dtype(sizes: Sizes, device: str, dtype: torch.dtype) -> list[Case]:
    def draw() -> Inputs:
        g = generator(device)
        logits = torch.randn(sizes.N, sizes.V, generator=g, device=device, dtype=dtype)
        return {"logits": logits, "targets": torch.randint(sizes.V, (sizes.N,), generator=g, device=device)}

    names = backends_of("token_logprobs", device)
    forward: dict[str, Contender] = {"eager": lambda x: [eager(**x)]}
    forward |= {name: (lambda x, name=name: [ours(name)(**x)]) for name in names}
    entropy: dict[str, Contender] = {"eager": lambda x: eager_entropy(**x)}
    entropy |= {name: (lambda x, name=name: list(ours(name, return_entropy=True)(**x))) for name in names}
    both = {"eager": with_gradient(eager, "logits")}
    both |= {name: with_gradient(ours(name, inplace_backward=True), "logits") for name in names}
    shape, costed = f"N={sizes.N} V={sizes.V} {short(dtype)}", {"N": sizes.N, "V": sizes.V, "s": dtype.itemsize}
    cpu, full = device == "cpu", dtype == torch.float32
    against_trl = (Bar("cpu", "trl", 4),) if cpu and full else ()
    made_in_forward: dict[str, Contender] = {"eager": both["eager"]}
    made_in_forward |= {name: gradient_in_forward(name) for name in names}
    on_gpu = [
        Case(
            "token_logprobs forward with its gradient", shape, draw,
            lambda x, rows: with_gradient(exact, "logits")(first(x, rows)), made_in_forward,
        ),
    ]  # fmt: skip
    return [
        *(on_gpu if device == "cuda" else []),
        Case(
            "token_logprobs forward", shape, draw, lambda x, rows: [exact(**first(x, rows))], forward,
            peers=results_of("token_logprobs"), bars=(Bar("cpu", "eager", 8), *against_trl) if cpu else (),
            op="token_logprobs", sizes=costed,
        ),
        Case(
            "token_logprobs forward + entropy", shape, draw,
            lambda x, rows: list(reference(**first(x, rows))), entropy,
            peers=results_of("token_logprobs and entropy"), op="token_logprobs", sizes=costed,
        ),
        Case(
            "token_logprobs forward + backward in place", shape, draw,
            lambda x, rows: with_gradient(exact, "logits")(first(x, rows)), both,
            peers={k: with_gradient(f, "logits") for k, f in peers.find("token_logprobs, differentiable").items()},
            bars=(Bar("cpu", "eager", 8),) if cpu and full else (),
            op="token_logprobs", passes="backward", sizes=costed,
        ),
    ]  # fmt: skip


def cases(sizes: Sizes, device: str) -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (sizes.dtype,)
    return [case for dtype in dtypes for case in of_dtype(sizes, device, dtype)]
