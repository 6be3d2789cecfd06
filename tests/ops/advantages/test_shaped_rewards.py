"""shaped_rewards: the KL penalty per token and the score at the last one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast import shaped_rewards
from rlhf_fast.ops.advantages import shaped_rewards as module
from rlhf_fast.testing.numerics import assert_contract

BACKENDS = ("reference", "cpu", "triton")
KERNELS = ("cpu", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plain(scores, kl, mask, kl_coef, clip):
    rewards = torch.where(mask, -kl_coef * kl, 0)
    for b in range(len(scores)):
        if mask[b].any():
            rewards[b, mask[b].nonzero().max()] += scores[b].clamp(-clip, clip)
    return rewards


def example(shape=(4, 17), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores, kl = 3 * torch.randn(shape[0], generator=generator), torch.randn(shape, generator=generator)
    return scores.to(dtype), kl.to(dtype), torch.rand(shape, generator=generator) > 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_rows_by_hand(backend):
    scores, kl = torch.tensor([3.0, -9.0]), torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    ours = shaped_rewards(scores, kl, mask=mask, kl_coef=0.5, clip=5.0, backend=backend)
    assert ours.tolist() == [[0.0, -1.0, 1.0], [-0.5, -6.0, 0.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_a_valid_token_gives_nothing_and_nan_behind_the_mask_stays_there(backend):
    kl = torch.tensor([[math.nan, 2.0, math.nan], [math.nan] * 3])
    mask = torch.tensor([[False, True, False], [False] * 3])
    ours = shaped_rewards(torch.tensor([1.0, math.nan]), kl, mask=mask, kl_coef=0.5, backend=backend)
    assert ours.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_score_that_is_nan_is_not_hidden_by_the_clip(backend):
    ours = shaped_rewards(torch.tensor([math.nan]), torch.zeros(1, 2), mask=torch.ones(1, 2), kl_coef=1.0, clip=5.0,
                          backend=backend)  # fmt: skip
    assert ours[0, 0] == 0
    assert ours[0, 1].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (4, 17), (2, 2100)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_keep_the_numerics_contract(backend, shape, dtype):
    scores, kl, mask = example(shape, dtype)
    ours = shaped_rewards(scores, kl, mask=mask, kl_coef=0.3, clip=2.0, backend=backend)
    assert_contract(
        "rewards", ours, plain(scores, kl, mask, 0.3, 2.0), plain(scores.double(), kl.double(), mask, 0.3, 2.0)
    )


@settings(max_examples=25, deadline=None)
@given(time=st.integers(1, 20), left=st.integers(0, 20), right=st.integers(0, 20), seed=st.integers(0, 99))
def test_padding_changes_nothing_bit_for_bit(time, left, right, seed):
    scores, kl, mask = example((3, time), seed=seed)
    padded_kl = torch.nn.functional.pad(kl, (left, right), value=math.nan)
    padded_mask = torch.nn.functional.pad(mask, (left, right))
    for backend in BACKENDS:
        ours = shaped_rewards(scores, kl, mask=mask, kl_coef=0.3, backend=backend)
        padded = shaped_rewards(scores, padded_kl, mask=padded_mask, kl_coef=0.3, backend=backend)
        assert torch.equal(torch.nn.functional.pad(ours, (left, right)), padded)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_same_values(backend):
    scores, kl, mask = example()
    expected = shaped_rewards(scores, kl[:, 3:].contiguous(), mask=mask[:, 3:], kl_coef=0.3, backend=backend)
    for strided in (kl[:, 3:], kl.T.contiguous().T[:, 3:]):
        assert torch.equal(expected, shaped_rewards(scores, strided, mask=mask[:, 3:], kl_coef=0.3, backend=backend))


def test_the_reference_is_differentiable_twice():
    scores, kl, mask = example((2, 5), torch.float64)
    run = lambda s, k: module.reference(s, k, mask=mask, kl_coef=0.3, clip=50.0)  # noqa: E731
    inputs = (scores.requires_grad_(), kl.requires_grad_())
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_registered_op_passes_opcheck_and_compiles(backend):
    scores, kl, mask = example()
    op = torch.ops.rlhf_fast.shaped_rewards.default
    torch.library.opcheck(op, (scores, kl, mask.to(torch.uint8), 0.3, 2.0, backend))
    run = lambda s, k: shaped_rewards(s, k, mask=mask, kl_coef=0.3, backend=backend)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(scores, kl), compiled(scores, kl))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl": torch.zeros(4)}, r"kl must be \(B, T\), got \(4,\)"),
        ({"scores": torch.zeros(3)}, r"\(B,\) = \(4,\), got \(3,\)"),
        ({"mask": torch.zeros(4, 5)}, r"\(4, 17\), got \(4, 5\)"),
        ({"clip": 0.0}, "clip must be > 0, got 0.0"),
        ({"kl_coef": math.nan}, "kl_coef must be finite, got nan"),
    ],
)
def test_bad_input_raises_with_the_values(change, message):
    scores, kl, mask = example()
    with pytest.raises(ValueError, match=message):
        shaped_rewards(**{"scores": scores, "kl": kl, "mask": mask, "kl_coef": 1.0, **change})
