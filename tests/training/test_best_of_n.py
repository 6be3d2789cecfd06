"""Best of n: what is chosen, its bound, and the curve over n beside every subset."""

import math
from itertools import combinations

import pytest
import torch

from rlhf_fast.training.best_of_n import best_of, curve, kl_bound, powers_of_two
from tests.training.tiny_runs import config_of, folder, job_of


def expected_best(proxy, gold, n):
    """Over all subsets of n samples, the gold of the best by proxy, the mean of those that tie."""
    picked = []
    for subset in combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        ties = [gold[i] for i in subset if proxy[i] == top]
        picked.append(sum(ties) / len(ties))
    return sum(picked) / len(picked)


@pytest.mark.parametrize("ties", [False, True])
def test_the_curve_is_the_mean_over_all_subsets(ties):
    torch.manual_seed(0)
    proxy, gold = torch.randn(2, 3, 7, dtype=torch.float64)
    if ties:
        proxy = proxy.round()
        assert all(len(set(row)) < 7 for row in proxy.tolist())
    sizes = [1, 2, 4, 7]
    expected = [
        sum(expected_best(p, g, n) for p, g in zip(proxy.tolist(), gold.tolist(), strict=True)) / 3 for n in sizes
    ]
    torch.testing.assert_close(curve(proxy, gold, sizes), torch.tensor(expected, dtype=torch.float64))


def test_the_bound_is_the_kl_of_the_best_of_n_where_nothing_ties():
    """The best of n of K equally likely answers has the mass ((k / K)^n - ((k - 1) / K)^n) at the k-th."""
    count, n = 200_000, 5
    edges = torch.linspace(0, 1, count + 1, dtype=torch.float64) ** n
    mass = edges[1:] - edges[:-1]
    kl = float((mass * (mass * count).log()).sum())
    assert kl <= kl_bound(n)
    assert kl == pytest.approx(kl_bound(n), abs=1e-4)
    assert kl_bound(1) == 0


def test_the_best_of_n_is_what_the_reward_likes_best():
    config = config_of("grpo", batch_size=6)
    job = job_of(config)
    torch.manual_seed(2)
    best = best_of(job, config, job.train[:3], 4)
    assert best.scores.shape == (3, 4)
    assert [len(texts) for texts in best.candidates] == [4, 4, 4]
    assert (best.scores.std(1) > 0).any()
    for text, reward, texts, scores in zip(*best[:4], strict=True):
        paid = [len(c) % 11 / 5.0 + 0.1 * sum(x in "aeiou" for x in c) for c in texts]  # reward.py:score
        assert scores.tolist() == pytest.approx(paid)
        assert text == texts[paid.index(max(paid))]
        assert float(reward) == pytest.approx(max(paid))
    assert best.parts.keys() == {f"{folder()}/reward.py:score"}
    assert best.kl_bound == pytest.approx(math.log(4) - 3 / 4)


def test_what_cannot_be_asked_is_said():
    config = config_of("grpo")
    job = job_of(config)
    with pytest.raises(ValueError, match="n >= 1 and a prompt, got n = 0 and 1 prompts"):
        best_of(job, config, job.train[:1], 0)
    with pytest.raises(ValueError, match=r"sizes must be in \[1, N\] = \[1, 3\], got 4"):
        curve(torch.zeros(1, 3), torch.zeros(1, 3), [1, 4])
    assert powers_of_two(6) == [1, 2, 4, 6]
