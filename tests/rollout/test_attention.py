"""Attention to a cache of slots against the formula in float64."""

import pytest
import torch

from rlhf_fast.models.packing import UnknownArgument
from rlhf_fast.rollout import attention


def expected(query, key, value, starts, *, scaling, window, softcap):
    """(B, 1, heads, D), one head of one row after the other."""
    out = torch.zeros(len(query), 1, query.shape[1], value.shape[3], dtype=torch.float64)
    share = query.shape[1] // key.shape[1]
    for row in range(len(query)):
        first = max(int(starts[row]), key.shape[2] - (window or key.shape[2]))
        for head in range(query.shape[1]):
            keys, values = (x[row, head // share, first:].double() for x in (key, value))
            scores = keys @ query[row, head, 0].double() * scaling
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            out[row, 0, head] = scores.softmax(0) @ values
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "window", "softcap"), [(3, None, None), (6, 4, None), (12, None, 2.0)])
def test_each_row_reads_from_its_start_on(heads, window, softcap, dtype):
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(4, 1, heads, 20, generator=draw).transpose(1, 2).to(dtype)
    key, value = (torch.randn(4, 3, 13, width, generator=draw).to(dtype)[:, :, 2:] for width in (20, 7))
    starts = torch.tensor([0, 10, 3, 8])
    with attention.reading(starts):
        out, _ = attention._attend(
            torch.nn.Module(), query, key, value, None, scaling=0.3, sliding_window=window, softcap=softcap,
            position_ids=starts, s_aux=None,
        )  # fmt: skip
    oracle = expected(query, key, value, starts, scaling=0.3, window=window, softcap=softcap)
    rounding = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(out.double(), oracle, rtol=rounding, atol=rounding)
    assert out.dtype == dtype


def test_what_it_does_not_know_is_said():
    x = torch.zeros(1, 1, 1, 4)
    with attention.reading(torch.tensor([0])), pytest.raises(UnknownArgument, match="s_aux"):
        attention._attend(torch.nn.Module(), x, x, x, None, s_aux=torch.zeros(1))
