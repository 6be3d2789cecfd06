import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import kl_estimate
from rlhf_fast.ops.tokens.kl_estimate import VARIANTS, reference
from rlhf_fast.testing.numerics import assert_contract
from tests.losses import BACKENDS, DTYPES, KERNELS, SHAPES, compiled, draw


def run(estimate, logprobs, ref_logprobs):
    leaves = [x.detach().requires_grad_() for x in (logprobs, ref_logprobs)]
    value = estimate(*leaves)
    upstream = torch.linspace(-1, 2, value.numel()).reshape(value.shape).to(value.dtype)
    value.backward(upstream)
    return {"value": value.detach(), "d logprobs": leaves[0].grad, "d ref_logprobs": leaves[1].grad}


def eager(variant):
    def estimate(logprobs, ref_logprobs):
        log_ratio = ref_logprobs - logprobs
        return {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": log_ratio.exp() - 1 - log_ratio}[variant]

    return estimate


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("variant", "values", "slopes"),
    [
        ("k1", [-math.log(2), math.log(2)], [1.0, 1.0]),
        ("k2", [math.log(2) ** 2 / 2] * 2, [-math.log(2), math.log(2)]),
        ("k3", [1 - math.log(2), math.log(2) - 0.5], [-1.0, 0.5]),
    ],
)
def test_the_estimators_are_those_of_schulman_2020(backend, variant, values, slopes):
    # r = ref / pi = 2 and 1/2: k1 = -log r, k2 = (log r)^2 / 2, k3 = (r - 1) - log r; d k3 / d logprob = 1 - r.
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    ref = torch.tensor([-1.0 + math.log(2), -1.0 - math.log(2)], requires_grad=True)
    got = kl_estimate(logprobs, ref, variant=variant, backend=backend)
    got.sum().backward()
    assert got.tolist() == pytest.approx(values, rel=1e-6)
    assert logprobs.grad.tolist() == pytest.approx(slopes, rel=1e-6)
    assert ref.grad.tolist() == pytest.approx([-x for x in slopes], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["k1", "k3"])
