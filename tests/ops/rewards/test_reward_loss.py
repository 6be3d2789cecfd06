import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import ensemble_scores, reward_loss
from rlhf_fast.ops.core.masked_loss import Over
from rlhf_fast.ops.rewards.reward_loss import reference
from tests.losses import BACKENDS, DTYPES, KERNELS, assert_keeps_contract, assert_same, compiled, draw, evaluate


def run(inputs, **options):
    return evaluate(lambda *x: reward_loss(*x, **options), inputs, 2)


def eager(chosen, rejected, margin):
    difference = chosen - rejected
    metrics = {"accuracy": (difference > 0).to(chosen.dtype).mean(), "margin": difference.detach().mean()}
    return -torch.nn.functional.logsigmoid(difference - margin).mean(), metrics


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_is_equation_1_of_instructgpt(backend):
    # arXiv 2203.02155, eq. 1 with one pair per prompt: sigmoid(log 3) = 3/4 and sigmoid(-log 3) = 1/4.
    chosen, rejected = torch.tensor([math.log(3.0) + 2, 0.0]), torch.tensor([2.0, math.log(3.0)])
    got = run([chosen, rejected], backend=backend)
    assert got["loss"].item() == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2, rel=1e-6)
    torch.testing.assert_close(got["gradient 0"], torch.tensor([-0.25, -0.75]) / 2)
    torch.testing.assert_close(got["gradient 1"], torch.tensor([0.25, 0.75]) / 2)
    assert got["accuracy"].item() == 0.5
    assert got["margin"].item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("margin", [1.0, torch.ones(1), torch.ones(1, dtype=torch.bfloat16)], ids=str)
