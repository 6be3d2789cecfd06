"""Every op keeps the numerics contract on the GPU, on every backend, as tests/ops/test_contract.py does on the CPU."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast import BackendError, gae, token_logprobs
from rlhf_fast.backends import native
from tests.op_table import DTYPES, OPS, assert_keeps_contract, case_backend_pairs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "backend"), case_backend_pairs("triton", "cuda"))
def test_ops_keep_the_contract_on_the_gpu(case, backend, dtype):
    assert_keeps_contract(case, "cuda", backend, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "backend"), case_backend_pairs("triton", "cuda"))
def test_the_same_inputs_give_the_same_bits_on_the_gpu(case, backend):
    first, second = (case.run(case.inputs("cuda", torch.bfloat16), backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "backend"), case_backend_pairs("triton", "cuda"))
def test_ops_can_be_captured_in_a_cuda_graph(case, backend):
    inputs = case.inputs("cuda", torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = case.run(inputs, backend)  # compiles and warms up, outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.run(inputs, backend)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", OPS["token_logprobs"][1:])
def test_more_than_65536_rows_of_a_large_vocabulary(backend):
    logits = torch.randn(70_000, 32_001, device="cuda", dtype=torch.bfloat16)  # 4.5 GB, past 2^31 elements
    targets = torch.randint(32_001, (70_000,), device="cuda")
    logprobs = token_logprobs(logits, targets, backend=backend)
    last = token_logprobs(logits[-5:].double(), targets[-5:], backend="reference")
    torch.testing.assert_close(logprobs[-5:].double(), last, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [151_936, 262_144])
@pytest.mark.parametrize("backend", OPS["token_logprobs"][1:])
def test_large_vocabularies_in_place(backend, vocabulary):
    logits = torch.randn(16, vocabulary, device="cuda", requires_grad=True)
    targets = torch.randint(vocabulary, (16,), device="cuda")
    (expected,) = torch.autograd.grad(token_logprobs(logits.double(), targets, backend="reference").sum(), logits)
    leaf = logits.detach().clone().requires_grad_()
    token_logprobs(leaf, targets, inplace_backward=True, backend=backend).sum().backward()
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", OPS["gae"][1:])
def test_packed_sequences_of_several_blocks_give_the_bits_of_padded_ones(backend):
    rewards, values, mask = (torch.randn(5, 2500, device="cuda") for _ in range(3))
    options = {"gamma": 0.99, "lam": 0.95, "backend": backend}
    padded = gae(rewards, values, mask=mask > -1, **options)
    starts = torch.arange(6, device="cuda") * 2500
    packed = gae(rewards.view(-1), values.view(-1), mask=mask.view(-1) > -1, cu_seqlens=starts, **options)
    exact = gae(rewards.double(), values.double(), mask=mask > -1, gamma=0.99, lam=0.95, backend="reference")
    for row, line, expected in zip(padded, packed, exact, strict=True):
        assert torch.equal(row.view(-1), line)
        torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("gradient", [0, 64], ids=["forward", "with gradient"])
def test_the_cuda_kernels_say_that_there_is_no_device(gradient):
    if not native().with_cuda:
        pytest.skip("built without a CUDA compiler")
    rows, transform, stats = (1, 1, 2, 2), (1.0, 0, 1.0, 0.0), [0] * 5  # never read: there is nothing to launch on
    with pytest.raises(RuntimeError, match="token_logprobs: no CUDA device or driver here"):
        native().token_logprobs_forward_cuda(0, 0, rows, 2, 0, 1, 0, transform, stats, gradient, 0, 0)


def test_the_cuda_backend_refuses_a_tensor_on_the_cpu():
    with pytest.raises(BackendError, match="it runs on cuda tensors"):
        token_logprobs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), backend="cuda")
