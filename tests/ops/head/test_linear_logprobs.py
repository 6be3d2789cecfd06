import math

import pytest
import torch

from rlhf_fast import linear_logprobs, token_logprobs
from rlhf_fast.ops.head import _logprobs_op, head, tiles
from rlhf_fast.ops.head._shards import Shards
from rlhf_fast.ops.tokens.token_logprobs import Wanted
from rlhf_fast.ops.tokens.transform import Transform
from rlhf_fast.testing.memory import peak_bytes
from rlhf_fast.testing.numerics import assert_contract
from tests.linear_losses import count_as_on_a_gpu

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


def draw_lora(weight, rank=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, weight.shape[1], generator=g).to(weight.dtype)
    return a, (torch.randn(weight.shape[0], rank, generator=g) / 4).to(weight.dtype)


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
def test_scale_softcap_and_temperature_are_applied_in_this_order(backend):
    # logits 0, 4; z = 2 tanh(0.5 * logits / 2) / 0.8 = 0, 2.5 tanh(1): Gemma 2 (arXiv 2408.00118), section 2
    hidden, weight = torch.tensor([[4.0]], requires_grad=True), torch.tensor([[0.0], [1.0]])
    temperature = torch.tensor([0.8])
    logprob = linear_logprobs(
        hidden, weight, torch.tensor([0]), temperature=temperature, logit_scale=0.5, softcap=2.0, backend=backend
    )
    logprob.sum().backward()
    z = 2.5 * math.tanh(1.0)
    assert logprob.item() == pytest.approx(-math.log1p(math.exp(z)), rel=1e-6)
    slope = 0.5 * (1 - math.tanh(1.0) ** 2) / 0.8
    assert hidden.grad.item() == pytest.approx(-slope / (1 + math.exp(-z)), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_targets_of_one_row_share_its_softmax(backend):
    hidden, weight = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.0], [1.0], [3.0]])
    logprobs = linear_logprobs(hidden, weight, torch.tensor([[2, 0]]), backend=backend)
    total = 1 + math.e + math.e**3
    torch.testing.assert_close(logprobs.detach(), torch.tensor([[3 - math.log(total), -math.log(total)]]))
    (logprobs * torch.tensor([[2.0, 1.0]])).sum().backward()  # 2 W[2] + W[0] - 3 sum p W
    expected = 2 * 3 - 3 * (math.e + 3 * math.e**3) / total
    assert hidden.grad.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lora_of_the_head_adds_its_scaled_product(backend):
    # LoRA (arXiv 2106.09685), eq. 3: logits = W h + s B A h with A h = 2 * 3 - 1 = 5: (0, 0) + 0.1 * (0, 4) * 5 = 0, 2
    hidden, weight = torch.tensor([[3.0, 1.0]], requires_grad=True), torch.zeros(2, 2)
    lora_a, lora_b = (
        torch.tensor([[2.0, -1.0]], requires_grad=True),
        torch.tensor([[0.0], [4.0]], requires_grad=True),
    )
    logprob = linear_logprobs(hidden, weight, torch.tensor([1]), head_lora=(lora_a, lora_b, 0.1), backend=backend)
    logprob.sum().backward()
    p0 = 1 / (1 + math.exp(2.0))
    assert logprob.item() == pytest.approx(math.log(1 - p0), rel=1e-6)
    torch.testing.assert_close(hidden.grad, 0.1 * p0 * 4 * torch.tensor([[2.0, -1.0]]))
    torch.testing.assert_close(lora_a.grad, 0.1 * p0 * 4 * torch.tensor([[3.0, 1.0]]))
    torch.testing.assert_close(lora_b.grad, 0.1 * 5 * p0 * torch.tensor([[-1.0], [1.0]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_statistics_are_those_of_the_softmax(backend):
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3.0)]])  # p = 1/4, 3/4
    _, stats = linear_logprobs(hidden, weight, torch.tensor([0]), return_stats=True, backend=backend)
    found = torch.stack([stats.lse, stats.max, stats.p_max, stats.sum_p_squared])
    torch.testing.assert_close(found, torch.tensor([[math.log(4.0)], [math.log(3.0)], [3 / 4], [10 / 16]]))


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_a_z_loss_keeps_the_numerics_contract(backend, dtype, frozen):
    hidden, weight, bias, targets, upstream = draw(dtype=dtype)
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 0, 1]])

    def op(*args, **options):
        given = {"return_lse": True, "mask": mask, "chunk_tokens": 3, "backend": backend}
        return linear_logprobs(*args, **given, **options)

    def by_definition(hidden, weight, targets, bias):
        z = torch.nn.functional.linear(hidden, weight, bias)
        results = torch.log_softmax(z, -1).gather(-1, targets[..., None])[..., 0], z.logsumexp(-1)
        return [torch.where(mask != 0, result, 0) for result in results]

    inputs = (hidden, weight, bias, targets, upstream)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    kernel, own, oracle = (
        run(fn, *x, frozen=frozen) for fn, x in ((op, inputs), (by_definition, inputs), (by_definition, wide))
    )
    for name in oracle:
        assert_contract(name, kernel[name], own[name], oracle[name])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_half_precision_head_wider_than_one_block_is_exact(backend, monkeypatch):
    monkeypatch.setattr(head, "VOCABULARY_BLOCK", 20)
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


