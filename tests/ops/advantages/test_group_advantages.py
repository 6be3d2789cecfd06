"""group_advantages: every variant, groups by size and by ids."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from rlhf_fast.kernels import group_advantages as kernels

from rlhf_fast import group_advantages
from rlhf_fast.ops.advantages import group_advantages as module
from rlhf_fast.testing.numerics import assert_contract

BACKENDS = ("reference", "cpu", "triton")
KERNELS = ("cpu", "triton")
GROUPED = tuple(variant for variant, rule in module.VARIANTS.items() if rule.grouped)
ZERO_SUM = tuple(variant for variant in GROUPED if variant != "opo")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def over_batch(a, eps):
    return a / (a.square().sum() / max(1, len(a) - 1) + eps).sqrt()


def plain(rewards, ids, variant, eps=1e-4, lengths=None, k=None):
    """From the papers, one group at a time: rloo as the mean of the others, pass_at_k from binomial coefficients."""
    if variant == "gdpo":
        return over_batch(sum(plain(r, ids, "grpo", eps) for r in rewards.T), eps)
    if variant == "reinforce_baseline":
        return over_batch(plain(rewards, ids, "dr_grpo"), eps)
    advantages = torch.zeros_like(rewards)
    for group in set(ids.tolist()):
        r = rewards[ids == group]
        if len(r) == 1:
            continue
        if variant == "rloo":
            a = r - (r.sum() - r) / (len(r) - 1)
        elif variant == "opo":
            weights = lengths[ids == group].to(r.dtype)
            a = r - (weights * r).sum() / weights.sum()
        elif variant == "pass_at_k":
            n, wrong = len(r), int((r <= 0).sum())
            missed = math.comb(wrong, k) / math.comb(n, k)  # 1 - the mean of the k-sets' rewards, eq. of R-bar
            missed_too = math.comb(wrong - 1, k - 1) / math.comb(n - 1, k - 1) if wrong else 0
            spread = math.sqrt(missed * (1 - missed)) or math.inf
            a = torch.where(r > 0, r.new_tensor(missed), r.new_tensor(missed - missed_too)) / spread
        else:
            a = (r - r.mean()) / (r.std() + eps if variant == "grpo" else 1)
        advantages[ids == group] = a
    return advantages


def example(groups, group_size, dtype=torch.float32, seed=0, variant="grpo"):
    """rewards, ids, and the options of the variant."""
    generator = torch.Generator().manual_seed(seed)
    shape = (groups * group_size, 3) if variant == "gdpo" else (groups * group_size,)
    rewards = (torch.randn(shape, generator=generator) * 3 + 1).to(dtype)
    options = {"variant": variant}
    if variant == "opo":
        options["lengths"] = torch.randint(1, 50, (groups * group_size,), generator=generator)
    if variant == "pass_at_k":
        options["k"] = min(2, group_size)
    return rewards, torch.arange(groups).repeat_interleave(group_size), options


BY_HAND = {
    "grpo": ([2.0, 4.0, 6.0], {"eps": 0}, [-1.0, 0.0, 1.0]),  # mean 4, std sqrt((4 + 0 + 4) / 2) = 2
    "dr_grpo": ([2.0, 4.0, 6.0], {}, [-2.0, 0.0, 2.0]),
    "rloo": ([2.0, 4.0, 6.0], {}, [-3.0, 0.0, 3.0]),  # eq. 8: 2 - (4 + 6) / 2, 4 - (2 + 6) / 2, 6 - (2 + 4) / 2
    "opo": ([2.0, 4.0, 6.0], {"lengths": torch.tensor([1, 1, 2])}, [-2.5, -0.5, 1.5]),  # less (2 + 4 + 12) / 4
    # C(3, 2) / C(4, 2) = 1/2, so mean and std of the pairs' rewards are 1/2; of the pairs with a given wrong answer
    # C(2, 1) / C(3, 1) = 2/3 have no right one: (1 - 1/2) / (1/2) and (1 - 1/2 - 2/3) / (1/2)
    "pass_at_k": ([1.0, 0.0, 0.0, 0.0], {"k": 2}, [1.0, -1 / 3, -1 / 3, -1 / 3]),
    # the variance of the differences, (4 + 0 + 4) / 2, and eps make 6.25
    "reinforce_baseline": ([2.0, 4.0, 6.0], {"eps": 2.25}, [-0.8, 0.0, 0.8]),
    # by reward 2 / (2 + 1/2) and 3 / (3 + 1/2); their sum over the root of its square (the variance) and 1/2
    "gdpo": ([[2.0, 0.0], [4.0, 3.0], [6.0, 6.0]], {"eps": 0.5}, [-0.9197662, 0.0, 0.9197662]),
    "reinforce_pp": ([2.0, 4.0, 6.0], {"eps": 2.25}, [-0.8, 0.0, 0.8]),
    "remax": ([2.0, 4.0, 6.0], {"baseline_rewards": torch.tensor([1.0, 5.0, 6.0])}, [1.0, -1.0, 0.0]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", module.VARIANTS)
def test_one_group_by_hand(backend, variant):
    rewards, options, expected = BY_HAND[variant]
    size = {"group_size": len(rewards)} if variant in GROUPED else {}
    ours = group_advantages(torch.tensor(rewards), variant=variant, **size, **options, backend=backend)
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", GROUPED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (5, 7), (2, 1100)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_keep_the_numerics_contract(backend, shape, dtype, variant):
    rewards, ids, options = example(*shape, dtype, variant=variant)
    ours = group_advantages(rewards, group_size=shape[1], **options, backend=backend)
    assert_contract(variant, ours, plain(rewards, ids, **options), plain(rewards.double(), ids, **options))


@pytest.mark.parametrize("variant", GROUPED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rewards_and_a_group_of_one_give_exactly_0(backend, variant):
    rewards, ids, options = example(3, 3, variant=variant)
    options["backend"] = backend
    rewards[3:6] = 0.1  # beside groups that are not constant
    assert group_advantages(rewards, group_size=3, **options)[3:6].eq(0).all()
    assert group_advantages(torch.full_like(rewards, 0.1), group_ids=ids * 0, **options).eq(0).all()
    alone = example(2, 1, variant=variant)
    assert group_advantages(alone[0], group_size=1, **alone[2], backend=backend).eq(0).all()
    nothing = {"lengths": torch.zeros(0)} if variant == "opo" else {}
    assert group_advantages(rewards[:0], group_size=3, **options | nothing).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reinforce_pp_of_equal_rewards_is_exactly_0(backend):
    assert group_advantages(torch.full((9,), 0.1), variant="reinforce_pp", backend=backend).eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pass_at_k_without_k_wrong_answers_or_without_a_right_one_gives_0(backend):
    rewards = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    assert group_advantages(rewards, group_size=4, variant="pass_at_k", k=2, backend=backend).eq(0).all()
    small = torch.arange(6) // 2  # groups of 2 and k = 3
    assert group_advantages(rewards[2:8], group_ids=small, variant="pass_at_k", k=3, backend=backend).eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_of_empty_answers_stays_finite(backend):
    rewards, lengths = torch.tensor([1.0, 3.0]), torch.zeros(2)
    assert group_advantages(rewards, group_size=2, variant="opo", lengths=lengths, backend=backend).isfinite().all()


id_lists = st.lists(st.sampled_from([-(2**63), -3, 0, 7, 2**63 - 1]), min_size=1, max_size=12)


@settings(max_examples=15, deadline=None)
@given(ids=id_lists, variant=st.sampled_from(GROUPED), seed=st.integers(0, 99))
def test_ids_are_any_integers_in_any_order(ids, variant, seed):
    rewards, _, options = example(len(ids), 1, seed=seed, variant=variant)
    ids = torch.tensor(ids)
    expected = plain(rewards.double(), ids, **options)
    for backend in BACKENDS:
        ours = group_advantages(rewards, group_ids=ids, **options, backend=backend)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(variant=st.sampled_from(GROUPED), seed=st.integers(0, 99), groups=st.integers(1, 4), size=st.integers(1, 5))
def test_permuting_the_answers_permutes_the_advantages(variant, seed, groups, size):
    rewards, ids, options = example(groups, size, seed=seed, variant=variant)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    permuted = {**options, "lengths": options["lengths"][order]} if variant == "opo" else options
    for backend in BACKENDS:
        by_size = group_advantages(rewards, group_size=size, **options, backend=backend)
        by_ids = group_advantages(rewards[order], group_ids=ids[order], **permuted, backend=backend)
        torch.testing.assert_close(by_size[order], by_ids, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(variant=st.sampled_from(ZERO_SUM), seed=st.integers(0, 99), groups=st.integers(1, 4), size=st.integers(1, 9))
def test_the_advantages_of_a_group_sum_to_0(variant, seed, groups, size):
    rewards, _, options = example(groups, size, seed=seed, variant=variant)
    for backend in BACKENDS:
        ours = group_advantages(rewards, group_size=size, **options, backend=backend)
        torch.testing.assert_close(ours.view(groups, size).sum(1), torch.zeros(groups), rtol=0, atol=3e-5)


@pytest.mark.parametrize("variant", GROUPED)
def test_strided_rewards_give_the_same_values(variant):
    rewards, _, options = example(4, 6, variant=variant)
    options |= {"lengths": options["lengths"][::2]} if variant == "opo" else {}
    for backend in BACKENDS:
        expected = group_advantages(rewards[::2].clone(), group_size=3, **options, backend=backend)
        assert torch.equal(expected, group_advantages(rewards[::2], group_size=3, **options, backend=backend))


# pass_at_k does not change with a small change of a reward
@pytest.mark.parametrize("variant", [variant for variant in GROUPED if variant != "pass_at_k"])
def test_the_reference_is_differentiable_twice(variant):
    rewards, ids, options = example(2, 3, torch.float64, variant=variant)
    run = lambda r: module.reference(r, ids, **options)  # noqa: E731
    assert torch.autograd.gradcheck(run, (rewards.requires_grad_(),))
    assert torch.autograd.gradgradcheck(run, (rewards,))


def test_every_variant_has_a_kernel():
    assert tuple(kernels.DIVISORS) == tuple(module.DIVISORS)
    assert {rule.divisor for rule in module.VARIANTS.values()} == set(module.DIVISORS)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("variant", ["grpo", "opo", "pass_at_k", "gdpo"])
def test_the_registered_op_passes_opcheck_and_compiles(backend, variant):
    rewards, ids, options = example(4, 5, variant=variant)
    op = torch.ops.rlhf_fast.group_advantages.default
    torch.library.opcheck(op, (torch.rand(20), None, None, None, 5, module.VARIANTS[variant].divisor, 1.0, backend))
    torch.compiler.reset()  # every variant is another graph of the same function
    run = lambda r: group_advantages(r, group_ids=ids, **options, backend=backend)  # noqa: E731
    assert torch.equal(run(rewards), torch.compile(run, fullgraph=True, backend="aot_eager")(rewards))


def _rank(rank, folder, results):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = slice(0, 6) if rank == 0 else slice(6, 18)
    for variant in ("reinforce_baseline", "gdpo", "reinforce_pp"):
        rewards = example(6, 3, variant=variant)[0][rows]
        size = {"group_size": 3} if variant in GROUPED else {}
        results[variant, rank] = group_advantages(rewards, variant=variant, process_group=dist.group.WORLD, **size)
    dist.destroy_process_group()


def test_two_processes_whiten_as_one_does(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (str(tmp_path), results), nprocs=2)
        results = dict(results)
    for variant in ("reinforce_baseline", "gdpo", "reinforce_pp"):
        size = {"group_size": 3} if variant in GROUPED else {}
        alone = group_advantages(example(6, 3, variant=variant)[0], variant=variant, **size)
        torch.testing.assert_close(torch.cat([results[variant, 0], results[variant, 1]]), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 4}, "group_size must be >= 1 and divide the 6 rewards, got 4"),
        ({"group_size": 0}, "group_size must be >= 1 and divide the 6 rewards, got 0"),
        ({}, "exactly one of group_size and group_ids"),
        ({"group_size": 3, "group_ids": torch.zeros(6, dtype=torch.int64)}, "got group_size=3"),
        ({"group_ids": torch.zeros(5, dtype=torch.int64)}, r"\(6,\), got \(5,\)"),
        ({"group_size": 3, "variant": "gpro"}, "one of grpo, dr_grpo, rloo, .*got 'gpro'"),
        ({"group_size": 3, "eps": -1.0}, "eps must be >= 0 for variant grpo, got -1.0"),
        ({"group_size": 3, "variant": "gdpo"}, r"variant gdpo must be \(B, M\) with M >= 1, got \(6,\)"),
        ({"variant": "reinforce_pp", "eps": 0.0}, "eps must be > 0 for variant reinforce_pp, got 0.0"),
        ({"variant": "reinforce_pp", "group_size": 3}, "variant reinforce_pp has no groups, got group_size=3"),
        ({"group_size": 3, "k": 2}, "variant grpo takes no k"),
        ({"group_size": 3, "variant": "opo"}, "variant opo needs lengths"),
        ({"group_size": 3, "variant": "opo", "lengths": torch.ones(5)}, r"\(6,\), got \(5,\)"),
        ({"group_size": 3, "variant": "opo", "lengths": -torch.ones(6)}, "lengths must be >= 0, got -1"),
        ({"variant": "remax"}, "variant remax needs baseline_rewards"),
        ({"group_size": 3, "variant": "pass_at_k", "k": 4}, "got k=4, group_size=3"),
        ({"group_size": 3, "process_group": object()}, "variant grpo takes no process_group"),
    ],
)
def test_bad_input_raises_with_the_values(options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(6), **options)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_gdpo_sums_its_rewards_by_weight(backend):
    rewards = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    each = [group_advantages(rewards[:, m], group_size=3, variant="grpo", backend=backend) for m in range(3)]
    summed = 2.0 * each[0] - 0.5 * each[1]
    got = group_advantages(rewards, group_size=3, variant="gdpo", reward_weights=[2.0, -0.5, 0.0], backend=backend)
    torch.testing.assert_close(got, summed / (summed.square().sum() / 5 + 1e-4).sqrt())
    with pytest.raises(ValueError, match="variant grpo takes no reward_weights"):
        group_advantages(rewards[:, 0], group_size=3, reward_weights=[1.0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reward_of_weight_0_is_not_looked_at(backend):
    rewards = torch.rand(6, 2)
    options = {"group_size": 3, "variant": "gdpo", "reward_weights": [1.0, 0.0], "backend": backend}
    expected = group_advantages(rewards, **options)
    rewards[1, 1] = torch.inf
    assert torch.equal(group_advantages(rewards, **options), expected)
