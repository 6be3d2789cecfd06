import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import token_kl
from rlhf_fast.ops.tokens.token_kl import VARIANTS, reference
from tests.losses import BACKENDS, KERNELS, compiled

LOG2, LOG3 = math.log(2), math.log(3)
# p = (1/2, 1/4, 1/4) of the policy, q = (1/4, 1/2, 1/4) of the reference.
POLICY, REFERENCE = [LOG2, 0.0, 0.0], [0.0, LOG2, 0.0]


def draw(shape=(4, 50), distance=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*shape, generator=g)
    return logits, logits + distance * torch.randn(*shape, generator=g)


def run(logits, ref_logits, upstream=None, **options):
    logits = logits.detach().clone().requires_grad_()
    kl = token_kl(logits, ref_logits, **options)
    kl.backward(torch.ones_like(kl) if upstream is None else upstream)
    return kl.detach(), logits.grad


# KL(p || q) = 1/2 log 2 - 1/4 log 2; the slope p_j (log p_j / q_j - KL). KL(q || p) is the same here, its slope p - q.
# m = (3/8, 3/8, 1/4): JS = KL(p || m) = 1/2 log 4/3 - 1/4 log 3/2 by symmetry; slope 1/2 p_j (log p_j / m_j - JS).
JS = 0.5 * math.log(4 / 3) - 0.25 * math.log(3 / 2)
CONSTANTS = {
    "reverse": (LOG2 / 4, [0.375 * LOG2, -0.3125 * LOG2, -0.0625 * LOG2]),
    "forward": (LOG2 / 4, [0.25, -0.25, 0.0]),
    "js": (JS, [0.25 * (math.log(4 / 3) - JS), 0.125 * (math.log(2 / 3) - JS), -0.125 * JS]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_divergences_are_those_of_agarwal_2024(backend, variant):
    # Section 2 of arXiv 2306.13649 with the reference as the teacher; slopes by hand.
    value, slope = CONSTANTS[variant]
    kl, gradient = run(torch.tensor(POLICY), torch.tensor(REFERENCE), variant=variant, backend=backend)
    assert kl.item() == pytest.approx(value, rel=1e-6)
    assert gradient.tolist() == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_js_weight_is_the_share_of_the_reference(backend):
    # b = 1/4, p = (1/2, 1/2), q = (1, 0): m = (5/8, 3/8); 1/4 log 8/5 + 3/4 (1/2 log 4/5 + 1/2 log 4/3).
    expected = 0.25 * math.log(8 / 5) + 0.375 * (math.log(4 / 5) + math.log(4 / 3))
    ref = torch.tensor([0.0, -torch.inf])
    kl = token_kl(torch.zeros(2), ref, variant="js", js_weight=0.25, backend=backend)
    assert kl.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_k_renormalises_both_over_the_reference_s_most_probable_tokens(backend):
    # The reference's two: token 1, then 0 (q = 1/3, 2/3 after all others are gone; p = 3/4, 1/4).
    logits, ref = torch.tensor([LOG3, 0.0, 5.0, 1.0]), torch.tensor([0.0, LOG2, -1.0, -2.0])
    kl, gradient = run(logits, ref, variant="reverse", top_k=2, backend=backend)
    expected = 0.75 * math.log(0.75 * 3) + 0.25 * math.log(0.25 * 3 / 2)
    assert kl.item() == pytest.approx(expected, rel=1e-6)
    slope = [0.75 * (math.log(2.25) - expected), 0.25 * (math.log(0.375) - expected), 0.0, 0.0]
    assert gradient.tolist() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("distance", [1e-2, 1e-4, 3e-6])
def test_a_small_divergence_keeps_its_digits_in_float32(backend, variant, distance):
    logits, ref = draw(distance=distance)
    kl, gradient = run(logits, ref, variant=variant, backend=backend)
    leaf = logits.double().requires_grad_()
    exact = reference(leaf, ref.double(), variant=variant)
    exact.sum().backward()
    # An error of 1e-7 in log p - log q is all that is left, relative to a distance of that order.
    torch.testing.assert_close(kl.double(), exact.detach(), rtol=1e-5 + 1e-7 / distance, atol=0)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=0, atol=1e-7)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("options", [{}, {"softcap": 60.0, "temperature": 0.7}], ids=["plain", "transformed"])
def test_a_confident_token_keeps_its_value_and_its_gradient(backend, variant, options):
    logits, ref = draw((2, 30))
    logits[:, 7], ref[:, 7] = 24.0, 22.0
    kl, gradient = run(logits, ref, variant=variant, backend=backend, **options)
    leaf = logits.double().requires_grad_()
    exact = reference(leaf, ref.double(), variant=variant, **options)
    exact.sum().backward()
    torch.testing.assert_close(kl.double(), exact.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_equal_logits_give_exactly_zero(backend, variant, dtype):
    logits = draw((3, 1030))[0].to(dtype)
    kl, gradient = run(logits, logits.clone(), variant=variant, backend=backend, temperature=0.7, softcap=9.0)
    assert (kl == 0).all()
    assert (gradient == 0).all()


LOGITS = st.lists(st.tuples(*[st.floats(-30, 30, width=32)] * 2), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None)
@given(LOGITS, st.sampled_from(list(VARIANTS)), st.sampled_from(KERNELS))
def test_a_divergence_is_never_negative_and_a_js_at_most_log_2(pairs, variant, backend):
    logits, ref = torch.tensor(pairs).t().contiguous()
    kl = token_kl(logits, ref, variant=variant, backend=backend).item()
    assert kl >= 0
    if variant == "js":
        assert kl <= LOG2 * (1 + 1e-6)


@settings(max_examples=15, deadline=None)
@given(LOGITS, st.sampled_from(KERNELS))
def test_forward_is_reverse_and_js_itself_with_the_sides_exchanged(pairs, backend):
    logits, ref = torch.tensor(pairs).t().contiguous()
    for one, other in (("forward", "reverse"), ("js", "js")):
        there = token_kl(logits, ref, variant=one, backend=backend)
        back = token_kl(ref, logits, variant=other, backend=backend)
        torch.testing.assert_close(there, back, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_shift_and_an_order_of_the_tokens_change_nothing(backend, variant):
    logits, ref = (x.double() for x in draw())
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    kl, gradient = run(logits, ref, variant=variant, backend=backend)
    moved, moved_gradient = run(logits[:, order] + 3, ref[:, order] - 1e3, variant=variant, backend=backend)
    torch.testing.assert_close(moved, kl, rtol=0, atol=1e-11)
    torch.testing.assert_close(moved_gradient, gradient[:, order], rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_token_forbidden_on_both_sides_is_left_out(backend, variant):
    logits, ref = draw()
    expected, slope = run(logits[:, 1:], ref[:, 1:], variant=variant, backend=backend)
    logits[:, 0] = ref[:, 0] = -torch.inf
    kl, gradient = run(logits, ref, variant=variant, backend=backend)
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient[:, 1:], slope, rtol=1e-4, atol=1e-6)
    assert (gradient[:, 0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kl_is_infinite_where_the_other_side_is_impossible(backend):
    logits, ref = torch.zeros(2), torch.tensor([0.0, -torch.inf])
    assert token_kl(logits, ref, variant="reverse", backend=backend).item() == math.inf
    assert token_kl(ref, logits, variant="forward", backend=backend).item() == math.inf
    assert token_kl(logits, ref, variant="forward", backend=backend).item() == pytest.approx(LOG2, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("top_k", [None, 4])
def test_nothing_behind_the_mask_gets_through(backend, variant, top_k):
    logits, ref = draw((2, 3, 20))
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])
    options = {"variant": variant, "top_k": top_k, "mask": mask, "backend": backend}
    expected = run(logits, ref, **options)
    logits[mask == 0], ref[mask == 0] = torch.nan, torch.nan
    found = run(logits, ref, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (found[0][mask == 0] == 0).all()
    assert (found[1][mask == 0] == 0).all()


@pytest.mark.parametrize("backend", KERNELS)
def test_strides_and_leading_dimensions_change_no_bits(backend):
    logits, ref = draw((2, 3, 20))
    whole = run(logits[:, 1:].contiguous(), ref[:, :-1].contiguous(), backend=backend)
    sliced = run(logits[:, 1:], ref[:, :-1], backend=backend)
    flat = run(logits[:, 1:].reshape(4, 20), ref[:, :-1].reshape(4, 20), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(whole, sliced, strict=True))
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(whole, flat, strict=True))
    turned = run(logits.transpose(0, 2).contiguous().transpose(0, 2), ref, backend=backend)
    assert torch.equal(turned[0], run(logits, ref, backend=backend)[0])


def test_the_reference_gets_no_gradient():
    logits, ref = draw()
    ref.requires_grad_()
    token_kl(logits.requires_grad_(), ref).sum().backward()
    assert logits.grad is not None
    assert ref.grad is None


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("top_k", [None, 3])
def test_the_reference_is_differentiable_twice(variant, top_k):
    logits, ref = (x.double() for x in draw((2, 5)))
    options = {"variant": variant, "js_weight": 0.3, "top_k": top_k, "temperature": 0.7, "softcap": 4.0}
    options["mask"] = torch.tensor([1, 0])
    assert torch.autograd.gradcheck(lambda x: reference(x, ref, **options), logits.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: reference(x, ref, **options), logits)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_registered_op_passes_opcheck(backend):
    logits, ref = (x.double()[None] for x in draw((3, 5)))
    temperatures = torch.tensor([[0.5, 1.0, 2.0]])
    mask = torch.tensor([[1, 0, 1]], dtype=torch.uint8)
    arguments = (logits.requires_grad_(), ref, mask, 1.0, temperatures, 1.5, 4.0, "js", 0.3, backend)
    torch.library.opcheck(torch.ops.rlhf_fast.token_kl.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k", [None, 4])
def test_it_compiles_without_graph_breaks(backend, top_k):
    logits, ref = draw()

    def evaluate(x, y):
        return token_kl(x, y, top_k=top_k, variant="js", backend=backend)

    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    values = [evaluate(leaves[0], ref), compiled(evaluate)(leaves[1], ref)]
    for value in values:
        value.sum().backward()
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        (((2, 5), (2, 4)), {}, ValueError, r"ref_logits must be .* = \(2, 5\), got \(2, 4\)"),
        (((2, 0), (2, 0)), {}, ValueError, r"logits must be \(\.\.\., V\) with V >= 1, got \(2, 0\)"),
        (
            ((2, 5), (2, 5)),
            {"variant": "kl"},
            ValueError,
            "variant must be one of reverse, forward, js, got 'kl'",
        ),
        (((2, 5), (2, 5)), {"js_weight": 1.0}, ValueError, r"js_weight must be in \(0, 1\), got 1.0"),
        (((2, 5), (2, 5)), {"top_k": 6}, ValueError, r"top_k must be in \[1, V\] = \[1, 5\], got 6"),
        (((2, 5), (2, 5)), {"mask": torch.ones(3)}, ValueError, r"mask must be .* = \(2,\), got \(3,\)"),
        (((2, 5), (2, 5)), {"temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0"),
    ],
)
def test_bad_input_raises_with_its_values(shapes, options, error, message):
    with pytest.raises(error, match=message):
        token_kl(*(torch.zeros(s) for s in shapes), **options)


def test_the_reference_s_type_must_be_the_policy_s():
    with pytest.raises(TypeError, match=r"ref_logits must have the type of logits, torch.float32, got torch.bfloat16"):
        token_kl(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bfloat16))
