"""Past the dispatcher goes only what nothing but autograd looks at."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_fast
from rlhf_fast.ops.core import registration


class Calls(TorchDispatchMode):
    """The names of the ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
WITHOUT_GRADIENT = {
    "whiten": lambda x: rlhf_fast.whiten(x),
    "gae": lambda x: rlhf_fast.gae(x, x)[0],
    "vtrace": lambda x: rlhf_fast.vtrace(x, x, x, x)[0],
    "group_advantages": lambda x: rlhf_fast.group_advantages(x.reshape(-1), group_size=6).view(4, 6),
    "shaped_rewards": lambda x: rlhf_fast.shaped_rewards(x[:, 0], x, mask=torch.ones(4, 6), kl_coef=0.1),
}


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_a_mode_sees_an_op_without_a_gradient(name):
    with Calls() as calls:
        WITHOUT_GRADIENT[name](X)
    assert f"rlhf_fast::{name}" in calls.names


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_a_function_transform_goes_through_an_op_without_a_gradient(name):
    op = WITHOUT_GRADIENT[name]
    assert torch.equal(torch.func.grad(lambda x: (x * op(x)).sum())(X), op(X))


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_results_of_an_op_without_a_gradient_require_none(name):
    assert not WITHOUT_GRADIENT[name](X.clone().requires_grad_()).requires_grad


class Factors(NamedTuple):
    x: Tensor
    offset: Tensor | None
    weights: list[Tensor]


class Options(NamedTuple):
    power: float
    limit: int | None
    names: list[float]


def _compute(factors: Factors, options: Options, backend: str) -> list[Tensor]:
    x, offset, weights = factors
    y = sum((w * x**options.power for w in weights), torch.zeros_like(x))
    return [y if offset is None else y + offset, x.detach().clone()]


def _backward(saved: registration.Saved, upstream) -> dict[str, registration.Gradient]:
    (factors, options), grad = saved.inputs, upstream[0]
    assert factors.offset is None, "a tensor that is not saved does not come back"
    assert (saved.backend, len(saved.results)) == ("cpu", 1)
    slope = sum(factors.weights) * options.power * factors.x ** (options.power - 1)
    of_weights = [grad * factors.x**options.power if needed else None for needed in saved.needs["weights"]]
    return {"x": grad * slope, "offset": grad, "weights": of_weights}


_toy = registration.op(
    "toy_of_the_tests",
    (Factors, Options),
    _compute,
    fake=lambda factors, options, backend: [torch.empty_like(factors.x), torch.empty_like(factors.x)],
    differentiable=("x", "offset", "weights"),
    backward=_backward,
    returned=1,
    saves=("x", "weights"),
    saves_results=slice(1, None),
)
OPTIONS = Options(2.0, None, [1.0])


def toy(x, offset, *weights):
    return _toy(Factors(x, offset, list(weights)), OPTIONS, "cpu")[0]


def test_the_schema_of_an_op_is_that_of_its_inputs():
    assert str(torch.ops.rlhf_fast.toy_of_the_tests.default._schema) == (
        "rlhf_fast::toy_of_the_tests(Tensor x, Tensor? offset, Tensor[] weights, float power, SymInt? limit, "
        "float[] names, str backend) -> Tensor[]"
    )


def test_two_inputs_of_one_name_are_refused():
    with pytest.raises(ValueError, match="twice_named: two inputs have one name among x, offset, weights, x"):
        registration.op_without_gradient("twice_named", (Factors, Factors), _compute, fake=_compute)


def leaves(*wanted):
    return [torch.rand(3, dtype=torch.float64).add(1).requires_grad_(needed) for needed in wanted]


@pytest.mark.parametrize("wanted", [(True, True, True, True), (True, False, False, True), (False, True, True, False)])
def test_gradients_come_back_by_name_and_only_where_they_are_needed(wanted):
    inputs = leaves(*wanted)
    assert torch.autograd.gradcheck(toy, inputs)
    toy(*inputs).sum().backward()
    assert [x.grad is not None for x in inputs] == list(wanted)


def test_an_input_that_is_not_there_has_no_gradient():
    (x, weight) = leaves(True, True)
    toy(x, None, weight).sum().backward()
    torch.testing.assert_close(x.grad, 2 * weight * x)


def test_an_eager_call_and_the_dispatcher_agree_and_a_compiler_sees_one_op():
    inputs = leaves(True, True, True, True)
    eager = torch.autograd.grad(toy(*inputs).sum(), inputs)
    with Calls() as calls:
        dispatched = torch.autograd.grad(toy(*inputs).sum(), inputs)
    assert "rlhf_fast::toy_of_the_tests" in calls.names
    compiled = torch.autograd.grad(torch.compile(toy, fullgraph=True, backend="aot_eager")(*inputs).sum(), inputs)
    torch.testing.assert_close((dispatched, compiled), (eager, eager), rtol=0, atol=0)
    flat = (inputs[0], inputs[1], inputs[2:], *OPTIONS, "cpu")
    torch.library.opcheck(torch.ops.rlhf_fast.toy_of_the_tests.default, flat)


def test_what_is_not_saved_is_not_kept_alive():
    x, offset, weight = leaves(True, True, True)
    y = toy(x, offset, weight)
    held = {id(t) for t in y.grad_fn.saved_tensors}
    assert id(offset) not in held
    assert not any(isinstance(other, Tensor) for other in y.grad_fn.others)
