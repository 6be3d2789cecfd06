import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import value_loss
from rlhf_fast.ops.core.masked_loss import Over
from rlhf_fast.ops.values.value_loss import reference
from tests.losses import (
    BACKENDS,
    DTYPES,
    KERNELS,
    SHAPES,
    assert_keeps_contract,
    assert_same,
    compiled,
    draw,
    evaluate,
    ragged,
)


def run(inputs, **options):
    return evaluate(lambda *x: value_loss(*x, **options), inputs, 1)


def eager(mask, clip_eps):
    def loss(values, old_values, returns):
        counts = mask.to(values.dtype)
        squares = (values - returns) ** 2
        clipped = torch.zeros_like(squares)
        if clip_eps is not None:
            bounded = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
            bounded = torch.where((values - old_values).abs() < clip_eps, values, bounded)
            clipped = ((bounded - returns) ** 2 > squares).to(values.dtype)
            squares = torch.max(squares, (bounded - returns) ** 2)
        total, share = ((x * counts).sum() / counts.sum() for x in (0.5 * squares, clipped))
        return total, {"clip_fraction": share}

    return loss


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_unclipped_loss_is_half_the_squared_error(backend):
    # PPO, arXiv 1707.06347, the value term of eq. 9, with the factor 1/2 of the clipped form.
    got = run([torch.tensor([1.0, 4.0]), torch.tensor([9.0, 9.0]), torch.tensor([3.0, 1.0])], backend=backend)
    assert got["loss"].item() == (0.5 * 4 + 0.5 * 9) / 2
    assert got["gradient 0"].tolist() == [-1.0, 1.5]
    assert got["clip_fraction"].item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_clipped_loss_takes_the_greater_square_by_hand(backend):
    # Old value 0, eps 0.5, return 2: v = 1 is clipped to 0.5 (error 1.5 > 1), v = 0.25 is inside, and v = -1 is clipped
    # to -0.5, whose error 2.5 is the smaller one.
    values = torch.tensor([1.0, 0.25, -1.0])
    got = run([values, torch.zeros(3), torch.full((3,), 2.0)], clip_eps=0.5, denominator=2, backend=backend)
    assert got["loss"].item() == 0.5 * (1.5**2 + 1.75**2 + 3.0**2) / 2
    assert got["gradient 0"].tolist() == [0.0, -1.75 / 2, -3.0 / 2]
    assert got["clip_fraction"].item() == 1 / 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("clip_eps", [None, 0.25])
def test_values_and_gradients_keep_the_numerics_contract(backend, dtype, shape, clip_eps):
    mask = ragged(shape)
    assert_keeps_contract(
        lambda *x: value_loss(*x, mask=mask, clip_eps=clip_eps, backend=backend),
        eager(mask, clip_eps), draw(shape, 3, dtype), 1,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip_eps", [None, 0.2])
def test_what_is_behind_the_mask_changes_nothing(backend, clip_eps):
    mask, inputs = ragged((6, 9)), draw((6, 9), 3)
    poisoned = [x.masked_fill(~mask, math.nan) for x in inputs]
    got = run(poisoned, mask=mask, clip_eps=clip_eps, backend=backend)
    assert_same(got, run(inputs, mask=mask, clip_eps=clip_eps, backend=backend))
    assert got["gradient 0"][~mask].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3)], ids=str)
def test_nothing_counted_gives_a_connected_zero(backend, shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    got = run([torch.full(shape, math.nan)] * 3, mask=mask, clip_eps=0.2, backend=backend)
    assert (got["loss"].item(), got["clip_fraction"].item()) == (0.0, 0.0)
    assert torch.equal(got["gradient 0"], torch.zeros(shape))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_bits_of_contiguous_ones(backend):
    inputs = draw((5, 8), 3)
    strided = [x.T.contiguous().T for x in inputs]
    assert_same(run(strided, clip_eps=0.2, backend=backend), run(inputs, clip_eps=0.2, backend=backend))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(1, 12), st.integers(0, 2**16))
