"""What stands around the policy loss, by hand: aggregation, correction, KL, entropy and the masks."""

import math
from math import exp, log

import pytest
import torch

from rlhf_fast import PolicyObjective, linear_kl, linear_policy_loss, policy_loss
from tests.losses import BACKENDS, evaluate, of_policy

# Losses -1, -2 of a sequence of two tokens and -4 of one of one token, all with ratio 1.
MASK = torch.tensor([[1, 1], [1, 0]])
ADVANTAGES = torch.tensor([[1.0, 2.0], [4.0, math.nan]], dtype=torch.float64)


def run(backend, advantages=ADVANTAGES, ratios=1.0, **options):
    logprobs = torch.full_like(advantages, -1.0) + torch.as_tensor(ratios, dtype=torch.float64).log()
    inputs = [logprobs, torch.full_like(advantages, -1.0), advantages]
    options.setdefault("mask", MASK if advantages.shape == MASK.shape else None)
    return evaluate(lambda *x: policy_loss(*x, **of_policy(**options), backend=backend), inputs, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("aggregation", "options", "loss", "weights"),
    [
        ("token_mean", {}, -7 / 3, [[1 / 3, 1 / 3], [1 / 3, 0]]),
        ("token_mean", {"denominator": 6}, -7 / 6, [[1 / 6, 1 / 6], [1 / 6, 0]]),
        ("token_sum", {}, -7, [[1, 1], [1, 0]]),
        ("seq_mean_token_mean", {}, -(1.5 + 4) / 2, [[1 / 4, 1 / 4], [1 / 2, 0]]),
        ("seq_mean_token_mean", {"sequences": 4}, -5.5 / 4, [[1 / 8, 1 / 8], [1 / 4, 0]]),
        ("seq_mean_token_sum", {}, -7 / 2, [[1 / 2, 1 / 2], [1 / 2, 0]]),
        ("seq_mean_token_sum_norm", {"fixed_length": 10}, -7 / 20, [[1 / 20, 1 / 20], [1 / 20, 0]]),
        ("seq_mean_token_mean", {"overlong": torch.tensor([0, 1])}, -1.5, [[1 / 2, 1 / 2], [0, 0]]),
        ("token_mean", {"overlong": torch.tensor([1, 0])}, -4, [[0, 0], [1, 0]]),
    ],
)
def test_an_aggregation_is_a_weight_per_token(backend, aggregation, options, loss, weights):
    got = run(backend, aggregation=aggregation, **options)
    assert got["loss"].item() == pytest.approx(loss, rel=1e-12)
    expected = -torch.tensor(weights, dtype=torch.float64) * torch.where(MASK != 0, ADVANTAGES, 0)
    torch.testing.assert_close(got["gradient 0"], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("level", "mode", "weights", "outside"),
    [  # ratios to the sampler 4, 1/2 and 3/2; products 2 and 3/2; geometric means sqrt(2) and 3/2; bounds 1 and 1.45
        ("token", "truncate", [1.45, 1, 1.45], 1),
        ("token", "mask", [0, 0, 0], 1),
        ("sequence", "truncate", [1.45, 1.45, 1.45], 1),
        ("geometric", "truncate", [math.sqrt(2), math.sqrt(2), 1.45], 1 / 3),
        ("geometric", "mask", [math.sqrt(2), math.sqrt(2), 0], 1 / 3),
    ],
)
def test_a_correction_weights_the_policy_term(backend, level, mode, weights, outside):
    sampler = -1 - torch.tensor([[4, 0.5], [1.5, math.nan]], dtype=torch.float64).log()
    got = run(
        backend, sampler_logprobs=sampler, correction_level=level, correction_mode=mode, correction_low=1.0,
        correction_high=1.45,
    )  # fmt: skip
    a, b, c = weights
    assert got["loss"].item() == pytest.approx(-(a + 2 * b + 4 * c) / 3, rel=1e-12)
    expected = -torch.tensor([[a, 2 * b], [4 * c, 0]], dtype=torch.float64) / 3
    torch.testing.assert_close(got["gradient 0"], expected)
    assert got["correction_mean"].item() == pytest.approx((a + b + c) / 3)
    assert got["correction_fraction"].item() == pytest.approx(outside)
    kl = (3 - log(4)) + (-0.5 - log(0.5)) + (0.5 - log(1.5))
    assert got["sampler_kl"].item() == pytest.approx(kl / 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_corrected_sequence_loss_has_the_weights_of_all_its_tokens(backend):
    # GSPO with s = 1.1 and token weights 2 and 1/2: loss -1.1 (2 + 1/2) / 2, half of it by each token's log-ratio.
    sampler = -1 - torch.tensor([[2, 0.5]], dtype=torch.float64).log()
    ones = torch.ones(1, 2, dtype=torch.float64)
    got = run(backend, ones, [[1.21, 1.0]], variant="gspo", clip_eps_high=0.2, sampler_logprobs=sampler)
    assert got["loss"].item() == pytest.approx(-1.1 * 1.25)
    torch.testing.assert_close(got["gradient 0"], -1.1 * 1.25 / 2 * ones)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("variant", "unbiased", "value", "slope"),
    [  # logprob - ref_logprob = log 2, r = 1.5
        ("k1", False, log(2), 1.0),
        ("k2", False, log(2) ** 2 / 2, log(2)),
        ("k3", False, -0.5 + log(2), 0.5),
        ("k1", True, 1.5 * log(2), 1.5 * log(2)),
        ("k3", True, 1.5 * (-0.5 + log(2)), 1.5 * log(2)),
    ],
)
def test_the_kl_to_the_reference_joins_the_loss(backend, variant, unbiased, value, slope):
    zero = torch.zeros(1, 1, dtype=torch.float64)
    got = run(
        backend, zero, 1.5, ref_logprobs=zero - 1 + log(1.5) - log(2), kl_coef=0.1, kl_variant=variant,
        kl_unbiased=unbiased,
    )  # fmt: skip
    assert got["loss"].item() == pytest.approx(0.1 * value)
    assert got["gradient 0"].item() == pytest.approx(0.1 * slope)
    assert got["kl_to_ref"].item() == pytest.approx(value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [("token_mean", [[1 / 3, 1 / 3], [1 / 3, 0]]), ("seq_mean_token_mean", [[1 / 4, 1 / 4], [1 / 2, 0]])],
)
def test_an_exact_kl_is_added_by_the_weights_of_the_tokens(backend, aggregation, weights):
    kl = torch.tensor([[0.5, 2.0], [3.0, math.nan]], dtype=torch.float64, requires_grad=True)
    weights, logprobs = torch.tensor(weights, dtype=torch.float64), torch.full_like(ADVANTAGES, -1.0)
    loss, metrics = policy_loss(
        logprobs, logprobs, ADVANTAGES, mask=MASK, kl=kl, backend=backend,
        objective=PolicyObjective(kl_coef=0.1, kl_variant="exact", aggregation=aggregation),
        ref_logprobs=logprobs - 9,  # of no use here
    )  # fmt: skip
    loss.backward()
    tokens = torch.tensor([[0.1 * 0.5 - 1, 0.1 * 2.0 - 2], [0.1 * 3.0 - 4, 0]], dtype=torch.float64)
    assert loss.item() == pytest.approx((weights * tokens).sum().item(), rel=1e-12)
    torch.testing.assert_close(kl.grad, 0.1 * weights)
    assert metrics["kl_to_ref"].item() == pytest.approx(5.5 / 3)
    assert not metrics["kl_to_ref"].requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("variant", "direction"), [("exact", "reverse"), ("exact_forward", "forward")])
