import math

import pytest
import torch
import torch.nn.functional as F

from rlhf_fast import lora_linear
from rlhf_fast.ops import _lora_cpu
from rlhf_fast.ops.lora_linear import reference
from tests.numerics import assert_contract

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


def test_operator_passes_opcheck():
    x, weight, bias, bank = make_inputs()
    downs, ups, scales = ([pair[i] for pair in bank] for i in range(3))
    arguments = (x, weight, bias, downs, ups, [], [], scales, [0, 20, -1, 10, 1, 7], 0.0, None, False, "cpu")
    torch.library.opcheck(torch.ops.rlhf_fast.lora_linear.default, arguments)


def test_compiles_without_graph_breaks():
    x, weight, bias, bank = make_inputs(torch.float32)

    def function(x):
        return lora_linear(x, weight, bank, [(0, 20), (1, 17)], bias=bias, backend="cpu").sum()

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
    with pytest.raises(ValueError, match=r"segments must cover the 37 rows of x, got \[30\]"):
        lora_linear(x, weight, bank, [(0, 30)])
    with pytest.raises(ValueError, match=r"segments must be \(-1\.\.1, rows >= 0\), got \(2, 37\)"):
        lora_linear(x, weight, bank, [(2, 37)])
    with pytest.raises(ValueError, match=r"must have A \(R, 33\) and B \(21, R\), got \(3, 33\) and \(21, 18\)"):
        lora_linear(x, weight, [(bank[0][0], bank[1][1], 1.0)], [(0, 37)])
    with pytest.raises(TypeError, match=r"must have the type of x, got x torch\.float32, weight torch\.float64"):
        lora_linear(x, weight.double(), bank, [(0, 37)])