def test_straight_through_has_the_estimator_s_value_and_the_slope_of_k2(backend, variant):
    # r = 2: k1 = -log 2, k3 = 1 - log 2, and d k2 / d logprob = -log r = -log 2.
    logprobs = torch.tensor([-1.0], requires_grad=True)
    ref = torch.tensor([-1.0 + math.log(2)], requires_grad=True)
    got = kl_estimate(logprobs, ref, variant=variant, gradient="k2", backend=backend)
    got.sum().backward()
    assert got.item() == pytest.approx({"k1": -math.log(2), "k3": 1 - math.log(2)}[variant], rel=1e-6)
    assert logprobs.grad.item() == pytest.approx(-math.log(2), rel=1e-6)
    assert ref.grad.item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("variant", "value", "slope", "ref_slope"),
    [
        ("k1", -3 * math.log(2), 3 * (1 - math.log(2)), -3.0),
        ("k2", 1.5 * math.log(2) ** 2, 3 * (math.log(2) ** 2 / 2 - math.log(2)), 3 * math.log(2)),
        ("k3", 3 * (1 - math.log(2)), -3 * math.log(2), 3.0),
    ],
)
def test_tokens_of_another_policy_are_weighted_as_in_deepseek_v3_2(backend, variant, value, slope, ref_slope):
    # The unbiased KL estimate of arXiv 2512.02556: w k with w = pi / pi_old = 3, r = 2. Its ratio is not constant:
    # d (w k) / d logprob = w (k + d k / d logprob).
    logprobs = torch.tensor([-1.0], requires_grad=True)
    ref = torch.tensor([-1.0 + math.log(2)], requires_grad=True)
    old = torch.tensor([-1.0 - math.log(3)])
    got = kl_estimate(logprobs, ref, variant=variant, old_logprobs=old, backend=backend)
    got.sum().backward()
    assert got.item() == pytest.approx(value, rel=1e-6)
    assert logprobs.grad.item() == pytest.approx(slope, rel=1e-6)
    assert ref.grad.item() == pytest.approx(ref_slope, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_clipped_estimate_that_overflows_has_no_gradient(backend):
    logprobs = torch.tensor([-200.0], requires_grad=True)
    value = kl_estimate(logprobs, torch.zeros(1), variant="k3", value_clip=10.0, backend=backend)
    value.sum().backward()
    assert (value.item(), logprobs.grad.item()) == (10.0, 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_clipped_is_a_constant(backend):
    # log r = 2 against a bound of 1: k1 = -1. log r = 1/2: k1 = -1/2. w = e^2 against a bound of 3.
    logprobs = torch.tensor([-3.0, -3.0, -3.0], requires_grad=True)
    ref = torch.tensor([-1.0, -2.5, -2.5])
    kl_estimate(logprobs, ref, variant="k1", log_ratio_clip=1.0, backend=backend).sum().backward()
    assert logprobs.grad.tolist() == [0, 1, 1]
    logprobs.grad = None
    got = kl_estimate(logprobs, ref, variant="k1", value_clip=0.75, backend=backend)
    got.sum().backward()
    assert got.tolist() == [-0.75, -0.5, -0.5]
    assert logprobs.grad.tolist() == [0, 1, 1]
    logprobs.grad = None
    old = torch.tensor([-5.0, -3.0, -5.0])
    got = kl_estimate(logprobs, ref, variant="k1", old_logprobs=old, weight_clip=3.0, backend=backend)
    got.sum().backward()
    assert got.tolist() == pytest.approx([-6.0, -0.5, -1.5])
    assert logprobs.grad.tolist() == pytest.approx([3.0, 0.5, 3.0])


@pytest.mark.parametrize(
    "options",
    [*({"variant": e, "gradient": g} for e in ("k1", "k3") for g in ("k2", None)),
     # The value of k2 is biased, and so would be the ratio's share of the gradient.
     {"variant": "k2", "gradient": "k2"}],
    ids=str,
)  # fmt: skip
def test_the_weighted_gradient_is_that_of_the_kl_in_expectation_over_the_sampler(options):
    logits, ref, old = draw((5,), 3, torch.float64)
    ref, old = torch.log_softmax(ref, -1), torch.log_softmax(old, -1)
    logits.requires_grad_()
    policy = torch.log_softmax(logits, -1)
    exact = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), logits, retain_graph=True)[0]
    sampled = (old.exp() * kl_estimate(policy, ref, old_logprobs=old, **options)).sum()
    torch.testing.assert_close(torch.autograd.grad(sampled, logits)[0], exact)


@pytest.mark.parametrize("variant", ["k1", "k3"])
def test_the_expectation_over_the_policy_is_the_kl(variant):
    policy, ref = (torch.log_softmax(x, -1) for x in draw((5,), 2, torch.float64))
    expectation = (policy.exp() * kl_estimate(policy, ref, variant=variant)).sum()
    torch.testing.assert_close(expectation, (policy.exp() * (policy - ref)).sum())


def test_the_gradient_of_k2_is_that_of_the_kl_in_expectation():
    logits, ref = draw((5,), 2, torch.float64)
    ref = torch.log_softmax(ref, -1)
    logits.requires_grad_()
    policy = torch.log_softmax(logits, -1)
    exact = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), logits, retain_graph=True)[0]
    sampled = (policy.exp().detach() * kl_estimate(policy, ref, variant="k2")).sum()
    torch.testing.assert_close(torch.autograd.grad(sampled, logits)[0], exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1030,)], ids=str)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_values_and_gradients_keep_the_numerics_contract(backend, dtype, shape, variant):
    inputs = draw(shape, 2, dtype)
    got = run(lambda *x: kl_estimate(*x, variant=variant, backend=backend), *inputs)
    plain, exact = run(eager(variant), *inputs), run(eager(variant), *(x.double() for x in inputs))
    for name in got:
        assert_contract(name, got[name], plain[name], exact[name])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("step", [2.0**-20, -(2.0**-20), 2.0**-9, 0.4999, 0.5, -0.5, -0.51])
