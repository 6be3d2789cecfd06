import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import linear_value_loss, value_loss
from rlhf_fast.ops.core.masked_loss import Over
from rlhf_fast.ops.values.linear_value_loss import reference
from rlhf_fast.testing.numerics import assert_contract
from tests.losses import BACKENDS, DTYPES, KERNELS, compiled, ragged


def draw(shape, width, dtype=torch.float32, seed=0):
    """hidden, weight, bias, old_values, returns; the head in float32, or float64 beside float64."""
    g = torch.Generator().manual_seed(seed)
    head = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size, dtype=head):
        return torch.randn(*size, generator=g).to(dtype)

    hidden, weight = normal(*shape, width, dtype=dtype), normal(1, width) / width**0.5
    return [hidden, weight, normal(1), normal(*shape), normal(*shape)]


def run(inputs, op=linear_value_loss, **options):
    hidden, weight, bias, old_values, returns = inputs
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    loss, metrics, values = op(leaves["hidden"], leaves["weight"], old_values, returns, bias=leaves["bias"], **options)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), "values": values, **metrics, **dict(zip(leaves, gradients, strict=True))}


def eager(hidden, weight, old_values, returns, *, bias, mask, clip_eps):
    """As a trainer writes it, with the head's product in the type of the hidden states."""
    values = torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype)).squeeze(-1).float()
    values = values.to(returns.dtype)
    squares = (values - returns) ** 2
    clipped = torch.zeros_like(squares)
    if clip_eps is not None:
        bounded = torch.minimum(torch.maximum(values, old_values - clip_eps), old_values + clip_eps)
        clipped = ((bounded - returns) ** 2 > squares).to(squares.dtype)
        squares = torch.maximum(squares, (bounded - returns) ** 2)
    loss = (0.5 * squares * mask).sum() / mask.sum()
    return loss, {"clip_fraction": (clipped * mask).sum() / mask.sum()}, (values * mask).detach()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_is_half_the_squared_error_of_the_head_by_hand(backend):
    # The value term of eq. 9, arXiv 1707.06347: v = (1 + 2 + 0.5, 3 - 2 + 0.5), errors 3.5 - 3 and 1.5 - 4.
    inputs = [torch.tensor([[1.0, 2.0], [3.0, -2.0]]), torch.ones(2), torch.tensor(0.5), None, torch.tensor([3.0, 4.0])]
    got = run(inputs, backend=backend)
    assert got["values"].tolist() == [3.5, 1.5]
    assert got["loss"].item() == (0.5 * 0.25 + 0.5 * 6.25) / 2
    assert got["hidden"].tolist() == [[0.25, 0.25], [-1.25, -1.25]]
    assert got["weight"].tolist() == [(0.5 - 7.5) / 2, (1.0 + 5.0) / 2]
    assert got["bias"].item() == (0.5 - 2.5) / 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_clip_stops_the_gradient_by_hand(backend):
    # Old value 0, eps 0.5, return 2: 1 is clipped to 0.5 (error 1.5 > 1), 0.25 is inside of the clip.
    inputs = [torch.tensor([[1.0], [0.25]]), torch.ones(1, 1), torch.zeros(1), torch.zeros(2), torch.full((2,), 2.0)]
    got = run(inputs, clip_eps=0.5, denominator=4, backend=backend)
    assert got["loss"].item() == 0.5 * (1.5**2 + 1.75**2) / 4
    assert got["hidden"].tolist() == [[0.0], [-1.75 / 4]]
    assert got["weight"].tolist() == [[-1.75 * 0.25 / 4]]
    assert got["clip_fraction"].item() == 1 / 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "width"), [((1, 1), 1), ((5, 31), 17), ((2, 70), 96)], ids=str)
@pytest.mark.parametrize("clip_eps", [None, 0.25])
def test_values_and_gradients_keep_the_numerics_contract(backend, dtype, shape, width, clip_eps):
    inputs, options = draw(shape, width, dtype), {"mask": ragged(shape), "clip_eps": clip_eps}
    got, plain = run(inputs, backend=backend, **options), run(inputs, eager, **options)
    exact = run([x.double() for x in inputs], backend="reference", **options)
    for name, value in got.items():
        assert_contract(name, value, plain[name], exact[name].double())
    assert got["hidden"].dtype == dtype
    assert got["weight"].dtype == inputs[1].dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip_eps", [None, 0.2])
def test_what_is_behind_the_mask_changes_nothing(backend, clip_eps):
    mask, inputs = ragged((6, 9)), draw((6, 9), 5)
    options = {"mask": mask, "clip_eps": clip_eps, "backend": backend}
    poisoned = [x.clone() for x in inputs]
    for k in (0, 3, 4):
        poisoned[k][~mask] = math.nan
    got, expected = run(poisoned, **options), run(inputs, **options)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert got["hidden"][~mask].eq(0).all()
    assert got["values"][~mask].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3)], ids=str)
def test_nothing_counted_gives_a_connected_zero(backend, shape):
    inputs = draw(shape, 4)
    inputs[0] = torch.full_like(inputs[0], math.nan)
    got = run(inputs, mask=torch.zeros(shape), clip_eps=0.2, backend=backend)
    assert all(got[name].eq(0).all() for name in got)


