"""The ops on a head as a GPU computes them: half-precision products, padded rows, one product for a weight."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast import PolicyObjective, linear_logprobs, linear_policy_loss
from rlhf_fast.ops.head import _loss, _products, head, tiles
from rlhf_fast.ops.head.tiles import chunks, default_chunk_tokens
from rlhf_fast.testing.numerics import assert_contract
from tests.linear_losses import plan_as_on_a_gpu

HALVES = [torch.bfloat16, torch.float16]
NAMES = ("hidden", "weight", "bias", "lora_a", "lora_b")


def draw(dtype=torch.float32, rows=24, width=16, vocabulary=97, rank=4):
    g = torch.Generator().manual_seed(0)
    shapes = (rows, width), (vocabulary, width), (vocabulary,), (rank, width), (vocabulary, rank)
    tensors = dict(zip(NAMES, (torch.randn(s, generator=g) / s[-1] ** 0.25 for s in shapes), strict=True))
    return {name: x.to(dtype) for name, x in tensors.items()}, torch.randint(vocabulary, (rows,), generator=g)


@pytest.fixture
def gpu(pytorch, monkeypatch):
    """The plan of a GPU with PyTorch 2.13, rows of logits padded, products of an odd vocabulary in two parts."""
    pytorch("2.13.0+cu130")
    monkeypatch.setattr(_products, "LONG", 64)
    monkeypatch.setitem(head.ROW_MULTIPLE, "cpu", 16)
    plan_as_on_a_gpu(monkeypatch)


def logprobs(tensors, targets, **options):
    lora = (tensors["lora_a"], tensors["lora_b"], 2.0)
    return linear_logprobs(
        tensors["hidden"], tensors["weight"], targets, bias=tensors["bias"], head_lora=lora, chunk_tokens=10, **options
    )


def losses(tensors, targets, **options):
    old, advantages = torch.linspace(-6, -4, len(targets)), torch.linspace(-1, 1, len(targets))
    return linear_policy_loss(
        tensors["hidden"], tensors["weight"], targets, old, advantages, bias=tensors["bias"],
        head_lora=(tensors["lora_a"], tensors["lora_b"], 2.0), objective=PolicyObjective(clip_eps_high=9.0),
        chunk_tokens=10, **options,
    ).loss  # fmt: skip


def results(op, tensors, targets, trained=NAMES, **options):
    leaves = {name: x.detach().clone().requires_grad_(name in trained) for name, x in tensors.items()}
    value = op(leaves, targets, **options)
    upstream = torch.linspace(0.5, 1.5, len(targets), dtype=value.dtype) if value.dim() else 1
    (value * upstream).sum().backward()
    return {"value": value.detach()} | {name: leaves[name].grad for name in trained}


@pytest.mark.parametrize("op", [logprobs, losses])
@pytest.mark.parametrize("mixed", [False, True], ids=["one type", "float32 LoRA"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_keeps_the_contract(gpu, dtype, mixed, op):
    tensors, targets = draw(dtype)
    if mixed:
        tensors |= {name: x.float() / 3 for name, x in tensors.items() if name.startswith("lora")}
    oracle = results(op, {name: x.double() for name, x in tensors.items()}, targets, backend="reference")
    eager = results(op, tensors, targets, backend="reference")
    found = results(op, tensors, targets, backend="triton")
    for name, exact in oracle.items():
        narrow = dtype if name != "value" else found[name].dtype  # d logits is of the head's type
        assert_contract(name, found[name].to(narrow), eager[name].to(narrow), exact)


@pytest.mark.parametrize("trained", [("hidden",), NAMES], ids=["frozen", "trained"])
def test_padded_rows_of_logits_change_nothing(trained, monkeypatch):
    tensors, targets = draw()
    for backend in ("cpu", "triton"):
        expected = results(logprobs, tensors, targets, trained, backend=backend)
        with monkeypatch.context() as patch:
            patch.setitem(head.ROW_MULTIPLE, "cpu", 16)
            found = results(logprobs, tensors, targets, trained, backend=backend)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", [logprobs, losses])
def test_the_gradient_of_a_weight_that_fits_is_one_product_into_its_own_type(gpu, op, monkeypatch):
    added, multiplied = [], []
    add, real = _products.add, torch.Tensor.addmm_
    monkeypatch.setattr(_products, "add", lambda total, *rest: (added.append(tuple(total.shape)), add(total, *rest)))

    def addmm(total, a, b, **options):
        multiplied.append((total.dtype, tuple(total.shape), a.shape[1]))
        return real(total, a, b, **options)

    monkeypatch.setattr(torch.Tensor, "addmm_", addmm)
    tensors, targets = draw(torch.bfloat16)
    results(op, tensors, targets, ("hidden", "weight"), backend="triton", **budget(op))
    assert multiplied.count((torch.bfloat16, (96, 16), 24)) == 1
    assert not {(97, 16), (96, 16)} & set(added)


def budget(op):
    return {"scratch_bytes": 1 << 20} if op is losses else {}


def test_a_loss_keeps_gradients_of_logits_in_place_of_a_float32_sum_for_its_head(gpu):
    tensors, targets = draw(torch.bfloat16, rows=64)
    tensors["weight"].requires_grad_()
    call = _loss.checked(
        tensors["hidden"], tensors["weight"], targets, None, None, 1.0, 1.0, None, None, None, 16, None
    )
    kept, sums = 64 * 112 * 2, 97 * 16 * 4
    fixed, row = _loss._scratch(call.head, 64)
    for left, keeps in ((kept - sums, True), (kept - sums - 1, False)):
        assert _loss.keeps_gradients(call._replace(scratch_bytes=fixed + 16 * row + left), "triton") is keeps
    room = call._replace(scratch_bytes=fixed + 16 * row + kept - 1)
    for other in (tensors["weight"].detach(), tensors["weight"].detach().half().requires_grad_()):
        assert not _loss.keeps_gradients(room._replace(head=room.head._replace(weight=other)), "triton")


def test_tiles_of_a_gpu_are_of_whole_waves_and_what_is_cut_in_tiles_of_128():
    weight = torch.empty(151_936, 4096, dtype=torch.bfloat16, device="meta")
    assert default_chunk_tokens(weight) == 1024  # 1,766 rows would fit
    assert [s.stop - s.start for s in chunks(5000, 1024)] == [1024] * 4 + [904]
    assert [s.stop - s.start for s in chunks(1500, 1766)] == [1536 - 36]
    assert [s.stop - s.start for s in chunks(8192, 1766)] == [1664] * 4 + [1536]
    assert [s.stop - s.start for s in chunks(1000, 130)] == [128] * 7 + [104]


def test_rows_of_logits_of_a_gpu_begin_at_a_multiple_of_16():
    weight = torch.empty(50_257, 8, dtype=torch.bfloat16, device="meta")
    buffer = tiles.tile_buffer(weight, 3, torch.float32)
    assert (buffer.shape, buffer.stride()) == ((3, 50_257), (50_272, 1))
    narrow = head.narrowed(buffer, torch.bfloat16)
    assert (narrow.dtype, narrow.shape, narrow.stride()) == (torch.bfloat16, (3, 50_257), (50_272, 1))
