import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from rlhf_fast import Adapter, lora_linear
from rlhf_fast.ops.lora import _cpu as _lora_cpu
from rlhf_fast.ops.lora.lora_linear import reference
from rlhf_fast.testing.numerics import assert_contract

BACKENDS = ("cpu", "triton")
LAYOUTS = {  # segments of a bank of two adapters
    "one adapter": [(0, 37)],
    "base, two adapters": [(-1, 10), (0, 20), (1, 7)],
    "an adapter twice": [(1, 5), (0, 3), (-1, 4), (1, 25)],
    "empty segments": [(0, 0), (1, 37), (-1, 0)],
    "base alone": [(-1, 37)],
}


def make_inputs(dtype=torch.float64, rows=37, inner=33, outer=21, ranks=(3, 18), seed=0):
    """x, weight, bias in `dtype`; adapters in float32, or in float64 beside float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype, size=1.0):
        return (size * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    adapter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    bank = [
        (normal(rank, inner, dtype=adapter_dtype, size=inner**-0.5), normal(outer, rank, dtype=adapter_dtype), scale)
        for rank, scale in zip(ranks, (2.0, 0.25), strict=True)
    ]
    return normal(rows, inner), normal(outer, inner, size=inner**-0.5), normal(outer), bank


def leaves(x, weight, bias, bank):
    return {"x": x, "weight": weight, "bias": bias,
            **{f"{part}{i}": pair["AB".index(part)] for i, pair in enumerate(bank) for part in "AB"}}  # fmt: skip


def cast(inputs, dtype):
    """The same values, detached, in another type; adapters too."""
    x, weight, bias, bank = inputs

    def copy(tensor):
        return tensor.detach().to(dtype).requires_grad_()

    return copy(x), copy(weight), copy(bias), [(copy(a), copy(b), scale) for a, b, scale in bank]


def eager(x, weight, bias, bank, segments):
    """What one would write for every segment."""
    y = F.linear(x, weight, bias)
    parts, start = [], 0
    for index, count in segments:
        part = x[start : start + count]
        delta = torch.zeros_like(y[start : start + count])
        if index >= 0:
            a, b, scale = bank[index]
            delta = scale * ((part @ a.to(x.dtype).t()) @ b.to(x.dtype).t())
        parts.append(y[start : start + count] + delta)
        start += count
    return torch.cat(parts)


def results(function, inputs, segments, **options):
    x, weight, bias, bank = inputs
    if function is eager:
        y = function(x, weight, bias, bank, segments)
    else:
        y = function(x, weight, bank, segments, bias=bias, **options)
    parameters = leaves(*inputs)
    used = {f"{part}{i}" for i, count in segments if i >= 0 and count for part in "AB"}
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(y.dtype)
    gradients = torch.autograd.grad(y, list(parameters.values()), upstream, allow_unused=True)
    named = {name: g for name, g in zip(parameters, gradients, strict=True) if name in used or len(name) > 2}
    return {"y": y, "x": gradients[0], **named}


def test_reference_is_the_formula():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([10.0, 20.0])
    bank = [(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [-1.0]]), 2.0)]
    y = lora_linear(x, weight, bank, [(-1, 1), (0, 2)], bias=bias, backend="reference")
    # rows 1 and 2: 2 (x0 + x1) times (1, -1)
    assert y.tolist() == [[11.0, 22.0], [13.0 + 14.0, 24.0 - 14.0], [15.0 + 22.0, 26.0 - 22.0]]


def test_reference_is_differentiable_twice():
    x, weight, bias, bank = make_inputs(rows=5, inner=3, outer=4, ranks=(1, 2))
    tensors = [x, weight, bias, *bank[0][:2], *bank[1][:2]]

    def function(x, weight, bias, a0, b0, a1, b1):
        return reference(x, weight, [(a0, b0, 2.0), (a1, b1, 0.25)], [(0, 2), (1, 2), (-1, 1)], bias=bias)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_values_and_gradients_in_float64(backend, layout):
    segments = LAYOUTS[layout]
    found = results(lora_linear, make_inputs(), segments, backend=backend)
    expected = results(lora_linear, make_inputs(), segments, backend="reference")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        close = torch.allclose(value, expected[name], rtol=1e-12, atol=1e-12)
        assert close, f"{name}: off by {(value - expected[name]).abs().max()}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["one adapter", "an adapter twice"])
def test_numerics_contract(backend, dtype, layout):
    segments = LAYOUTS[layout]
    inputs = make_inputs(dtype, inner=130, outer=140, ranks=(8, 5))
    found = results(lora_linear, inputs, segments, backend=backend)
    plain = results(eager, inputs, segments)
    oracle = results(eager, cast(inputs, torch.float64), segments)
    for name, value in found.items():
        assert_contract(name, value, plain[name], oracle[name])
    assert found["y"].dtype == dtype
    assert found["A0" if "A0" in found else "A1"].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 16, 17, 130])
def test_row_counts_around_a_tile(backend, rows):
    x, weight, bias, bank = make_inputs(torch.float32, rows=rows)
    y = lora_linear(x, weight, bank, [(0, rows)], bias=bias, backend=backend)
    torch.testing.assert_close(y, reference(x, weight, bank, [(0, rows)], bias=bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [math.inf, -1], ids=["native", "products of PyTorch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_cpu_adapters_of_any_type_and_stride(monkeypatch, limit, dtype, bank_dtype):
    monkeypatch.setattr(_lora_cpu, "NATIVE_LIMITS", {dtype: (limit, limit)})
    x, weight, bias, bank = cast(make_inputs(rows=75, inner=1043, outer=531, ranks=(1, 18)), dtype)
    (a0, b0, s0), (a1, b1, s1) = cast((x, weight, bias, bank), bank_dtype)[3]
    bank = [  # A transposed, B with gaps between its rows and its columns
        (a0.detach().t().contiguous().t().requires_grad_(), b0, s0),
        (a1, b1.detach().repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3].requires_grad_(), s1),
    ]
    inputs, segments = (x, weight, bias, bank), [(1, 34), (-1, 3), (0, 37), (1, 1)]
    found = results(lora_linear, inputs, segments, backend="cpu")
    plain = results(eager, inputs, segments)
    oracle = results(eager, cast(inputs, torch.float64), segments)
    for name, value in found.items():
        assert_contract(name, value, plain[name], oracle[name])


@pytest.mark.parametrize("threads", [1, 3])
def test_cpu_results_are_the_same_every_time(threads):
    x, weight, _, bank = make_inputs(torch.float32, rows=200, ranks=(8, 5))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = lora_linear(x, weight, bank, [(0, 100), (1, 100)], backend="cpu")
        again = lora_linear(x, weight, bank, [(0, 100), (1, 100)], backend="cpu")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, again)
    torch.testing.assert_close(y, reference(x, weight, bank, [(0, 100), (1, 100)]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_base_weight_gets_a_gradient_only_when_it_asks(backend):
    x, weight, bias, bank = make_inputs()
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    bank[1][0].requires_grad_(False)
    lora_linear(x, weight, bank, [(0, 20), (1, 17)], bias=bias, backend=backend).sum().backward()
    assert weight.grad is None
    assert bias.grad is None
    assert bank[1][0].grad is None
    assert all(tensor.grad is not None for tensor in (x, *bank[0][:2], bank[1][1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_input_costs_no_gradient_of_it(backend):
    x, weight, _, bank = make_inputs()
    lora_linear(x.detach(), weight.detach(), bank, [(0, 37)], backend=backend).sum().backward()
    expected = make_inputs()[3]
    reference(x.detach(), weight.detach(), expected, [(0, 37)]).sum().backward()
    for ours, theirs in zip(bank[0][:2], expected[0][:2], strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_an_adapter_never_see_the_bank(backend):
    x, weight, bias, bank = make_inputs(torch.float32)
    poisoned = [(torch.full_like(a, torch.nan), torch.full_like(b, torch.nan), s) for a, b, s in bank]
    y = lora_linear(x, weight, poisoned, [(-1, 30), (0, 7)], bias=bias, backend=backend)
    torch.testing.assert_close(y[:30], F.linear(x, weight, bias)[:30])
    assert y[30:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input_transposed_weight_and_leading_dimensions(backend):
    x, weight, bias, bank = make_inputs(torch.float32, rows=36)
    strided = torch.stack([x, x], -1).view(36, -1)[:, ::2].detach().view(4, 9, 33)
    stored = weight.detach().t().contiguous()  # as Conv1D has it
    y = lora_linear(strided, stored.t(), bank, [(0, 18), (1, 18)], bias=bias, backend=backend)
    assert y.shape == (4, 9, 21)
    expected = reference(x, weight, bank, [(0, 18), (1, 18)], bias=bias)
    torch.testing.assert_close(y.view(36, 21), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pass_without_gradients_gives_the_same_bits(backend):
    x, weight, bias, bank = make_inputs(torch.float32)
    segments = LAYOUTS["base, two adapters"]
    with_graph = lora_linear(x, weight, bank, segments, bias=bias, backend=backend)
    with torch.no_grad():
        without = lora_linear(x, weight, bank, segments, bias=bias, backend=backend)
    assert torch.equal(with_graph, without)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_without_a_weight_the_low_rank_term_is_left(backend, dropout):
    segments = LAYOUTS["base, two adapters"]
    options = {"dropout": dropout, "seed": 3, "backend": backend}
    found = []
    for weight in (None, torch.zeros(21, 33, dtype=torch.float64)):
        x, _, _, bank = make_inputs()
        y = lora_linear(x, weight, bank, segments, **options)
        y.square().sum().backward()
        found.append([y, x.grad, *(t.grad for a, b, _ in bank for t in (a, b))])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


# --- DoRA -------------------------------------------------------------------------------------------------------------


def make_magnitudes(bank, seed=3):
    """The bank with a magnitude for its last adapter: plain LoRA and DoRA side by side."""
    (a0, b0, s0), (a1, b1, s1) = bank
    generator = torch.Generator().manual_seed(seed)
    magnitude = (1 + torch.rand(len(b1), generator=generator, dtype=torch.float64)).to(b1.dtype).requires_grad_()
    return [Adapter(a0, b0, s0), Adapter(a1, b1, s1, magnitude)]


def eager_dora(x, weight, bias, bank, segments):
    """As one would write it; the norm is a constant."""
    parts = []
    for part, (index, _) in zip(x.split([count for _, count in segments]), segments, strict=True):
        merged, factor = weight, 1.0
        if index >= 0:
            a, b, scale, magnitude = bank[index]
            merged = weight + scale * (b.to(x.dtype) @ a.to(x.dtype))
            if magnitude is not None:
                factor = magnitude.to(x.dtype) / merged.detach().norm(dim=1)
        parts.append(factor * (part @ merged.t()) + bias)
    return torch.cat(parts)


def dora_results(function, inputs, segments, **options):
    x, weight, bias, bank = inputs
    leaves = {"x": x, "weight": weight, "bias": bias, "magnitude": bank[1].magnitude}
    leaves |= {f"{name}{i}": getattr(adapter, name) for i, adapter in enumerate(bank) for name in "ab"}
    y = function(x, weight, bias, bank, segments) if function is eager_dora else function(
        x, weight, bank, segments, bias=bias, **options
    )  # fmt: skip
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(y.dtype)
    return {"y": y, **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream), strict=True))}


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_dora_scales_the_rows_of_the_merged_weight_to_its_magnitude(backend):
    # arXiv 2402.09353, eq. 5: W + s B A = [[1 + 2, 2 + 2], [6, 8]] has rows of norm 5 and 10.
    adapter = Adapter(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0]]), 2.0, torch.tensor([10.0, 5.0]))
    weight, bias = torch.tensor([[1.0, 2.0], [6.0, 8.0]]), torch.tensor([100.0, 200.0])
    magnitude = adapter.magnitude.requires_grad_()
    y = lora_linear(torch.tensor([[1.0, 1.0]]), weight, [adapter], [(0, 1)], bias=bias, backend=backend)
    torch.testing.assert_close(y, torch.tensor([[100 + 10 / 5 * 7, 200 + 5 / 10 * 14.0]]))
    y.sum().backward()
    torch.testing.assert_close(magnitude.grad, torch.tensor([7 / 5, 14 / 10]))  # the direction's answer


def test_dora_reference_is_differentiable_twice_where_the_norm_is_no_matter():
    x, weight, bias, bank = make_inputs(rows=4, inner=3, outer=4, ranks=(1, 2))
    bank = [adapter._replace(a=adapter.a.detach(), b=adapter.b.detach()) for adapter in make_magnitudes(bank)]

    def function(x, bias, magnitude):
        adapters = [bank[0], bank[1]._replace(magnitude=magnitude)]
        segments = [(0, 1), (1, 2), (-1, 1)]
        return reference(x, weight.detach(), adapters, segments, bias=bias, dropout=0.3, seed=torch.tensor(1))

    assert torch.autograd.gradcheck(function, (x, bias, bank[1].magnitude))
    assert torch.autograd.gradgradcheck(function, (x, bias, bank[1].magnitude))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dora_beside_lora_keeps_the_numerics_contract(backend, dtype):
    x, weight, bias, bank = make_inputs(dtype, inner=130, outer=140, ranks=(8, 5))
    inputs, segments = (x, weight, bias, make_magnitudes(bank)), [(1, 5), (-1, 3), (0, 9), (1, 20)]
    found = dora_results(lora_linear, inputs, segments, backend=backend)
    plain = dora_results(eager_dora, inputs, segments)
    adapters = [[None if t is None else t.detach().double().requires_grad_() for t in (a, b, m)] + [s]
                for a, b, s, m in inputs[3]]  # fmt: skip
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    oracle = dora_results(eager_dora, (*exact, [Adapter(a, b, s, m) for a, b, m, s in adapters]), segments)
    for name, value in found.items():
        assert_contract(name, value, plain[name], oracle[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dora_without_gradients_gives_the_same_bits_and_a_zero_magnitude_its_gradient(backend):
    x, weight, bias, bank = make_inputs(torch.float32)
    bank = make_magnitudes(bank)
    with torch.no_grad():
        bank[1].magnitude[:2] = 0
        without = lora_linear(x, weight, bank, [(1, 30), (0, 7)], bias=bias, backend=backend)
    found = dora_results(lora_linear, (x, weight, bias, bank), [(1, 30), (0, 7)], backend=backend)
    assert torch.equal(without, found["y"])
    expected = dora_results(eager_dora, (x, weight, bias, bank), [(1, 30), (0, 7)])
    torch.testing.assert_close(found["magnitude"], expected["magnitude"], rtol=1e-5, atol=1e-5)
    assert found["magnitude"][:2].abs().min() > 0


# --- Dropout ----------------------------------------------------------------------------------------------------------


def mask_of(rows, width, dropout, seed, backend, dtype=torch.float64):
    """The mask, read off an adapter that hands its input through."""
    eye = torch.eye(width, dtype=dtype)
    y = lora_linear(torch.ones(rows, width, dtype=dtype), torch.zeros_like(eye), [(eye, eye, 1 - dropout)],
                    [(0, rows)], dropout=dropout, seed=seed, backend=backend)  # fmt: skip
    return y


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_dropout_keeps_what_philox_says(backend):
    # Counter (0, 0) under seed 0 gives the words of the generator's first known answer.
    words = torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
    for dropout in (0.25, 0.5, 0.65, 0.8):
        expected = (words >= round(dropout * 2**32)).double()
        torch.testing.assert_close(mask_of(1, 4, dropout, 0, backend)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [5, 70])
def test_every_backend_drops_the_same_elements(dtype, rows):
    masks = [mask_of(rows, 45, 0.3, -(2**62) + 12345, backend, dtype) for backend in ["reference", *BACKENDS]]
    assert torch.equal(masks[0] != 0, masks[1] != 0)
    assert torch.equal(masks[0] != 0, masks[2] != 0)


def test_dropout_keeps_its_share_and_seeds_differ():
    kept = mask_of(400, 100, 0.3, 7, "cpu") != 0
    assert abs(kept.double().mean() - 0.7) < 4 * (0.3 * 0.7 / kept.numel()) ** 0.5
    other = mask_of(400, 100, 0.3, 8, "cpu") != 0
    assert abs((kept == other).double().mean() - (0.7**2 + 0.3**2)) < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients_with_dropout_keep_the_numerics_contract(backend, dtype):
    inputs = make_inputs(dtype, inner=130, outer=140, ranks=(8, 5))
    segments, options = [(1, 5), (-1, 3), (0, 29)], {"dropout": 0.4, "seed": 3}
    found = results(lora_linear, inputs, segments, backend=backend, **options)
    plain = results(lora_linear, inputs, segments, backend="reference", **options)
    oracle = results(lora_linear, cast(inputs, torch.float64), segments, backend="reference", **options)
    for name, value in found.items():
        assert_contract(name, value, plain[name], oracle[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_recomputed_pass_drops_the_same_elements(backend):
    inputs, options = make_inputs(), {"dropout": 0.4, "seed": torch.tensor(11), "backend": backend}
    segments = LAYOUTS["base, two adapters"]

    def recomputed(x, weight, bank, segments, **options):
        return checkpoint(lora_linear, x, weight, bank, segments, use_reentrant=False, **options)

    expected = results(lora_linear, inputs, segments, **options)
    found = results(recomputed, inputs, segments, **options)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_ranks_that_are_no_powers_of_two_in_one_launch(backend):
    ranks, rows = (1, 7, 24, 33, 65, 128), (3, 70, 1, 130, 20, 16)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    bank = [Adapter(normal(rank, 37), normal(29, rank), rank**-0.5) for rank in ranks]
    x, weight = normal(sum(rows), 37), normal(29, 37)
    segments = list(enumerate(rows))
    parameters = [x, weight, *(p for adapter in bank for p in adapter[:2])]
    upstream = normal(sum(rows), 29).detach()
    found = lora_linear(x, weight, bank, segments, backend=backend)
    expected = reference(x, weight, bank, segments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)
    for ours, theirs in zip(*(torch.autograd.grad(y, parameters, upstream) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)


def test_triton_splits_the_rows_of_a_gradient():
    inputs = make_inputs(rows=64 * 16 + 5, inner=8, outer=8)  # more than twice 512 rows: two partial sums
    found = results(lora_linear, inputs, [(1, 1029)], backend="triton")
    expected = results(lora_linear, inputs, [(1, 1029)], backend="reference")
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_peft_computes_the_same_layer(options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False, **options)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(13, 11)), config).double()
    layer = model.base_model.model[0]
    magnitude = layer.lora_magnitude_vector["default"].weight if "use_dora" in options else None
    theirs = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    if magnitude is not None:
        with torch.no_grad():
            magnitude += torch.rand(11)
        theirs.append(magnitude)
    scale = 6 / 4**0.5 if "use_rslora" in options else 6 / 4
    x = torch.randn(5, 13, dtype=torch.float64)
    y = model(x)
    base = layer.base_layer
    found = lora_linear(x, base.weight, [Adapter(*theirs[:2], scale, magnitude)], [(0, 5)], bias=base.bias)
    torch.testing.assert_close(found, y, rtol=1e-6, atol=1e-6)  # PEFT's factor is made in float32 in places
    for ours, expected in zip(*(torch.autograd.grad(out.square().sum(), theirs) for out in (found, y)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_passes_opcheck(backend):
    x, weight, bias, bank = make_inputs()
    downs, ups, scales = ([pair[i] for pair in bank] for i in range(3))
    magnitude = make_magnitudes(bank)[1].magnitude
    arguments = (x, weight, bias, downs, ups, [magnitude], [1], scales, [0, 20, -1, 10, 1, 7], 0.2, torch.tensor(3))
    torch.library.opcheck(torch.ops.rlhf_fast.lora_linear.default, (*arguments, True, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_without_a_weight_passes_opcheck(backend):
    x, _, _, bank = make_inputs()
    downs, ups, scales = ([pair[i] for pair in bank] for i in range(3))
    arguments = (x, None, None, downs, ups, [], [], scales, [0, 20, -1, 10, 1, 7], 0.0, None, False, backend)
    torch.library.opcheck(torch.ops.rlhf_fast.lora_linear.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_bank_is_the_base_layer_with_its_gradients(backend):
    x, weight, bias, _ = make_inputs(torch.float32)
    y = lora_linear(x, weight, [], [(-1, 37)], bias=bias, backend=backend)
    assert torch.equal(y, F.linear(x, weight, bias))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, weight.sum(0).expand(37, 33))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_autocast_rounds_the_operands_of_the_layer(grad):
    x, weight, bias, bank = make_inputs(torch.float32)
    with torch.set_grad_enabled(grad):
        expected = lora_linear(x.bfloat16(), weight.bfloat16(), bank, [(0, 37)], bias=bias.bfloat16(), backend="cpu")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = lora_linear(x, weight, bank, [(0, 37)], bias=bias, backend="cpu")
    assert torch.equal(found, expected)


def test_without_gradients_tensors_without_memory_reach_the_registered_op():
    x, weight, _, bank = make_inputs(torch.float32)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, weight, down, up = map(mode.from_tensor, (x, weight, *bank[0][:2]))
        y = lora_linear(x, weight, [(down, up, 2.0)], [(0, 37)], backend="cpu")
    assert isinstance(y, FakeTensor)
    assert y.shape == (37, 21)


def test_compiles_without_graph_breaks():
    x, weight, bias, bank = make_inputs(torch.float32)
    adapters = make_magnitudes(bank)

    def function(x):
        y = lora_linear(x, weight, adapters, [(0, 20), (1, 17)], bias=bias, dropout=0.1, seed=5, backend="cpu")
        return y.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))
    compiled(x).backward()
    gradient, x.grad = x.grad, None
    function(x).backward()
    torch.testing.assert_close(gradient, x.grad)


def test_wrong_arguments_are_named_with_their_values():
    x, weight, _, bank = make_inputs(torch.float32)
    with pytest.raises(ValueError, match=r"and weight \(out, in\), got \(37, 33\) and \(33, 21\)"):
        lora_linear(x, weight.t(), bank, [(0, 37)])
    for options in ({"bank": []}, {"bank": bank, "bias": torch.ones(21)}, {"bank": [(*bank[0], torch.ones(21))]}):
        with pytest.raises(ValueError, match="without a weight there must be one or more adapters, no bias and no mag"):
            lora_linear(x, None, segments=[(-1, 37)], **options)
    with pytest.raises(ValueError, match=r"segments must cover the 37 rows of x, got \[30\]"):
        lora_linear(x, weight, bank, [(0, 30)])
    with pytest.raises(ValueError, match=r"segments must be \(-1\.\.1, rows >= 0\), got \(2, 37\)"):
        lora_linear(x, weight, bank, [(2, 37)])
    with pytest.raises(ValueError, match=r"must have A \(R, 33\) and B \(21, R\), got \(3, 33\) and \(21, 18\)"):
        lora_linear(x, weight, [(bank[0][0], bank[1][1], 1.0)], [(0, 37)])
    with pytest.raises(ValueError, match=r"magnitude of adapter 0 must be \(out,\) = \(21,\), got \(20,\)"):
        lora_linear(x, weight, [(*bank[0], torch.ones(20))], [(0, 37)])
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1\.0"):
        lora_linear(x, weight, bank, [(0, 37)], dropout=1.0, seed=0)
    with pytest.raises(ValueError, match=r"dropout=0\.1 needs a seed"):
        lora_linear(x, weight, bank, [(0, 37)], dropout=0.1)
    with pytest.raises(TypeError, match=r"must have the type of x, got x torch\.float32, weight torch\.float64"):
        lora_linear(x, weight.double(), bank, [(0, 37)])
