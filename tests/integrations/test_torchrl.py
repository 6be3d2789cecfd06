"""torchrl's advantage estimates beside ours: values, gradients, types and layouts; patch and unpatch."""

from __future__ import annotations

import importlib
import math
import runpy
from pathlib import Path

import pytest
import torch

from rlhf_fast.integrations import patched
from rlhf_fast.integrations import torchrl as ours
from tests.integrations.parity import DTYPES, assert_parity, draw

pytest.importorskip("torchrl", reason="needs torchrl (make peers)")

theirs = importlib.import_module("torchrl.objectives.value.functional")

# Fractions of powers of 2: torchrl rounds gamma to float32 in float64 too.
GAMMA, LAMBDA = 0.96875, 0.9375
SHAPES = [(3, 11, 1), (2, 3, 7, 2), (13, 1), (2, 1, 1)]


def flags(*shape: int, seed: int, share: float = 0.25):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def floats(count: int, shape, dtype=torch.float32):
    return [draw(*shape, seed=k).to(dtype) for k in range(count)]


ENDS = {
    "none": lambda shape: (torch.zeros(shape, dtype=torch.bool), None),
    "done": lambda shape: (flags(*shape, seed=1), None),
    "terminated": lambda shape: (flags(*shape, seed=1), flags(*shape, seed=1) & flags(*shape, seed=2, share=0.5)),
    "terminated alone": lambda shape: (torch.zeros(shape, dtype=torch.bool), flags(*shape, seed=2)),
}


