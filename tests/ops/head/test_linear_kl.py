import math

import pytest
import torch

from rlhf_fast import linear_kl, linear_logprobs, token_kl
from rlhf_fast.ops.head import _kl_op, _logprobs_op
from rlhf_fast.ops.head.head import Head
from rlhf_fast.ops.head.linear_kl import LinearKl
from rlhf_fast.ops.head.tiles import Rows
from rlhf_fast.ops.tokens.token_kl import VARIANTS, Divergence
from rlhf_fast.ops.tokens.transform import Transform
from rlhf_fast.testing.numerics import assert_contract
from tests.linear_losses import count_as_on_a_gpu
from tests.losses import BACKENDS, DTYPES, KERNELS, compiled

MASK = torch.tensor([[1, 0, 1], [0, 1, 1]])


def draw(shape=(2, 3), width=8, vocabulary=37, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=g)
    tensors = {
        "hidden": hidden,
        "ref_hidden": hidden + 0.3 * torch.randn(*shape, width, generator=g),
        "weight": torch.randn(vocabulary, width, generator=g) / 2,
        "bias": torch.randn(vocabulary, generator=g),
    }
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    return tensors | {"targets": torch.randint(0, vocabulary, shape, generator=g)}


def eager(hidden, ref_hidden, weight, targets, bias, temperature, variant="reverse", **_):
    """What a user would have written: softmax over all the logits, in their own type."""
    log_p = torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias) / temperature, -1)
    with torch.no_grad():
        log_q = torch.log_softmax(torch.nn.functional.linear(ref_hidden, weight, bias) / temperature, -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    kl = {
        "reverse": lambda: (log_p.exp() * (log_p - log_q)).sum(-1),
        "forward": lambda: (log_q.exp() * (log_q - log_p)).sum(-1),
        "js": lambda: 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1),
    }[variant]()
    logprobs, ref_logprobs = (x.gather(-1, targets[..., None])[..., 0] for x in (log_p, log_q))
    return LinearKl(kl, logprobs, ref_logprobs, -(log_p.exp() * log_p).sum(-1))