@pytest.fixture
def products(monkeypatch):
    """Counts, in rows, the products between all of V and all of D."""
    counted = []
    real_mm, real_matmul, real_addmm = torch.mm, torch.Tensor.__matmul__, torch.Tensor.addmm_

    def spy(a, b):
        sizes = sorted((*a.shape, b.shape[1]))
        if sizes[-2:] == [16, 97]:
            counted.append(sizes[0])

    monkeypatch.setattr(torch, "mm", lambda a, b, **o: (spy(a, b), real_mm(a, b, **o))[1])
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (spy(a, b), real_matmul(a, b))[1])
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda t, a, b, **o: (spy(a, b), real_addmm(t, a, b, **o))[1])
    return counted


KINDS = {  # what is trained -> products of a pass without gradients, with G kept, with G too large, with entropy, lse
    "hidden": (1, 2, 2, 4, 3),
    "hidden weight": (1, 3, 4, 4, 4),
    "weight": (1, 2, 3, 3, 3),
    "hidden bias": (1, 2, 3, 3, 3),
    "hidden lora": (1, 2, 3, 3, 3),
    "hidden weight lora": (1, 3, 4, 4, 4),
}


@pytest.mark.parametrize("column", range(5), ids=["no gradients", "kept", "remade", "entropy", "lse"])
@pytest.mark.parametrize("trained", KINDS)
def test_the_products_are_those_of_the_cost_model(trained, column, products, monkeypatch):
    hidden, weight, bias, targets, _ = draw((8,))
    lora = draw_lora(weight)
    for name, parameters in {"hidden": [hidden], "weight": [weight], "bias": [bias], "lora": lora}.items():
        for parameter in parameters:
            parameter.requires_grad_(name in trained and column > 0)
    if column == 2:
        monkeypatch.setitem(_logprobs_op.KEPT_BYTES, "cpu", 8 * 97 * 4 - 1)
    logprobs, other = linear_logprobs(
        hidden, weight, targets, bias=bias, head_lora=(*lora, 2.0) if "lora" in trained else None,
        chunk_tokens=3, return_entropy=column < 4, return_lse=column == 4, backend="cpu",
    )  # fmt: skip
    if column > 0:
        (logprobs + other if column >= 3 else logprobs).sum().backward()
    assert sum(products) == 8 * KINDS[trained][column]


