"""The native product for few rows: one pass over the weight for the base product, the adapters and the bias."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.backends import native
from rlhf_fast.ops.lora import _cpu
from rlhf_fast.ops.lora.lora_linear import prepare, reference
from rlhf_fast.testing.numerics import assert_contract

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def wherever_it_is_fast(monkeypatch):
    """It runs on every machine and for 64 rows, and is chosen where it is fast."""
    monkeypatch.setattr(_cpu, "FEW_ROWS_LIMITS", dict.fromkeys(DTYPES, 64))
    monkeypatch.setattr(_cpu, "few_rows_are_fast", lambda: True)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def layer(dtype: torch.dtype, rows: int, width: int, outer: int, ranks=(3, 18), bank_dtype=torch.float32):
    """x, weight, bias, and a bank of adapters of these ranks."""
    bank = [
        (
            draw(rank, width, dtype=bank_dtype, seed=4 + i, scale=width**-0.5),
            draw(outer, rank, dtype=bank_dtype, seed=7 + i),
            0.5 + i,
        )
        for i, rank in enumerate(ranks)
    ]
    weight = draw(outer, width, dtype=dtype, seed=1, scale=width**-0.5)
    return draw(rows, width, dtype=dtype), weight, draw(outer, dtype=dtype, seed=2), bank


def one_pass(x, weight, bank, segments, bias=None):
    return prepare(x, weight, bank, segments, "cpu", bias=bias, one_pass=True)(x, weight, bias)


def formula(x, weight, bias, bank, segments, dtype):
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    parts = []
    for part, (index, _) in zip(x.split([count for _, count in segments]), segments, strict=True):
        y = part @ weight.t() + bias
        if index >= 0:
            a, b, scale = bank[index]
            y = y + scale * (part @ a.to(dtype).t()) @ b.to(dtype).t()
        parts.append(y)
    return torch.cat(parts)


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """The rows of every call of the native product."""
    rows: list[int] = []
    made = _cpu.few_rows

    def counted(x, *others):
        product = made(x, *others)
        if product is not None:
            rows.append(x.shape[0])
        return product

    monkeypatch.setattr(_cpu, "few_rows", counted)
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bank_dtype", [torch.float32, None], ids=["adapters in float32", "adapters in the type of x"])
@pytest.mark.parametrize(("width", "outer"), [(128, 64), (33, 21), (1, 3), (75, 130)])
def test_numerics_contract(products, dtype, bank_dtype, width, outer):
    for rows in (1, 2, 5, 8, 64):
        x, weight, bias, bank = layer(dtype, rows, width, outer, bank_dtype=bank_dtype or dtype)
        segments = [(0, rows // 3), (-1, rows // 4), (1, rows - rows // 3 - rows // 4)]
        found = one_pass(x, weight, bank, segments, bias=bias)
        plain = formula(x, weight, bias, bank, segments, dtype)
        assert_contract("y", found, plain, formula(x, weight, bias, bank, segments, torch.float64))
    assert products == [1, 2, 5, 8, 64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_has_the_same_bits_whatever_other_rows_there_are(dtype, threads):
    x, weight, bias, bank = layer(dtype, 64, 300, 202)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = one_pass(x, weight, bank, [(0, 30), (1, 34)], bias=bias)
        for start, count in ((0, 1), (3, 2), (7, 3), (11, 5), (16, 8), (13, 16), (5, 20)):
            some = x[start : start + count]
            alone = one_pass(some, weight, bank, [(0, count)], bias=bias)
            assert torch.equal(alone[: 30 - start], together[start : start + count][: 30 - start])
            after = one_pass(x[30 + start - 1 : 30 + start + count], weight, bank, [(-1, 1), (1, count)], bias=bias)
            assert torch.equal(after[1:], together[30 + start : 30 + start + count])
    finally:
        torch.set_num_threads(before)


def test_an_adapter_that_adds_nothing_leaves_the_bits_of_the_base():
    x, weight, bias, [(a, b, scale), _] = layer(torch.float32, 9, 70, 50)
    base = one_pass(x, weight, [], [(-1, 9)], bias=bias)
    assert torch.equal(one_pass(x, weight, [(a, torch.zeros_like(b), scale)], [(0, 9)], bias=bias), base)


def test_where_it_is_not_made_for_the_products_of_pytorch_run(products):
    x, weight, _, bank = layer(torch.float32, 65, 40, 30)
    few, stored = x[:4], weight.t().contiguous()
    exact = bank[0][0].double()
    calls = [
        (x, weight, bank),  # too many rows
        (few, stored.t(), bank),  # a weight stored (in, out)
        (few, weight, [(exact, *bank[0][1:])]),  # an adapter in float64
        (few, weight, [(exact.float().t().contiguous().t(), *bank[0][1:])]),  # A stored (in, R)
        (few, weight, [(draw(65, 40, dtype=torch.float32), draw(30, 65, dtype=torch.float32), 1.0)]),
        (few[:0], weight, bank),
        (few.double(), weight.double(), []),
    ]
    for x, weight, bank in calls:
        segments = [(0 if bank else -1, len(x))]
        y = one_pass(x, weight, bank, segments)
        expected = reference(x, weight, bank, segments)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert not products
    few_of_many = torch.cat([weight, weight], 1)[:, :40].float()
    y = one_pass(few, few_of_many, [], [(-1, 4)])
    torch.testing.assert_close(y, F.linear(few, few_of_many), rtol=1e-5, atol=1e-5)
    assert products == [4]


def test_it_is_chosen_by_the_registers_of_the_machine(monkeypatch):
    monkeypatch.undo()
    assert _cpu.few_rows_are_fast() == native().few_rows_is_fast()
