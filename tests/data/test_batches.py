from collections import Counter
from itertools import permutations
from math import factorial

import numpy as np
import pytest
import torch

from rlhf_fast.data.batches import held_out_indices, pad_batch, permuted, shuffled_indices
from rlhf_fast.data.encoding import Example


def test_rows_are_padded_on_the_right_and_only_completions_count():
    batch = pad_batch([Example([5, 6, 7], 1), Example([8, 9], 0), Example([4], 1)], pad=0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0], [4, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    # Nothing predicts the first token, so it never counts.
    assert batch.mask.tolist() == [[0, 1, 1], [0, 1, 0], [0, 0, 0]]
    assert (batch.counts.tolist(), batch.count) == ([2, 1, 0], 3)


def test_rows_of_a_batch_keep_its_padding():
    batch = pad_batch([Example([5, 6, 7], 1), Example([8, 9], 1)], pad=0)
    assert batch.rows(slice(1, 2)).input_ids.tolist() == [[8, 9, 0]]
    assert batch.rows(torch.tensor([1, 0])).counts.tolist() == batch.rows(torch.tensor([1, 0])).mask.sum(1).tolist()


def test_every_epoch_is_a_permutation_of_its_own():
    order = shuffled_indices(7, seed=1, start=0, count=14)
    assert sorted(order[:7]) == sorted(order[7:]) == list(range(7))
    assert order[:7] != order[7:]
    assert order != shuffled_indices(7, seed=2, start=0, count=14)


def test_the_order_continues_from_any_place():
    order = shuffled_indices(7, seed=1, start=0, count=30)
    for start in (0, 3, 7, 12):
        assert shuffled_indices(7, seed=1, start=start, count=11) == order[start : start + 11]


def test_the_order_is_a_permutation_for_every_size():
    sizes = [*range(1, 200), 1023, 1024, 1025, 9973]
    assert all(sorted(shuffled_indices(size, size, 0, size)) == list(range(size)) for size in sizes)


def test_the_order_is_the_same_in_every_process_and_on_every_machine():
    assert shuffled_indices(10, seed=0, start=0, count=20) == [
        5,
        6,
        4,
        2,
        8,
        9,
        7,
        0,
        3,
        1,
        5,
        3,
        2,
        1,
        6,
        0,
        7,
        8,
        9,
        4,
    ]


def test_a_batch_of_a_data_set_of_any_size_is_drawn_alone():
    size = 10**13  # the memory of no machine holds as many numbers
    drawn = shuffled_indices(size, seed=0, start=3 * size - 5, count=10)
    assert len(set(drawn)) == 10
    assert all(0 <= place < size for place in drawn)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_every_order_of_a_few_rows_is_equally_frequent(size):
    """Pearson's statistic over all orders, less its mean, in standard deviations (chi-square of size! - 1 degrees)."""
    orders, runs = factorial(size), 15 * factorial(size)
    places = np.arange(size, dtype=np.uint64)
    seen = Counter(tuple(permuted(places, size, f"{seed}").tolist()) for seed in range(runs))
    statistic = sum((seen[order] - 15) ** 2 / 15 for order in permutations(range(size)))
    assert (statistic - (orders - 1)) / (2 * (orders - 1)) ** 0.5 < 4


def test_where_a_row_comes_says_nothing_of_its_neighbour():
    """Of a larger set: places of the first row over many seeds, and steps from a row to the next, in ten bins each."""
    size, runs = 1000, 1000
    orders = [permuted(np.arange(2, dtype=np.uint64), size, f"{seed}").astype(np.int64) for seed in range(runs)]
    for values in ([order[0] for order in orders], [(order[1] - order[0]) % size for order in orders]):
        counts = np.bincount(np.array(values) // 100, minlength=10)
        assert ((counts - runs / 10) ** 2 / (runs / 10)).sum() < 9 + 4 * 18**0.5


def test_held_out_indices_are_drawn_by_the_seed_and_not_from_the_end():
    keys = [str(i) for i in range(100)]
    drawn = held_out_indices(keys, 10, seed=1)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 10
    assert drawn == held_out_indices(keys, 10, seed=1)
    draws = [held_out_indices(keys, 10, seed=seed) for seed in range(200)]
    # Every index is drawn with probability 1/10: 20 of 200 times, with a standard deviation of 4.2.
    counts = [sum(i in draw for draw in draws) for i in range(100)]
    assert 3 <= min(counts) <= max(counts) <= 40


def test_equal_keys_are_held_out_together_or_not_at_all():
    keys = [str(i // 4) for i in range(40)]
    for seed in range(5):
        drawn = held_out_indices(keys, 10, seed)
        held, kept = ({keys[i] for i in range(40) if (i in drawn) is side} for side in (True, False))
        assert len(drawn) == 8
        assert not held & kept
    assert held_out_indices(["a", "a", "a", "b", "b"], 1, seed=0) == [3, 4]