def test_micro_batches_with_the_global_denominator_sum_to_the_whole(rows, columns, seed):
    inputs, mask = draw((rows, columns), 3, torch.float64, seed), ragged((rows, columns))
    whole = run(inputs, mask=mask, clip_eps=0.2)
    parts = [
        run([x[part] for x in inputs], mask=mask[part], clip_eps=0.2, denominator=mask.sum())
        for part in (slice(0, 1), slice(1, None))
    ]
    for name in ("loss", "clip_fraction"):
        torch.testing.assert_close(sum(p[name] for p in parts), whole[name])
    torch.testing.assert_close(torch.cat([p["gradient 0"] for p in parts]), whole["gradient 0"])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 5), st.integers(0, 2**16))
def test_padding_the_order_of_rows_and_a_common_shift_change_nothing(rows, columns, pad, seed):
    inputs, mask = draw((rows, columns), 3, torch.float64, seed), ragged((rows, columns))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    moved = [torch.nn.functional.pad(x[order] + 3, (0, pad), value=math.inf) for x in inputs]
    got = run(moved, mask=torch.nn.functional.pad(mask[order], (0, pad)), clip_eps=0.2)
    expected = run(inputs, mask=mask, clip_eps=0.2)
    gradient = got.pop("gradient 0")[:, :columns]
    torch.testing.assert_close(gradient, expected.pop("gradient 0")[order])
    torch.testing.assert_close(got, expected)


def test_the_reference_is_differentiable_twice():
    values, old, returns = draw((2, 5), 3, torch.float64)
    values.requires_grad_()

    def loss(x):
        return reference(x, old, returns, Over(ragged((2, 5))), clip_eps=0.3)[0]

    assert torch.autograd.gradcheck(loss, values)
    assert torch.autograd.gradgradcheck(loss, values)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_registered_op_passes_opcheck(backend):
    (values, old, returns), mask = draw((3, 5), 3), ragged((3, 5)).to(torch.uint8)
    args = (values.requires_grad_(), returns, old, mask, None, "value_clip", 0.2, backend)
    torch.library.opcheck(torch.ops.rlhf_fast.value_loss.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip_eps", [None, 0.2])
def test_the_compiled_graph_is_whole_and_gives_the_same_bits(backend, clip_eps):
    inputs, mask = draw((3, 5), 3), ragged((3, 5))

    def loss(*x):
        return value_loss(*x, mask=mask, clip_eps=clip_eps, backend=backend)

    assert_same(evaluate(compiled(loss), inputs, 1), evaluate(loss, inputs, 1))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_second_derivative_of_a_kernel_raises(backend):
    inputs = draw((3, 5), 3)
    inputs[0].requires_grad_()
    (gradient,) = torch.autograd.grad(value_loss(*inputs, backend=backend)[0], inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"_loss has no second derivative; backend=.reference"):
        gradient.sum().backward()


def test_old_values_are_not_needed_without_a_clip():
    values, old, returns = draw((3, 5), 3)
    assert torch.equal(value_loss(values, None, returns)[0], value_loss(values, old, returns)[0])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x: [x[0], x[1], x[2][:1]], {}, r"returns .*\(2, 3\), got \(1, 3\)"),
        (lambda x: [x[0], x[1][0], x[2]], {"clip_eps": 0.2}, r"old_values .*\(2, 3\), got \(3,\)"),
        (lambda x: [x[0], None, x[2]], {"clip_eps": 0.2}, "old_values must be given with clip_eps=0.2"),
        (lambda x: x, {"clip_eps": 0.0}, "clip_eps must be > 0, got 0.0"),
        (lambda x: x, {"mask": torch.ones(3)}, r"mask .*\(2, 3\), got \(3,\)"),
        (lambda x: x, {"denominator": -1}, "denominator must be > 0, got -1"),
    ],
)
def test_bad_input_raises_with_its_values(change, options, message):
    with pytest.raises(ValueError, match=message):
        value_loss(*change(draw((2, 3), 3)), **options)
