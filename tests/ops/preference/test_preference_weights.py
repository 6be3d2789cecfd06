import math

import pytest
import torch

from rlhf_fast import length_desensitized_weights, wpo_weights


def test_tokens_beyond_the_shorter_answer_count_alpha():
    # LD-DPO, 2409.06411: the first min(n, m) tokens of each answer count in full.
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    got = length_desensitized_weights(mask, torch.tensor([2, 3]), alpha=0.25)
    assert got.tolist() == [[0.0, 1.0, 1.0, 0.25], [1.0, 1.0, 0.0, 0.0]]


def test_alpha_of_one_is_the_mask():
    mask = torch.tensor([[1, 1, 1, 0]])
    assert torch.equal(length_desensitized_weights(mask, torch.tensor([1]), alpha=1.0), mask.float())


def test_the_wpo_weight_is_the_mean_token_aligned_with_sampling():
    # 2406.11827: exp(mean of log(p / sum p^2)): (1/4) / (1/2) and (1/8) / (1/2), whose geometric mean is sqrt(1/8).
    answers = [[math.log(1 / 4), math.log(1 / 8), math.nan], [math.log(1 / 2), math.nan, math.nan]]
    logprobs = torch.tensor(answers, requires_grad=True)
    squares = torch.tensor([[0.5, 0.5, math.nan], [0.5, math.nan, math.nan]])
    got = wpo_weights(logprobs, squares, mask=torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert got.item() == pytest.approx(math.sqrt(1 / 8), rel=1e-6)
    assert not got.requires_grad


def test_the_wpo_weight_of_a_pair_is_at_most_one_and_its_answers_are_not_bounded_apart():
    # chosen 1.8, rejected 0.2: 0.36; and 1.8 twice: bounded
    logprobs = torch.log(torch.tensor([[0.9], [0.9], [0.1], [0.9]]))
    assert wpo_weights(logprobs, torch.full((4, 1), 0.5)).tolist() == pytest.approx([0.36, 1.0])


def test_answers_without_tokens_have_weight_one():
    assert wpo_weights(torch.full((2, 2), math.nan), torch.ones(2, 2), mask=torch.zeros(2, 2)).item() == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: length_desensitized_weights(torch.ones(3), torch.ones(3), alpha=0.5), r"mask must be \(B, T\), got"),
        (lambda: length_desensitized_weights(torch.ones(2, 3), torch.ones(3), alpha=0.5), r"other_lengths must be"),
        (lambda: length_desensitized_weights(torch.ones(2, 3), torch.ones(2), alpha=2), r"alpha must be in \[0, 1\]"),
        (lambda: wpo_weights(torch.ones(2), torch.ones(2)), r"logprobs must be \(2 B, T\), got \(2,\)"),
        (lambda: wpo_weights(torch.ones(3, 2), torch.ones(3, 2)), r"logprobs must be \(2 B, T\), got \(3, 2\)"),
        (lambda: wpo_weights(torch.ones(2, 3), torch.ones(2, 2)), r"sum_p_squared must be \(2 B, T\) = \(2, 3\), got"),
    ],
)
def test_bad_input_raises_with_its_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
