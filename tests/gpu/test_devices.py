"""Kernels run where their tensors are, whichever device is current."""

from __future__ import annotations

import pytest
import torch

from tests.op_table import assert_keeps_contract, case_backend_pairs

FIRST = {(case.values[0].op, case.values[1]): case for case in reversed(case_backend_pairs("triton", "cuda"))}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("case", "backend"), list(FIRST.values()))
def test_ops_run_on_a_device_that_is_not_the_current_one(case, backend):
    assert torch.cuda.current_device() == 0
    assert_keeps_contract(case, "cuda:1", backend, torch.bfloat16)
