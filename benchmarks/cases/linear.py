"""Log-probabilities and whole losses from hidden states, beside the bare matrix products they cannot do without."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

import rlhf_fast
from benchmarks import peers
from benchmarks.cases.sizes import Sizes, backends_of, by_rows, generator, published, short, with_gradient
from benchmarks.harness import Bar, Case, Contender, Inputs
from benchmarks.peers import CLIP
from rlhf_fast.ops.head._loss import SCRATCH_BYTES
from rlhf_fast.ops.head.tiles import TILE_BYTES
from rlhf_fast.ops.tokens.token_logprobs import reference


def draw_tokens(sizes: Sizes, device: str) -> Inputs:
    g = generator(device)
    new = {"generator": g, "device": device, "dtype": sizes.dtype}
    return {
        "hidden": torch.randn(sizes.N, sizes.D, **new),
        "weight": torch.randn(sizes.V, sizes.D, **new) / sizes.D**0.5,
        "targets": torch.randint(sizes.V, (sizes.N,), generator=g, device=device),
    }


def eager_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, targets[:, None])[:, 0]


def exact_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return by_rows(lambda rows, ids: reference(rows @ weight.T, ids)[0], hidden, targets)


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


def frozen(sizes: Sizes, device: str) -> Case:
    def exact(inputs: Inputs, rows: int) -> list[Tensor]:
        first = {name: inputs[name][:rows] for name in ("hidden", "targets")} | {"weight": inputs["weight"]}
        return with_gradient(exact_logprobs, "hidden")(
            {name: x.double() if x.is_floating_point() else x for name, x in first.items()}
        )

    contenders = {"eager": with_gradient(eager_logprobs, "hidden")}
    others = {"torch.compile": torch.compile(eager_logprobs)} | peers.find("linear_logprobs")
    for name in backends_of("linear_logprobs", device):
        contenders[name] = with_gradient(
            lambda hidden, weight, targets, name=name: rlhf_fast.linear_logprobs(hidden, weight, targets, backend=name),
            "hidden",
        )
    on_cpu = (Bar("cpu", "two products", 1 / 1.08), Bar("cpu", "trl", 2.5), Bar("cpu", "torch.compile", 1))
    on_gpu = (Bar("triton", "two products", 1 / 1.15), *(Bar("triton", name, 1) for name in others))
    return Case(
        "linear_logprobs, frozen head, forward + backward", shape(sizes), lambda: draw_tokens(sizes, device), exact,
        contenders, peers={name: with_gradient(f, "hidden") for name, f in others.items()},
        floors={"two products": products(sizes, device, trained=False)}, bars=on_cpu if device == "cpu" else on_gpu,
        scratch=TILE_BYTES[device] + rows_bytes(sizes),
        op="linear_logprobs", passes="backward", sizes=costed(sizes),
    )  # fmt: skip


def draw_samples(sizes: Sizes, device: str) -> Inputs:
    """Tokens of 8 sequences with their old log-probabilities and an advantage for each sequence."""
    g = generator(device)
    old = -torch.rand(sizes.N, generator=g, device=device) - 10
    advantages = torch.randn(8, generator=g, device=device).repeat_interleave(sizes.N // 8)
    return draw_tokens(sizes, device) | {"old_logprobs": old, "advantages": advantages}


def surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()


def eager_policy_loss(hidden: Tensor, weight: Tensor, targets: Tensor, **rest: Tensor) -> Tensor:
    return surrogate(eager_logprobs(hidden, weight, targets), **rest)


def exact_policy_loss(hidden: Tensor, weight: Tensor, targets: Tensor, **rest: Tensor) -> Tensor:
    return surrogate(exact_logprobs(hidden, weight, targets), **rest)


def trained(sizes: Sizes, device: str) -> Case:
    """The clipped policy loss of one batch of 8 sequences, with the gradients of hidden states and head."""

    def exact(inputs: Inputs, rows: int) -> list[Tensor]:
        double = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        return [x[:rows] if x.dim() else x for x in with_gradient(exact_policy_loss, "hidden", "weight")(double)]

    def ours(backend: str) -> Callable[..., Tensor]:
        def loss(hidden: Tensor, weight: Tensor, targets: Tensor, **rest: Tensor) -> Tensor:
            return rlhf_fast.linear_policy_loss(hidden, weight, targets, **rest, backend=backend)[0]

        return loss

    contenders = {"eager": with_gradient(eager_policy_loss, "hidden", "weight")}
    for name in backends_of("linear_policy_loss", device):
        contenders[name] = with_gradient(ours(name), "hidden", "weight")
    on_cpu = (Bar("cpu", "three products", 1 / 1.10), Bar("cpu", "liger", 1.8))
    on_gpu = (Bar("triton", "three products", 1 / 1.15), Bar("triton", "liger", 1))
    return Case(
        "linear_policy_loss, trained head, forward + backward", shape(sizes), lambda: draw_samples(sizes, device),
        exact, contenders,
        peers={name: with_gradient(f, "hidden", "weight") for name, f in peers.find("linear_policy_loss").items()},
        floors={"three products": products(sizes, device, trained=True)}, bars=on_cpu if device == "cpu" else on_gpu,
        scratch=SCRATCH_BYTES, op="linear_policy_loss", passes="trained head", sizes=costed(sizes),
    )  # fmt: skip


def rows_bytes(sizes: Sizes) -> int:
    """U, and some numbers for each row."""
    return sizes.N * (2 * sizes.D * sizes.dtype.itemsize + 256)


def costed(sizes: Sizes) -> dict[str, int]:
    return {"N": sizes.N, "D": sizes.D, "V": sizes.V, "s": sizes.dtype.itemsize}


def shape(sizes: Sizes) -> str:
    return f"N={sizes.N} D={sizes.D} V={sizes.V} {short(sizes.dtype)}"


def cases(sizes: Sizes, device: str) -> list[Case]:
    return [case for size in published(sizes, device) for case in (frozen(size, device), trained(size, device))]
