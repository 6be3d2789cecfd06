"""The cluster kernel of token_logprobs on the host, beside the row kernel: one thread per CUDA thread of a cluster."""

from __future__ import annotations

import ctypes

import pytest
import torch

from rlhf_fast.backends import DTYPE_CODES
from rlhf_fast.ops.tokens.token_logprobs import empty_stats
from rlhf_fast.testing.numerics import assert_contract
from tests.host_cuda.token_logprobs import address, arguments, with_gradients

DTYPES = list(DTYPE_CODES)


@pytest.fixture(scope="module")
def host(compiled):
    return compiled("token_logprobs")


def aligned(logits):
    """The same values in rows that start at multiples of 16 bytes, with more memory behind each."""
    padded = torch.full((*logits.shape[:-1], logits.shape[-1] // 8 * 8 + 16), torch.nan, dtype=logits.dtype)
    return padded[..., : logits.shape[-1]].copy_(logits)


def run(host, logits, targets, mask=None, *, slices, in_cluster=True, in_place=False, want_more=True, **transform):
    """[*stats, gradient] with the rows in so many slices; None where a cluster cannot."""
    stats = [s.fill_(torch.nan) for s in empty_stats(logits, want_more, want_more, targets.shape[2:])]
    gradient = logits if in_place else aligned(torch.full_like(logits, torch.nan))
    pack = 16 // logits.element_size()
    size = -(-logits.shape[-1] // (slices * pack)) * pack
    ran = host.forward_in_slices(
        *arguments(logits, targets, mask, transform, stats), ctypes.c_void_p(address(gradient)), slices,
        ctypes.c_int64(size), in_cluster,
    )  # fmt: skip
    return [*stats, gradient] if ran else None


def assert_same_bits(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.nan_to_num(7e7), y.nan_to_num(7e7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("vocabulary", "slices", "per_row", "transform"),
    [
        (3, 1, 1, {}),
        (17, 4, 3, {"temperature": 0.7}),  # more slices than 16-byte packs
        (9001, 2, 1, {"temperature": 1.3, "softcap": 5.0}),
        (5003, 8, 2, {"logit_scale": 0.5}),  # a last slice that is shorter
    ],
    ids=str,
)
def test_values_and_gradient_keep_the_numerics_contract(host, dtype, vocabulary, slices, per_row, transform):
    torch.manual_seed(vocabulary)
    logits, targets = (4 * torch.randn(1, 1, vocabulary)).to(dtype), torch.randint(vocabulary, (1, 1, per_row))
    ones, none = torch.ones(targets.shape), torch.zeros(1, 1)
    oracle = with_gradients(logits.double(), targets, transform, ones, none, none)
    eager = with_gradients(logits, targets, transform, ones, none, none)
    logprobs, entropy, *_, gradient = run(host, aligned(logits), targets, slices=slices, **transform)
    for name, *values in zip(
        ("logprobs", "entropy", "gradient"), (logprobs, entropy, gradient), eager, oracle, strict=True
    ):
        assert_contract(name, *values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("want_more", [True, False])
def test_the_row_kernel_gives_the_same_bits_as_a_cluster(host, dtype, want_more):
    """Also without a gradient: old log-probabilities and the policy's are equal before the first step."""
    torch.manual_seed(1)
    vocabulary = 40_007 if dtype == torch.float32 else 9001  # more than one stage of 16 KB in a slice
    logits = aligned((4 * torch.randn(1, 1, vocabulary)).to(dtype))
    targets = torch.tensor([[[0, vocabulary - 1, 4500, vocabulary, -1]]])
    options = {"slices": 4, "want_more": want_more, "temperature": 0.8}
    expected = run(host, logits, targets, **options, in_cluster=False)
    assert expected[0].isnan().tolist() == [[[False, False, False, True, True]]]
    assert_same_bits(run(host, logits, targets, **options), expected)


def test_the_gradient_may_be_written_over_the_logits(host):
    torch.manual_seed(2)
    logits = aligned(torch.randn(1, 1, 5001).bfloat16())
    targets = torch.randint(5001, (1, 1))
    expected = run(host, logits, targets, slices=4)
    assert_same_bits(run(host, logits, targets, slices=4, in_place=True), expected)


def test_masked_rows_are_never_read_and_give_zero(host):
    logits = aligned(torch.randn(1, 2, 40))
    logits[0, 0] = torch.nan
    mask = torch.tensor([[0, 1]], dtype=torch.uint8)
    *stats, gradient = run(host, logits, torch.tensor([[10**9, 2]]), mask, slices=2)
    assert all(s[0, 0] == 0 for s in stats)
    assert not gradient[0, 0].any()
    assert torch.isfinite(gradient).all()


def test_a_target_outside_the_vocabulary_leaves_the_gradient_of_the_log_sum_exp(host):
    logits = aligned(torch.randn(1, 1, 36))
    logprobs, *_, gradient = run(host, logits, torch.tensor([[2**62]]), slices=4)
    assert logprobs.isnan().all()
    torch.testing.assert_close(gradient, -torch.softmax(logits, -1))


def test_ties_at_the_maximum_and_banned_tokens_are_exact_across_slices(host):
    logits = aligned(torch.full((1, 2, 4096), -torch.inf))
    logits[0, 0, [0, 4000]] = 5.0  # in the first and the last slice; nothing at all in those between
    logits[0, 1, 2047] = 3.0  # nothing but the target
    logprobs, entropy, *_, gradient = run(host, logits, torch.tensor([[4000, 2047]]), slices=4)
    half = torch.tensor(2.0).log().item()
    torch.testing.assert_close(logprobs, torch.tensor([[-half, 0.0]]))
    torch.testing.assert_close(entropy, torch.tensor([[half, 0.0]]))
    torch.testing.assert_close(gradient[0, 0, [0, 4000]], torch.tensor([-0.5, 0.5]))
    assert gradient.count_nonzero() == 2


def test_large_logits_keep_the_numerics_contract(host):
    torch.manual_seed(3)
    logits = 1e4 + 4 * torch.randn(1, 1, 3000)
    logits[..., ::7] *= -1
    targets, ones, none = torch.tensor([[[1, 7]]]), torch.ones(1, 1, 2), torch.zeros(1, 1)
    oracle, eager = (with_gradients(x, targets, {}, ones, none, none) for x in (logits.double(), logits))
    logprobs, entropy, *_, gradient = run(host, aligned(logits), targets, slices=4)
    found = (logprobs, entropy, gradient)
    for name, *values in zip(("logprobs", "entropy", "gradient"), found, eager, oracle, strict=True):
        assert_contract(name, *values)


@pytest.mark.parametrize("spoiled", [lambda x: x[..., 70].fill_(torch.nan), lambda x: x.fill_(-torch.inf)])
@pytest.mark.parametrize("in_cluster", [True, False])
def test_a_nan_and_nothing_but_banned_tokens_make_the_row_nan(host, in_cluster, spoiled):
    logits = aligned(torch.full((1, 1, 2000), -torch.inf))
    logits[..., 1500] = 1.0  # the NaN comes before any finite logit
    spoiled(logits)
    logprobs, entropy, *_ = run(host, logits, torch.tensor([[1500]]), slices=4, in_cluster=in_cluster)
    assert logprobs.isnan().all()
    assert entropy.isnan().all()


def test_a_confident_token_keeps_its_value_and_its_gradient(host):
    logits = torch.full((1, 1, 64), -torch.inf)
    logits[0, 0, 3], logits[0, 0, 60] = 20.0, 0.0  # leader and follower in different slices
    logprobs, *_, gradient = run(host, aligned(logits), torch.tensor([[3]]), slices=4)
    p = 2.061153618190204e-09  # 1 / (1 + e^20)
    torch.testing.assert_close(logprobs.double(), torch.tensor([[-p]], dtype=torch.float64), rtol=1e-6, atol=0)
    found = gradient[0, 0, [3, 60]].double()
    torch.testing.assert_close(found, torch.tensor([p, -p], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("logits", [torch.zeros(1, 1, 41)[..., 1:], torch.zeros(1, 2, 41)], ids=["first", "second"])
def test_a_row_that_does_not_start_at_a_multiple_of_16_bytes_is_left_to_the_row_kernel(host, logits):
    targets = torch.zeros(logits.shape[:-1], dtype=torch.long)
    assert run(host, logits, targets, slices=2) is None
    assert run(host, logits, targets, slices=2, in_cluster=False) is not None


@pytest.mark.parametrize(
    ("dtype", "vocabulary", "count"),
    [
        (torch.bfloat16, 1, 1),
        (torch.bfloat16, 32_000, 1),
        (torch.bfloat16, 50_264, 2),
        (torch.bfloat16, 151_936, 4),
        (torch.bfloat16, 262_144, 8),
        (torch.float32, 151_936, 8),
        (torch.float32, 262_144, 8),  # slices of 128 KB: one block per multiprocessor
        (torch.float64, 262_144, 1),  # no cluster holds 2 MB
    ],
    ids=str,
)
def test_a_row_is_divided_among_as_few_blocks_as_leave_room_for_three(host, dtype, vocabulary, count):
    size = ctypes.c_int64()
    assert host.slices(DTYPE_CODES[dtype], ctypes.c_int64(vocabulary), ctypes.byref(size)) == count
    assert size.value * count >= vocabulary
    assert count == 1 or size.value * dtype.itemsize % 16 == 0