def test_several_targets_per_row_cost_three_products_with_a_frozen_head(products):
    hidden, weight, _, _, _ = draw((8,))
    targets = torch.arange(24).view(8, 3)
    linear_logprobs(hidden.requires_grad_(), weight, targets, backend="cpu").sum().backward()
    assert sum(products) == 8 * 3


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "remade"])
def test_rows_without_an_upstream_gradient_cost_no_product_in_backward(kept, products, monkeypatch):
    if not kept:
        monkeypatch.setitem(_logprobs_op.KEPT_BYTES, "cpu", 0)
    hidden, weight, _, targets, _ = draw((8,))
    mask = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1])
    upstream = torch.tensor([0.0, 1, 0, 1, 2, 0, 0, 0])  # two rows count and have a gradient
    logprobs = linear_logprobs(
        hidden.requires_grad_(), weight.requires_grad_(), targets, mask=mask, chunk_tokens=3, backend="cpu"
    )
    assert sum(products) == 7
    logprobs.backward(upstream)
    assert sum(products) == 7 + 2 * (2 if kept else 3)
    expected = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    linear_logprobs(*expected, targets, mask=mask, backend="reference").backward(upstream)
    for found, wanted in zip((hidden, weight), expected, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-5, atol=1e-6)


def test_masked_rows_cost_no_product(products):
    hidden, weight, _, targets, _ = draw((8,))
    linear_logprobs(hidden, weight, targets, mask=torch.tensor([0, 1, 0, 0, 1, 1, 0, 0]), backend="cpu")
    assert products == [3]


@pytest.mark.parametrize("mask_count", [None, 4, 7], ids=["all rows", "exact", "upper bound"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("kind", ["frozen", "kept", "remade"])
def test_masked_rows_change_nothing_where_a_gpu_cannot_leave_them_out(kind, backend, mask_count, products, monkeypatch):
    hidden, weight, bias, targets, upstream = draw((8,))
    mask = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])
    hidden[mask == 0] = torch.nan
    upstream[:, mask == 0] = torch.nan
    if kind == "remade":
        monkeypatch.setitem(_logprobs_op.KEPT_BYTES, "cpu", 0)

    def op(*a, **o):
        return linear_logprobs(*a, mask=mask, mask_count=mask_count, return_entropy=True, backend=backend, **o)

    options = {"frozen": kind == "frozen", "entropy_gradient": False, "chunk_tokens": 3}
    expected = run(op, hidden, weight, bias, targets, upstream, **options)
    products.clear()
    count_as_on_a_gpu(monkeypatch)
    found = run(op, hidden, weight, bias, targets, upstream, **options)
    assert sum(products) == (mask_count or 8) * {"frozen": 2, "kept": 3, "remade": 4}[kind]
    for name, value in expected.items():
        assert name in ("d weight", "d bias") or (found[name][mask == 0] == 0).all()
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_the_memory_beside_the_results_stays_within_the_budgets(trained, monkeypatch):
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(_logprobs_op.KEPT_BYTES, "cpu", 0)
    hidden, weight, _, targets, _ = draw((1000,), vocabulary=4099)  # 16 MiB of logits
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    peak = peak_bytes(lambda: linear_logprobs(hidden, weight, targets, backend="cpu").sum().backward())
    assert peak >= 1 << 19  # the tile itself is seen
    rows = 16 * hidden.shape[0] * hidden.element_size()  # statistics, ids, upstream
    assert peak <= (1 << 20) + 4 * hidden.nbytes + rows + (2 * weight.nbytes if trained else 0)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("save", ["U", "G", ""])
