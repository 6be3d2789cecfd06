"""NaN never hides: of any payload, where it counts in any argument of any op. Behind a mask it never shows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rlhf_fast
from tests.op_inputs import CASES, each

# By bits: quiet and signalling ones of both signs, with the lowest and with all bits of the payload.
PAYLOADS = {
    torch.float32: (0x7FC00000, 0x7F800001, 0xFF800001, 0xFFC00001, 0x7FFFFFFF),
    torch.float64: (0x7FF8000000000000, 0x7FF0000000000001, 0xFFF0000000000001, 0xFFFFFFFFFFFFFFFF),
    torch.bfloat16: (0x7FC0, 0x7F81, 0xFF81, 0xFFC1, 0x7FFF),
    torch.float16: (0x7E00, 0x7C01, 0xFC01, 0xFE01, 0x7FFF),
}
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def nan(dtype: torch.dtype, bits: int) -> Tensor:
    width = dtype.itemsize * 8
    signed = bits - (1 << width) if bits >> (width - 1) else bits
    made = torch.tensor([signed], dtype=INTEGERS.get(dtype, torch.int16)).view(dtype)
    assert made.isnan().all()
    return made


REFUSED = {"temperature", "lam", "value_lam"}  # by a ValueError, as what is not in their range


def _places(name: str, x: Tensor, mask: Tensor | None) -> tuple[list[int], list[int]]:
    """(flat places that count, places that do not) of some elements of an argument."""
    if mask is None or x.shape[: mask.dim()] != mask.shape or name == "mask":
        return sorted({0, x.numel() // 2, x.numel() - 1}), []
    inner = x.shape[mask.dim() :].numel()
    counted, masked = (m.nonzero()[:, 0] * inner for m in ((mask != 0).view(-1), (mask == 0).view(-1)))
    return [int(counted[0]), int(counted[-1]) + inner - 1], [int(masked[0]), int(masked[-1]) + inner - 1]


def _with(case, dtype: torch.dtype, name: str, place: int, bits: int) -> dict[str, Tensor]:
    inputs = {n: x.detach() for n, x in case.inputs("cpu", dtype).items()}
    x = inputs[name].clone(memory_format=torch.contiguous_format)
    x.view(-1)[place : place + 1] = nan(x.dtype, bits)
    return inputs | {name: x}


def _mask(inputs: dict[str, Tensor]) -> Tensor | None:
    """What counts, of overlong sequences and tokens behind the last one as well."""
    mask = inputs.get("mask")
    if mask is None:
        return None
    if "overlong" in inputs and mask.dim() == 2:
        mask = mask & ~inputs["overlong"][:, None]
    return mask


@pytest.mark.parametrize(("case", "backend"), each("reference", "cpu", "triton"))
def test_nan_in_any_argument_shows_where_it_counts_and_nowhere_else(case, backend):
    for name, x in case.tensors().items():
        if not x.is_floating_point() or name in REFUSED:
            continue
        if (case.op, name) == ("token_kl", "logits") and "top_k" in case.options:
            continue  # looked at where the reference's most probable tokens are
        dtype = torch.float32 if backend != "cpu" else torch.float16
        counted, masked = _places(name, x, _mask(case.inputs("cpu", dtype)))
        if backend == "triton":  # interpreted: what is behind the mask, test_contract tries
            counted, masked = counted[:1], []
        for place in counted:
            found = case.call(_with(case, dtype, name, place, PAYLOADS[dtype][0]), backend)
            assert any(r.is_floating_point() and bool(r.isnan().any()) for r in found), f"{name}[{place}]"
        for place in masked:
            found = case.call(_with(case, dtype, name, place, PAYLOADS[dtype][0]), backend)
            assert not any(r.is_floating_point() and bool(r.isnan().any()) for r in found), f"{name}[{place}], masked"


V = 5000  # more than one block of every kernel, and not a multiple of one


def _row(dtype: torch.dtype) -> Tensor:
    """Logits that rise from block to block by more than a probability can bear, and fall in the last one."""
    rising = torch.linspace(-1, 1, V) + 300 * (torch.arange(V) // 1024).float()
    rising[-100:] = -2000
    return rising.to(dtype)


PLACES = {"first": 0, "before a block that raises the maximum": 700, "beside the maximum": V - 102,
          "the maximum": V - 101, "in the last block": V - 1}  # fmt: skip


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", PAYLOADS, ids=str)
def test_nan_in_any_block_of_logits_shows_in_all_that_is_made_of_the_row(dtype, backend, place):
    payloads, targets = (PAYLOADS[dtype], {place, 3, V - 101}) if backend == "cpu" else (PAYLOADS[dtype][1:2], {3})
    for bits in payloads:
        logits = torch.stack([_row(dtype), _row(dtype)])
        logits[0, place : place + 1] = nan(dtype, bits)
        for target in targets:
            leaf = logits.clone().requires_grad_()
            found = rlhf_fast.token_logprobs(
                leaf, torch.tensor([target, target]), return_entropy=True, return_stats=True, backend=backend
            )
            logprobs, entropy, stats = found
            assert logprobs[0].isnan(), (hex(bits), target)
            assert entropy[0].isnan()
            assert stats.lse[0].isnan()
            assert stats.sum_p_squared[0].isnan()
            assert not any(x[1].isnan() for x in (logprobs, entropy, stats.lse, stats.sum_p_squared))
            (gradient,) = torch.autograd.grad(logprobs.sum(), leaf)
            assert gradient[0].isnan().any() if backend == "reference" else gradient[0].isnan().all()
            assert not gradient[1].isnan().any()
        for divergence in ("reverse", "forward", "js") if backend == "cpu" else ("js",):
            of_both = rlhf_fast.token_kl(logits.flip(0), logits, variant=divergence, backend=backend)
            assert of_both.isnan().all(), (hex(bits), divergence)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_nan_in_the_bias_of_a_head_shows_in_every_log_probability(backend, softcap):
    hidden, weight, bias = torch.randn(3, 4), torch.randn(V, 4), torch.randn(V)
    bias[700] = torch.nan
    ids = torch.tensor([0, 1, 2])
    found = rlhf_fast.linear_logprobs(hidden, weight, ids, bias=bias, softcap=softcap, backend=backend)
    assert found.isnan().all()


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_infinite_logits_give_what_log_softmax_gives(dtype, backend):
    inf = torch.inf
    logits = torch.tensor(
        [[0.0, inf, 1.0], [0.0, -inf, 1.0], [-inf, -inf, 2.0], [-inf, -inf, -inf], [inf, inf, 0.0]], dtype=dtype
    )
    expected = torch.log_softmax(logits.double(), -1)
    for target in range(3):
        found = rlhf_fast.token_logprobs(logits, torch.full((5,), target), backend=backend)
        torch.testing.assert_close(found.double(), expected[:, target], equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_an_infinite_logit_under_a_softcap_is_the_bound(backend):
    logits = torch.tensor([[torch.inf, 0.0, 1.0]], dtype=torch.float64)
    expected = torch.log_softmax(3 * torch.tanh(logits / 3), -1)
    for target in range(3):
        found = rlhf_fast.token_logprobs(logits, torch.tensor([target]), softcap=3.0, backend=backend)
        torch.testing.assert_close(found, expected[:, target])


@pytest.mark.parametrize("case", [c for c in CASES if "old_values" in c.tensors()], ids=lambda c: c.name)
def test_nan_in_the_old_values_reaches_loss_and_gradient(case):
    inputs = _with(case, torch.float32, "old_values", 0, PAYLOADS[torch.float32][1])
    leaves = {n: inputs[n].requires_grad_() for n in case.grads}
    loss = case.call(inputs | leaves, "cpu")[0]
    assert loss.isnan()
    assert torch.autograd.grad(loss, leaves[case.grads[0]])[0].isnan().any()
