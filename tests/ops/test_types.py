"""What users bring as numbers, masks and ids."""

import numpy as np
import pytest
import torch

from rlhf_fast import (
    PolicyObjective,
    PreferenceObjective,
    linear_policy_loss,
    policy_loss,
    preference_loss,
    token_logprobs,
)

BACKENDS = ["reference", "cpu", "triton"]


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor([0.5])], ids=repr)
def test_any_type_of_number_is_a_number(number):
    assert PolicyObjective(clip_eps_high=number) == PolicyObjective(clip_eps_high=0.5)
    assert PreferenceObjective(beta=number) == PreferenceObjective(beta=0.5)
    hidden, weight = torch.randn(2, 3, 4), torch.randn(5, 4, requires_grad=True)
    ids, ones = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
    objective = PolicyObjective(clip_eps_high=number)
    linear_policy_loss(hidden, weight, ids, None, ones, objective=objective)[0].backward()
    policy_loss(ones, ones, ones, clip_eps_high=number, denominator=np.float32(3))
    preference_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(2), beta=number)


def test_a_number_with_a_gradient_raises():
    with pytest.raises(TypeError, match="clip_eps_high must be a number without a gradient"):
        PolicyObjective(clip_eps_high=torch.tensor(0.5, requires_grad=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32], ids=str)
def test_a_mask_of_rows_is_that_of_their_tokens(backend, dtype):
    logits, ids, rows = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1], [0]]).to(dtype)
    whole = rows.expand(2, 3).contiguous()
    found = token_logprobs(logits, ids, mask=rows, backend=backend)
    assert torch.equal(found, token_logprobs(logits, ids, mask=whole, backend=backend))
    losses = [policy_loss(found, found - 0.1, found + 1, mask=m, backend=backend)[0] for m in (rows, whole)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int16, torch.int8, torch.uint8, torch.int32], ids=str)
def test_ids_are_of_any_integer_type(backend, dtype):
    logits, ids = torch.randn(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    found = token_logprobs(logits, ids.to(dtype), backend=backend)
    assert torch.equal(found, token_logprobs(logits, ids, backend=backend))