def run(op, tensors, *, trained=(), through=("kl", "logprobs"), **options):
    """Every result, and the gradients of hidden and of what is `trained` under fixed upstream gradients."""
    leaves = {
        n: x.detach().clone().requires_grad_(n in ("hidden", *trained)) for n, x in tensors.items() if n != "targets"
    }
    found = op(**leaves, targets=tensors["targets"], **options)
    loss = sum(
        (getattr(found, n) * torch.linspace(-1, 2, found.kl.numel()).view(found.kl.shape)).sum() for n in through
    )
    loss.backward()
    results = {n: x.detach() for n, x in found._asdict().items() if x is not None}
    return results | {f"d {n}": leaves[n].grad for n in ("hidden", *trained)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_of_two_rows_gives_the_divergence_of_two_coins(backend):
    # logits (0, log 3) and (0, 0): p = (1/4, 3/4), q = (1/2, 1/2).
    hidden, ref_hidden = torch.tensor([[math.log(3), 1.0]], requires_grad=True), torch.tensor([[0.0, 1.0]])
    weight = torch.tensor([[0.0, 0.5], [1.0, 0.5]])
    found = linear_kl(hidden, ref_hidden, weight, torch.tensor([0]), return_entropy=True, backend=backend)
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert found.kl.item() == pytest.approx(kl, rel=1e-6)
    assert found.logprobs.item() == pytest.approx(math.log(0.25), rel=1e-6)
    assert found.ref_logprobs.item() == pytest.approx(math.log(0.5), rel=1e-6)
    assert found.entropy.item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75), rel=1e-6)
    found.kl.sum().backward()
    # d kl / d z_1 = p_1 (log p_1 / q_1 - kl), and d z_1 / d hidden = weight[1], whose slopes sum to 0 with weight[0]'s.
    slope = 0.75 * (math.log(1.5) - kl)
    torch.testing.assert_close(hidden.grad, slope * (weight[1:] - weight[:1]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("trained", "variant", "entropy"),
    [((), "reverse", False), ((), "forward", True), (("weight", "bias"), "js", True)],
    ids=["frozen", "frozen with an entropy gradient", "trained"],
)
def test_values_and_gradients_keep_the_numerics_contract(backend, dtype, trained, variant, entropy):
    tensors = draw(dtype=dtype)
    options = {"temperature": 0.7, "variant": variant}
    kind = {"trained": trained, "through": ("kl", "logprobs", "entropy") if entropy else ("kl", "logprobs")}
    exact = {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}
    own, oracle = run(eager, tensors, **kind, **options), run(eager, exact, **kind, **options)
    found = run(linear_kl, tensors, **kind, **options, return_entropy=True, chunk_tokens=4, backend=backend)
    for name in oracle:
        assert_contract(name, found[name], own[name], oracle[name])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("trained", [(), ("weight", "bias")], ids=["frozen", "trained"])
def test_it_equals_token_kl_and_linear_logprobs(backend, top_k, trained):
    tensors = draw(dtype=torch.float64)
    shared = {"temperature": 0.5 + torch.rand(2, 3), "logit_scale": 1.5, "softcap": 6.0, "mask": MASK}
    options = {"variant": "js", "js_weight": 0.3, "top_k": top_k}

    def composed(hidden, ref_hidden, weight, bias, targets):
        logits, ref = (torch.nn.functional.linear(h, weight, bias) for h in (hidden, ref_hidden))
        kl = token_kl(logits, ref, **options, **shared, backend="reference")
        one, other = (
            linear_logprobs(h, weight, targets, bias=bias, **shared, return_entropy=True, backend="reference")
            for h in (hidden, ref_hidden)
        )
        return LinearKl(kl, one[0], other[0], one[1])

    kind = {"trained": trained, "through": ("kl", "logprobs", "entropy")}
    expected = run(composed, tensors, **kind)
    found = run(linear_kl, tensors, **kind, **options, **shared, return_entropy=True, chunk_tokens=2, backend=backend)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reference_with_a_head_of_its_own_may_have_another_width(backend):
    tensors, other = draw(), draw(width=5, seed=1)
    hidden = tensors["hidden"].requires_grad_()
    found = linear_kl(
        hidden, other["ref_hidden"], tensors["weight"], None, ref_weight=other["weight"], bias=tensors["bias"],
        variant="forward", backend=backend,
    )  # fmt: skip
    logits = torch.nn.functional.linear(hidden, tensors["weight"], tensors["bias"])
    expected = token_kl(logits, other["ref_hidden"] @ other["weight"].t(), variant="forward")
    torch.testing.assert_close(found.kl, expected, rtol=1e-5, atol=1e-6)
    slope, exact = (torch.autograd.grad(x.sum(), hidden)[0] for x in (found.kl, expected))
    torch.testing.assert_close(slope, exact, rtol=1e-5, atol=1e-6)
    assert found[1:] == (None, None, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reference_is_a_constant_even_through_a_shared_head(backend):
    tensors = draw()
    leaves = {n: x.requires_grad_() for n, x in tensors.items() if n != "targets"}
    found = linear_kl(**leaves, targets=tensors["targets"], backend=backend)
    assert not found.ref_logprobs.requires_grad
    found.kl.sum().backward()
    apart = {n: x.detach().clone().requires_grad_() for n, x in leaves.items()}
    ref = {"ref_weight": apart["weight"].detach(), "ref_bias": apart["bias"].detach()}
    linear_kl(**apart, **ref, targets=tensors["targets"], backend=backend).kl.sum().backward()
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(leaves[name].grad, apart[name].grad, rtol=1e-5, atol=1e-6)
    assert leaves["ref_hidden"].grad is None


@pytest.mark.parametrize("backend", KERNELS)
def test_a_policy_at_its_reference_has_no_divergence(backend):
    tensors = draw((7,))
    for variant in VARIANTS:
        same = {**tensors, "ref_hidden": tensors["hidden"].clone()}
        found = run(linear_kl, same, variant=variant, through=("kl",), backend=backend)
        assert (found["kl"] >= 0).all()
        assert (found["kl"] < 1e-12).all()
        assert found["d hidden"].abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [(), ("weight", "bias")], ids=["frozen", "trained"])
def test_nothing_behind_the_mask_gets_through(backend, trained):
    clean, dirty = draw(), draw()
    for name in ("hidden", "ref_hidden"):
        dirty[name][MASK == 0] = torch.nan
    dirty["targets"][MASK == 0] = -100
    options = {"trained": trained, "mask": MASK, "backend": backend}
    expected, found = run(linear_kl, clean, **options), run(linear_kl, dirty, **options)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert (found["kl"][MASK == 0] == 0).all()
    assert (found["d hidden"][MASK == 0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [(), ("weight", "bias")], ids=["frozen", "trained"])
def test_an_all_masked_batch_gives_a_connected_zero(backend, trained):
    found = run(linear_kl, draw(), trained=trained, mask=torch.zeros(2, 3), backend=backend)
    for name, value in found.items():
        assert (value == 0).all(), name


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("top_k", [None, 5])
def test_logits_that_are_kept_and_logits_made_again_give_the_same_bits(backend, top_k, monkeypatch):
    options = {"trained": ("weight", "bias"), "through": ("kl", "logprobs", "entropy"), "return_entropy": True}
    options |= {"mask": MASK, "top_k": top_k, "softcap": 3.0, "chunk_tokens": 3, "backend": backend}
    kept = run(linear_kl, draw(), **options)
    monkeypatch.setitem(_logprobs_op.KEPT_BYTES, "cpu", 0)
    for name, value in run(linear_kl, draw(), **options).items():
        assert torch.equal(kept[name], value), name


@pytest.mark.parametrize("backend", KERNELS)
def test_kept_logits_serve_several_backward_passes(backend):
    leaves = {n: x.requires_grad_(n in ("hidden", "weight")) for n, x in draw().items() if n != "targets"}
    found = linear_kl(**leaves, targets=draw()["targets"], backend=backend)
    wanted = [leaves["hidden"], leaves["weight"]]
    first, second = (torch.autograd.grad((found.kl + found.logprobs).sum(), wanted, retain_graph=True) for _ in "12")
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_pass_without_gradients_gives_the_bits_of_one_with_them(backend):
    tensors = draw()
    with torch.no_grad():
        quiet = linear_kl(**tensors, return_entropy=True, backend=backend)
    for trained in ((), ("weight",)):
        found = run(linear_kl, tensors, trained=trained, return_entropy=True, backend=backend)
        for name, value in quiet._asdict().items():
            assert torch.equal(found[name], value), name


EVERYTHING = ("kl", "logprobs", "entropy")
LOGITS = 2 * 8 * 37 * 4  # bytes of both logits of the test below


@pytest.mark.parametrize(
    ("trained", "targets", "through", "budget", "products"),
    [
        ((), True, ("kl", "logprobs"), LOGITS, 4),
        ((), False, ("kl",), LOGITS, 3),
        (("weight",), True, EVERYTHING, LOGITS, 4),
        (("weight",), True, EVERYTHING, LOGITS - 1, 6),
        ((), True, EVERYTHING, LOGITS, 7),
    ],
    ids=["frozen 4P", "frozen without targets 3P", "trained 4P", "trained beyond the budget 6P",
         "frozen with an entropy gradient 7P"],
)  # fmt: skip
def test_the_products_are_those_of_the_cost_model(trained, targets, through, budget, products, monkeypatch):
    monkeypatch.setitem(_logprobs_op.KEPT_BYTES, "cpu", budget)
    tensors = draw((8,))
    del tensors["bias"]
    if not targets:
        tensors["targets"] = None
    sizes = []
    real_mm, real_matmul, real_addmm = torch.mm, torch.Tensor.__matmul__, torch.Tensor.addmm_

    def spy(a, b):
        sizes.append(a.shape[0] * a.shape[1] * b.shape[1])

    monkeypatch.setattr(torch, "mm", lambda a, b, **o: (spy(a, b), real_mm(a, b, **o))[1])
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (spy(a, b), real_matmul(a, b))[1])
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda t, a, b, **o: (spy(a, b), real_addmm(t, a, b, **o))[1])
    run(linear_kl, tensors, trained=trained, through=through, return_entropy=True, backend="cpu", chunk_tokens=3)
    assert sum(sizes) == products * 8 * 8 * 37


