"""group_advantages: every kind, groups by size and by ids."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rlhf_fast.kernels import group_advantages as kernels

from rlhf_fast import group_advantages
from rlhf_fast.ops import group_advantages as module
from tests.numerics import assert_contract

BACKENDS = ("reference", "cpu", "triton")
KERNELS = ("cpu", "triton")
KINDS = tuple(module.KINDS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plain(rewards, ids, kind, eps=1e-4):
    """By definition, one group at a time; rloo as the mean of the others."""
    advantages = torch.zeros_like(rewards)
    for group in set(ids.tolist()):
        r = rewards[ids == group]
        if len(r) > 1 and kind == "rloo":
            advantages[ids == group] = r - (r.sum() - r) / (len(r) - 1)
        elif len(r) > 1:
            advantages[ids == group] = (r - r.mean()) / (r.std() + eps if kind == "grpo" else 1)
    return advantages


def example(groups, group_size, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards = (torch.randn(groups * group_size, generator=generator) * 3 + 1).to(dtype)
    return rewards, torch.arange(groups).repeat_interleave(group_size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("grpo", [-1.0, 0.0, 1.0]),  # mean 4, std sqrt((4 + 0 + 4) / 2) = 2
        ("dr_grpo", [-2.0, 0.0, 2.0]),
        ("rloo", [-3.0, 0.0, 3.0]),  # 2 - (4 + 6) / 2, 4 - (2 + 6) / 2, 6 - (2 + 4) / 2
    ],
)
def test_one_group_by_hand(backend, kind, expected):
    rewards = torch.tensor([2.0, 4.0, 6.0])
    assert group_advantages(rewards, group_size=3, kind=kind, eps=0, backend=backend).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (5, 7), (2, 1100)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_keep_the_numerics_contract(backend, shape, dtype, kind):
    rewards, ids = example(*shape, dtype)
    ours = group_advantages(rewards, group_size=shape[1], kind=kind, backend=backend)
    assert_contract(kind, ours, plain(rewards, ids, kind), plain(rewards.double(), ids, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rewards_and_a_group_of_one_give_exactly_0(backend, kind):
    constant = torch.full((9,), 0.1)
    assert group_advantages(constant, group_size=3, kind=kind, eps=0, backend=backend).eq(0).all()
    assert (
        group_advantages(constant, group_ids=torch.zeros(9, dtype=torch.int64), kind=kind, backend=backend).eq(0).all()
    )
    assert group_advantages(torch.tensor([2.0, 5.0]), group_size=1, kind=kind, eps=0, backend=backend).eq(0).all()
    assert group_advantages(torch.zeros(0), group_size=4, kind=kind, backend=backend).shape == (0,)


ids = st.lists(st.sampled_from([-(2**63), -3, 0, 7, 2**63 - 1]), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(ids=ids, kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
def test_ids_are_any_integers_in_any_order(ids, kind, seed):
    rewards, ids = example(len(ids), 1, seed=seed)[0], torch.tensor(ids)
    expected = plain(rewards.double(), ids, kind)
    for backend in BACKENDS:
        ours = group_advantages(rewards, group_ids=ids, kind=kind, backend=backend)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_the_answers_permutes_the_advantages(backend, kind):
    rewards, ids = example(4, 5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    by_size = group_advantages(rewards, group_size=5, kind=kind, backend=backend)
    by_ids = group_advantages(rewards[order], group_ids=ids[order], kind=kind, backend=backend)
    torch.testing.assert_close(by_size[order], by_ids, rtol=1e-6, atol=1e-6)


def test_strided_rewards_give_the_same_values():
    rewards, _ = example(4, 6)
    for backend in BACKENDS:
        expected = group_advantages(rewards[::2].clone(), group_size=3, backend=backend)
        assert torch.equal(expected, group_advantages(rewards[::2], group_size=3, backend=backend))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_differentiable_twice(kind):
    rewards, ids = example(2, 3, torch.float64)
    run = lambda r: module.reference(r, ids, kind=kind)  # noqa: E731
    assert torch.autograd.gradcheck(run, (rewards.requires_grad_(),))
    assert torch.autograd.gradgradcheck(run, (rewards,))


def test_every_kind_has_a_kernel():
    assert tuple(kernels.DIVISORS) == KINDS


@pytest.mark.parametrize("backend", KERNELS)
def test_the_registered_op_passes_opcheck_and_compiles(backend):
    rewards, ids = example(4, 5)
    op = torch.ops.rlhf_fast.group_advantages.default
    torch.library.opcheck(op, (rewards, None, None, 5, "grpo", 1e-4, backend))
    run = lambda r: group_advantages(r, group_ids=ids, backend=backend)  # noqa: E731
    assert torch.equal(run(rewards), torch.compile(run, fullgraph=True, backend="aot_eager")(rewards))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 4}, "B=6, group_size=4"),
        ({"group_size": 0}, "B=6, group_size=0"),
        ({}, "exactly one of group_size and group_ids"),
        ({"group_size": 3, "group_ids": torch.zeros(6, dtype=torch.int64)}, "got group_size=3"),
        ({"group_ids": torch.zeros(5, dtype=torch.int64)}, r"\(6,\), got \(5,\)"),
        ({"group_size": 3, "kind": "gpro"}, "one of grpo, dr_grpo, rloo, got 'gpro'"),
        ({"group_size": 3, "eps": -1.0}, "eps must be >= 0, got -1.0"),
    ],
)
def test_bad_input_raises_with_the_values(options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(6), **options)
