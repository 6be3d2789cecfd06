import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import preference_loss
from rlhf_fast.ops.preference_loss import METRICS, VARIANTS, reference
from tests.losses import BACKENDS, DTYPES, KERNELS, assert_keeps_contract, assert_same, compiled, draw, evaluate

CASES = [("sigmoid", 0.0), ("sigmoid", 0.1), ("ipo", 0.0)]


def lengths(pairs):
    return {"chosen_lengths": torch.arange(pairs) % 7 + 1, "rejected_lengths": torch.arange(pairs) % 5 + 2}


def run(inputs, **options):
    pairs = inputs[0].shape[0]
    return evaluate(lambda *x: preference_loss(*x, **{**lengths(pairs), **options}), inputs, 2)


def eager(variant, beta, smoothing, pairs):
    def loss(chosen, rejected, ref_chosen, ref_rejected):
        x, y = chosen - ref_chosen, rejected - ref_rejected
        if variant == "ipo":
            n, m = (length.to(x.dtype) for length in lengths(pairs).values())
            x, y = x / n, y / m
            losses = (x - y - 1 / (2 * beta)) ** 2
        else:
            h = beta * (x - y)
            log_p, log_q = torch.nn.functional.logsigmoid(h), torch.nn.functional.logsigmoid(-h)
            losses = -(1 - smoothing) * log_p - smoothing * log_q
        won, lost = beta * x.detach(), beta * y.detach()
        metrics = ((won > lost).to(x.dtype), won - lost, won, lost)
        return losses.mean(), {name: m.mean() for name, m in zip(METRICS, metrics, strict=True)}

    return loss


@pytest.mark.parametrize("backend", BACKENDS)
def test_sigmoid_is_equation_7_of_the_dpo_paper(backend):
    # arXiv 2305.18290, eq. 7: beta ((-1 - -3) - (-4 - -2)) = 4 beta = log 3 gives sigmoid = 3/4.
    inputs = [torch.tensor([x]) for x in (-1.0, -4.0, -3.0, -2.0)]
    beta = math.log(3.0) / 4
    got = run(inputs, beta=beta, backend=backend)
    assert got["loss"].item() == pytest.approx(-math.log(0.75), rel=1e-6)
    assert got["gradient 0"].item() == pytest.approx(-beta / 4, rel=1e-6)
    assert got["gradient 1"].item() == pytest.approx(beta / 4, rel=1e-6)
    rewards = [got[name].item() for name in METRICS]
    assert rewards == pytest.approx([1.0, 4 * beta, 2 * beta, -2 * beta])


