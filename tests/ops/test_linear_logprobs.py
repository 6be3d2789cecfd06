import math

import pytest
import torch

from rlhf_fast import linear_logprobs, token_logprobs
from rlhf_fast.ops import linear_logprobs as module
from tests.numerics import assert_contract

BACKENDS = ["reference", "cpu", "triton"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def eager(hidden, weight, targets, bias=None, temperature=1.0):
    log_p = torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias) / temperature, -1)
    return log_p.gather(-1, targets[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def draw(shape=(2, 5), width=16, vocabulary=97, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=g).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=g) / 2).to(dtype)
    bias = torch.randn(vocabulary, generator=g).to(dtype)
    targets = torch.randint(0, vocabulary, shape, generator=g)
    return hidden, weight, bias, targets, torch.randn(2, *shape, generator=g)


def run(fn, hidden, weight, bias, targets, upstream, *, frozen, entropy_gradient=True, **options):
    hidden, weight, bias = (x.detach().clone() for x in (hidden, weight, bias))
    hidden.requires_grad_()
    if not frozen:
        weight.requires_grad_()
        bias.requires_grad_()
    logprobs, entropy = fn(hidden, weight, targets, bias=bias, **options)
    loss = (logprobs * upstream[0]).sum()
    if entropy_gradient:
        loss = loss + (entropy * upstream[1]).sum()
    loss.backward()
    out = {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "d hidden": hidden.grad}
    return out if frozen else out | {"d weight": weight.grad, "d bias": bias.grad}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_of_two_rows_gives_the_logistic_function(backend):
    hidden, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.5]])  # logits 0, 2
    hidden.requires_grad_()
    logprob = linear_logprobs(hidden, weight, torch.tensor([1]), backend=backend)
    logprob.sum().backward()
    p0 = 1 / (1 + math.exp(2.0))
    assert logprob.item() == pytest.approx(math.log(1 - p0), rel=1e-6)
    torch.testing.assert_close(hidden.grad, p0 * weight[1:])  # U = W[1] - (p0 W[0] + p1 W[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_values_and_gradients_keep_the_numerics_contract(backend, dtype, frozen, entropy_gradient):
    inputs = draw(dtype=dtype)
    kind = {"frozen": frozen, "entropy_gradient": entropy_gradient, "temperature": 0.7}

    def op(*args, **options):
        return linear_logprobs(*args, return_entropy=True, chunk_tokens=3, backend=backend, **options)

    kernel = run(op, *inputs, **kind)
    own = run(eager, *inputs, **kind)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    oracle = run(eager, *wide, **kind)
    for name in oracle:
        assert_contract(name, kernel[name], own[name], oracle[name])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_half_precision_head_wider_than_one_block_is_exact(backend, monkeypatch):
    monkeypatch.setattr(module, "_VOCABULARY_BLOCK", 20)
    inputs = draw(dtype=torch.bfloat16)
    op = lambda *a, **o: linear_logprobs(*a, return_entropy=True, backend=backend, **o)  # noqa: E731
    kernel, own = run(op, *inputs, frozen=False), run(eager, *inputs, frozen=False)
    oracle = run(eager, *[x.double() if x.is_floating_point() else x for x in inputs], frozen=False)
    for name in oracle:
        assert_contract(name, kernel[name], own[name], oracle[name])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_confident_token_keeps_its_gradient(backend):
    hidden = torch.tensor([[20.0, 0.0]], requires_grad=True)
    weight = torch.eye(2)
    logprob = linear_logprobs(hidden, weight, torch.tensor([0]), backend=backend)
    logprob.sum().backward()
    assert logprob.item() == pytest.approx(-math.exp(-20.0), rel=1e-6)
    assert hidden.grad[0, 0].item() == pytest.approx(math.exp(-20.0), rel=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_nothing_behind_the_mask_gets_through(backend, frozen):
    hidden, weight, bias, targets, upstream = draw()
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]])
    dirty = hidden.clone()
    dirty[mask == 0] = torch.nan
    wild = torch.where(mask == 0, torch.full_like(targets, -100), targets)
    op = lambda *a, **o: linear_logprobs(*a, mask=mask, return_entropy=True, backend=backend, **o)  # noqa: E731
    clean = run(op, hidden, weight, bias, targets, upstream, frozen=frozen)
    other = run(op, dirty, weight, bias, wild, upstream, frozen=frozen)
    for name, value in clean.items():
        assert torch.equal(value, other[name]), name
    assert (clean["d hidden"][mask == 0] == 0).all()
    assert (clean["logprobs"][mask == 0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_an_all_masked_batch_gives_a_connected_zero(backend, frozen):
    hidden, weight, bias, targets, upstream = draw()
    op = lambda *a, **o: linear_logprobs(  # noqa: E731
        *a, mask=torch.zeros(2, 5), return_entropy=True, backend=backend, **o
    )
    for value in run(op, hidden, weight, bias, targets, upstream, frozen=frozen).values():
        assert (value == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_no_rows_give_a_connected_nothing(backend, frozen):
    hidden, weight, _, targets, _ = draw((0,))
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    linear_logprobs(hidden, weight, targets, backend=backend).sum().backward()
    assert hidden.grad.shape == hidden.shape
    assert frozen or (weight.grad == 0).all()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_tiles_do_not_change_the_result(backend):
    hidden, weight, bias, targets, upstream = draw((4, 9))
    whole, tiled = (
        run(
            lambda *a, c=chunk, **o: linear_logprobs(*a, return_entropy=True, chunk_tokens=c, backend=backend, **o),
            hidden, weight, bias, targets, upstream, frozen=False,
        )
        for chunk in (1000, 5)
    )  # fmt: skip
    for name, value in whole.items():
        torch.testing.assert_close(value, tiled[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_pass_without_gradients_gives_the_bits_of_one_with_them(backend):
    hidden, weight, _, targets, _ = draw()
    with torch.no_grad():
        quiet = linear_logprobs(hidden, weight, targets, backend=backend)
    frozen = linear_logprobs(hidden.requires_grad_(), weight, targets, backend=backend)
    trained = linear_logprobs(hidden, weight.requires_grad_(), targets, backend=backend)
    assert torch.equal(quiet, frozen.detach())
    assert torch.equal(quiet, trained.detach())


def test_it_equals_token_logprobs_of_the_logits():
    hidden, weight, bias, targets, _ = draw((7,), dtype=torch.float64)
    logits = hidden @ weight.t() + bias
    torch.testing.assert_close(
        linear_logprobs(hidden, weight, targets, bias=bias, temperature=1.3, backend="cpu"),
        token_logprobs(logits, targets, temperature=1.3, backend="reference"),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize(("frozen", "products"), [(True, 2), (False, 4)], ids=["frozen head 2P", "trained head 4P"])
def test_the_products_are_those_of_the_cost_model(frozen, products, monkeypatch):
    hidden, weight, _, targets, _ = draw((8,))
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    shapes = []
    real_mm, real_matmul, real_addmm = torch.mm, torch.Tensor.__matmul__, torch.Tensor.addmm_

    def spy(a, b):
        shapes.append(a.shape[0] * a.shape[1] * b.shape[1])

    monkeypatch.setattr(torch, "mm", lambda a, b, **o: (spy(a, b), real_mm(a, b, **o))[1])
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (spy(a, b), real_matmul(a, b))[1])
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda t, a, b: (spy(a, b), real_addmm(t, a, b))[1])
    linear_logprobs(hidden, weight, targets, backend="cpu", chunk_tokens=3).sum().backward()
    assert sum(shapes) == products * hidden.shape[0] * hidden.shape[1] * weight.shape[0]


def test_masked_rows_cost_no_product(monkeypatch):
    hidden, weight, _, targets, _ = draw((8,))
    rows = []
    real_mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **o: (rows.append(a.shape[0]), real_mm(a, b, **o))[1])
    linear_logprobs(hidden, weight, targets, mask=torch.tensor([0, 1, 0, 0, 1, 1, 0, 0]), backend="cpu")
    assert rows == [3]


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_the_registered_op_passes_opcheck(backend, frozen):
    hidden, weight, bias, targets, _ = draw((3,), dtype=torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    mask = torch.tensor([1, 0, 1], dtype=torch.uint8)
    args = (hidden, weight, bias, targets, mask, 0.7, True, frozen, 2, backend)
    torch.library.opcheck(torch.ops.rlhf_fast.linear_logprobs.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_it_compiles_without_graph_breaks(backend, frozen):
    inputs = draw()
    op = lambda *a, **o: linear_logprobs(*a, return_entropy=True, backend=backend, **o)  # noqa: E731
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    expected, got = run(op, *inputs, frozen=frozen), run(compiled, *inputs, frozen=frozen)
    for name, value in expected.items():
        torch.testing.assert_close(value, got[name], rtol=1e-5, atol=1e-5)


def test_a_trained_bias_on_a_frozen_weight_gets_its_gradient():
    hidden, weight, bias, targets, _ = draw()
    bias.requires_grad_()
    linear_logprobs(hidden, weight, targets, bias=bias, backend="cpu").sum().backward()
    expected = bias.detach().clone().requires_grad_()
    eager(hidden, weight, targets, expected)[0].sum().backward()
    torch.testing.assert_close(bias.grad, expected.grad, rtol=1e-5, atol=1e-6)


def test_bad_input_raises_with_the_shapes_in_the_message():
    hidden, weight, bias, targets, _ = draw()
    with pytest.raises(
        ValueError, match=r"hidden must be \(\.\.\., D\) and weight \(V, D\), got \(2, 5, 16\) and \(16, 97\)"
    ):
        linear_logprobs(hidden, weight.t(), targets)
    with pytest.raises(TypeError, match=r"hidden torch.float32, weight torch.bfloat16"):
        linear_logprobs(hidden, weight.bfloat16(), targets)
    with pytest.raises(ValueError, match=r"bias must be \(V,\) = \(97,\), got \(96,\)"):
        linear_logprobs(hidden, weight, targets, bias=bias[1:])
    with pytest.raises(ValueError, match=r"targets must be .* got \(2, 4\)"):
        linear_logprobs(hidden, weight, targets[:, 1:])
    with pytest.raises(ValueError, match=r"chunk_tokens must be >= 1, got 0"):
        linear_logprobs(hidden, weight, targets, chunk_tokens=0)


def test_a_target_outside_the_vocabulary_names_its_row():
    hidden, weight, _, targets, _ = draw((6,))
    targets[4] = 97
    with pytest.raises(IndexError, match=r"row 4 is 97, outside \[0, 97\)"):
        linear_logprobs(hidden, weight, targets, chunk_tokens=3, backend="cpu")