# --- Numbers for gamma and lambda ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize(("gamma", "lam"), [(GAMMA, LAMBDA), (1.0, 1.0), (GAMMA, 0.5)])
def test_gae_is_that_of_torchrl(dtype, shape, ends, gamma, lam):
    calls = [lambda *x, m=m: m.vec_generalized_advantage_estimate(gamma, lam, *x, *ends(shape)) for m in (ours, theirs)]
    assert_parity(*calls, floats(3, shape, dtype), 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize(("gamma", "lam"), [(GAMMA, LAMBDA), (torch.tensor(GAMMA), torch.tensor(LAMBDA)), (1.0, 0.5)])
def test_td_lambda_is_that_of_torchrl(dtype, shape, ends, gamma, lam):
    calls = [lambda *x, m=m: m.vec_td_lambda_return_estimate(gamma, lam, *x, *ends(shape)) for m in (ours, theirs)]
    assert_parity(*calls, floats(2, shape, dtype), 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("bounds", [{}, {"rho_thresh": 1.5, "c_thresh": 0.8}, {"rho_thresh": torch.tensor(0.9)}])
@pytest.mark.parametrize("trained", [0, 5])
def test_vtrace_is_that_of_torchrl(dtype, shape, ends, bounds, trained):
    calls = [lambda *x, m=m: m.vtrace_advantage_estimate(GAMMA, *x, *ends(shape), **bounds) for m in (ours, theirs)]
    assert_parity(*calls, floats(5, shape, dtype), trained)


def test_gradients_can_be_differentiated_again():
    done = flags(2, 5, 1, seed=1)
    inputs = [x.double().requires_grad_() for x in floats(3, (2, 5, 1))]

    def squares(*x):
        return ours.vec_generalized_advantage_estimate(GAMMA, LAMBDA, *x, done)[0] ** 2

    assert torch.autograd.gradcheck(squares, inputs)
    assert torch.autograd.gradgradcheck(squares, inputs)


def test_long_trajectories_keep_the_terms_that_torchrl_leaves_out():
    value, reward = torch.zeros(1, 400, 1, dtype=torch.float64), torch.zeros(1, 400, 1, dtype=torch.float64)
    reward[0, -1] = 1e9
    done = torch.zeros(1, 400, 1, dtype=torch.bool)
    arguments = (GAMMA, LAMBDA, value, value, reward, done)
    expected = 1e9 * (GAMMA * LAMBDA) ** 399
    assert ours.vec_generalized_advantage_estimate(*arguments)[0][0, 0, 0].item() == pytest.approx(expected, rel=1e-12)
    assert theirs.vec_generalized_advantage_estimate(*arguments)[0][0, 0, 0].item() == 0


def test_the_value_after_the_end_of_an_episode_is_not_looked_at():
    shape = (3, 11, 1)
    done = flags(*shape, seed=1)
    values, next_values, rewards = floats(3, shape)
    got = ours.vec_generalized_advantage_estimate(
        GAMMA, LAMBDA, values, next_values.masked_fill(done, math.nan), rewards, done
    )
    expected = ours.vec_generalized_advantage_estimate(GAMMA, LAMBDA, values, next_values, rewards, done)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


# --- Tensors of them, layouts ----------------------------------------------------------------------------------------


GAE = (ours.vec_generalized_advantage_estimate, theirs.generalized_advantage_estimate)
TD_LAMBDA = (ours.vec_td_lambda_return_estimate, theirs.td_lambda_return_estimate)


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("time_dim", [1, -3])
@pytest.mark.parametrize(("of_gamma", "of_lambda"), [(True, False), (False, True), (True, True)])
def test_a_discount_of_each_step_is_that_of_the_loops_of_torchrl(ends, time_dim, of_gamma, of_lambda):
    shape = (5, 7, 2)
    gammas, lambdas = (0.5 + flags(*shape, seed=seed, share=0.5).float() / 4 for seed in (5, 6))

    def call(function):
        return lambda x, *rest: function(
            gammas.to(x.dtype) if of_gamma else GAMMA, lambdas.to(x.dtype) if of_lambda else LAMBDA, x, *rest,
            *ends(shape), time_dim=time_dim,
        )  # fmt: skip

    assert_parity(*map(call, GAE), floats(3, shape), 3)
    assert_parity(*map(call, TD_LAMBDA), floats(2, shape), 2)


def test_a_lambda_of_zero_is_td_zero_where_the_vectorised_functions_of_torchrl_fail():
    done = flags(3, 11, 1, seed=1)
    assert_parity(*(lambda *x, f=f: f(GAMMA, 0.0, *x, done) for f in GAE), floats(3, done.shape))
    assert_parity(*(lambda *x, f=f: f(GAMMA, 0.0, *x, done) for f in TD_LAMBDA), floats(2, done.shape))


@pytest.mark.parametrize("time_dim", [0, 1, -1, -2, -3])
def test_time_may_be_any_dimension(time_dim):
    shape = (4, 5, 6)
    done = flags(*shape, seed=1)

    def call(name, *numbers):
        return [lambda *x, m=m: getattr(m, name)(*numbers, *x, done, time_dim=time_dim) for m in (ours, theirs)]

    assert_parity(*call("vec_generalized_advantage_estimate", GAMMA, LAMBDA), floats(3, shape), 3)
    assert_parity(*call("vec_td_lambda_return_estimate", GAMMA, LAMBDA), floats(2, shape), 2)
    assert_parity(*call("vtrace_advantage_estimate", GAMMA), floats(5, shape))
    assert_parity(*call("vtrace_advantage_estimate", GAMMA), floats(5, shape), 5)


def test_tensors_of_time_alone_are_taken_and_keep_their_shape():
    done = flags(9, seed=1)

    def call(module, time_dim):
        return lambda *x: module.vec_generalized_advantage_estimate(GAMMA, LAMBDA, *x, done, time_dim=time_dim)

    assert_parity(call(ours, -1), call(theirs, -1), floats(3, (9,)), 3)
    assert_parity(call(ours, 0), call(theirs, -1), floats(3, (9,)), 3)


def test_strided_inputs_are_taken():
    done = flags(6, 8, 1, seed=1)[::2]
    calls = [lambda *x, m=m: m.vec_generalized_advantage_estimate(GAMMA, LAMBDA, *x, done) for m in (ours, theirs)]
    assert_parity(
        lambda *x: calls[0](*(y[::2] for y in x)), lambda *x: calls[1](*(y[::2] for y in x)), floats(3, (6, 8, 1)), 3
    )


@pytest.mark.parametrize("module", [ours, theirs])
def test_different_shapes_raise_runtime_error(module):
    value, done = torch.zeros(2, 3, 1), torch.zeros(2, 3, 1, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="share"):
        module.vec_generalized_advantage_estimate(GAMMA, LAMBDA, value, value, value[:1], done)


@pytest.mark.parametrize("module", [ours, theirs])
def test_td_lambda_without_a_rolling_gamma_of_each_step_is_not_implemented(module):
    value, done = torch.zeros(2, 3, 1), torch.zeros(2, 3, 1, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="rolling_gamma=False"):
        module.vec_td_lambda_return_estimate(value + GAMMA, LAMBDA, value, value, done, rolling_gamma=False)


# --- patch -----------------------------------------------------------------------------------------------------------


def test_patch_replaces_every_name_and_unpatch_restores_it():
    advantages = importlib.import_module("torchrl.objectives.value.advantages")
    originals = {name: vars(theirs)[name.rpartition(".")[2]] for name in ours.replacements()}
    with patched("torchrl") as names:
        assert {*originals, "torchrl.objectives.value.advantages.vtrace_advantage_estimate"} <= set(names)
        assert {name: vars(theirs)[name.rpartition(".")[2]] for name in originals} == ours.replacements()
        assert advantages.vtrace_advantage_estimate is ours.vtrace_advantage_estimate
    assert {name: vars(theirs)[name.rpartition(".")[2]] for name in originals} == originals
    assert advantages.vtrace_advantage_estimate is theirs.vtrace_advantage_estimate


def test_the_gae_module_of_torchrl_runs_on_ours():
    tensordict = importlib.import_module("tensordict")
    advantages = importlib.import_module("torchrl.objectives.value.advantages")
    linear = tensordict.nn.TensorDictModule(torch.nn.Linear(3, 1), ["observation"], ["state_value"])
    batch = tensordict.TensorDict(
        {
            "observation": draw(2, 7, 3),
            "next": {
                "observation": draw(2, 7, 3, seed=1), "reward": draw(2, 7, 1, seed=2),
                "done": flags(2, 7, 1, seed=3), "terminated": flags(2, 7, 1, seed=3),
            },
        },
        [2, 7],
    )  # fmt: skip
    estimator = advantages.GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=linear)
    expected = estimator(batch.clone())
    with patched("torchrl"):
        got = estimator(batch.clone())
    for name in ("advantage", "value_target"):
        torch.testing.assert_close(got[name], expected[name])


def test_the_example_runs(capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "dropin" / "torchrl_gae.py"), run_name="__main__")
    assert "value targets differ" in capsys.readouterr().out