@pytest.mark.parametrize("backend", KERNELS)
def test_strided_hidden_states_give_the_bits_of_contiguous_ones(backend):
    inputs = draw((5, 8), 6)
    expected = run(inputs, backend=backend)
    for strided in (inputs[0].mT.contiguous().mT, torch.cat([inputs[0]] * 2, -1)[..., :6]):
        got = run([strided, *inputs[1:]], backend=backend)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_more_rows_than_partial_sums(backend):
    inputs = draw((3000,), 3, torch.float64)
    got, expected = run(inputs, backend=backend), run(inputs, backend="reference")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counted", range(9))
def test_rows_are_taken_together_whatever_the_mask_leaves_of_them(counted):
    inputs = draw((9,), 37, torch.float64)
    options = {"mask": torch.randperm(9, generator=torch.Generator().manual_seed(2)) < counted, "clip_eps": 0.2}
    got, expected = run(inputs, **options, backend="cpu"), run(inputs, **options, backend="reference")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12)


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    inputs, found = draw((1200,), 577), []  # more than one thread takes alone
    for threads in (1, 3):
        monkeypatch.setattr("rlhf_fast.ops.values.linear_value_loss.threads", lambda n=threads: n)
        found.append(run(inputs, backend="cpu"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("backend", KERNELS)
def test_a_frozen_head_gets_no_gradient(backend):
    hidden, weight, _, _, returns = draw((4,), 3)
    loss, _, _ = linear_value_loss(hidden.requires_grad_(), weight, None, returns, backend=backend)
    loss.backward()
    assert weight.grad is None
    expected = (hidden.detach() @ weight[0] - returns)[:, None] * weight / 4
    torch.testing.assert_close(hidden.grad, expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(1, 12), st.integers(0, 2**16))
def test_it_is_value_loss_of_the_head_s_values(rows, columns, seed):
    inputs, mask = draw((rows, columns), 7, torch.float64, seed), ragged((rows, columns))
    got = run(inputs, mask=mask, clip_eps=0.3, denominator=mask.sum())
    values = inputs[0] @ inputs[1][0] + inputs[2]
    loss, metrics = value_loss(values, *inputs[3:], mask=mask, clip_eps=0.3)
    torch.testing.assert_close(got["loss"], loss)
    torch.testing.assert_close(got["clip_fraction"], metrics["clip_fraction"])
    parts = [run([inputs[0][part], *inputs[1:3], *(x[part] for x in inputs[3:])], mask=mask[part], clip_eps=0.3,
                 denominator=mask.sum()) for part in (slice(0, 1), slice(1, None))]  # fmt: skip
    for name in ("loss", "clip_fraction", "weight", "bias"):
        torch.testing.assert_close(sum(p[name] for p in parts), got[name])


def test_the_reference_is_differentiable_twice():
    hidden, weight, bias, old, returns = draw((2, 3), 3, torch.float64)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def loss(hidden, weight, bias):
        return reference(hidden, weight, old, returns, Over(ragged((2, 3))), bias=bias, clip_eps=0.3)[0]

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_registered_op_passes_opcheck(backend):
    hidden, weight, bias, old, returns = draw((6,), 4)
    leaves = [x.requires_grad_() for x in (hidden, weight[0].detach(), bias[0].detach())]
    args = (*leaves, old, returns, None, None, 0.2, True, backend)
    torch.library.opcheck(torch.ops.rlhf_fast.linear_value_loss.default, args)


def test_differentiating_twice_raises():
    hidden, weight, _, _, returns = draw((6,), 4)
    loss, _, _ = linear_value_loss(hidden.requires_grad_(), weight, None, returns)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), hidden)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_compiled_graph_is_whole_and_gives_the_same_bits(backend):
    inputs, options = draw((3, 5), 4), {"mask": ragged((3, 5)), "clip_eps": 0.2, "backend": backend}
    got = run(inputs, compiled(lambda *x, **o: linear_value_loss(*x, **o, **options)))
    expected = run(inputs, **options)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({1: torch.ones(3)}, {}, r"weight \(D,\) or \(1, D\) with D >= 1, got \(2, 3, 4\) and \(3,\)"),
        ({4: torch.ones(2)}, {}, r"returns must be hidden.shape\[:-1\] = \(2, 3\), got \(2,\)"),
        ({3: None}, {"clip_eps": 0.2}, "old_values must be given with clip_eps=0.2"),
        ({}, {"clip_eps": 0.0}, "clip_eps must be > 0, got 0.0"),
        ({2: torch.ones(2)}, {}, r"bias must be \(\) or \(1,\), got \(2,\)"),
        ({}, {"mask": torch.ones(3)}, r"mask .*\(2, 3\), got \(3,\)"),
        ({}, {"denominator": 0}, "denominator must be > 0, got 0"),
    ],
)
def test_bad_input_raises_with_its_values(change, options, message):
    hidden, weight, bias, old, returns = (change.get(k, x) for k, x in enumerate(draw((2, 3), 4)))
    with pytest.raises(ValueError, match=message):
        linear_value_loss(hidden, weight, old, returns, bias=bias, **options)
