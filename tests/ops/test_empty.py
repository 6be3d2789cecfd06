"""No row, no column, no sequence, no pair: the result that is right for nothing, or one line that says why not."""

from __future__ import annotations

import pytest
import torch

import rlhf_fast
from tests import op_inputs
from tests.op_inputs import CASES, OPS, each

# What may be missing; the sizes of which there must be at least one raise for all ops that have them.
SIZES = ("B", "T", "V", "D", "R", "ANSWERS", "REWARDS", "PAIRS", "BINS", "TARGETS")


def _concerned(size: str, monkeypatch) -> list:
    """The cases whose tensors have that size; it is 0 from here on."""
    before = {case.name: {name: x.shape for name, x in case.tensors().items()} for case in CASES}
    monkeypatch.setattr(op_inputs, size, 0)
    return [case for case in CASES if {n: x.shape for n, x in case.tensors().items()} != before[case.name]]


def _outcome(case, backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor] | str:
    try:
        return case.run(case.inputs("cpu", dtype), backend)
    except ValueError as error:
        return "ValueError of one line" if "\n" not in str(error) else str(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_where_a_size_is_0_every_backend_gives_what_the_definition_gives(size, dtype, monkeypatch):
    concerned = _concerned(size, monkeypatch)
    assert concerned
    for case in concerned:
        expected = _outcome(case, "reference", dtype)
        for backend in ({"cpu", "triton"} if dtype == torch.float32 else {"cpu"}) & set(OPS[case.op]):
            found = _outcome(case, backend, dtype)
            if isinstance(expected, str):
                assert found == expected, (case.name, backend)
                continue
            assert not isinstance(found, str), (case.name, backend, found)
            for name, value in expected.items():
                assert not value.isnan().any(), (case.name, name)
                size = float(value.abs().max()) if value.numel() else 0.0
                tolerance = (2e-2 if dtype == torch.bfloat16 else 1e-5) * size + 1e-6  # two roundings of half a percent
                assert torch.allclose(found[name], value, rtol=0, atol=tolerance), (case.name, backend, name)


@pytest.mark.parametrize(("case", "backend"), each("reference", "cpu", of=lambda case: "cu_seqlens" in case.tensors()))
@pytest.mark.parametrize("bounds", [[], [0]], ids=["no bound", "no sequence"])
def test_bounds_of_no_sequence_raise_where_there_must_be_one(case, backend, bounds, monkeypatch):
    monkeypatch.setattr(op_inputs, "B", 0)
    monkeypatch.setattr(op_inputs, "T", 0)
    inputs = case.inputs("cpu", torch.float32) | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int64)}
    of_sequences = ("bootstrap", "overlong", "ref_chosen", "ref_rejected")
    inputs |= {name: torch.ones(0) for name in of_sequences if name in inputs}
    if bounds and case.op == "linear_preference_loss":  # whose sequences come in pairs: none is an even number
        assert not any(x.isnan().any() for x in case.run(inputs, backend).values())
        return
    with pytest.raises(ValueError, match="cu_seqlens must be"):
        case.run(inputs, backend)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_a_linear_layer_of_no_segment_has_no_row_and_gradients_of_0(backend):
    x, weight = torch.ones(0, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    a, b = torch.ones(1, 3, requires_grad=True), torch.ones(2, 1, requires_grad=True)
    y = rlhf_fast.lora_linear(x, weight, [(a, b, 1.0)], [], backend=backend)
    assert y.shape == (0, 2)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (2, 0, 3, 5), (2, 3, 0, 5)], ids=str)
def test_rows_of_logits_may_be_missing_along_any_dimension(shape, backend):
    logits, ids = torch.ones(shape), torch.zeros(shape[:-1], dtype=torch.int64)
    assert rlhf_fast.token_logprobs(logits, ids, backend=backend).shape == shape[:-1]
    assert rlhf_fast.token_kl(logits, logits, backend=backend).shape == shape[:-1]