def test_k3_does_not_cancel_near_zero(backend, step):
    step = torch.tensor([step], dtype=torch.float32).item()
    exact = sum(step**k / math.factorial(k) for k in range(2, 20))
    got = kl_estimate(torch.zeros(1), torch.tensor([step]), variant="k3", backend=backend)
    assert got.item() == pytest.approx(exact, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.floats(-80, 80, width=32), st.sampled_from(BACKENDS))
def test_k3_is_never_negative_and_zero_only_at_equality(log_ratio, backend):
    got = kl_estimate(torch.tensor([-log_ratio]), torch.zeros(1), variant="k3", backend=backend).item()
    assert got >= 0
    if abs(log_ratio) > 1e-3:
        assert got > 0
    if log_ratio == 0:
        assert got == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_common_shift_and_strides_change_nothing(backend, variant):
    logprobs, ref = (x.double() for x in draw((4, 6), 2))
    expected = kl_estimate(logprobs, ref, variant=variant, backend=backend)
    moved = kl_estimate((logprobs + 4).T.contiguous().T, (ref + 4)[:, :], variant=variant, backend=backend)
    torch.testing.assert_close(moved, expected)
    one = kl_estimate(logprobs[:, :1].expand(4, 6), ref, variant=variant, backend=backend)
    assert torch.equal(one, kl_estimate(logprobs[:, :1].repeat(1, 6), ref, variant=variant, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_inputs_that_ask_get_a_gradient(backend):
    logprobs, ref = draw((3,), 2)
    logprobs.requires_grad_()
    kl_estimate(logprobs, ref, variant="k2", backend=backend).sum().backward()
    assert logprobs.grad is not None
    assert ref.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_gives_no_estimate(backend):
    got = run(lambda *x: kl_estimate(*x, backend=backend), torch.empty(0, 3), torch.empty(0, 3))
    assert got["value"].shape == (0, 3)


@pytest.mark.parametrize("weighted", [False, True], ids=["on-policy", "weighted"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_reference_is_differentiable_twice(variant, weighted):
    *leaves, old = draw((2, 3), 3, torch.float64)
    options = {"variant": variant, "old_logprobs": old if weighted else None, "log_ratio_clip": 1.5}
    leaves = [x.requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(lambda *x: reference(*x, **options), leaves)
    assert torch.autograd.gradgradcheck(lambda *x: reference(*x, **options), leaves)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_registered_op_passes_opcheck(backend):
    *leaves, old = draw((2, 3), 3)
    clips = [1.0, math.inf, 2.0]
    arguments = (*(x.requires_grad_() for x in leaves), old, "k3", "own", clips, True, backend)
    torch.library.opcheck(torch.ops.rlhf_fast.kl_estimate.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_compiled_graph_is_whole_and_gives_the_same_bits(backend, variant):
    inputs = draw((2, 3), 2)

    def estimate(*x):
        return kl_estimate(*x, variant=variant, backend=backend)

    got, expected = run(compiled(estimate), *inputs), run(estimate, *inputs)
    for name in got:
        assert torch.equal(got[name], expected[name])


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([torch.zeros(2, 3), torch.zeros(2)], {}, r"ref_logprobs .*\(2, 3\), got \(2,\)"),
        ([torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)], {}, r"logprobs must be \(B, T\) or \(N,\), got \(1, 2, 3\)"),
        ([torch.zeros(2), torch.zeros(2)], {"variant": "k4"}, "variant must be one of k1, k2, k3, got 'k4'"),
        ([torch.zeros(2), torch.zeros(2)], {"gradient": "k4"}, "gradient must be one of k1, k2, k3, got 'k4'"),
        ([torch.zeros(2), torch.zeros(2)], {"weight_clip": 0.0}, "weight_clip must be > 0, got 0.0"),
        ([torch.zeros(2), torch.zeros(2)], {"old_logprobs": torch.zeros(3)}, r"old_logprobs .*\(2,\), got \(3,\)"),
    ],
)
def test_bad_input_raises_with_its_values(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        kl_estimate(*inputs, **options)
