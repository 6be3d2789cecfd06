import math

import pytest
import torch

from rlhf_fast import step_reward_loss
from rlhf_fast.ops.core.masked_loss import Over
from rlhf_fast.ops.rewards.step_reward_loss import VARIANTS, reference
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


def draw_steps(shape, dtype=torch.float32):
    scores, labels = draw(shape, 2, dtype)
    return [scores, labels.sigmoid()]


def run(inputs, **options):
    return evaluate(lambda *x: step_reward_loss(*x, **options), inputs, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bce_is_equation_2_of_math_shepherd(backend):
    # 2312.08935, eq. 2: -y log r - (1 - y) log(1 - r), here with r = sg(log 3) = 3/4 and labels 1, 0 and 1/2.
    scores = torch.full((3,), math.log(3.0), dtype=torch.float64)
    got = run([scores, torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)], backend=backend)
    expected = -1.5 * math.log(0.75) - 1.5 * math.log(0.25)
    assert got["loss"].item() == pytest.approx(expected / 3, rel=1e-12)
    torch.testing.assert_close(got["gradient 0"], torch.tensor([-0.25, 0.75, 0.25], dtype=torch.float64) / 3)
    assert got["accuracy"].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mse_is_the_squared_error(backend):
    got = run([torch.tensor([0.9, 0.2]), torch.tensor([1.0, 0.7])], variant="mse", backend=backend)
    assert got["loss"].item() == pytest.approx((0.01 + 0.25) / 2, rel=1e-5)
    assert got["accuracy"].item() == 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", [60.0, -60.0])
def test_a_confident_step_keeps_its_value_and_gradient(backend, score):
    got = run([torch.tensor([score]), torch.tensor([1.0 if score > 0 else 0.0])], backend=backend)
    assert got["loss"].item() == pytest.approx(math.exp(-60), rel=2e-6)
    assert abs(got["gradient 0"].item()) == pytest.approx(math.exp(-60), rel=2e-6)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_values_and_gradients_keep_the_numerics_contract(backend, dtype, variant):
    for shape in SHAPES:
        mask = ragged(shape)

        def eager(x, y, mask=mask):
            return reference(x, y, Over(mask), variant=variant)

        def loss(x, y, mask=mask):
            return step_reward_loss(x, y, mask=mask, variant=variant, backend=backend)

        assert_keeps_contract(loss, eager, draw_steps(shape, dtype), 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_nothing_behind_the_mask_is_looked_at(backend, variant):
    inputs, mask = draw_steps((5, 33)), ragged((5, 33))
    poisoned = [torch.where(mask, x, torch.nan) for x in inputs]
    options = {"mask": mask, "variant": variant, "backend": backend}
    assert_same(run(poisoned, **options), run(inputs, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_step_gives_a_connected_zero(backend):
    got = run(draw_steps((2, 3)), mask=torch.zeros(2, 3), backend=backend)
    assert [got["loss"].item(), got["accuracy"].item(), got["gradient 0"].abs().sum().item()] == [0.0] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_bits_of_contiguous_ones(backend):
    inputs = draw_steps((4, 9))
    assert_same(run([x.T for x in inputs], backend=backend), run([x.T.contiguous() for x in inputs], backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_batch_add_up_with_its_denominator(backend):
    inputs, mask = draw_steps((4, 9)), ragged((4, 9))
    whole = run(inputs, mask=mask, backend=backend)
    options = {"denominator": mask.sum(), "backend": backend}
    parts = [run([x[s] for x in inputs], mask=mask[s], **options) for s in (slice(1), slice(1, 4))]
    torch.testing.assert_close(parts[0]["loss"] + parts[1]["loss"], whole["loss"])
    torch.testing.assert_close(torch.cat([p["gradient 0"] for p in parts]), whole["gradient 0"])


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_reference_is_differentiable_twice(variant):
    scores, labels = draw_steps((5,), torch.float64)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference(x, labels, Over(), variant=variant)[0], (scores,))
    assert torch.autograd.gradgradcheck(lambda x: reference(x, labels, Over(), variant=variant)[0], (scores,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_compiled_graph_is_whole_and_gives_the_same_bits(backend):
    def loss(*x):
        return step_reward_loss(*x, mask=ragged((3, 5)), backend=backend)

    assert_same(evaluate(compiled(loss), draw_steps((3, 5)), 1), evaluate(loss, draw_steps((3, 5)), 1))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x, y: (x[None], y), {}, r"scores must be \(B, T\) or \(N,\), got \(1, 2, 3\)"),
        (lambda x, y: (x, y[:1]), {}, r"labels must be the shape of scores = \(2, 3\), got \(1, 3\)"),
        (lambda *x: x, {"variant": "ce"}, "variant must be one of bce, mse, got 'ce'"),
        (lambda *x: x, {"mask": torch.ones(3)}, r"mask must be the shape of scores = \(2, 3\), got \(3,\)"),
        (lambda *x: x, {"denominator": 0}, "denominator must be > 0, got 0"),
    ],
)
def test_bad_input_raises_with_its_values(change, options, message):
    with pytest.raises(ValueError, match=message):
        step_reward_loss(*change(*draw_steps((2, 3))), **options)
