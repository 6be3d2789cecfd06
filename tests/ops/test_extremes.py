"""Numbers at the edge: a weight of 0 takes infinities out, infinite separations have their limits, in every backend."""

import itertools
import math
from functools import partial

import pytest
import torch

from rlhf_fast import (
    PolicyObjective,
    group_advantages,
    kl_estimate,
    linear_kl,
    linear_logprobs,
    linear_policy_loss,
    linear_preference_loss,
    policy_loss,
    preference_loss,
    ranking_loss,
    reward_loss,
    sample_tokens,
    shaped_rewards,
    step_reward_loss,
    token_logprobs,
    unpaired_preference_loss,
    whiten,
)
from rlhf_fast.ops.preference.objective import VARIANTS as PREFERENCES
from rlhf_fast.ops.preference.objective import PreferenceObjective
from tests.losses import BACKENDS, EVERYWHERE, evaluate, of_policy, of_preference

INF = math.inf
PAIRED = [name for name, variant in PREFERENCES.items() if variant.kernel]
OF_POLICY = {"dr_grpo": {"fixed_length": 4.0}}


def of_pairs(chosen, rejected, variant, backend, dtype=torch.float32, **options):
    """The loss and its gradients of pairs of sequences of one token each, beside a reference of -1."""
    inputs = [torch.as_tensor(chosen, dtype=dtype), torch.as_tensor(rejected, dtype=dtype)]
    ones = torch.ones_like(inputs[0])
    given = {
        "chosen_lengths": ones, "rejected_lengths": ones, "chosen_advantages": ones, "rejected_advantages": ones,
        "ref_chosen": -ones, "ref_rejected": -ones, "variant": variant, "backend": backend, "beta": 0.5,
    }  # fmt: skip
    if variant == "exo_pair":
        given["label_smoothing"] = 0.1
    arguments = of_preference(**{**given, **options})
    return evaluate(lambda a, b: preference_loss(a, b, **arguments), inputs, 2)


