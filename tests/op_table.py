"""Runs the cases of rlhf_fast/testing/cases against float64: shared by the contract tests of every device."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast.ops import table
from rlhf_fast.testing.cases import CASES, Case
from rlhf_fast.testing.numerics import assert_contract

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPS = table()


def case_backend_pairs(*backends: str):
    """Every case with every one of `backends` that its op has."""
    return [
        pytest.param(case, backend, id=f"{case.name}-{backend}")
        for case in CASES
        for backend in backends
        if backend in OPS[case.op]
    ]


def assert_keeps_contract(case: Case, device: str, backend: str, dtype: torch.dtype) -> None:
    """Values and gradients of `case` keep the numerics contract; the same inputs in float64 are the oracle."""
    inputs = case.inputs(device, dtype)
    exact = {k: x.detach().cpu().double() if x.is_floating_point() else x.cpu() for k, x in inputs.items()}
    oracle = case.run({k: x.requires_grad_(k in case.grads) for k, x in exact.items()}, "reference")
    eager = case.run(case.inputs(device, dtype), "reference")
    results = case.run(inputs, backend)
    assert results.keys() == oracle.keys()
    for name, value in results.items():
        if value.is_floating_point():
            assert_contract(f"{case.name}, {name}", value.cpu(), eager[name].cpu(), oracle[name].double())
        else:
            assert torch.equal(value.cpu(), oracle[name]), f"{case.name}, {name}"