def test_the_margin_is_equation_2_of_llama_2(backend, margin):
    # arXiv 2307.09288: sigmoid(1 + log 3 - 1) = 3/4; the metrics leave the margin out.
    got = run([torch.tensor([1 + math.log(3.0)]), torch.zeros(1)], margin=margin, backend=backend)
    assert got["loss"].item() == pytest.approx(-math.log(0.75), rel=1e-6)
    assert got["margin"].item() == pytest.approx(1 + math.log(3.0), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_label_smoothing_is_the_expected_loss_of_a_flipped_label(backend):
    # arXiv 2401.06080: -(1 - s) log sigmoid(h) - s log sigmoid(-h), here with sigmoid(h) = 3/4.
    got = run([torch.tensor([math.log(3.0)]), torch.zeros(1)], label_smoothing=0.2, backend=backend)
    assert got["loss"].item() == pytest.approx(-0.8 * math.log(0.75) - 0.2 * math.log(0.25), rel=1e-6)
    assert got["gradient 0"].item() == pytest.approx(-0.8 * 0.25 + 0.2 * 0.75, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_soft_label_is_the_cross_entropy_with_its_chance(backend, smoothing):
    chances = torch.tensor([1.0, 0.8, 0.5, 0.0])
    inputs = [torch.tensor([3.0, -2.0, 0.5, 40.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])]
    got = run(inputs, margin=0.5, preferences=chances, label_smoothing=smoothing, backend=backend)
    chosen, rejected = (x.double().requires_grad_() for x in inputs)
    kept = chances.double() * (1 - smoothing) + (1 - chances.double()) * smoothing
    h = chosen - rejected - 0.5
    logs = torch.nn.functional.logsigmoid
    expected = -(kept * logs(h) + (1 - kept) * logs(-h)).mean()
    expected.backward()
    assert got["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(got["gradient 0"].double(), chosen.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got["gradient 1"].double(), rejected.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_centring_adds_the_squared_sum(backend):
    # arXiv 2312.09244, section 3: 0.1 (log 3 + 2 + 2)^2, slope 0.2 (log 3 + 4) in both rewards.
    got = run([torch.tensor([math.log(3.0) + 2]), torch.tensor([2.0])], centring=0.1, backend=backend)
    total = math.log(3.0) + 4
    assert got["loss"].item() == pytest.approx(-math.log(0.75) + 0.1 * total**2, rel=1e-6)
    assert got["gradient 0"].item() == pytest.approx(-0.25 + 0.2 * total, rel=1e-6)
    assert got["gradient 1"].item() == pytest.approx(0.25 + 0.2 * total, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_is_the_log_exp_form(backend):
    chosen, rejected = inputs = draw((9,), 2, torch.float64)
    expected = torch.log(1 + torch.exp(rejected - chosen)).mean().item()
    assert run(inputs, backend=backend)["loss"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tie_is_not_accurate(backend):
    assert run([torch.ones(3), torch.ones(3)], backend=backend)["accuracy"].item() == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [60.0, -60.0, 1e4, -1e4])
def test_confident_pairs_keep_their_value_and_gradient(backend, gap):
    got = run([torch.tensor([gap]), torch.zeros(1)], backend=backend)
    tail = math.exp(-min(abs(gap), 80.0)) if abs(gap) < 80 else 0.0
    assert got["loss"].item() == pytest.approx(tail if gap > 0 else -gap, rel=2e-6, abs=1e-38)
    assert got["gradient 0"].item() == pytest.approx(-tail if gap > 0 else -1.0, rel=2e-6, abs=1e-38)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairs", [1, 17, 2100])
def test_values_and_gradients_keep_the_numerics_contract(backend, dtype, pairs):
    inputs = draw((pairs,), 3, dtype)
    assert_keeps_contract(lambda c, r, m: reward_loss(c, r, margin=m, backend=backend), eager, inputs, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_pair_gives_a_connected_zero(backend):
    got = run([torch.empty(0), torch.empty(0)], backend=backend)
    assert [got[name].item() for name in ("loss", "accuracy", "margin")] == [0.0] * 3
    assert got["gradient 0"].shape == (0,)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.floats(-50, 50), st.integers(0, 2**16))
def test_a_common_shift_and_the_order_of_pairs_change_nothing(pairs, shift, seed):
    inputs = draw((pairs,), 2, torch.float64, seed)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    got, expected = run([x[order] + shift for x in inputs]), run(inputs)
    for name in ("gradient 0", "gradient 1"):
        torch.testing.assert_close(got.pop(name), expected.pop(name)[order])
    torch.testing.assert_close(got, expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**16))
def test_exchanging_chosen_and_rejected_adds_the_mean_difference(pairs, seed):
    # softplus(h) - softplus(-h) = h
    chosen, rejected = draw((pairs,), 2, torch.float64, seed)
    got, swapped = run([chosen, rejected]), run([rejected, chosen])
    torch.testing.assert_close(swapped["loss"] - got["loss"], (chosen - rejected).mean())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_bits_of_contiguous_ones(backend):
    inputs = draw((9,), 2)
    assert_same(run(torch.stack(inputs, 1).unbind(1), backend=backend), run(inputs, backend=backend))


def test_the_reference_is_differentiable_twice():
    chosen, rejected, margin = draw((4,), 3, torch.float64)
    leaves = (chosen.requires_grad_(), rejected.requires_grad_())
    assert torch.autograd.gradcheck(lambda c, r: reference(c, r, margin, Over())[0], leaves)
    assert torch.autograd.gradgradcheck(lambda c, r: reference(c, r, margin, Over())[0], leaves)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_registered_op_passes_opcheck(backend):
    inputs = [x[None] for x in draw((5,), 9)]
    inputs[0].requires_grad_()
    inputs[1].requires_grad_()
    args = (*inputs, None, None, "bradley_terry", 1.0, 0.0, 0.1, 0.0, 0.0, backend)
    torch.library.opcheck(torch.ops.rlhf_fast.reward_loss.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_compiled_graph_is_whole_and_gives_the_same_bits(backend):
    inputs = draw((5,), 2)

    def loss(*x):
        return reward_loss(*x, margin=0.5, backend=backend)

    assert_same(evaluate(compiled(loss), inputs, 2), evaluate(loss, inputs, 2))


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([torch.zeros(2, 1), torch.zeros(2, 1)], {}, r"chosen_rewards must be \(B,\), got \(2, 1\)"),
        ([torch.zeros(2), torch.zeros(3)], {}, r"rejected_rewards must be \(B,\) = \(2,\), got \(3,\)"),
        ([torch.zeros(2), torch.zeros(2)], {"margin": torch.zeros(3)}, r"margin .*\(2,\), got \(3,\)"),
    ],
)
def test_bad_input_raises_with_its_values(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        reward_loss(*inputs, **options)


def test_ensembles_are_a_mean_less_or_more_the_spread():
    scores = torch.tensor([[1.0, 2.0], [3.0, 2.0]], dtype=torch.float64)
    assert ensemble_scores(scores).tolist() == [2.0, 2.0]
    assert ensemble_scores(scores, variant="pessimistic", coef=0.5).tolist() == [1.5, 2.0]
    assert ensemble_scores(scores, variant="optimistic", coef=0.5).tolist() == [2.5, 2.0]
    assert ensemble_scores(scores, variant="min").tolist() == [1.0, 2.0]
    assert ensemble_scores(scores, variant="uwo", coef=0.5).tolist() == [1.0, 2.0]  # variance 2, divided by M - 1
    assert ensemble_scores(scores[:1], variant="uwo").tolist() == [1.0, 2.0]


def test_models_that_agree_have_a_finite_gradient():
    scores = torch.ones(3, 2, requires_grad=True)
    ensemble_scores(scores, variant="pessimistic").sum().backward()
    torch.testing.assert_close(scores.grad, torch.full((3, 2), 1 / 3))


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (torch.zeros(3), {}, r"scores must be \(M, B\) with M >= 1, got \(3,\)"),
        (torch.zeros(0, 3), {}, r"scores must be \(M, B\) with M >= 1, got \(0, 3\)"),
        (torch.zeros(2, 3), {"variant": "max"}, "variant must be one of mean, min, uwo, .*optimistic, got 'max'"),
        (torch.zeros(2, 3), {"coef": -1.0}, "coef must be >= 0, got -1.0"),
    ],
)
def test_a_bad_ensemble_raises_with_its_values(scores, options, message):
    with pytest.raises(ValueError, match=message):
        ensemble_scores(scores, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"centring": -1.0}, "centring must be >= 0 and finite, got -1.0"),
    ],
)
def test_bad_hyper_parameters_raise_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        reward_loss(torch.zeros(2), torch.zeros(2), **options)
