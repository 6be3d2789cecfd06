"""Past the dispatcher goes only what nothing but autograd looks at."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_fast


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