# The limit of each loss of a pair whose rejected answer is impossible; the chosen one's log-ratio is 1, its reward 0.5.
SOFT = math.log1p(math.exp(-0.5))
LIMITS = {
    "sigmoid": 0.0, "sigmoid_norm": 0.0, "robust": 0.0, "hinge": 0.0, "rso": 0.0, "ipo": INF,
    "exo_pair": -math.log(0.9), "nca_pair": SOFT + 0.5 * (SOFT + 0.5), "bco_pair": 0.0, "sppo_hard": INF, "aot": 0.0,
    "aot_unpaired": 0.0, "apo_zero": -1 / (1 + math.exp(-0.5)), "apo_down": 1 / (1 + math.exp(-0.5)) - 1,
    "discopop": 0.0, "sft": 0.0, "simpo": 0.0, "cpo": 0.0, "orpo": 0.0, "hpo": INF,
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", PAIRED)
def test_a_pair_that_is_told_apart_infinitely_has_the_limit_of_its_loss(variant, backend):
    got = of_pairs([0.0], [-INF], variant, backend)
    assert got["loss"].item() == pytest.approx(LIMITS[variant], rel=1e-5, abs=1e-6)
    assert not got["gradient 0"].isnan().any()
    assert not got["gradient 1"].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_aot_compares_with_the_references_gap_even_where_that_is_infinite(backend):
    # the reference's gaps are -inf and 1, the policy's 2 and 0.5: by rank 0.5 beside -inf, 2 beside 1
    refs = {"ref_chosen": torch.tensor([-INF, -1.0]), "ref_rejected": torch.tensor([-1.0, -2.0])}
    got = of_pairs([-1.0, -1.0], [-3.0, -1.5], "aot", backend, **refs)
    assert got["loss"].item() == pytest.approx(SOFT / 2, rel=1e-6)
    slope = 0.25 / (1 + math.exp(0.5))
    assert got["gradient 0"].tolist() == pytest.approx([-slope, 0.0])
    assert got["gradient 1"].tolist() == pytest.approx([slope, 0.0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tau", "slope"), [(0.05, -0.5), (2.0, -0.5 * (1 + math.exp(20) / 2))])
def test_discopop_has_a_slope_where_the_wrong_answer_leads_infinitely(tau, slope, backend):
    got = of_pairs([-INF], [0.0], "discopop", backend, discopop_tau=tau)
    assert got["loss"] == INF
    assert got["gradient 0"].item() == pytest.approx(slope, rel=1e-5)
    assert got["gradient 1"].item() == pytest.approx(-slope, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", [name for name in PAIRED if "aot" not in name])
def test_a_pair_of_weight_zero_contributes_nothing(variant, backend):
    options = {"reward_shift": torch.tensor(0.0)}
    alone = of_pairs([-1.0], [-2.0], variant, backend, **options)
    weights = torch.tensor([1.0, 0.0, 0.0])
    got = of_pairs(
        [-1.0, -INF, 0.0], [-2.0, 0.0, -INF], variant, backend, weights=weights, denominator=1.0, **options
    )  # fmt: skip
    assert got["loss"].item() == pytest.approx(alone["loss"].item(), rel=1e-6)
    assert got["gradient 0"].tolist() == [alone["gradient 0"].item(), 0, 0]
    assert got["gradient 1"].tolist() == [alone["gradient 1"].item(), 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["forward_kl", "alpha", "js"])
@pytest.mark.parametrize("ratio", [INF, -INF])
def test_an_infinite_log_ratio_is_no_nan_under_any_divergence(divergence, ratio, backend):
    ref = torch.tensor([-INF if ratio == INF else -1.0])
    chosen = [-1.0 if ratio == INF else -INF]
    got = of_pairs(chosen, [-1.0], "sigmoid", backend, divergence_variant=divergence, ref_chosen=ref)
    assert not got["loss"].isnan()
    assert not got["gradient 0"].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_discopop_grows_along_a_tangent_where_its_exponential_would_overflow(backend):
    got = of_pairs([-1e4], [0.0], "discopop", backend, discopop_tau=2.0)
    gap, tau = -5e3, 2.0  # exp(-gap) sigmoid(gap / tau) = exp(gap (1 / tau - 1)), along its tangent from exp(20)
    expected = -gap + math.exp(20) * (1 + gap * (1 / tau - 1) - 20)
    assert got["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert got["gradient 0"].item() == pytest.approx(0.5 * (-1 + math.exp(20) * (1 / tau - 1)), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_lead_costs_a_reward_model_nothing(backend):
    inputs = [torch.tensor([1.0, 2.0]), torch.tensor([-INF, 1.0])]
    got = evaluate(lambda a, b: reward_loss(a, b, backend=backend), inputs, 2)
    assert got["loss"].item() == pytest.approx(math.log1p(math.exp(-1)) / 2, rel=1e-6)
    assert got["gradient 0"][0] == got["gradient 1"][0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unpaired_answer_of_weight_zero_contributes_nothing(backend):
    given = {"objective": "bco", "reward_shift": torch.tensor(0.0), "weights": torch.tensor([1.0, 0.0])}
    inputs, desirable = torch.tensor([-1.0, -INF]), torch.tensor([True, True])
    got = evaluate(
        lambda x: unpaired_preference_loss(x, torch.zeros(2), desirable, **given, backend=backend), [inputs], 1
    )
    assert got["loss"].item() == pytest.approx(math.log1p(math.exp(0.1)) / 2, rel=1e-6)
    assert got["gradient 0"][1] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kl_variant", ["k1", "k2", "k3"])
def test_a_reference_that_is_only_measured_changes_no_gradient(kl_variant, backend):
    # at a log-ratio of 94, exp overflows float32
    inputs = [torch.tensor([[-95.0, -1.0, -2.0]]), torch.tensor([[-95.0, -1.2, -2.0]]), torch.ones(1, 3)]
    ref = torch.tensor([[-1.0, -INF, -2.0]])
    plain = evaluate(lambda *x: policy_loss(*x, backend=backend), inputs, 1)
    options = {"ref_logprobs": ref, "objective": PolicyObjective(kl_variant=kl_variant), "backend": backend}
    measured = evaluate(lambda *x: policy_loss(*x, **options), inputs, 1)
    assert torch.equal(measured["gradient 0"], plain["gradient 0"])
    assert measured["loss"] == plain["loss"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_the_log_ratio_of_k3_is_held_within_twenty(unbiased, backend):
    inputs = [torch.tensor([[-95.0, -1.0]], dtype=torch.float64)] * 2 + [torch.zeros(1, 2, dtype=torch.float64)]
    ref = torch.tensor([[-1.0, -INF]], dtype=torch.float64)
    objective = PolicyObjective(kl_coef=0.5, kl_unbiased=unbiased)
    options = {"objective": objective, "ref_logprobs": ref, "backend": backend}
    got = evaluate(lambda *x: policy_loss(*x, **options), inputs, 1)
    expected = (math.exp(20) - 21 + math.exp(-20) + 19) / 2
    assert got["kl_to_ref"].item() == pytest.approx(expected, rel=1e-12)
    assert got["loss"].item() == pytest.approx(0.5 * expected, rel=1e-12)
    assert got["gradient 0"].tolist() == ([[-5.0, 5.0]] if unbiased else [[0.0, 0.0]])


@pytest.mark.parametrize(("variant", "backend"), EVERYWHERE)
def test_tokens_of_weight_zero_take_no_infinity_into_a_policy_loss(variant, backend):
    # the sampler's mask gives the second sequence weight 0; its second token is impossible
    inputs = [torch.tensor([[-1.0, -2.0], [-1.0, -INF]]), torch.tensor([[-1.1, -1.9], [-1.0, -5.0]]), torch.ones(2, 2)]
    sampler = torch.tensor([[-1.1, -1.9], [-9.0, -9.0]])
    numbers = {"correction_level": "sequence", "correction_mode": "mask"} | OF_POLICY.get(variant, {})
    options = of_policy(variant=variant, **numbers, sampler_logprobs=sampler, backend=backend)
    got = evaluate(lambda *x: policy_loss(*x, **options), inputs, 1)
    assert got["loss"].isfinite() or variant in ("vespo", "kl_cov")
    assert got["gradient 0"].isfinite().all() or variant == "kl_cov"


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_impossible_token_leaves_gspo_token_and_the_unbiased_kl_finite(backend):
    # both take exp(-20) for the ratio; the KL is that times (exp(20) - 21)
    inputs = [torch.tensor([[-INF]]), torch.tensor([[-1.0]]), torch.ones(1, 1)]
    objective = PolicyObjective("gspo_token", kl_coef=0.5, kl_unbiased=True)
    options = {"objective": objective, "ref_logprobs": -torch.ones(1, 1), "backend": backend}
    got = evaluate(lambda *x: policy_loss(*x, **options), inputs, 1)
    assert got["loss"].item() == pytest.approx(0.5 * (1 - 21 * math.exp(-20)), rel=1e-5)
    assert got["gradient 0"].abs().item() < 1e-7


EXTREMES = (0.0, -1e-30, -1.0, -1e4, -INF)


def every(*columns):
    """(rows, 1) of each column: all combinations of the numbers of the columns, but no two infinities that cancel."""
    rows = [row for row in itertools.product(*columns) if row[:2] != (-INF, -INF)]
    return [torch.tensor(x)[:, None] for x in zip(*rows, strict=True)]


@pytest.mark.parametrize("variant", [name for name, backend in EVERYWHERE if backend == "cpu"])
def test_policy_losses_of_extreme_sequences_are_those_of_float64(variant):
    numbers = {"variant": variant, "aggregation": "token_sum", "cov_fraction": 1.0} | OF_POLICY.get(variant, {})
    objective = PolicyObjective(**numbers)
    # Losses are compared of finite inputs and advantages of one sign: the sum of both is little of either.
    for numbers, advantages in ((EXTREMES, (0.0, 1.0, -1.0, 1e4, -1e4)), (EXTREMES[:-1], (0.0, 1.0, 1e4))):
        inputs = every(numbers, numbers, advantages)
        loss = {name: partial(policy_loss, objective=objective, backend=name) for name in ("cpu", "reference")}
        found = evaluate(loss["cpu"], inputs, 1)
        exact = evaluate(loss["reference"], [x.double() for x in inputs], 1)
        gradients = found["gradient 0"].double(), exact["gradient 0"]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)  # 1e-4 of an advantage of 1e4 is exp(-20)
        for name in ("loss", "clip_fraction", "ratio_mean", "approx_kl") if numbers != EXTREMES else ():
            torch.testing.assert_close(found[name].double(), exact[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", PAIRED)
def test_preference_losses_of_extreme_pairs_are_those_of_float64(variant):
    # aot_unpaired sets the impossible chosen answers beside the impossible rejected ones: inf - inf
    extremes = (0.0, -1.0, -1e4) if variant == "aot_unpaired" else (0.0, -1.0, -1e4, -INF)
    chosen, rejected, *refs = (x[:, 0] for x in every(extremes, extremes, (-1.0, -1e4), (-1.0, -1e4)))
    options = {"reward_shift": torch.tensor(0.5)}

    def loss(dtype, backend):
        given = dict(zip(("ref_chosen", "ref_rejected"), (x.to(dtype) for x in refs), strict=True)) | options
        return of_pairs(chosen, rejected, variant, backend, dtype=dtype, **given)

    found, exact = loss(torch.float32, "cpu"), loss(torch.float64, "reference")
    for name in ("loss", "gradient 0", "gradient 1", "accuracy"):
        torch.testing.assert_close(found[name].double(), exact[name].double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["kto", "apo_zero_unpaired", "bco"])
def test_unpaired_losses_of_extreme_answers_are_those_of_float64(variant):
    logprobs, refs, desirable = (x[:, 0] for x in every(EXTREMES, EXTREMES, (0.0, 1.0)))

    def loss(dtype, backend):
        given = {"objective": variant, "backend": backend}
        if variant != "apo_zero_unpaired":
            given["kl" if variant == "kto" else "reward_shift"] = torch.tensor(0.5, dtype=dtype)
        call = lambda x, ref: unpaired_preference_loss(x, ref, desirable != 0, **given)  # noqa: E731
        return evaluate(call, [logprobs.to(dtype), refs.to(dtype)], 1)

    found, exact = loss(torch.float32, "cpu"), loss(torch.float64, "reference")
    for name in ("loss", "gradient 0"):
        torch.testing.assert_close(found[name].double(), exact[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["gpg", "cispo", "vespo"])
def test_an_advantage_of_zero_takes_out_an_impossible_token(variant, backend):
    inputs = [torch.tensor([[-1.0, -INF]]), torch.tensor([[-1.0, -30.0]]), torch.tensor([[1.0, 0.0]])]
    got = evaluate(lambda *x: policy_loss(*x, objective=variant, backend=backend), inputs, 1)
    assert got["loss"].isfinite()
    assert got["gradient 0"].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rewards_without_a_kl_coefficient_do_not_see_the_kl(backend):
    kl, mask = torch.tensor([[INF, 1.0, -INF]]), torch.ones(1, 3)
    got = shaped_rewards(torch.tensor([2.0]), kl, mask=mask, kl_coef=0.0, backend=backend)
    assert got.tolist() == [[0.0, 0.0, 2.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_k3_of_an_impossible_reference_is_infinite_with_a_finite_slope(backend):
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    value = kl_estimate(logprobs, torch.tensor([[-INF]]), variant="k3", backend=backend)
    value.sum().backward()
    assert value.item() == INF
    assert logprobs.grad.item() == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["plackett_luce", "breslow", "pairwise"])
def test_an_answer_of_reward_minus_infinity_that_is_ranked_last_costs_nothing(variant, backend):
    rewards, ranks = torch.tensor([1.0, 0.0, -INF]), torch.tensor([1, 2, 3])
    got = evaluate(lambda x: ranking_loss(x, ranks, group_size=3, variant=variant, backend=backend), [rewards], 1)
    share = 1 / 3 if variant == "pairwise" else 1.0
    assert got["loss"].item() == pytest.approx(share * math.log1p(math.exp(-1)), rel=1e-6)
    assert got["gradient 0"].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_minus_zero_is_drawn_like_zero(backend, dtype):
    logits = torch.tensor([[-0.0, -1.0, -INF], [-1.0, -0.0, 0.0]], dtype=dtype)
    got = sample_tokens(logits, seed=0, min_p=1.0, backend=backend)
    assert got.ids[0] == 0
    assert got.ids[1] in (1, 2)
    assert got.logprobs.tolist() == pytest.approx([0.0, -math.log(2)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1e-37, 1e-40])
def test_a_tiny_temperature_draws_the_greatest_logit(backend, temperature):
    logits = torch.tensor([[1.0, 50.0, -3.0, 49.9], [-7.0, -8.0, -INF, -7.0]])
    got = sample_tokens(logits, seed=0, temperature=temperature, backend=backend)
    assert got.ids[0] == 1
    assert got.ids[1] in (0, 3)
    assert got.logprobs.tolist() == pytest.approx([0.0, -math.log(2)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1e-37, 1e-40, torch.full((3,), 1e-37)], ids=str)
@pytest.mark.parametrize("of_hidden", [False, True])
def test_a_tiny_temperature_leaves_the_greatest_logits(of_hidden, temperature, backend):
    logits = torch.tensor([[1.0, 50.0, -3.0, 49.9], [-7.0, -8.0, -9.0, -7.0], [90.0, 90.0, 80.0, 0.0]])
    options = {"temperature": temperature, "return_entropy": True, "backend": backend}
    x, targets = logits.clone().requires_grad_(), torch.tensor([1, 0, 2])
    run = (lambda: linear_logprobs(x, torch.eye(4), targets, **options)) if of_hidden else (
        lambda: token_logprobs(x, targets, **options)
    )  # fmt: skip
    logprobs, entropy = run()
    assert logprobs[:2].tolist() == pytest.approx([0.0, -math.log(2)])
    assert entropy.tolist() == pytest.approx([0.0, math.log(2), math.log(2)])
    assert -INF < logprobs[2] < -1e29
    logprobs.sum().backward()
    assert (x.grad * 1e-30).sign().tolist() == [[0, 0, 0, 0], [1, 0, 0, -1], [-1, -1, 1, 0]]
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_saturated_softcap_keeps_its_small_slope(backend, inplace):
    logits = torch.tensor([[25.0, 27.0, 1.0]])
    exact = logits.double().requires_grad_()
    e = torch.exp(-2 * exact.detach() / 4)
    z = 4 * torch.tanh(exact / 4)
    torch.log_softmax(z, -1)[0, 1].backward()
    p = torch.softmax(z.detach(), -1)
    expected = ((torch.tensor([0.0, 1.0, 0.0]) - p) * 4 * e / (1 + e).square()).float()
    x = logits.clone().requires_grad_() * 1
    x.retain_grad()
    token_logprobs(x, torch.tensor([1]), softcap=4.0, inplace_backward=inplace, backend=backend).sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_near_a_million_are_whitened_to_mean_zero(backend):
    x = 1e6 + torch.randn(4096, generator=torch.Generator().manual_seed(0))
    got = whiten(x, backend=backend)
    assert abs(got.double().mean().item()) < 1e-6
    assert got.double().var().item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_share_of_each_token_keeps_the_gradients_of_a_float16_head(backend):
    # 1 / N of N = 8192, and of a batch of which this call is a part: 1e-6 times a probability is no float16
    g = torch.Generator().manual_seed(0)
    count, vocabulary, width = (8192 if backend == "cpu" else 96), 61, 8
    hidden, weight = torch.randn(count, width, generator=g), torch.randn(vocabulary, width, generator=g)
    targets = torch.randint(vocabulary, (count,), generator=g)
    advantages, scaler = torch.randn(count, generator=g), 2.0**20

    def gradients(dtype, backend):
        leaves = [x.half().to(dtype).requires_grad_() for x in (hidden, weight)]
        loss, _ = linear_policy_loss(
            *leaves, targets, None, advantages, objective=PolicyObjective("gpg"), denominator=1e6, chunk_tokens=1000,
            backend=backend,
        )  # fmt: skip
        (scaler * loss).backward()
        return [x.grad.double() for x in leaves]

    for found, exact in zip(gradients(torch.half, backend), gradients(torch.double, "reference"), strict=True):
        assert (found - exact).norm() / exact.norm() < 1e-3


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_small_upstream_gradient_keeps_the_gradients_of_a_float16_head(backend, monkeypatch):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(96, 8, generator=g), torch.randn(61, 8, generator=g)
    targets, upstream = torch.randint(61, (96,), generator=g), torch.randn(96, generator=g) * 1e-7

    def gradients(dtype, backend):
        leaves = [hidden.half().to(dtype), weight.half().to(dtype).requires_grad_()]
        logprobs, lse = linear_logprobs(*leaves, targets, return_lse=True, chunk_tokens=40, backend=backend)
        (2.0**20 * (logprobs + lse.square()) * upstream).sum().backward()
        return leaves[1].grad.double()

    found, exact = gradients(torch.half, backend), gradients(torch.double, "reference")
    assert (found - exact).norm() / exact.norm() < 1e-3


def test_a_small_share_of_each_token_keeps_the_gradients_of_a_float16_head_under_the_kl():
    g = torch.Generator().manual_seed(0)
    hidden, ref_hidden, weight = (torch.randn(n, 8, generator=g) for n in (8192, 8192, 61))
    targets = torch.randint(61, (8192,), generator=g)

    def gradients(dtype, backend):
        h, ref, w = (x.half().to(dtype) for x in (hidden, ref_hidden, weight))
        leaves = [h.requires_grad_(), w.requires_grad_()]
        given = {"ref_weight": w.detach().flip(0), "chunk_tokens": 1000, "backend": backend}
        result = linear_kl(h, ref, w, targets, **given)
        (2.0**20 * 1e-8 * (result.kl + result.logprobs).sum()).backward()
        return [x.grad.double() for x in leaves]

    for found, exact in zip(gradients(torch.half, "cpu"), gradients(torch.double, "reference"), strict=True):
        assert (found - exact).norm() / exact.norm() < 1e-3


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_small_share_of_each_pair_keeps_the_gradients_of_a_float16_head(backend):
    g = torch.Generator().manual_seed(0)
    pairs, length = (64, 128) if backend == "cpu" else (2, 16)
    hidden, weight = torch.randn(2 * pairs, length, 8, generator=g), torch.randn(61, 8, generator=g)
    targets = torch.randint(61, (2 * pairs, length), generator=g)

    def gradients(dtype, backend):
        leaves = [x.half().to(dtype).requires_grad_() for x in (hidden, weight)]
        loss, _ = linear_preference_loss(
            *leaves, targets, objective=PreferenceObjective(beta=0.01, reference_free=True), denominator=1e6,
            chunk_tokens=1000, backend=backend,
        )  # fmt: skip
        (2.0**20 * loss).backward()
        return [x.grad.double() for x in leaves]

    for found, exact in zip(gradients(torch.half, backend), gradients(torch.double, "reference"), strict=True):
        assert (found - exact).norm() / exact.norm() < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_is_scored_right_infinitely_costs_nothing(backend):
    scores, labels = torch.tensor([-INF, INF, 0.0]), torch.tensor([0.0, 1.0, 1.0])
    got = evaluate(lambda x: step_reward_loss(x, labels, backend=backend), [scores], 1)
    assert got["loss"].item() == pytest.approx(math.log(2) / 3)
    assert got["gradient 0"].tolist() == pytest.approx([0.0, 0.0, -1 / 6])


def test_the_reference_of_group_advantages_takes_no_matrix_of_pairs():
    rewards, ids = torch.randn(200_000), torch.arange(200_000) % 1000  # 4e10 pairs
    got = group_advantages(rewards, group_ids=ids, variant="rloo", backend="reference")
    torch.testing.assert_close(got, group_advantages(rewards, group_ids=ids, variant="rloo", backend="cpu"))
