"""verl's advantage estimators on our scans and group statistics, beside verl's own."""

import numpy as np
import pytest
import torch

from rlhf_fast.integrations import verl as ours
from rlhf_fast.testing.numerics import assert_contract

core = pytest.importorskip("verl.trainer.ppo.core_algos", reason="needs verl (make peers)")
import verl.utils.torch_functional as verl_functional  # noqa: E402
from verl.trainer.config import AlgoConfig  # noqa: E402

ESTIMATORS = ours.advantages.ESTIMATORS
CONFIG = AlgoConfig(gamma=0.9)
INDEX = np.array(["b", "a", "b", "c", "a", "b", "a"], dtype=object)  # c has one answer


def batch(dtype=torch.float32, seed=0):
    """Rewards, values and a mask with holes and padding, (7, 11)."""
    g = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(7, 11, generator=g).to(dtype) for _ in range(2))
    mask = (torch.rand(7, 11, generator=g) < 0.7).long()
    mask[:, 0] = 1
    mask[1, 5:] = 0
    return rewards, values, mask


def arguments(name, rewards, values, mask, index=INDEX):
    """The keywords that verl's trainer gives the estimator."""
    if name == "gae":
        return {"token_level_rewards": rewards, "values": values, "response_mask": mask, "gamma": 0.97, "lam": 0.9}
    given = {"token_level_rewards": rewards, "response_mask": mask, "config": CONFIG}
    if name == "remax":
        given["reward_baselines"] = values[:, 0]
    elif name != "reinforce_plus_plus":
        given["index"] = index
    if name.endswith("optimal_token_baseline"):
        given["old_log_probs"] = -values.abs()
        given["sum_pi_squared"] = (-values.abs()).exp().square() + 0.1
    return given


def indices(name):
    """Pass@k takes no prompt with a single answer."""
    return np.where(INDEX == "c", "a", INDEX) if name == "grpo_passk" else INDEX


def assert_same(name, rewards, values, mask, **options):
    theirs = core.get_adv_estimator_fn(name)
    index = indices(name)
    got = ESTIMATORS[name](**arguments(name, rewards.clone(), values, mask, index), **options)
    plain = theirs(**arguments(name, rewards.clone(), values, mask, index), **options)
    # An integer mask would put float32 into verl's moments.
    exact = theirs(**arguments(name, rewards.double(), values.double(), mask.double(), index), **options)
    for what, mine, verls, oracle in zip(("advantages", "returns"), got, plain, exact, strict=True):
        assert mine.dtype == verls.dtype, what
        assert not mine.requires_grad
        assert_contract(what, mine, verls, oracle.double())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages_and_returns_are_verls(name):
    assert_same(name, *batch())


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n != "rloo_vectorized"])
def test_bfloat16_rewards_keep_the_contract_beside_verls(name):
    # rloo_vectorized: bfloat16 comes out of torch.bincount, and therefore of verl's, as float64.
    assert_same(name, *batch(torch.bfloat16))


@pytest.mark.parametrize("name", ["grpo", "grpo_vectorized"])
def test_grpo_without_the_standard_deviation_is_verls(name):
    assert_same(name, *batch(), norm_adv_by_std_in_grpo=False)


def test_pass_at_k_is_normalised_as_the_config_says():
    rewards, _, mask = batch()
    for normalised in (True, False):
        config = AlgoConfig(norm_adv_by_std_in_grpo=normalised)
        mine, theirs = (
            function(rewards, mask, indices("grpo_passk"), config=config)[0]
            for function in (ESTIMATORS["grpo_passk"], core.compute_grpo_passk_outcome_advantage)
        )
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6)


