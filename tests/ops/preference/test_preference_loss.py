import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import BackendError, PreferenceObjective, preference_loss
from rlhf_fast.ops.core.masked_loss import Over
from rlhf_fast.ops.preference.objective import Variant
from rlhf_fast.ops.preference.preference_loss import METRICS, VARIANTS, Pairs, checked, coefficients, reference
from tests.losses import (
    BACKENDS,
    KERNELS,
    assert_keeps_contract,
    assert_same,
    compiled,
    draw,
    evaluate,
    of_preference,
    on_backends,
)

GOOD = -math.log(0.75)  # -log sigmoid(log 3)
LOG3 = math.log(3.0)
DELTA = torch.tensor(LOG3, dtype=torch.float64)
LOG4 = torch.tensor([2 * math.log(2.0)], dtype=torch.float64)
LOSSES_OF_THE_GAP = ["sigmoid", "robust", "hinge", "discopop", "exo_pair"]
OF_DIVERGENCES = [
    {"divergence_variant": d, "divergence_alpha": a} for d, a in (("forward_kl", 0.5), ("alpha", 0.3), ("js", 0.5))
]


def logprobs(pairs, dtype=torch.float32, seed=0):
    return [-5 * x.abs() - 0.1 for x in draw((pairs,), 4, dtype, seed)]


def hyper_parameters(variant):
    """Such as no variant takes for granted."""
    return {"variant": variant, "beta": 0.3, "label_smoothing": 0.1 if VARIANTS[variant].smooths else 0.0}


def data(pairs, variant="sigmoid"):
    """Everything that the variant may look at besides the log-probabilities."""
    position = torch.arange(pairs)
    return {
        "chosen_lengths": position % 7 + 1, "rejected_lengths": position % 5 + 2,
        "chosen_advantages": torch.cos(position.float()), "rejected_advantages": torch.sin(position.float()),
        "weights": None if "aot" in str(variant) else 0.5 + position % 3 / 2,
    }  # fmt: skip


def run(inputs, **options):
    given = data(inputs[0].shape[0], options.get("variant"))
    arguments = of_preference(**{**given, **options})
    return evaluate(lambda *x: preference_loss(*x, **arguments), inputs, 2)


def by_definition(pairs, **options):
    """The reference as a function of the four log-probabilities."""
    given = data(pairs, options.get("variant")) | {"reward_shift": options.pop("reward_shift", None)}
    objective = PreferenceObjective(**options)
    return lambda *x: reference(checked(Pairs(*x, **given), objective), objective, Over())