def test_an_exact_kl_has_the_gradient_of_the_sum_over_the_vocabulary(backend, variant, direction):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 8), (2, 3, 8), (37, 8), (2, 3))
    hidden, reference, weight, upstream = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    ids, mask = torch.randint(0, 37, (2, 3), generator=generator), torch.tensor([[1, 1, 0], [1, 1, 1]])
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    objective = PolicyObjective("a2c", kl_coef=0.3, kl_variant=variant)
    out = linear_kl(ours, reference, weight, ids, mask=mask, temperature=0.7, variant=direction, backend=backend)
    options = {"mask": mask, "objective": objective, "kl": out.kl, "backend": backend}
    policy_loss(out.logprobs, None, upstream, **options).loss.backward()
    log_p, log_q = ((x @ weight.T / 0.7).log_softmax(-1) for x in (theirs, reference))
    kl = log_p.exp() * (log_p - log_q) if variant == "exact" else log_q.exp() * (log_q - log_p)
    tokens = 0.3 * kl.sum(-1) - upstream * log_p.gather(-1, ids[..., None]).squeeze(-1)
    ((tokens * mask).sum() / 5).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ({"kl_coef": 0.1, "kl_variant": "exact"}, {}, "kl must be given for kl_variant exact with kl_coef 0.1"),
        ({}, {"kl": ADVANTAGES}, "kl is of kl_variant exact or exact_forward, got k3"),
        ({"kl_variant": "exact"}, {"kl": ADVANTAGES[0]}, r"kl must be the shape of logprobs = \(2, 2\), got \(2,\)"),
        ({"kl_variant": "exact", "kl_unbiased": True}, {}, "kl_unbiased is of an estimate, got kl_variant exact"),
        ({"kl_variant": "exakt"}, {}, "kl_variant must be one of k1, k2, k3, exact, exact_forward, got 'exakt'"),
    ],
    ids=str,
)
def test_an_exact_kl_that_does_not_fit_is_refused(objective, options, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(ADVANTAGES, None, ADVANTAGES, objective=PolicyObjective(**objective), **options)


def test_a_loss_from_hidden_states_of_the_policy_alone_has_no_exact_kl():
    objective = PolicyObjective(kl_coef=0.1, kl_variant="exact")
    hidden, weight, ids = torch.zeros(2, 2, 4), torch.zeros(5, 4), torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="kl_variant exact takes linear_kl and policy_loss"):
        linear_policy_loss(hidden, weight, ids, None, torch.zeros(2), objective=objective)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_entropy_bonus_lowers_the_loss_and_has_a_gradient(backend):
    entropy = torch.tensor([[1.0, 2.0], [3.0, math.nan]], dtype=torch.float64, requires_grad=True)
    loss, metrics = policy_loss(
        torch.full_like(ADVANTAGES, -1.0), torch.full_like(ADVANTAGES, -1.0), ADVANTAGES, mask=MASK, entropy=entropy,
        objective=PolicyObjective(entropy_coef=0.5, aggregation="seq_mean_token_mean"), backend=backend,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == pytest.approx(-(1.5 + 4) / 2 - 0.5 * (1.5 + 3) / 2)
    assert metrics["entropy"].item() == pytest.approx(2.0)
    expected = -0.5 * torch.tensor([[0.25, 0.25], [0.5, 0]], dtype=torch.float64)
    torch.testing.assert_close(entropy.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_entropy_mask_keeps_the_tokens_of_highest_entropy(backend):
    # arXiv 2506.01939: the upper half of three tokens is two; the mean is still over all of them.
    entropy = torch.tensor([[1.0, 2.0], [3.0, math.nan]], dtype=torch.float64)
    got = run(backend, entropy=entropy, entropy_fraction=0.5)
    assert got["loss"].item() == pytest.approx(-(2 + 4) / 3)
    assert got["gradient 0"].tolist() == [[0, -2 / 3], [-4 / 3, 0]]
    assert got["dropped_fraction"].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_off_policy_mask_drops_far_sequences_with_a_negative_advantage(backend):
    # DeepSeek-V3.2 2512.02556: the mean of log old - log new is 0.5 in both sequences, above 0.4.
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    ratios = [[exp(-0.2), exp(-0.8)]] * 2
    options = {"mask": None, "aggregation": "token_sum", "clip_eps_low": 1.0}
    near = run(backend, advantages, ratios, off_policy_max_kl=0.6, **options)
    far = run(backend, advantages, ratios, off_policy_max_kl=0.4, **options)
    assert near["loss"].item() == pytest.approx(0.0, abs=1e-12)
    assert far["loss"].item() == pytest.approx(-exp(-0.2) - exp(-0.8))
    assert far["gradient 0"][1].tolist() == [0.0, 0.0]
    assert (near["dropped_fraction"].item(), far["dropped_fraction"].item()) == (0.0, 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_vespo_takes_the_correction_into_its_weight(backend, level):
    # VESPO 2602.10693, TRL: log w = sum log r + the log of the truncated ratios to the sampler, w^k exp(lambda (1 - w))
    logprobs, old = torch.tensor([[-1.0, -2.0]]).double(), torch.tensor([[-1.1, -1.8]]).double()
    sampler, advantages = torch.tensor([[-1.4, -1.7]]).double(), torch.ones(1, 2).double()
    apart = old - sampler  # 0.3, -0.1
    folded = {
        "token": apart.clamp(max=log(1.2)).sum(),
        "sequence": apart.sum().clamp(max=log(1.2)),
        "geometric": 2 * apart.mean().clamp(max=log(1.2)),
    }[level].item()
    w = exp((logprobs - old).sum().item() + folded)
    slope = -(w**2) * exp(3 * (1 - w))
    options = {"sampler_logprobs": sampler, "correction_level": level, "correction_high": 1.2}
    loss = lambda *x: policy_loss(*x, **of_policy(variant="vespo", **options), backend=backend)  # noqa: E731
    got = evaluate(loss, [logprobs, old, advantages], 1)
    assert got["loss"].item() == pytest.approx(slope * -1.5)
    torch.testing.assert_close(got["gradient 0"], torch.full((1, 2), slope / 2, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["dppo_tv", "dppo_kl"])
def test_dppo_caps_its_ratio_but_not_the_gradient_of_the_cap(backend, variant):
    # verl: -sg(min(r, 20)) A logprob
    inputs = [torch.tensor([[-2.0]]).double(), torch.tensor([[-6.0]]).double(), torch.full((1, 1), -1.0).double()]
    objective = PolicyObjective(variant, max_divergence=9.0)
    got = evaluate(lambda *x: policy_loss(*x, objective=objective, backend=backend), inputs, 1)
    assert (got["loss"].item(), got["gradient 0"].item()) == (20.0, 20.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_cov_selects_among_tokens_that_no_bound_holds(backend):
    # covariances 3, 0, -1, -2 of which the greatest is clipped already: the second is selected
    old = torch.tensor([[-1.5, -2.0, -2.0, -3.0]]).double()
    inputs = [torch.tensor([[-1.0, -2.0, -2.0, -3.0]]).double(), old, torch.tensor([[3.0, 1.0, 0.0, 0.5]]).double()]
    objective = PolicyObjective("clip_cov", cov_fraction=0.25, cov_low=-9.0, cov_high=9.0)
    got = evaluate(lambda *x: policy_loss(*x, objective=objective, backend=backend), inputs, 1)
    assert got["clip_fraction"].item() == 0.5
    assert (got["gradient 0"] == 0).sum() == 3  # clipped, selected, and the advantage of 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_cov_selects_among_tokens_that_the_dual_clip_does_not_hold(backend):
    # covariances about 2, 0, 0 and 1: the first is held by the dual clip
    logprobs = torch.tensor([[-4.0, -2.0, -2.0, -1.0]]).double()
    old = torch.tensor([[-6.0, -2.0, -2.0, -1.0]]).double()
    inputs = [logprobs, old, torch.tensor([[-1.0, 0.5, 0.5, 1.0]]).double()]
    objective = PolicyObjective("clip_cov", cov_fraction=0.25, cov_low=0.1, cov_high=9.0, dual_clip=3.0)
    got = evaluate(lambda *x: policy_loss(*x, objective=objective, backend=backend), inputs, 1)
    assert got["gradient 0"].tolist() == [[0, -0.125, -0.125, 0]]