def test_pass_at_k_rewards_the_lead_of_the_best_by_hand():
    # 3 leads 1 by 2, and 5 leads 5 by nothing.
    rewards, mask = torch.tensor([[1.0], [5.0], [3.0], [5.0]]), torch.ones(4, 1)
    config = AlgoConfig(norm_adv_by_std_in_grpo=False)
    advantages, _ = ESTIMATORS["grpo_passk"](rewards, mask, np.array([0, 1, 0, 1]), config=config)
    assert advantages.flatten().tolist() == [0, 0, 2, 0]


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n.endswith("optimal_token_baseline")])
@pytest.mark.parametrize("handle_zero_tail", [True, False])
@pytest.mark.parametrize("weighed", [True, False])
def test_optimal_token_baselines_are_verls_also_of_empty_answers_and_with_sample_weights(
    name, handle_zero_tail, weighed
):
    rewards, values, mask = batch()
    mask[4] = 0
    weights = {"rollout_is_weights": 0.5 + values.abs()} if weighed else {}
    assert_same(name, rewards, values, mask, handle_zero_tail=handle_zero_tail, **weights)
    even = torch.ones_like(mask)
    even[5, 4:] = 0  # two of the three answers are the longest: no tail
    assert_same(name, rewards, values, even, handle_zero_tail=handle_zero_tail, **weights)


def test_an_optimal_token_baseline_by_hand():
    # energies 1, 2 and 3, 6; returns 1, 1 and 3, 0: baselines (1 + 9) / 4 and 2 / 8
    rewards, mask = torch.tensor([[0.0, 1.0], [3.0, 0.0]]), torch.ones(2, 2)
    logprobs = torch.full((2, 2), 0.5).log()
    squares = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    advantages, returns = ESTIMATORS["optimal_token_baseline"](rewards, mask, [0, 0], logprobs, squares, epsilon=0.0)
    assert returns.tolist() == [[1, 1], [3, 0]]
    torch.testing.assert_close(advantages, torch.tensor([[-1.5, 0.75], [0.5, -0.25]]))


@pytest.mark.parametrize("index", [[3, 9, 3, 1, 9, 3, 9], np.array([3, 9, 3, 1, 9, 3, 9])])
def test_groups_come_as_lists_and_arrays_of_any_kind(index):
    rewards, _, mask = batch()
    assert torch.equal(ESTIMATORS["rloo"](rewards, mask, index)[0], ESTIMATORS["rloo"](rewards, mask, INDEX)[0])


def test_groups_come_as_tensors():
    # verl's loop looks tensors up by identity: every answer is a group of its own.
    rewards, _, mask = batch()
    index = torch.tensor([3, 9, 3, 1, 9, 3, 9])
    assert torch.equal(ESTIMATORS["opo"](rewards, mask, index)[0], ESTIMATORS["opo"](rewards, mask, INDEX)[0])


def test_equal_scores_of_a_prompt_give_no_advantage():
    # verl's is the rounding of their mean over epsilon: 0.06 for three scores of 0.7.
    rewards = torch.full((3, 1), 0.7)
    advantages, _ = ESTIMATORS["grpo"](rewards, torch.ones(3, 1), np.zeros(3))
    assert advantages.eq(0).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_rewards_given_are_left_as_they_are(name):
    rewards, values, mask = batch()
    before = rewards.clone()
    ESTIMATORS[name](**arguments(name, rewards, values, mask, indices(name)))
    assert torch.equal(rewards, before)


def test_gae_is_bit_equal_whatever_stands_behind_the_mask():
    rewards, values, mask = batch()
    first = ESTIMATORS["gae"](rewards, values, mask, 0.97, 0.9)
    noise = 100 * torch.randn(7, 11) * (1 - mask)
    second = ESTIMATORS["gae"](rewards + noise, values - noise, mask, 0.97, 0.9)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1] * mask, second[1] * mask)


def test_gae_of_whole_numbers_is_verls_bit_for_bit():
    g = torch.Generator().manual_seed(1)
    rewards, values = (torch.randint(-4, 5, (6, 20), generator=g).float() for _ in range(2))
    mask = (torch.rand(6, 20, generator=g) < 0.6).long()
    _, returns = ESTIMATORS["gae"](rewards, values, mask, 1.0, 1.0)
    assert torch.equal(returns, core.compute_gae_advantage_return(rewards, values, mask, 1.0, 1.0)[1])


