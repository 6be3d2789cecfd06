import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import BackendError, backends, token_logprobs, use_backend
from rlhf_fast.ops.core import check
from rlhf_fast.ops.tokens.token_logprobs import IMPLS, Transform, empty_stats, reference
from rlhf_fast.testing.numerics import assert_contract

BACKENDS = ["reference", "cpu", "triton"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# (leading shape, V): one token, odd vocabulary, ragged against every block size, many rows
SHAPES = [((1,), 1), ((3,), 17), ((2, 3), 1023), ((2, 2), 4099), ((1, 2, 2), 9001)]


TRANSFORMS = {
    "temperature": {"temperature": 0.7},
    "logit_scale": {"logit_scale": 1.7},
    "softcap": {"softcap": 5.0},
    "softcap of scaled logits, tempered": {"temperature": 1.3, "logit_scale": 0.25, "softcap": 2.0},
    "temperature per row": {"temperature": torch.tensor([[0.5, 1.0, 2.0], [0.75, 1.5, 4.0]]), "softcap": 6.0},
}


def scaled(logits, temperature=1.0, logit_scale=1.0, softcap=None):
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / (temperature[..., None].to(logits.dtype) if isinstance(temperature, torch.Tensor) else temperature)


def eager(logits, targets, **options):
    log_p = torch.log_softmax(scaled(logits, **options), -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, targets[..., None])[..., 0], entropy


def value_and_grad(fn, logits, targets, weights, **options):
    x = logits.detach().clone().requires_grad_()
    logprobs, entropy = fn(x, targets, **options)
    (logprobs * weights[0] + entropy * weights[1]).sum().backward()
    return logprobs.detach(), entropy.detach(), x.grad


def draw(shape, vocabulary, dtype, scale=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, vocabulary, generator=g) * scale).to(dtype)
    targets = torch.randint(0, vocabulary, shape, generator=g)
    weights = torch.randn(2, *shape, generator=g)
    return logits, targets, weights


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_entropy_alone_can_be_differentiated(backend):
    # p = (1/4, 3/4): d H / d z_j = -p_j (log p_j + H)
    logits = torch.tensor([[0.0, math.log(3.0)]], requires_grad=True)
    token_logprobs(logits, torch.tensor([1]), return_entropy=True, backend=backend)[1].sum().backward()
    slope = 0.1875 * math.log(3.0)
    torch.testing.assert_close(logits.grad, torch.tensor([[slope, -slope]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_logits_give_the_logistic_function(backend):
    logits = torch.tensor([[0.0, math.log(3.0)]])
    logprobs, entropy = token_logprobs(logits, torch.tensor([1]), return_entropy=True, backend=backend)
    assert logprobs.item() == pytest.approx(math.log(0.75), rel=1e-6)
    assert entropy.item() == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_divides_the_logits(backend):
    logits = torch.tensor([[0.0, 2 * math.log(3.0)]])
    logprobs = token_logprobs(logits, torch.tensor([0]), temperature=2.0, backend=backend)
    assert logprobs.item() == pytest.approx(math.log(0.25), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_softcap_bounds_the_scaled_logits(backend):
    # Gemma 2 (arXiv 2408.00118, section 2): logits <- c tanh(logits / c)
    x = 2.0 * math.atanh(math.log(3.0) / 2.0) / 0.5
    logprobs = token_logprobs(
        torch.tensor([[0.0, x]]), torch.tensor([1]), logit_scale=0.5, softcap=2.0, backend=backend
    )
    assert logprobs.item() == pytest.approx(math.log(0.75), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_statistics_of_two_logits_are_those_of_a_coin(backend):
    logits = torch.tensor([[0.0, 2 * math.log(3.0)]], requires_grad=True)
    logprobs, stats = token_logprobs(logits, torch.tensor([1]), temperature=2.0, return_stats=True, backend=backend)
    assert logprobs.item() == pytest.approx(math.log(0.75), rel=1e-6)
    assert [x.item() for x in stats] == pytest.approx([math.log(4), math.log(3), 0.75, 0.625], rel=1e-6)
    assert not any(x.requires_grad for x in stats)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_z_loss_pulls_every_logit_by_its_probability(backend):
    # d lse^2 / d z_j = 2 lse p_j with p = (1/4, 3/4), lse = log 4
    logits = torch.tensor([[0.0, math.log(3.0)], [1.0, -torch.inf]], requires_grad=True)
    _, lse = token_logprobs(logits, torch.tensor([1, 0]), return_lse=True, backend=backend)
    lse.square().sum().backward()
    assert lse.tolist() == pytest.approx([math.log(4.0), 1.0], rel=1e-6)
    slope = 2 * math.log(4.0)
    torch.testing.assert_close(logits.grad, torch.tensor([[slope / 4, slope * 3 / 4], [2.0, 0.0]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_row", [1, 3])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "logit_scale": 0.5, "softcap": 2.0}], ids=str)
def test_lse_keeps_the_numerics_contract_beside_logprobs_and_entropy(backend, dtype, per_row, options):
    logits, targets, weights = draw((2, 3), 1027, dtype)
    targets = torch.stack([(targets + 7 * k) % 1027 for k in range(per_row)], -1)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])

    def by_definition(x, targets, **options):
        z = scaled(x, **options)
        log_p = torch.log_softmax(z, -1)
        keep = mask[..., None] != 0
        results = log_p.gather(-1, targets), -(log_p.exp() * log_p).sum(-1, keepdim=True), z.logsumexp(-1, True)
        return [torch.where(keep, result, 0) for result in results]

    def op(x, targets, **options):
        given = {"mask": mask, "return_entropy": True, "return_lse": True, "backend": backend}
        logprobs, entropy, lse = token_logprobs(x, targets, **given, **options)
        return [logprobs, entropy[..., None], lse[..., None]]

    def run(fn, logits):
        x = logits.clone().requires_grad_()
        results = fn(x, targets, **options)
        upstream = [weights[0, ..., None], weights[1, ..., None], weights[1, ..., None].cos()]
        sum((r * u).sum() for r, u in zip(results, upstream, strict=True)).backward()
        return [*(r.detach() for r in results), x.grad]

    results = [run(op, logits), run(by_definition, logits), run(by_definition, logits.double())]
    for name, *triple in zip(("logprobs", "entropy", "lse", "gradient"), *results, strict=True):
        assert_contract(name, *triple)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_the_gradient_of_lse_can_be_written_over_the_logits(backend):
    logits, targets, weights = draw((2, 3), 129, torch.float32)
    leaf = logits.clone().requires_grad_()
    x = leaf * 1
    _, lse = token_logprobs(x, targets, return_lse=True, inplace_backward=True, backend=backend)
    (lse * weights[0]).sum().backward()
    torch.testing.assert_close(leaf.grad, torch.softmax(logits, -1) * weights[0][..., None], rtol=1e-5, atol=1e-7)
    assert torch.equal(x.detach(), leaf.grad)


def test_the_results_come_in_one_order():
    logits, targets, _ = draw((2,), 9, torch.float32)
    given = {"return_entropy": True, "return_lse": True, "return_stats": True}
    logprobs, entropy, lse, stats = token_logprobs(logits, targets, **given)
    assert torch.equal(lse, stats.lse)
    for k, (name, expected) in enumerate(zip(given, (entropy, lse, stats.lse), strict=True)):
        first, other = token_logprobs(logits, targets, **{name: True})
        assert torch.equal(first, logprobs)
        assert torch.equal(other.lse if k == 2 else other, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=list(TRANSFORMS))
def test_every_transform_of_the_logits_keeps_the_numerics_contract(backend, dtype, options):
    logits, targets, weights = draw((2, 3), 1027, dtype)

    def op(x, t, **options):
        return token_logprobs(x, t, **options, return_entropy=True, backend=backend)

    kernel = value_and_grad(op, logits, targets, weights, **options)
    own = value_and_grad(eager, logits, targets, weights, **options)
    oracle = value_and_grad(eager, logits.double(), targets, weights.double(), **options)
    for name, *triple in zip(("logprobs", "entropy", "gradient"), kernel, own, oracle, strict=True):
        assert_contract(name, *triple)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_keep_the_numerics_contract_and_are_zero_behind_the_mask(backend):
    logits, targets, _ = draw((2, 3), 2051, torch.float32)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    options = {"temperature": 0.7, "softcap": 9.0}
    *_, stats = token_logprobs(logits, targets, mask=mask, return_stats=True, backend=backend, **options)

    def by_definition(x):
        z = 9.0 * torch.tanh(x / 9.0) / 0.7
        p = torch.softmax(z, -1)
        return torch.logsumexp(z, -1), z.amax(-1), p.amax(-1), p.square().sum(-1)

    for name, kernel, own, oracle in zip(
        stats._fields, stats, by_definition(logits), by_definition(logits.double()), strict=True
    ):
        assert_contract(name, kernel[mask != 0], own[mask != 0], oracle[mask != 0])
        assert (kernel[mask == 0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_several_targets_per_row_are_as_many_calls_with_one(backend, softcap):
    logits, _, weights = draw((2, 3), 1027, torch.float32)
    targets = torch.randint(0, 1027, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    targets[0, 0, 3] = targets[0, 0, 1]  # the same token twice
    upstream = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2))
    options = {"softcap": softcap, "return_entropy": True, "backend": backend}
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    logprobs, entropy = token_logprobs(a, targets, **options)
    (logprobs * upstream).sum().add((entropy * weights[1]).sum()).backward()
    loss = torch.zeros(())
    for k in range(5):
        one, entropy_too = token_logprobs(b, targets[..., k], **options)
        assert torch.equal(one, logprobs[..., k])
        loss = loss + (one * upstream[..., k]).sum() + (entropy_too * weights[1]).sum() / 5
    loss.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_a_target_outside_the_vocabulary_is_none_in_the_row_kernels(backend, softcap):
    logits, _, _ = draw((1, 2), 1500, torch.float32)
    forward, backward = IMPLS[backend]
    transform, targets = Transform(softcap=softcap), torch.tensor([[-3, 1500]])
    stats = empty_stats(logits, True)
    forward(logits, targets, None, transform, True, stats, None)
    assert stats[0].isnan().all()
    x = logits.double().requires_grad_()
    z = x if softcap == 0 else softcap * torch.tanh(x / softcap)
    lse = torch.logsumexp(z, -1)
    torch.testing.assert_close((stats[2] + stats[3]).double(), lse.detach(), rtol=0, atol=2e-6)
    gradient = torch.empty_like(logits)
    backward(logits, targets, None, transform, stats, torch.tensor([[2.0, -1.0]]), None, None, gradient)
    lse.backward(torch.tensor([[-2.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(gradient.double(), x.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "vocabulary"), SHAPES, ids=str)
def test_values_and_gradients_keep_the_numerics_contract(backend, dtype, shape, vocabulary):
    logits, targets, weights = draw(shape, vocabulary, dtype)

    def op(x, t, temperature):
        return token_logprobs(x, t, temperature=temperature, return_entropy=True, backend=backend)

    kernel = value_and_grad(op, logits, targets, weights, temperature=0.7)
    own = value_and_grad(eager, logits, targets, weights, temperature=0.7)
    oracle = value_and_grad(eager, logits.double(), targets, weights.double(), temperature=0.7)
    for name, *triple in zip(("logprobs", "entropy", "gradient"), kernel, own, oracle, strict=True):
        assert_contract(name, *triple)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_logits_of_ten_thousand_stay_exact(backend, scale):
    logits, targets, weights = draw((4,), 301, torch.float32, scale=1.0)
    logits = logits + scale

    def op(x, t):
        return token_logprobs(x, t, return_entropy=True, backend=backend)

    kernel = value_and_grad(op, logits, targets, weights)
    own = value_and_grad(eager, logits, targets, weights)
    oracle = value_and_grad(eager, logits.double(), targets, weights.double())
    for name, *triple in zip(("logprobs", "entropy", "gradient"), kernel, own, oracle, strict=True):
        assert_contract(name, *triple)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("margin", [14.0, 17.0, 20.0, 40.0])
def test_a_confident_token_keeps_its_value_and_gradient(backend, margin):
    # softmax collapse: z - lse is 15 % off at a margin of 14 nats and exactly 0 from 16 in float32
    logits = torch.zeros(1, 5)
    logits[0, 2] = margin
    x = logits.clone().requires_grad_()
    logprob, entropy = token_logprobs(x, torch.tensor([2]), return_entropy=True, backend=backend)
    logprob.sum().backward()
    others = 4 * math.exp(-margin)
    assert logprob.item() == pytest.approx(-math.log1p(others), rel=2e-6)
    assert x.grad[0, 2].item() == pytest.approx(others / (1 + others), rel=2e-6)
    assert x.grad[0, 0].item() == pytest.approx(-math.exp(-margin) / (1 + others), rel=2e-6)
    if backend != "reference":  # which is exact in float64 only
        assert entropy.item() == pytest.approx(math.log1p(others) + others * margin / (1 + others), rel=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_confident_token_is_exact_through_a_softcap_and_a_temperature(backend):
    logits = torch.zeros(1, 5)
    logits[0, 2] = 30.0
    logprob = token_logprobs(logits, torch.tensor([2]), softcap=50.0, temperature=1.3, backend=backend)
    margin = 50.0 * math.tanh(30.0 / 50.0) / 1.3
    assert logprob.item() == pytest.approx(-math.log1p(4 * math.exp(-margin)), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hopeless_token_keeps_its_value_and_gradient(backend):
    logits = torch.tensor([[500.0, 0.0, 500.0]], requires_grad=True)
    logprob = token_logprobs(logits, torch.tensor([1]), backend=backend)
    logprob.sum().backward()
    assert logprob.item() == pytest.approx(-500 - math.log(2), rel=1e-6)
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.5, 1.0, -0.5]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_forbidden_tokens_have_no_probability_and_no_gradient(backend):
    logits = torch.tensor([[1.0, -torch.inf, 2.0], [-torch.inf, -torch.inf, 0.5]], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([0, 2]), return_entropy=True, backend=backend)
    (logprobs + entropy).sum().backward()
    assert logprobs[0].item() == pytest.approx(-math.log1p(math.e), rel=1e-6)
    assert logprobs[1].item() == 0
    assert entropy[1].item() == 0
    assert not logits.grad.isnan().any()
    assert logits.grad[0, 1] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_behind_the_mask_gets_through(backend):
    logits, targets, weights = draw((2, 4), 33, torch.float32)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]])
    dirty = logits.clone()
    dirty[mask == 0] = torch.nan
    wild = torch.where(mask == 0, torch.full_like(targets, -100), targets)
    temperature = torch.where(mask == 0, torch.nan, 0.8)

    def op(x, t):
        return token_logprobs(x, t, temperature=temperature, mask=mask, return_entropy=True, backend=backend)

    for a, b in zip(
        value_and_grad(op, logits, targets, weights), value_and_grad(op, dirty, wild, weights), strict=True
    ):
        assert torch.equal(a, b)
        assert (a[mask == 0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_all_masked_batch_gives_a_connected_zero(backend):
    logits = torch.full((2, 5), torch.nan, requires_grad=True)
    out = token_logprobs(logits, torch.zeros(2, dtype=torch.long), mask=torch.zeros(2), backend=backend)
    out.sum().backward()
    assert torch.equal(out.detach(), torch.zeros(2))
    assert torch.equal(logits.grad, torch.zeros(2, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strided_slice_gives_the_bits_of_its_copy(backend):
    logits, targets, weights = draw((3, 5), 70, torch.float32)
    view, index = logits[:, :-1], targets[:, 1:]

    def op(x, t):
        return token_logprobs(x, t, return_entropy=True, backend=backend)

    x = logits.clone().requires_grad_()
    logprobs, entropy = op(x[:, :-1], index)
    (logprobs * weights[0][:, 1:] + entropy * weights[1][:, 1:]).sum().backward()
    expected = value_and_grad(op, view.contiguous(), index, weights[..., 1:])
    assert torch.equal(logprobs.detach(), expected[0])
    assert torch.equal(entropy.detach(), expected[1])
    assert torch.equal(x.grad[:, :-1], expected[2])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_in_place_is_the_gradient_and_takes_no_second_buffer(backend, dtype):
    logits, targets, weights = draw((2, 3), 129, dtype)

    def run(inplace):
        leaf = logits.clone().requires_grad_()
        x = leaf * 1  # the logits of a model are not a leaf
        out = token_logprobs(x, targets, inplace_backward=inplace, backend=backend)
        (out * weights[0]).sum().backward()
        return leaf.grad, x.detach()

    expected, untouched = run(False)
    gradient, overwritten = run(True)
    assert torch.equal(gradient, expected)
    assert torch.equal(overwritten, expected)
    assert torch.equal(untouched, logits)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_the_same_inputs_give_the_same_bits_with_and_without_gradients(backend):
    logits, targets, _ = draw((4,), 5000, torch.float32)
    with torch.no_grad():
        quiet = token_logprobs(logits, targets, backend=backend)
    again = token_logprobs(logits.clone().requires_grad_(), targets, backend=backend)
    assert torch.equal(quiet, again.detach())


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_many_rows_are_all_written(backend):
    rows = 70_000 if backend == "cpu" else 300  # the interpreter runs one program at a time
    logits = torch.randn(rows, 3)
    targets = torch.randint(0, 3, (rows,))
    out = token_logprobs(logits, targets, backend=backend)
    torch.testing.assert_close(out, eager(logits, targets)[0], rtol=0, atol=3e-6)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_large_vocabulary_is_exact(backend):
    logits, targets, weights = draw((2,), 262_144, torch.float32)

    def op(x, t):
        return token_logprobs(x, t, return_entropy=True, backend=backend)

    kernel = value_and_grad(op, logits, targets, weights)
    own = value_and_grad(eager, logits, targets, weights)
    oracle = value_and_grad(eager, logits.double(), targets, weights.double())
    for name, *triple in zip(("logprobs", "entropy", "gradient"), kernel, own, oracle, strict=True):
        assert_contract(name, *triple)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.floats(-50, 50), st.integers(0, 10_000))
def test_a_shift_of_all_logits_changes_nothing_and_probabilities_sum_to_one(vocabulary, shift, seed):
    logits, _, _ = draw((1,), vocabulary, torch.float64, seed=seed)
    every = torch.arange(vocabulary)[None]
    logprobs = token_logprobs(logits, every, backend="cpu")
    assert logprobs.exp().sum().item() == pytest.approx(1.0, abs=1e-10)
    torch.testing.assert_close(token_logprobs(logits + shift, every, backend="cpu"), logprobs, rtol=0, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 2100), st.integers(0, 4), st.integers(0, 10_000))
def test_neither_the_order_of_rows_nor_padding_changes_a_bit(rows, vocabulary, padding, seed):
    logits, targets, _ = draw((rows,), vocabulary, torch.float32, seed=seed)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    expected = token_logprobs(logits, targets, backend="cpu")
    assert torch.equal(token_logprobs(logits[order], targets[order], backend="cpu"), expected[order])
    padded = torch.cat([logits, torch.full((padding, vocabulary), torch.nan)])
    ids, mask = torch.cat([targets, torch.full((padding,), -1)]), torch.arange(rows + padding) < rows
    assert torch.equal(token_logprobs(padded, ids, mask=mask, backend="cpu")[:rows], expected)


@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=list(TRANSFORMS))
def test_the_reference_is_differentiable_twice(options):
    logits, targets, _ = draw((2, 3), 4, torch.float64, scale=1.0)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference(x, targets, **options), logits)
    assert torch.autograd.gradgradcheck(lambda x: reference(x, targets, **options), logits)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("several", [False, True])
def test_the_registered_op_passes_opcheck(backend, several):
    logits, targets, _ = draw((2, 2), 9, torch.float64)
    mask = torch.tensor([[1, 0], [1, 1]], dtype=torch.uint8)
    transform = (1.0, torch.full((2, 2), 0.7), 2.0, 3.0) if several else (0.7, None, 1.0, 0.0)
    ids = targets[..., None].expand(2, 2, 3).contiguous() if several else targets
    args = (logits.requires_grad_(), ids, mask, *transform, several, several, several, False, backend)
    torch.library.opcheck(torch.ops.rlhf_fast.token_logprobs.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_without_graph_breaks(backend):
    logits, targets, weights = draw((2, 3), 50, torch.float32)

    temperature = torch.full((2, 3), 0.8)

    def loss(x):
        options = {"temperature": temperature, "softcap": 4.0, "return_stats": True, "backend": backend}
        results = token_logprobs(x, targets, return_entropy=True, return_lse=True, **options)
        logprobs, entropy, lse, stats = results
        return (logprobs * weights[0] + entropy * weights[1] + lse.square() + stats.lse).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss(a).backward()
    compiled(b).backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7)


def test_bad_input_raises_with_the_shapes_in_the_message():
    logits, targets = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"targets must be .* \(2, 3\), got \(2, 2\)"):
        token_logprobs(logits, targets[:, :2])
    with pytest.raises(ValueError, match=r"mask must be .* got \(3,\)"):
        token_logprobs(logits, targets, mask=torch.ones(3))
    with pytest.raises(TypeError, match=r"targets must be int64, int32, .*, got torch.float32"):
        token_logprobs(logits, targets.float())
    with pytest.raises(TypeError, match=r"logits must be .* got torch.int64"):
        token_logprobs(logits.long(), targets)
    with pytest.raises(ValueError, match=r"targets must be .* \(2, 3\), got \(2, 4, 7\)"):
        token_logprobs(logits, torch.zeros(2, 4, 7, dtype=torch.long))
    with pytest.raises(ValueError, match=r"temperature must be one number or one per row = \(2, 3\), got \(3,\)"):
        token_logprobs(logits, targets, temperature=torch.ones(3))
    with pytest.raises(ValueError, match=r"temperature must be > 0, row 4 is -1.0"):
        token_logprobs(logits, targets, temperature=torch.tensor([[1.0, 2, 3], [4, -1, 0]]))
    for name in ("temperature", "logit_scale", "softcap"):
        with pytest.raises(ValueError, match=rf"{name} must be > 0, got 0"):
            token_logprobs(logits, targets, **{name: 0})


@pytest.mark.parametrize("target", [-1, 5])
def test_a_target_outside_the_vocabulary_names_its_row(target):
    for backend in BACKENDS:
        with pytest.raises(IndexError, match=rf"row 1 is {target}, outside \[0, 5\)"):
            token_logprobs(torch.zeros(3, 5), torch.tensor([0, target, 1]), backend=backend)
        with pytest.raises(IndexError, match=rf"row 1 is {target}, outside \[0, 5\)"):
            token_logprobs(torch.zeros(2, 5), torch.tensor([[0, 4], [1, target]]), backend=backend)


def test_values_on_a_gpu_are_looked_at_when_asked_for(monkeypatch):
    monkeypatch.delenv("RLHF_FAST_DEBUG", raising=False)
    assert check.looks_at_values(torch.device("cpu"))
    assert not check.looks_at_values(torch.device("cuda"))
    monkeypatch.setenv("RLHF_FAST_DEBUG", "1")
    assert check.looks_at_values(torch.device("cuda"))


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    logits, targets = torch.zeros(1, 2), torch.tensor([0])
    with pytest.raises(BackendError, match=r"token_logprobs: backend 'cuda' cannot run on cpu: "):
        token_logprobs(logits, targets, backend="cuda")
    with pytest.raises(BackendError, match="backend must be one of"):
        token_logprobs(logits, targets, backend="fast")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="Triton needs a GPU"), use_backend("triton"):
        token_logprobs(logits, targets)


@pytest.mark.parametrize(
    ("op", "built", "expected"),
    [("gae", True, "cuda"), ("gae", False, "triton"), ("token_logprobs", True, "triton")],
)
def test_a_gpu_takes_the_faster_backend_of_those_that_are_built(monkeypatch, op, built, expected):
    def why_not(op, impls, device, name):
        return None if built or name != "cuda" else "built without a CUDA compiler"

    monkeypatch.setattr(backends, "why_not", why_not)
    monkeypatch.delenv("RLHF_FAST_BACKEND", raising=False)
    assert backends.resolve(op, ("cpu", "triton", "cuda"), torch.device("cuda")) == expected


def test_the_argument_wins_over_the_context_and_the_context_over_the_environment(monkeypatch):
    logits, targets = torch.zeros(1, 2), torch.tensor([0])
    monkeypatch.setenv("RLHF_FAST_BACKEND", "cuda")
    with use_backend("reference"):
        token_logprobs(logits, targets)
        with pytest.raises(BackendError):
            token_logprobs(logits, targets, backend="cuda")
    with pytest.raises(BackendError):
        token_logprobs(logits, targets)