# The log-ratios of the pair (-1, -4) against (-3, -2) are 2 and -2; every value is written out of the paper's equation.
PAIR = (-1.0, -4.0, -3.0, -2.0)
CONSTANTS = {
    # DPO, 2305.18290 eq. 7: h = 4 beta
    "sigmoid": ({"beta": LOG3 / 4}, GOOD),
    # Mitchell 2023: -(1 - s) log sigmoid(h) - s log sigmoid(-h)
    "sigmoid, smoothed": ({"beta": LOG3 / 4, "label_smoothing": 0.2}, 0.8 * GOOD - 0.2 * math.log(0.25)),
    # Tulu 3, 2411.15124: the log-ratios over the lengths, 1 and -1
    "sigmoid_norm": ({"beta": LOG3 / 2, "lengths": (2, 2)}, GOOD),
    # robust DPO, 2403.00409: ((1 - s) L - s L flipped) / (1 - 2 s)
    "robust": ({"beta": LOG3 / 4, "label_smoothing": 0.2}, (0.8 * GOOD + 0.2 * math.log(0.25)) / 0.6),
    # RSO, 2309.06657, hinge-norm: max(0, 1 - 4 beta)
    "hinge": ({"beta": 0.125}, 0.5),
    "rso": ({"beta": 0.125}, 0.5),
    # IPO, 2310.12036 eq. 17 on token averages: (1 + 1 - 1 / (2 tau))^2
    "ipo": ({"beta": 0.5, "lengths": (2, 2)}, 1.0),
    # EXO, 2402.00856 eq. 16: KL((3/4, 1/4), (1 - s, s))
    "exo_pair": (
        {"beta": LOG3 / 4, "label_smoothing": 0.2}, 0.75 * math.log(0.75 / 0.8) + 0.25 * math.log(0.25 / 0.2)
    ),
    # NCA, 2402.05369: -log sg(r_w) - (log sg(-r_w) + log sg(-r_l)) / 2 with r = +-log 3
    "nca_pair": ({"beta": LOG3 / 2}, GOOD - 0.5 * math.log(0.25) - 0.5 * math.log(0.75)),
    # BCO, 2404.04656: -log sg(r_w - delta) - log sg(-(r_l - delta)) with r = +-log 3
    "bco_pair": ({"beta": LOG3 / 2}, 2 * GOOD),
    "bco_pair, shifted": ({"beta": LOG3 / 2, "reward_shift": DELTA}, math.log(2) + math.log(10 / 9)),
    # SPPO, 2405.00675: (2 - eta / 2)^2 + (-2 + eta / 2)^2 with eta = 1 / beta = 2
    "sppo_hard": ({"beta": 0.5}, 2.0),
    # APO, 2408.06266: -sg(r_w) + sg(r_l);  sg(r_w) - sg(r_w - r_l), r = +-log 3
    "apo_zero": ({"beta": LOG3 / 2}, 0.25 - 0.75),
    "apo_down": ({"beta": LOG3 / 2}, 0.75 - 0.9),
    # DiscoPOP, 2406.08414 eq. 5 with tau = 1: the modulation is 3/4
    "discopop": ({"beta": LOG3 / 4, "discopop_tau": 1.0}, 0.25 * GOOD + 0.75 / 3),
    # RPO, 2404.19733: -log pi(chosen) / length
    "sft": ({"lengths": (2, 2)}, 0.5),
    # SimPO, 2405.14734 eq. 6: beta (-1 + 4 / 2) - gamma = log 3
    "simpo": ({"beta": 2 * LOG3, "gamma": LOG3, "lengths": (1, 2)}, GOOD),
    # CPO, 2401.08417: -log sg(beta (-1 + 4)) - weight * (-1)
    "cpo": ({"beta": LOG3 / 3, "nll_weight": 0.5}, GOOD + 0.5),
    # ORPO, 2403.07691 eq. 6 and 7: probabilities per token 1/2 and 1/4, odds 1 and 1/3
    "orpo": (
        {"beta": 0.5, "lengths": (2, 1), "pair": (-2 * math.log(2), -math.log(4), 0.0, 0.0)}, math.log(2) + 0.5 * GOOD
    ),
    # HPO, 2405.17956: DPO - weight * (exp(A_w / alpha) log pi(chosen) + exp(A_l / alpha) log pi(rejected))
    "hpo": (
        {"beta": LOG3 / 4, "auxiliary_weight": 0.1, "auxiliary_temperature": 2.0,
         "chosen_advantages": LOG4, "rejected_advantages": torch.zeros(1)},
        GOOD + 0.1 * (2 * 1 + 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(CONSTANTS))
def test_every_variant_has_the_value_of_its_paper(backend, name):
    options, expected = CONSTANTS[name]
    options = {"variant": name.split(",")[0], "weights": None, **options}
    pair, lengths = options.pop("pair", PAIR), options.pop("lengths", (1, 1))
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), map(torch.tensor, ([n] for n in lengths)), strict=True))
    got = run([torch.tensor([x], dtype=torch.float64) for x in pair], **lengths, **options, backend=backend)
    assert got["loss"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_aot_matches_the_quantiles_of_the_gaps(backend):
    # 2406.05882, paired: policy gaps (log 3, 0) against the reference's (log 3, -log 3), both sorted: log 3 and 0.
    inputs = [torch.tensor(x) for x in ([LOG3, 1.0], [0.0, 1.0], [LOG3, 0.0], [0.0, LOG3])]
    got = run(inputs, variant="aot", beta=1.0, weights=None, backend=backend)
    assert got["loss"].item() == pytest.approx((GOOD + math.log(2)) / 2, rel=1e-6)
    # The first pair has the greater policy gap, whose match is log 3: gradient -sg(0); the second: -sg(-log 3).
    torch.testing.assert_close(got["gradient 0"], torch.tensor([-0.5, -0.25]) / 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_aot_unpaired_matches_the_quantiles_of_the_rewards(backend):
    # 2406.05882, unpaired: a = (log 3, 0), b = (0, -2 log 3), sorted 0 - (-2 log 3) and log 3 - 0.
    inputs = [torch.tensor(x) for x in ([LOG3, 0.0], [0.0, -2 * LOG3], [0.0, 0.0], [0.0, 0.0])]
    got = run(inputs, variant="aot_unpaired", beta=1.0, weights=None, backend=backend)
    assert got["loss"].item() == pytest.approx((-math.log(0.9) + GOOD) / 2, rel=1e-6)
    torch.testing.assert_close(got["gradient 0"], torch.tensor([-0.25, -0.1]) / 2)
    torch.testing.assert_close(got["gradient 1"], torch.tensor([0.25, 0.1]) / 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("divergence", "ratios", "beta"),
    [
        ("forward_kl", (2.0, 0.5), LOG3 / 1.5),  # f' = -1 / u: -1/2 + 2
        ("alpha", (4.0, 0.25), LOG3 / 3),  # f' = (1 - u^-alpha) / alpha with alpha = 1/2: 1 + 2
        ("js", (3.0, 1 / 3), 1.0),  # f' = log(2 u / (1 + u)): log 1.5 - log 0.5
    ],
)
def test_divergences_are_those_of_f_dpo(backend, divergence, ratios, beta):
    inputs = [torch.tensor([math.log(u)]) for u in ratios] + [torch.zeros(1)] * 2
    got = run(inputs, divergence_variant=divergence, divergence_alpha=0.5, beta=beta, weights=None, backend=backend)
    assert got["loss"].item() == pytest.approx(GOOD, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_and_metrics_of_dpo_are_known(backend):
    got = run([torch.tensor([x]) for x in PAIR], beta=LOG3 / 4, weights=None, backend=backend)
    assert got["gradient 0"].item() == pytest.approx(-LOG3 / 16, rel=1e-6)
    assert got["gradient 1"].item() == pytest.approx(LOG3 / 16, rel=1e-6)
    assert [got[name].item() for name in METRICS] == pytest.approx([1.0, LOG3, LOG3 / 2, -LOG3 / 2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_losses_are_added_with_their_weights(backend):
    inputs, lengths = [torch.tensor([x]) for x in PAIR], torch.tensor([2])
    got = run(
        inputs, variant={"sigmoid": 0.8, "sft": 0.2}, beta=LOG3 / 4, weights=None, chosen_lengths=lengths,
        rejected_lengths=lengths, backend=backend,
    )  # fmt: skip
    assert got["loss"].item() == pytest.approx(0.8 * GOOD + 0.2 * 0.5, rel=1e-6)
    assert got["gradient 0"].item() == pytest.approx(-0.8 * LOG3 / 16 - 0.2 / 2, rel=1e-6)
    assert got["margin"].item() == pytest.approx(LOG3, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_counts_with_its_weight_over_the_denominator(backend):
    inputs = [torch.tensor([x, 5.0]) for x in PAIR]
    got = run(inputs, beta=LOG3 / 4, weights=torch.tensor([2.0, 0.0]), denominator=8.0, backend=backend)
    assert got["loss"].item() == pytest.approx(2 * GOOD / 8, rel=1e-6)
    assert got["gradient 0"].tolist() == pytest.approx([-2 * LOG3 / 16 / 8, 0.0], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["sigmoid", "simpo"])
def test_without_a_reference_its_log_probabilities_are_zero(backend, variant):
    chosen, rejected, *_ = logprobs(5)
    options = of_preference(**data(5), variant=variant, reference_free=True, backend=backend)
    got = evaluate(lambda c, r: preference_loss(c, r, None, None, **options), [chosen, rejected], 2)
    zeros = [torch.zeros(5)] * 2
    assert_same(got, run([chosen, rejected, *zeros], variant=variant, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [60.0, -60.0, -1e4])
def test_confident_pairs_keep_their_value_and_gradient(backend, gap):
    got = run([torch.tensor([gap]), *[torch.zeros(1)] * 3], beta=1.0, weights=None, backend=backend)
    assert got["loss"].item() == pytest.approx(math.exp(-60) if gap > 0 else -gap, rel=2e-6)
    assert got["gradient 0"].item() == pytest.approx(-math.exp(-60) if gap > 0 else -1.0, rel=2e-6)


@pytest.mark.parametrize(("variant", "backend"), on_backends(VARIANTS))
def test_no_variant_overflows(backend, variant):
    inputs = [torch.tensor(x) for x in ([0.0, -1e4], [-1e4, 0.0], [-1.0, -1.0], [-1.0, -1.0])]
    got = run(inputs, **hyper_parameters(variant), backend=backend)
    assert all(value.isfinite().all() for value in got.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["sigmoid_norm", "ipo"])
def test_the_scores_of_averaging_losses_are_averaged_and_not_their_log_ratios(variant, backend):
    # f-DPO 2309.16240, forward KL: 1 - ref / pi of the whole answers, over 2 and 4 tokens as in TRL
    inputs = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -3.0, -1.5, -2.0)]
    lengths = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([4])}
    gap = (1 - math.exp(-0.5)) / 2 - (1 - math.exp(1.0)) / 4
    expected = math.log1p(math.exp(-0.5 * gap)) if variant == "sigmoid_norm" else (gap - 1) ** 2
    objective = PreferenceObjective(variant, beta=0.5, divergence_variant="forward_kl")
    loss, _ = preference_loss(*inputs, objective=objective, **lengths, backend=backend)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["forward_kl", "alpha", "js"])
def test_no_divergence_overflows(backend, divergence):
    got = run([torch.tensor([x]) for x in (-1e4, 0.0, 0.0, -1e4)], divergence_variant=divergence, backend=backend)
    assert all(value.isfinite().all() for value in got.values())
    assert got["gradient 0"].item() < 0


@pytest.mark.parametrize(("variant", "backend"), on_backends(VARIANTS, KERNELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_keep_the_numerics_contract(backend, dtype, variant):
    options = hyper_parameters(variant)
    for pairs in (1, 17):
        assert_keeps_contract(
            lambda *x, n=pairs: preference_loss(
                *x, **of_preference(**data(n, options.get("variant")), **options, backend=backend)
            ),
            by_definition(pairs, **options), logprobs(pairs, dtype), 2,
        )  # fmt: skip


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    "options",
    [*OF_DIVERGENCES, {"variant": {"aot": 0.5, "ipo": 2.0}}],
    ids=str,
)
def test_divergences_and_sums_keep_the_numerics_contract(backend, options):
    for pairs in (17, 2100):
        assert_keeps_contract(
            lambda *x, n=pairs: preference_loss(
                *x, **of_preference(**data(n, options.get("variant")), **options, backend=backend)
            ),
            by_definition(pairs, **options), draw((pairs,), 4), 2,
        )  # fmt: skip


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("variant", ["sigmoid", "aot_unpaired", {"orpo": 1.0, "bco_pair": 0.5}], ids=str)
def test_coefficients_are_the_gradient(backend, variant):
    inputs = logprobs(9)
    expected = run(inputs, variant=variant, denominator=5.0, backend=backend)
    objective = PreferenceObjective(variant=variant)
    pairs = checked(Pairs(*inputs, **data(9, variant)), objective)
    loss, metrics, chosen, rejected = coefficients(pairs, objective, torch.tensor(5.0), backend)
    torch.testing.assert_close({"loss": loss, **metrics, "gradient 0": chosen, "gradient 1": rejected}, expected)


def test_a_loss_without_kernels_runs_on_the_reference(monkeypatch):
    monkeypatch.setitem(VARIANTS, "square_hinge", Variant(lambda s, o: torch.relu(1 - s.gap).square(), kernel=None))
    inputs = [torch.tensor([x]) for x in PAIR]
    got = run(inputs, variant="square_hinge", beta=0.125, weights=None)
    assert got["loss"].item() == 0.25
    assert got["gradient 0"].item() == -0.125
    with pytest.raises(BackendError, match=r"preference_loss of sft \+ square_hinge: .* no cpu implementation"):
        run(inputs, variant={"sft": 1.0, "square_hinge": 1.0}, backend="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_sequence_counts_as_one_token(backend):
    inputs = logprobs(2)
    given = {"chosen_lengths": torch.tensor([0, 3]), "rejected_lengths": torch.tensor([2, 0])}
    clamped = {name: length.clamp(min=1) for name, length in given.items()}
    got = run(inputs, variant="ipo", **given, backend=backend)
    assert_same(got, run(inputs, variant="ipo", **clamped, backend=backend))


@pytest.mark.parametrize(("variant", "backend"), [each for each in on_backends(VARIANTS) if each[0] != "bco_pair"])
def test_no_pair_gives_a_connected_zero(backend, variant):
    got = run([torch.empty(0)] * 4, **hyper_parameters(variant), backend=backend)
    assert [got[name].item() for name in ("loss", *METRICS)] == [0.0] * 5
    assert got["gradient 0"].shape == (0,)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**16))
def test_exchanging_chosen_and_rejected_adds_the_margin(pairs, seed):
    # softplus(h) - softplus(-h) = h, and the metrics change sign.
    chosen, rejected, ref_chosen, ref_rejected = inputs = draw((pairs,), 4, torch.float64, seed)
    got, swapped = run(inputs, weights=None), run([rejected, chosen, ref_rejected, ref_chosen], weights=None)
    torch.testing.assert_close(swapped["loss"] - got["loss"], got["margin"])
    torch.testing.assert_close(swapped["margin"], -got["margin"])
    torch.testing.assert_close(swapped["chosen_reward"], got["rejected_reward"])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.sampled_from(LOSSES_OF_THE_GAP), st.integers(0, 2**16))
def test_a_loss_of_the_gap_pulls_chosen_as_much_as_it_pushes_rejected(pairs, variant, seed):
    got = run(logprobs(pairs, torch.float64, seed), **hyper_parameters(variant))
    assert torch.equal(got["gradient 0"], -got["gradient 1"])


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.sampled_from(sorted(VARIANTS)), st.integers(0, 2**16))
def test_the_order_of_the_pairs_changes_nothing(pairs, variant, seed):
    inputs = logprobs(pairs, torch.float64, seed)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    in_order = {name: x if x is None else x[order] for name, x in data(pairs, variant).items()}
    got = run([x[order] for x in inputs], **hyper_parameters(variant), **in_order)
    expected = run(inputs, **hyper_parameters(variant))
    for name in ("gradient 0", "gradient 1"):
        torch.testing.assert_close(got.pop(name), expected.pop(name)[order])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_bits_of_contiguous_ones(backend):
    inputs = logprobs(9)
    assert_same(run(torch.stack(inputs, 1).unbind(1), backend=backend), run(inputs, backend=backend))


@pytest.mark.parametrize(
    "options",
    [*(hyper_parameters(variant) for variant in VARIANTS), *OF_DIVERGENCES],
    ids=lambda options: options.get("variant", options.get("divergence_variant")),
)
def test_the_reference_is_differentiable_twice(options):
    chosen, rejected, *rest = logprobs(4, torch.float64)
    loss = by_definition(
        4, **options, reward_shift=torch.tensor(0.2)
    )  # a given one: made from the batch, it has no gradient
    leaves = (chosen.requires_grad_(), rejected.requires_grad_())
    assert torch.autograd.gradcheck(lambda c, r: loss(c, r, *rest)[0], leaves)
    assert torch.autograd.gradgradcheck(lambda c, r: loss(c, r, *rest)[0], leaves)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_registered_op_passes_opcheck(backend):
    inputs = [x[None] for x in draw((5,), 9)]
    inputs[0].requires_grad_()
    inputs[1].requires_grad_()
    args = (*inputs, None, None, "orpo", 0.1, 0.0, 0.0, 0.0, 1.0, backend)
    torch.library.opcheck(torch.ops.rlhf_fast.preference_loss.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["sigmoid", "aot_unpaired", "bco_pair", {"ipo": 0.5, "hpo": 1.0}], ids=str)
def test_the_compiled_graph_is_whole_and_gives_the_same_bits(backend, variant):
    inputs = logprobs(5)

    def loss(*x):
        return preference_loss(*x, objective=PreferenceObjective(variant), **data(5, variant), backend=backend)

    assert_same(evaluate(compiled(loss), inputs, 2), evaluate(loss, inputs, 2))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x: [y[None] for y in x], {}, r"chosen must be \(B,\), got \(1, 3\)"),
        (lambda x: [*x[:3], x[3][:2]], {}, r"ref_rejected must be \(B,\) = \(3,\), got \(2,\)"),
        (lambda x: [*x[:2], None, None], {"variant": {"sft": 1.0, "hinge": 2.0}, "chosen_lengths": torch.ones(3)},
         r"ref_chosen must be given for sft \+ hinge"),
        (lambda x: x, {"variant": "kto"}, "variant must be one of sigmoid, .*, hpo, got 'kto'"),
        (lambda x: x, {"variant": {"ipo": math.inf}}, "the weight of variant ipo must be finite, got inf"),
        (lambda x: x, {"variant": ["ipo"]}, r"variant must be a name or weights of several, got \['ipo'\]"),
        (lambda x: x, {"variant": {}}, "variant must name at least one loss"),
        (lambda x: x, {"beta": 0.0}, "beta must be > 0, got 0.0"),
        (lambda x: x, {"discopop_tau": 0.0}, "discopop_tau must be > 0, got 0.0"),
        (lambda x: x, {"nll_weight": -1.0}, "nll_weight must be >= 0, got -1.0"),
        (lambda x: x, {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        (lambda x: x, {"variant": "exo_pair"}, "label_smoothing must be > 0 for exo_pair"),
        (lambda x: x, {"variant": "ipo", "label_smoothing": 0.1}, "0.1 with ipo"),
        (lambda x: x, {"divergence_variant": "kl"},
         "divergence_variant must be one of reverse_kl, forward_kl, alpha, js, got 'kl'"),
        (lambda x: x, {"variant": "nca_pair", "divergence_variant": "js"},
         "divergence_variant must be reverse_kl for nca_pair, got 'js'"),
        (lambda x: x, {"variant": "ipo"}, "chosen_lengths must be given for ipo"),
        (lambda x: x, {"variant": "hpo"}, "chosen_advantages must be given for hpo"),
        (lambda x: x, {"weights": torch.ones(4)}, r"weights must be \(B,\) = \(3,\), got \(4,\)"),
        (lambda x: x, {"variant": "aot", "weights": torch.ones(3)}, "weights are not of aot"),
        (lambda x: x, {"reward_shift": torch.ones(1)}, r"reward_shift must be a 0-d tensor = \(\), got \(1,\)"),
        (lambda x: x, {"variant": "ipo", "chosen_lengths": torch.ones(3), "rejected_lengths": torch.ones(2)},
         r"rejected_lengths must be \(B,\) = \(3,\), got \(2,\)"),
    ],
)  # fmt: skip
def test_bad_input_raises_with_its_values(change, options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(*change(draw((3,), 4)), **of_preference(**options))