@pytest.mark.parametrize("backend", BACKENDS)
def test_label_smoothing_is_the_loss_of_the_note_on_noisy_preferences(backend):
    # Mitchell 2023: -(1 - s) log sigmoid(h) - s log sigmoid(-h), here with sigmoid(h) = 3/4.
    inputs = [torch.tensor([x]) for x in (-1.0, -4.0, -3.0, -2.0)]
    got = run(inputs, beta=math.log(3.0) / 4, label_smoothing=0.2, backend=backend)
    assert got["loss"].item() == pytest.approx(-0.8 * math.log(0.75) - 0.2 * math.log(0.25), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ipo_is_equation_17_of_its_paper_on_token_averages(backend):
    # arXiv 2310.12036, eq. 17: ((4 / 2) - (-6 / 3) - 1 / (2 * 0.25))^2 = (4 - 2)^2, slopes 2 * 2 / 2 and -2 * 2 / 3.
    inputs = [torch.tensor([x]) for x in (-1.0, -8.0, -5.0, -2.0)]
    given = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([3])}
    got = run(inputs, variant="ipo", beta=0.25, **given, backend=backend)
    assert got["loss"].item() == pytest.approx(4.0)
    assert got["gradient 0"].item() == pytest.approx(2.0)
    assert got["gradient 1"].item() == pytest.approx(-4 / 3)
    assert [got[name].item() for name in METRICS] == pytest.approx([1.0, 1.0, 0.5, -0.5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unchanged_policy_has_the_loss_of_a_coin(backend):
    chosen, rejected = draw((6,), 2)
    got = run([chosen, rejected, chosen, rejected], backend=backend)
    assert got["loss"].item() == pytest.approx(math.log(2), rel=1e-6)
    assert [got[name].item() for name in METRICS] == [0.0] * 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [60.0, -60.0, -1e4])
def test_confident_pairs_keep_their_value_and_gradient(backend, gap):
    got = run([torch.tensor([gap]), torch.zeros(1), torch.zeros(1), torch.zeros(1)], beta=1.0, backend=backend)
    assert got["loss"].item() == pytest.approx(math.exp(-60) if gap > 0 else -gap, rel=2e-6)
    assert got["gradient 0"].item() == pytest.approx(-math.exp(-60) if gap > 0 else -1.0, rel=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairs", [1, 17, 2100])
@pytest.mark.parametrize(("variant", "smoothing"), CASES)
def test_values_and_gradients_keep_the_numerics_contract(backend, dtype, pairs, variant, smoothing):
    options = {"variant": variant, "beta": 0.3, "label_smoothing": smoothing, "backend": backend, **lengths(pairs)}
    assert_keeps_contract(
        lambda *x: preference_loss(*x, **options), eager(variant, 0.3, smoothing, pairs), draw((pairs,), 4, dtype), 2
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_sequence_counts_as_one_token(backend):
    inputs = draw((2,), 4)
    given = {"chosen_lengths": torch.tensor([0, 3]), "rejected_lengths": torch.tensor([2, 0])}
    clamped = {name: length.clamp(min=1) for name, length in given.items()}
    got = run(inputs, variant="ipo", **given, backend=backend)
    assert_same(got, run(inputs, variant="ipo", **clamped, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_no_pair_gives_a_connected_zero(backend, variant):
    got = run([torch.empty(0)] * 4, variant=variant, backend=backend)
    assert [got[name].item() for name in ("loss", *METRICS)] == [0.0] * 5
    assert got["gradient 0"].shape == (0,)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**16))
def test_exchanging_chosen_and_rejected_adds_the_margin(pairs, seed):
    # softplus(h) - softplus(-h) = h, and the metrics change sign.
    chosen, rejected, ref_chosen, ref_rejected = inputs = draw((pairs,), 4, torch.float64, seed)
    got, swapped = run(inputs), run([rejected, chosen, ref_rejected, ref_chosen])
    torch.testing.assert_close(swapped["loss"] - got["loss"], got["margin"])
    torch.testing.assert_close(swapped["margin"], -got["margin"])
    torch.testing.assert_close(swapped["chosen_reward"], got["rejected_reward"])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.sampled_from(CASES), st.floats(-20, 20), st.integers(0, 2**16))
def test_a_common_shift_and_the_order_of_pairs_change_nothing(pairs, case, shift, seed):
    inputs = draw((pairs,), 4, torch.float64, seed)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    options = {"variant": case[0], "label_smoothing": case[1]}
    moved = [inputs[0] + shift, inputs[1] - shift, inputs[2] + shift, inputs[3] - shift]
    in_order = {name: length[order] for name, length in lengths(pairs).items()}
    got, expected = run([x[order] for x in moved], **options, **in_order), run(inputs, **options)
    for name in ("gradient 0", "gradient 1"):
        torch.testing.assert_close(got.pop(name), expected.pop(name)[order])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_bits_of_contiguous_ones(backend):
    inputs = draw((9,), 4)
    assert_same(run(torch.stack(inputs, 1).unbind(1), backend=backend), run(inputs, backend=backend))


@pytest.mark.parametrize(("variant", "smoothing"), CASES)
def test_the_reference_is_differentiable_twice(variant, smoothing):
    chosen, rejected, *rest = draw((4,), 4, torch.float64)
    rest += [x.double() for x in lengths(4).values()] if variant == "ipo" else []
    leaves = (chosen.requires_grad_(), rejected.requires_grad_())

    def loss(c, r):
        return reference([c, r, *rest], variant=variant, beta=0.3, label_smoothing=smoothing)[0]

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_registered_op_passes_opcheck(backend, variant):
    inputs = [x[None] for x in draw((5,), 4)]
    inputs[0].requires_grad_()
    inputs[1].requires_grad_()
    inputs += [x[None].float() for x in lengths(5).values()] if variant == "ipo" else []
    args = (inputs, None, None, variant, [0.1, 0.0, 0.0], backend)
    torch.library.opcheck(torch.ops.rlhf_fast.preference_loss.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_compiled_graph_is_whole_and_gives_the_same_bits(backend, variant):
    inputs = draw((5,), 4)

    def loss(*x):
        return preference_loss(*x, variant=variant, **lengths(5), backend=backend)

    assert_same(evaluate(compiled(loss), inputs, 2), evaluate(loss, inputs, 2))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x: [y[None] for y in x], {}, r"chosen must be \(B,\), got \(1, 3\)"),
        (lambda x: [*x[:3], x[3][:2]], {}, r"ref_rejected must be \(B,\) = \(3,\), got \(2,\)"),
        (lambda x: x, {"variant": "kto"}, "variant must be one of sigmoid, ipo, got 'kto'"),
        (lambda x: x, {"beta": 0.0}, "beta must be > 0, got 0.0"),
        (lambda x: x, {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        (lambda x: x, {"variant": "ipo"}, "chosen_lengths must be given for ipo"),
        (lambda x: x, {"variant": "ipo", "label_smoothing": 0.1}, "got 0.1 with ipo"),
        (
            lambda x: x,
            {"variant": "ipo", "chosen_lengths": torch.ones(3), "rejected_lengths": torch.ones(2)},
            r"rejected_lengths must be \(B,\) = \(3,\), got \(2,\)",
        ),
    ],
)
def test_bad_input_raises_with_its_values(change, options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(*change(draw((3,), 4)), **options)