def test_policy_and_reference_share_one_product_and_masked_rows_cost_none(monkeypatch):
    heights = []
    real_mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **o: (heights.append(a.shape[0]), real_mm(a, b, **o))[1])
    linear_kl(**draw((8,)), mask=torch.tensor([0, 1, 0, 0, 1, 1, 0, 0]), backend="cpu")
    assert heights == [6]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("mask_count", [3, 5], ids=["exact", "upper bound"])
def test_with_mask_count_a_gpu_takes_so_many_rows(mask_count, trained, monkeypatch):
    mask = torch.tensor([0, 1, 0, 0, 1, 1, 0, 0])

    def gradients(**options):
        given = draw((8,), dtype=torch.float64)
        given["hidden"][mask == 0] = torch.nan
        leaves = [given["hidden"].requires_grad_(), given["weight"].requires_grad_(trained)]
        found = linear_kl(**given, mask=mask, backend="cpu", **options)
        grads = torch.autograd.grad(found.kl.sum() + found.logprobs.sum(), leaves[: 1 + trained])
        return [found.kl.detach(), found.logprobs.detach(), *grads]

    expected = gradients()
    count_as_on_a_gpu(monkeypatch)
    heights, real_mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **o: (heights.append(a.shape[0]), real_mm(a, b, **o))[1])
    found = gradients(mask_count=mask_count)
    assert heights[0] == 2 * mask_count
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("trained", "top_k"), [(False, None), (True, 5)], ids=["frozen", "trained, top-k"])
def test_the_registered_op_passes_opcheck(backend, trained, top_k):
    t = draw((3,), dtype=torch.float64)
    mask = torch.tensor([1, 0, 1], dtype=torch.uint8)
    call = (
        *Head(t["weight"].requires_grad_(trained), t["bias"]),
        *Rows(t["hidden"].requires_grad_(), t["targets"], mask, 2, 2),
        *Transform(0.7, None, 1.5, 6.0),
        *_kl_op.Reference(t["ref_hidden"], None, None),
        *Divergence("reverse", 0.5),
        *_kl_op.Options(top_k, True, "logits" if trained else "U"),
    )
    torch.library.opcheck(torch.ops.rlhf_fast.linear_kl.default, (*call, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [(), ("weight", "bias")], ids=["frozen", "trained"])
def test_it_compiles_without_graph_breaks(backend, trained):
    def op(**tensors):
        return linear_kl(**tensors, mask=MASK, return_entropy=True, backend=backend)

    expected, found = run(op, draw(), trained=trained), run(compiled(op), draw(), trained=trained)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def changed(**changes):
    return {**draw(), **changes}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (changed(weight=torch.zeros(37, 7)), ValueError, r"hidden must be .* got \(2, 3, 8\) and \(37, 7\)"),
        (changed(ref_hidden=torch.zeros(2, 3, 7)), ValueError, r"ref_hidden must be .* got \(2, 3, 7\) and \(37, 8\)"),
        (changed(ref_hidden=torch.zeros(2, 4, 8)), ValueError, r"ref_hidden must be .* got \(2, 4, 8\)"),
        (changed(ref_weight=torch.zeros(36, 8)), ValueError, r"ref_weight must be \(V, D\) = \(37, 8\), got \(36, 8\)"),
        (changed(bias=torch.zeros(36)), ValueError, r"bias must be \(V,\) = \(37,\), got \(36,\)"),
        (changed(targets=torch.zeros(2, 2, dtype=torch.int64)), ValueError, r"targets must be .* got \(2, 2\)"),
        (changed(chunk_tokens=0), ValueError, "chunk_tokens must be >= 1, got 0"),
        (changed(variant="kl"), ValueError, "variant must be one of reverse, forward, js, got 'kl'"),
        (changed(top_k=38), ValueError, r"top_k must be in \[1, V\] = \[1, 37\], got 38"),
        (changed(weight=torch.zeros(37, 8).bfloat16()), TypeError, "weight must have the type of hidden"),
        (changed(targets=torch.full((2, 3), 37)), IndexError, r"row 0 is 37, outside \[0, 37\)"),
    ],
)
def test_bad_input_raises_with_its_values(arguments, error, message):
    with pytest.raises(error, match=message):
        linear_kl(**arguments)