def test_gae_takes_gamma_and_lambda_as_tensors():
    rewards, values, mask = batch()
    got = ESTIMATORS["gae"](rewards, values, mask, torch.tensor(0.5), torch.tensor(0.25))
    plain = ESTIMATORS["gae"](rewards, values, mask, 0.5, 0.25)
    assert torch.equal(got[0], plain[0])
    assert torch.equal(got[1], plain[1])


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whitening_and_its_gradient_are_verls_also_behind_the_mask(dtype, shift_mean):
    x, upstream, mask = batch(dtype)
    results = []
    for function, values, counts in (
        (ours.advantages.masked_whiten, x, mask),
        (verl_functional.masked_whiten, x, mask),
        (verl_functional.masked_whiten, x.double(), mask.double()),
    ):
        leaf = values.detach().requires_grad_()
        out = function(leaf, counts, shift_mean)
        out.backward(upstream.to(out.dtype))
        results.append((out.detach(), leaf.grad))
    for name, mine, theirs, exact in zip(("value", "gradient"), *results, strict=True):
        assert mine.dtype == theirs.dtype
        assert_contract(name, mine, theirs, exact)


@pytest.mark.parametrize("counted", [0, 1])
def test_a_mask_that_leaves_no_variance_raises(counted):
    mask = (torch.arange(6) < counted).long().view(2, 3)
    with pytest.raises(ValueError, match=f"counts two at least, got {counted}$"):
        ours.advantages.masked_whiten(torch.ones(2, 3), mask)


def test_arguments_that_do_not_fit_raise():
    rewards, _, mask = batch()
    with pytest.raises(ValueError, match=r"two answers to every prompt, got groups of \[1, 3\]"):
        ESTIMATORS["grpo_passk"](rewards, mask, INDEX, config=CONFIG)
    with pytest.raises(ValueError, match="config must be given, for its gamma"):
        ESTIMATORS["reinforce_plus_plus"](rewards, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("axis", [None, -1, (0, 1)], ids=str)
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32], ids=str)
def test_masked_sums_and_means_and_their_gradients_are_verls(dtype, axis, kind):
    x, _, mask = batch(dtype)
    mask[3] = 0
    for name in ("masked_sum", "masked_mean"):
        found = {}
        cases = (
            (ours.masked, x, mask.to(kind)),
            (verl_functional, x, mask.to(kind)),
            (verl_functional, x.double(), mask),
        )
        for key, (module, values, counts) in zip(("ours", "verl's", "exact"), cases, strict=True):
            leaf = values.clone().requires_grad_()
            result = getattr(module, name)(leaf, counts, axis)
            result.sum().backward()
            found[key] = result.detach(), leaf.grad
        assert found["ours"][0].dtype == found["verl's"][0].dtype
        for what, *each in zip(("value", "gradient"), *found.values(), strict=True):
            assert_contract(f"{name} {what}", each[0], each[1], each[2].double())


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_variance_is_verls(dtype, unbiased):
    x, _, mask = batch(dtype)
    mine, theirs = (module.masked_var(x, mask, unbiased) for module in (ours.masked, verl_functional))
    assert mine.dtype == theirs.dtype
    assert_contract("variance", mine, theirs, verl_functional.masked_var(x.double(), mask, unbiased))


@pytest.mark.parametrize("name", ["masked_sum", "masked_mean", "masked_var"])
def test_nan_behind_the_mask_changes_no_sum_mean_or_variance(name):
    x, _, mask = batch()
    poisoned = torch.where(mask.bool(), x, torch.nan)
    assert torch.equal(getattr(ours.masked, name)(poisoned, mask), getattr(ours.masked, name)(x, mask))
