"""Products with a float32 result, with PyTorch's own functions as each version has them on a GPU."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast.ops.head import _products

VERSIONS = ["2.9.0+cu128", "2.9.1+rocm7.0", "2.10.0+cu130", "2.13.0+cu130", "3.0.0a0+git12"]
SHAPES = [(300, 7, 5), (5, 300, 7), (7, 5, 300), (3, 3, 3)]  # each dimension the longest once


def drawn(shape, dtype=torch.bfloat16):
    torch.manual_seed(sum(shape))
    m, k, n = shape
    return torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype).t(), torch.randn(m, n)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(_products, "BLOCK_BYTES", 1000)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_product_of_half_precision_is_not_rounded_to_it(pytorch, small_blocks, version, shape):
    a, b, _ = drawn(shape)
    expected = a.double() @ b.double()
    pytorch(version)
    found = _products.multiply(a, b, torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    out = torch.full_like(found, torch.nan)
    assert _products.multiply(a, b, torch.float32, out) is out
    torch.testing.assert_close(out, found, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("scale", "old"), [(1.0, 1.0), (2.0, 0.0), (0.5, 1.0)])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_product_of_half_precision_is_added_to_float32(pytorch, small_blocks, version, scale, old, shape):
    a, b, total = drawn(shape, torch.float16)
    expected = old * total.double() + scale * (a.double() @ b.double())
    if old == 0:
        total.fill_(torch.nan)  # unwritten
    pytorch(version)
    _products.add(total, a, b, scale, old)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", ["logits", "hidden", "weight"])
@pytest.mark.parametrize("odd", [1, 9, 12])
def test_an_odd_vocabulary_is_multiplied_in_two_parts(pytorch, monkeypatch, odd, layout):
    monkeypatch.setattr(_products, "LONG", 32)
    monkeypatch.setattr(_products, "BLOCK_BYTES", 1000)
    v, logits = 64 + odd, torch.zeros(5, 80)[:, : 64 + odd]
    hidden, weight, gradient = (torch.randn(s).bfloat16() for s in ((5, 16), (v, 16), (5, 80)))
    total, a, b = {
        "logits": (logits, hidden, weight.t()), "hidden": (torch.zeros(5, 16), gradient[:, :v], weight),
        "weight": (torch.zeros(v, 16), gradient[:, :v].t(), hidden),
    }[layout]  # fmt: skip
    split = _products.parts(total, a, b)
    assert [again for *_, again in split] == [False, layout == "hidden"]
    assert all(v not in (*place.shape, *x.shape, *y.shape) for place, x, y, _ in split)
    assert any(64 + odd // 8 * 8 in x.shape + y.shape for _, x, y, _ in split[:1])
    pytorch("2.13.0+cu130")
    exact = a.double() @ b.double()
    assert _products.multiply(a, b, torch.float32, total) is total
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-4)
    rounded = _products.multiply(a, b, torch.bfloat16)
    torch.testing.assert_close(rounded, exact.bfloat16(), rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(("version", "scratch"), [("2.9.0", 2 * _products.BLOCK_BYTES), ("2.10.0", 0)])
def test_what_a_product_takes_beside_its_result_is_counted(pytorch, version, scratch):
    pytorch(version)
    assert _products.scratch_bytes() == scratch
