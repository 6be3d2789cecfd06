import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import UnpairedPreferenceObjective, mismatched_kl, running_reward_shift, unpaired_preference_loss
from rlhf_fast.ops.core.masked_loss import Over
from rlhf_fast.ops.preference.unpaired_preference_loss import METRICS, VARIANTS, Inputs, reference
from tests.losses import (
    BACKENDS,
    DTYPES,
    KERNELS,
    assert_keeps_contract,
    assert_same,
    compiled,
    draw,
    evaluate,
    on_backends,
    with_objective,
)

LOG3 = math.log(3.0)


def shifts(variant, value=0.2):
    source = VARIANTS[variant].shift
    return {} if source is None else {source: torch.tensor(value, dtype=torch.float64)}


def labels(answers):
    return torch.arange(answers) % 3 > 0


def run(inputs, desirable=None, **options):
    desirable = labels(inputs[0].shape[0]) if desirable is None else torch.tensor(desirable)
    options = {**shifts(options.get("variant", "kto")), **options}
    arguments = with_objective(UnpairedPreferenceObjective, **options)
    return evaluate(lambda *x: unpaired_preference_loss(*x, desirable, **arguments), inputs, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("variant", "options", "expected"),
    [
        # KTO, 2402.01306 eq. 8: lambda - v, v = lambda sg(+-(r - z0)): r = 2 log 3 and 0, z0 = beta kl = log 3
        ("kto", {"kl": 2 * LOG3}, (3 * 0.25 + 5 * 0.25) / 2),
        # APO-zero, 2408.06266: 1 - sg(r) and sg(r), r = 2 log 3 and 0
        ("apo_zero_unpaired", {}, (3 * 0.1 + 5 * 0.5) / 2),
        # BCO, 2404.04656: -log sg(r - delta) and -log sg(-(r - delta))
        ("bco", {"reward_shift": LOG3}, -(3 + 5) * math.log(0.75) / 2),
    ],
)
def test_every_variant_has_the_value_of_its_paper(backend, variant, options, expected):
    inputs = [torch.tensor(x, dtype=torch.float64) for x in ([4 * LOG3 - 7, -2.0], [-7.0, -2.0])]
    options = {name: torch.tensor(x, dtype=torch.float64) for name, x in options.items()}
    weights = {"desirable_weight": 3.0, "undesirable_weight": 5.0}
    got = run(inputs, [True, False], variant=variant, beta=0.5, **weights, **options, backend=backend)
    assert got["loss"].item() == pytest.approx(expected, rel=1e-12)
    assert [got[name].item() for name in METRICS] == pytest.approx([2 * LOG3, 0.0, 2 * LOG3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_kto_is_known(backend):
    # d (1 - sg(r - z)) / d logprob = -beta sg sg' with sg = 3/4; the answer's weight is 2 of 8.
    got = run(
        [torch.tensor([2 * LOG3]), torch.zeros(1)], [True], beta=0.5, kl=torch.tensor(0.0),
        weights=torch.tensor([2.0]), denominator=8.0, backend=backend,
    )  # fmt: skip
    assert got["gradient 0"].item() == pytest.approx(-2 / 8 * 0.5 * 0.75 * 0.25, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_class_without_an_answer_has_a_mean_of_zero(backend):
    got = run([torch.ones(3), torch.zeros(3)], [True] * 3, beta=0.5, backend=backend)
    assert [got[name].item() for name in METRICS] == [0.5, 0.0, 0.5]


@pytest.mark.parametrize(("variant", "backend"), on_backends(VARIANTS, KERNELS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_keep_the_numerics_contract(backend, dtype, variant):
    objective = UnpairedPreferenceObjective(variant, 0.3, 0.7, 1.3)
    for answers in (1, 17, 2100):
        good, weights = labels(answers), torch.linspace(0.5, 2, answers)
        shift = next(iter(shifts(variant).values()), None)

        def eager(x, ref, good=good, weights=weights, shift=shift):
            return reference(Inputs(x, ref, good.to(x.dtype), weights, shift), objective, Over())

        def loss(x, ref, good=good, weights=weights):
            options = {**shifts(variant), "weights": weights}
            return unpaired_preference_loss(x, ref, good, objective=objective, **options, backend=backend)

        assert_keeps_contract(loss, eager, draw((answers,), 2, dtype), 1)


@pytest.mark.parametrize(("variant", "backend"), on_backends(VARIANTS))
def test_no_answer_gives_a_connected_zero(backend, variant):
    got = run([torch.empty(0)] * 2, variant=variant, backend=backend)
    assert [got[name].item() for name in ("loss", *METRICS)] == [0.0] * 4
    assert got["gradient 0"].shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_a_confident_answer_does_not_overflow(backend, gap):
    got = run([torch.tensor([gap]), torch.zeros(1)], [True], variant="bco", backend=backend)
    assert got["loss"].item() == pytest.approx(max(0.0, 0.2 - gap / 10))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.sampled_from(sorted(VARIANTS)), st.integers(0, 2**16))
def test_the_order_of_the_answers_changes_nothing(answers, variant, seed):
    inputs, good = draw((answers,), 2, torch.float64, seed), labels(answers)
    order = torch.randperm(answers, generator=torch.Generator().manual_seed(seed))
    got = run([x[order] for x in inputs], good[order].tolist(), variant=variant)
    expected = run(inputs, good.tolist(), variant=variant)
    torch.testing.assert_close(got.pop("gradient 0"), expected.pop("gradient 0")[order])
    torch.testing.assert_close(got, expected)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(VARIANTS)), st.integers(0, 2**16))
def test_an_undesirable_answer_is_the_mirror_of_a_desirable_one(variant, seed):
    (x, ref), zero = draw((9,), 2, torch.float64, seed), shifts(variant, 0.0)
    good = run([x, ref], [True] * 9, variant=variant, **zero)
    bad = run([ref, x], [False] * 9, variant=variant, **zero)
    torch.testing.assert_close(good["loss"], bad["loss"])
    torch.testing.assert_close(good["gradient 0"], -bad["gradient 0"])


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_reference_is_differentiable_twice(variant):
    x, ref = draw((5,), 2, torch.float64)
    rest = [ref, labels(5).double(), torch.ones(5).double(), torch.full((5,), 0.1).double()]

    def loss(x):
        return reference(Inputs(x, *rest), UnpairedPreferenceObjective(variant, 0.3, 0.7, 1.3), Over())[0]

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(),))
    assert torch.autograd.gradgradcheck(loss, (x,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_bits_of_contiguous_ones(backend):
    inputs = draw((9,), 2)
    assert_same(run(torch.stack(inputs, 1).unbind(1), backend=backend), run(inputs, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_compiled_graph_is_whole_and_gives_the_same_bits(backend):
    def loss(*x):
        return unpaired_preference_loss(*x, labels(5), kl=torch.tensor(0.3), backend=backend)

    assert_same(evaluate(compiled(loss), draw((5,), 2), 1), evaluate(loss, draw((5,), 2), 1))


def test_the_mismatched_kl_is_a_mean_that_is_not_negative():
    logprobs, ref = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-3.0, -1.0])
    assert mismatched_kl(logprobs, ref).item() == 0.5
    assert not mismatched_kl(logprobs, ref).requires_grad
    assert mismatched_kl(ref, logprobs).item() == 0.0


def test_the_running_shift_moves_towards_the_middle_of_the_classes():
    metrics = {"desirable_reward": torch.tensor(3.0), "undesirable_reward": torch.tensor(1.0)}
    assert running_reward_shift(torch.tensor(1.0), metrics, decay=0.75).item() == 1.25
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        running_reward_shift(torch.tensor(1.0), metrics, decay=1)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda x, r, d: (x[None], r, d), {}, ValueError, r"logprobs must be \(B,\), got \(1, 3\)"),
        (lambda x, r, d: (x, r[:2], d), {}, ValueError, r"ref_logprobs must be \(B,\) = \(3,\), got \(2,\)"),
        (lambda x, r, d: (x, r, d[:2]), {}, ValueError, r"desirable must be \(B,\) = \(3,\), got \(2,\)"),
        (lambda x, r, d: (x, r, x), {}, TypeError, r"desirable must be bool, got torch\.float32"),
        (lambda *x: x, {"variant": "dpo"}, ValueError, "variant must be one of kto, apo_zero_unpaired, bco, got 'dpo'"),
        (lambda *x: x, {"kl": None}, ValueError, "kl must be given for kto"),
        (lambda *x: x, {"kl": torch.ones(2)}, ValueError, r"kl must be a 0-d tensor = \(\), got \(2,\)"),
        (lambda *x: x, {"variant": "bco"}, ValueError, "reward_shift must be given for bco"),
        (lambda *x: x, {"beta": -1.0}, ValueError, "beta must be > 0, got -1.0"),
        (lambda *x: x, {"desirable_weight": -1.0}, ValueError, "desirable_weight must be >= 0, got -1.0"),
    ],
)
def test_bad_input_raises_with_its_values(change, options, error, message):
    inputs = change(*draw((3,), 2), labels(3))
    options = {"kl": torch.tensor(0.1), **options}
    with pytest.raises(error, match=message):
        unpaired_preference_loss(*inputs, **with_objective(UnpairedPreferenceObjective, **options))
