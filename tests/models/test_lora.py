"""LoRALinear without gradients: calls that repeat are prepared once, and nothing stale is ever used."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_fast.backends import use_backend
from rlhf_fast.data.encoding import Prompt
from rlhf_fast.models import lora as lora_module
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.lora import LoRALinear, LoRAShape, Route, routed
from rlhf_fast.models.tiny import tiny
from rlhf_fast.rollout import roll_out

IN, OUT = 33, 21
ROUTES = {
    "one adapter": Route(("a",)),
    "two adapters": Route(("a", "b"), 3),
    "base, two adapters, one of them twice": Route((None, "b", "a", "b"), 3),
    "an adapter of other layers": Route(("elsewhere", "a"), 3),
}
KINDS = ("linear", "linear without bias", "Conv1D", "DoRA", "rank 16", "quantised")


def make(kind: str = "linear", dtype: torch.dtype = torch.float32) -> LoRALinear:
    """Adapters "a" and "b" of different ranks and scales, away from their start."""
    torch.manual_seed(0)
    base = Conv1D(OUT, IN) if kind == "Conv1D" else nn.Linear(IN, OUT, bias=kind != "linear without bias")
    lora = LoRALinear(base.to(dtype).requires_grad_(False), 0)
    add(lora, "a", LoRAShape(16 if kind == "rank 16" else 4, 2.0, use_dora=kind == "DoRA"))
    add(lora, "b", LoRAShape(3, 0.5))
    return lora


@torch.no_grad()
def add(lora: LoRALinear, name: str, shape: LoRAShape) -> None:
    for parameter in lora.add(name, shape, trainable=True, dtype=torch.float32).parameters.values():
        parameter.add_(torch.rand_like(parameter))


def rows(route: Route, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(len(route.adapters) * 3, 1, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def ordinary(lora: LoRALinear, x: Tensor, route: Route) -> Tensor:
    """With gradients nothing is prepared."""
    with torch.enable_grad(), routed(route):
        return lora(x).detach()


@pytest.fixture
def checked_calls(monkeypatch) -> list[Tensor]:
    """The inputs that take the way with all checks."""
    calls: list[Tensor] = []
    original = LoRALinear._adapted
    monkeypatch.setattr(LoRALinear, "_adapted", lambda lora, x, route: (calls.append(x), original(lora, x, route))[1])
    return calls


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_prepared_calls_have_the_bits_of_the_ordinary_ones(monkeypatch, checked_calls, kind, dtype, backend):
    monkeypatch.setattr(lora_module, "is_quantized", lambda module: kind == "quantised")
    lora = make(kind, dtype)
    for route in ROUTES.values():
        first, second = rows(route, dtype), rows(route, dtype).flip(0)
        with use_backend(backend):
            expected = ordinary(lora, second, route)
            checked_calls.clear()
            with torch.no_grad(), routed(route):
                lora(first)
                found = lora(second)
        assert torch.equal(found, expected)
        assert found.dtype == dtype
        assert len(checked_calls) == 1


def step(lora: LoRALinear) -> None:
    optimizer = torch.optim.SGD([lora.bank["a"].a, lora.bank["a"].b], lr=1.0)
    for parameter in (lora.bank["a"].a, lora.bank["a"].b):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def replace(lora: LoRALinear) -> None:
    del lora.bank["a"]
    add(lora, "a", LoRAShape(5, 1.0))


def remove(lora: LoRALinear) -> None:
    del lora.bank["a"]


def rescale(lora: LoRALinear) -> None:
    lora.bank["a"].shape = LoRAShape(4, 3.0)


def add_the_other(lora: LoRALinear) -> None:
    add(lora, "late", LoRAShape(2, 1.0))


def to_another_type(lora: LoRALinear) -> None:
    pair = lora.bank["a"]
    pair.a.data, pair.b.data = pair.a.data.bfloat16(), pair.b.data.double()


def another_type_at_the_same_address(lora: LoRALinear) -> None:
    values = lora.bank["a"].a.data.repeat(2, 1).flatten()
    lora.bank["a"].a.data = values[: 4 * IN].view(4, IN)
    with torch.no_grad(), routed(CHANGED):
        lora(rows(CHANGED))
    lora.bank["a"].a.data = values.view(torch.float64).view(4, IN)


def other_strides_at_the_same_address(lora: LoRALinear) -> None:
    lora.bank["a"].a.data = lora.bank["a"].a.data.view(IN, 4).t()


def fewer_ranks_at_the_same_address(lora: LoRALinear) -> None:
    lora.bank["a"].a.data = lora.bank["a"].a.data[:2]
    lora.bank["a"].b.data = lora.bank["a"].b.data.view(-1)[: 2 * OUT].view(OUT, 2)


def another_base_weight(lora: LoRALinear) -> None:
    lora.base.weight = nn.Parameter(torch.randn(OUT, IN), requires_grad=False)


CHANGED = Route(("a", "b", "late"), 3)
CHANGES: tuple[Callable[[LoRALinear], None], ...] = (
    step, replace, remove, rescale, add_the_other, to_another_type, another_type_at_the_same_address,
    other_strides_at_the_same_address, fewer_ranks_at_the_same_address, another_base_weight,
)  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_layer_is_seen_by_the_next_call(change, backend):
    lora, x = make(), rows(CHANGED)
    with use_backend(backend), torch.no_grad(), routed(CHANGED):
        lora(x)
        before = lora(x)
        change(lora)
        found = lora(x)
        assert not torch.equal(found, before)
        assert torch.equal(found, ordinary(lora, x, CHANGED))


def test_another_magnitude_is_seen_by_the_next_call():
    lora, x = make("DoRA"), rows(CHANGED)
    with torch.no_grad(), routed(CHANGED):
        before = [lora(x), lora(x)][1]
        lora.bank["a"].magnitude = nn.Parameter(torch.rand(OUT))
        found = lora(x)
        assert not torch.equal(found, before)
        assert torch.equal(found, ordinary(lora, x, CHANGED))


def test_a_base_weight_of_another_shape_is_refused_by_the_next_call():
    lora, x = make("linear without bias"), rows(CHANGED)
    with torch.no_grad(), routed(CHANGED):
        lora(x)
        lora.base.weight = nn.Parameter(torch.randn(OUT + 1, IN), requires_grad=False)
        with pytest.raises(ValueError, match=r"must have A \(R, 33\) and B \(22, R\)"):
            lora(x)


def test_a_base_weight_in_another_form_is_seen_by_the_next_call():
    lora, x = make("linear without bias"), rows(CHANGED)
    with torch.no_grad(), routed(CHANGED):
        lora(x)
        for weight in (torch.randn(IN, OUT).t(), torch.randn(OUT, 2 * IN)[:, :IN]):
            lora.base.weight = nn.Parameter(weight, requires_grad=False)
            assert torch.equal(lora(x), ordinary(lora, x, CHANGED))
        lora.base.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
        with pytest.raises(TypeError, match=r"must have the type of x, got x torch\.float32, weight torch\.bfloat16"):
            lora(x)


def test_a_change_of_the_input_is_seen_by_the_next_call():
    lora, route = make(), ROUTES["one adapter"]
    x = rows(route)
    with torch.no_grad(), routed(route):
        for other in (x, x[:2], x.transpose(0, 1).contiguous(), x.repeat(1, 1, 2)[..., :IN]):
            lora(x)
            assert torch.equal(lora(other), ordinary(lora, other, route))
        lora(x)
        with pytest.raises(TypeError, match=r"must have the type of x, got x torch\.float64"):
            lora(x.double())
        with pytest.raises(ValueError, match=r"got \(3, 1, 32\) and \(21, 33\)"):
            lora(x[..., :-1].contiguous())


def test_grad_mode_autocast_and_dropout_take_the_ordinary_call(checked_calls):
    lora, route = make(), ROUTES["one adapter"]
    x = rows(route)
    with torch.no_grad(), routed(route):
        lora(x)
        lora(x)
        checked_calls.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert lora(x).dtype == torch.bfloat16
        with torch.enable_grad():
            assert lora(x).requires_grad
        with routed(Route(("a",), dropout_seed=1)):
            lora(x)
    assert len(checked_calls) == 3


def test_one_backend_after_another_is_followed():
    lora, route = make(dtype=torch.bfloat16), ROUTES["one adapter"]
    x = rows(route, torch.bfloat16)
    with torch.no_grad(), routed(route):
        for name in ("cpu", "reference", "triton", "cpu"):
            with use_backend(name):
                lora(x)
                assert torch.equal(lora(x), ordinary(lora, x, route))


def test_generation_checks_the_prompts_and_the_first_token_alone(checked_calls):
    model, tokenizer = tiny(0, hidden_size=32, layers=2, heads=2)
    backbone = Backbone(model)
    backbone.add_adapter("policy", rank=2, seed=0)
    backbone.model.generation_config.eos_token_id = None
    prompts = [Prompt("", [257, 97, 98], "ab", {"prompt": "ab"})] * 2
    rollout = roll_out(backbone, tokenizer, prompts, max_new_tokens=8)
    assert rollout.batch.mask.sum(1).max() > 3
    assert len(checked_calls) == 2 * (len(backbone.adapters["policy"]) + 1)  # and the head