def test_the_registered_op_passes_opcheck(backend, save):
    hidden, weight, bias, targets, _ = draw((3,), dtype=torch.float64)
    lora_a, lora_b = draw_lora(weight)
    hidden.requires_grad_()
    for parameter in (weight, bias, lora_a, lora_b):
        parameter.requires_grad_(save != "U")
    mask, temperatures = torch.tensor([1, 0, 1], dtype=torch.uint8), torch.tensor([0.7, 1.0, 2.0])
    call = (
        *head.Head(weight, bias, lora_a, lora_b, 0.5),
        *tiles.Rows(hidden, targets, mask, 2, 2),
        *Transform(1.0, temperatures, 1.1, 3.0),
        *Shards(),
        *Wanted(True, True, True),
        *_logprobs_op.Saves(save),
    )
    torch.library.opcheck(torch.ops.rlhf_fast.linear_logprobs.default, (*call, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_it_compiles_without_graph_breaks(backend, frozen):
    inputs = draw()
    op = lambda *a, **o: linear_logprobs(*a, return_entropy=True, backend=backend, **o)  # noqa: E731
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    expected, got = run(op, *inputs, frozen=frozen), run(compiled, *inputs, frozen=frozen)
    for name, value in expected.items():
        torch.testing.assert_close(value, got[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", ["plain", "softcap", "head_lora", "targets"])
def test_the_reference_is_differentiable_twice(option):
    hidden, weight, bias, targets, _ = draw((2,), width=3, vocabulary=5, dtype=torch.float64)
    lora_a, lora_b = (x.requires_grad_() for x in draw_lora(weight, rank=2))
    options = (
        {"temperature": torch.tensor([0.7, 1.5]), "logit_scale": 0.5, "softcap": 2.0} if option == "softcap" else {}
    )
    ids = torch.tensor([[1, 4], [0, 0]]) if option == "targets" else targets

    def op(hidden, weight, bias, a, b):
        lora = (a, b, 0.5) if option == "head_lora" else None
        return linear_logprobs(
            hidden, weight, ids, bias=bias, head_lora=lora, return_entropy=True, backend="reference", **options
        )

    inputs = [x.requires_grad_() for x in (hidden, weight, bias)] + [lora_a, lora_b]
    if option != "head_lora":
        inputs[3:] = [x.detach() for x in inputs[3:]]
    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


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
        ValueError,
        match=r"hidden must be \(\.\.\., D\) and weight \(V, D\) with V and D >= 1, got \(2, 5, 16\) and \(16, 97\)",
    ):
        linear_logprobs(hidden, weight.t(), targets)
    with pytest.raises(TypeError, match=r"weight must have the type of hidden, torch.float32, got torch.bfloat16"):
        linear_logprobs(hidden, weight.bfloat16(), targets)
    with pytest.raises(ValueError, match=r"bias must be \(V,\) = \(97,\), got \(96,\)"):
        linear_logprobs(hidden, weight, targets, bias=bias[1:])
    with pytest.raises(ValueError, match=r"targets must be .* got \(2, 4\)"):
        linear_logprobs(hidden, weight, targets[:, 1:])
    with pytest.raises(ValueError, match=r"chunk_tokens must be >= 1, got 0"):
        linear_logprobs(hidden, weight, targets, chunk_tokens=0)
    with pytest.raises(ValueError, match=r"head_lora B must be \(V, R\) = \(97, 3\), got \(3, 97\)"):
        linear_logprobs(hidden, weight, targets, head_lora=(torch.ones(3, 16), torch.ones(3, 97), 1.0))
    with pytest.raises(ValueError, match=r"mask_count = 4 counts the rows of a mask, but none is given"):
        linear_logprobs(hidden, weight, targets, mask_count=4)
    with pytest.raises(ValueError, match=r"mask counts 10 rows, more than mask_count = 9"):
        linear_logprobs(hidden, weight, targets, mask=torch.ones(2, 5), mask_count=9, backend="cpu")


def test_a_target_outside_the_vocabulary_names_its_row():
    hidden, weight, _, targets, _ = draw((6,))
    targets[4] = 97
    with pytest.raises(IndexError, match=r"row 4 is 97, outside \[0, 97\)"):
        linear_logprobs(hidden, weight, targets, chunk_tokens=3, backend="cpu")
