"""The ops that multiply by a head or a layer's weight, under autocast: what F.linear does there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import (
    linear_kl,
    linear_logprobs,
    linear_policy_loss,
    linear_preference_loss,
    linear_value_loss,
    lora_linear,
)
from rlhf_fast.testing.numerics import assert_contract

BACKENDS = ["reference", "cpu", "triton"]
TYPES = [torch.bfloat16, torch.float16]
B, T, V, D, R = 2, 5, 37, 16, 3
Given = dict[str, Tensor]


def draw(hidden_type: torch.dtype) -> Given:
    """Hidden states of a model under autocast, an fp32 head with a LoRA, and what stands beside them."""
    torch.manual_seed(0)
    given = {
        "hidden": torch.randn(B, T, D).to(hidden_type), "ref_hidden": torch.randn(B, T, D).to(hidden_type),
        "weight": torch.randn(V, D), "bias": torch.randn(V), "lora_a": torch.randn(R, D), "lora_b": torch.randn(V, R),
        "targets": torch.randint(V, (B, T)), "constants": -torch.rand(B, T), "pairs": -torch.rand(B // 2),
    }  # fmt: skip
    return {name: x.requires_grad_(name in TRAINED) for name, x in given.items()}


TRAINED = ("hidden", "weight", "bias", "lora_a", "lora_b")


def logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def logits(g: Given) -> Tensor:
    return F.linear(g["hidden"], g["weight"], g["bias"]) + 0.5 * F.linear(
        F.linear(g["hidden"], g["lora_a"]), g["lora_b"]
    )


def eager_policy(g: Given) -> Tensor:
    ratio = (logprobs(logits(g), g["targets"]) - g["constants"]).exp()
    return -torch.minimum(ratio * g["constants"], ratio.clamp(0.8, 1.2) * g["constants"]).mean()


def eager_preference(g: Given) -> Tensor:
    chosen, rejected = logprobs(logits(g), g["targets"]).sum(1).chunk(2)
    ref_logits = F.linear(g["ref_hidden"], g["weight"], g["bias"]).detach()
    ref_chosen, ref_rejected = logprobs(ref_logits, g["targets"]).sum(1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - ref_chosen - rejected + ref_rejected)).mean()


def eager_kl(g: Given) -> Tensor:
    p, q = (F.linear(g[name], g["weight"], g["bias"]) for name in ("hidden", "ref_hidden"))
    p, q = (x.double() if x.dtype == torch.float64 else x.float() for x in (p, q))
    p, q = p.log_softmax(-1), q.detach().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def lora(g: Given) -> tuple[Tensor, Tensor, float]:
    return g["lora_a"], g["lora_b"], 0.5


def layer(g: Given, backend: str | None) -> Tensor:
    return lora_linear(g["hidden"], g["weight"], [lora(g)], [(0, B * T)], bias=g["bias"], backend=backend)


def head(g: Given, backend: str | None) -> dict:
    return {"bias": g["bias"], "head_lora": lora(g), "backend": backend}


def scored(g: Given, backend: str | None) -> Tensor:
    return linear_logprobs(g["hidden"], g["weight"], g["targets"], **head(g, backend))


def policy(g: Given, backend: str | None) -> Tensor:
    arguments = g["hidden"], g["weight"], g["targets"], g["constants"], g["constants"]
    return linear_policy_loss(*arguments, **head(g, backend))[0]


def preference(g: Given, backend: str | None) -> Tensor:
    arguments = g["hidden"], g["weight"], g["targets"]
    return linear_preference_loss(*arguments, ref_hidden=g["ref_hidden"], **head(g, backend))[0]


def divergence(g: Given, backend: str | None) -> Tensor:
    arguments = g["hidden"], g["ref_hidden"], g["weight"], g["targets"]
    return linear_kl(*arguments, bias=g["bias"], backend=backend).kl


# (ours, what a user writes with F.linear)
OPS: dict[str, tuple[Callable[[Given, str | None], Tensor], Callable[[Given], Tensor]]] = {
    "linear_logprobs": (scored, lambda g: logprobs(logits(g), g["targets"])),
    "linear_policy_loss": (policy, eager_policy),
    "linear_preference_loss": (preference, eager_preference),
    "linear_kl": (divergence, eager_kl),
    "lora_linear": (layer, logits),
}


def run(function: Callable[[Given], Tensor], given: Given, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """The result under `autocast`; outside it, as PyTorch asks, the gradient of everything trained that it reads."""
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        result = function(given)
    upstream = torch.linspace(0.5, 1.5, result.numel()).to(result.dtype).view(result.shape)
    gradients = torch.autograd.grad(result, [given[n] for n in TRAINED], upstream, allow_unused=True)
    found = {f"gradient of {n}": g for n, g in zip(TRAINED, gradients, strict=True) if g is not None}
    return {"result": result.detach(), **found}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden_type", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_an_fp32_head_is_as_near_to_fp64_as_f_linear_under_the_same_autocast(op, hidden_type, backend):
    ours, eager = OPS[op]
    given = draw(hidden_type)
    found = run(lambda g: ours(g, backend), given, torch.bfloat16)
    expected = run(eager, given, torch.bfloat16)
    oracle = run(eager, {n: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
                         for n, x in given.items()})  # fmt: skip
    assert found.keys() == expected.keys()
    for name, kernel in found.items():
        assert kernel.dtype == expected[name].dtype
        if "gradient" in name:  # of operands in bfloat16, whatever type it is handed back in
            kernel = kernel.to(torch.bfloat16)
        assert_contract(f"{op} {name}", kernel, expected[name], oracle[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_autocast_is_the_call_with_operands_in_its_type(op, dtype, backend):
    ours, _ = OPS[op]

    def by_hand(g: Given) -> Tensor:
        operands = {n: g[n].to(dtype) for n in ("hidden", "ref_hidden", "weight", "bias")}
        adapters = {n: g[n] if op == "lora_linear" else g[n].to(dtype) for n in ("lora_a", "lora_b")}
        return ours({**g, **operands, **adapters}, backend)

    given = draw(torch.float32)
    expected = run(by_hand, given)
    found = run(lambda g: ours(g, backend), given, dtype)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("op", OPS)
def test_autocast_without_gradients_gives_the_same_bits(op):
    ours, _ = OPS[op]
    with torch.autocast("cpu", torch.bfloat16):
        expected = ours(draw(torch.float32), "cpu")
        with torch.no_grad():
            assert torch.equal(ours(draw(torch.float32), "cpu"), expected)


@pytest.mark.parametrize("op", OPS)
def test_autocast_leaves_float64_alone(op):
    ours, _ = OPS[op]
    given = {n: x.detach().double() if x.is_floating_point() else x for n, x in draw(torch.float32).items()}
    expected = ours(given, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(given, "cpu"), expected)


@pytest.mark.parametrize("op", OPS)
def test_autocast_around_a_compiled_call_gives_its_bits(op):
    ours, _ = OPS[op]
    torch.compiler.reset()
    compiled = torch.compile(lambda g: ours(g, "cpu"), fullgraph=True, backend="aot_eager")
    found, expected = (run(f, draw(torch.bfloat16), torch.bfloat16) for f in (compiled, lambda g: ours(g, "cpu")))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_head_stays_in_float32_under_autocast(backend):
    hidden, weight, returns = torch.randn(B, T, D).bfloat16(), torch.randn(D), torch.randn(B, T)
    expected = linear_value_loss(hidden, weight, None, returns, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_value_loss(hidden, weight, None, returns, backend=backend)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.values, expected.values)
