import math

import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlhf_fast import sample_tokens

BACKENDS = ["reference", "cpu", "triton"]
TRUNCATIONS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.03},
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def draws(logits, count, **options):
    """(count,) ids for the one row of logits."""
    return sample_tokens(logits.expand(count, -1), seed=3, **options)


def warped(logits, top_k=None, top_p=1.0, min_p=0.0):
    """The scores that transformers' own sampling leaves finite, in its order."""
    rules = LogitsProcessorList()
    if top_k:
        rules.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        rules.append(TopPLogitsWarper(top_p))
    if min_p:
        rules.append(MinPLogitsWarper(min_p))
    return rules(torch.zeros(logits.shape[0], 1, dtype=torch.long), logits)


def test_by_hand(backend):
    # Probabilities 0.5, 0.3, 0.2; nucleus of 0.6 keeps the first two: 0.625, 0.375 (Holtzman et al. 2020, eq. 2).
    logits = torch.tensor([[0.3, 0.5, 0.2]]).log()
    found = sample_tokens(logits.expand(20, 3), seed=0, top_p=0.6, backend=backend)
    assert set(found.ids.tolist()) == {0, 1}
    expected = torch.where(found.ids == 1, math.log(0.625), math.log(0.375))
    torch.testing.assert_close(found.logprobs, expected)
    torch.testing.assert_close(found.full_logprobs, torch.where(found.ids == 1, math.log(0.5), math.log(0.3)))


def test_the_draws_are_the_inverse_of_the_cumulative_distribution_at_philox_uniforms(backend):
    # Random123's known answer for counter 0 and key 0: the first words are 6627e8d5 and e169c58d, u = 0.39904...
    uniform = ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53
    below, above = ([uniform + step, 1 - uniform - step] for step in (-1e-4, 1e-4))
    assert sample_tokens(torch.tensor([below]).log(), seed=0, backend=backend).ids.item() == 1
    assert sample_tokens(torch.tensor([above]).log(), seed=0, backend=backend).ids.item() == 0


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.08}], ids=str)
def test_frequencies_follow_the_truncated_distribution(options):
    count, logits = 40_000, torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    found = draws(logits, count, **options)
    rules = {name: value for name, value in options.items() if name != "temperature"}
    p = warped(logits / options.get("temperature", 1.0), **rules).softmax(-1)[0]
    expected, seen = count * p[p > 0], torch.bincount(found.ids, minlength=12)[p > 0]
    assert torch.bincount(found.ids, minlength=12)[p == 0].sum() == 0
    freedom = len(expected) - 1
    assert ((seen - expected) ** 2 / expected).sum() < freedom + 4.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
def test_the_log_probabilities_are_those_of_transformers_rules_and_of_the_full_distribution(backend, options):
    logits = 3 * torch.randn(5, 61, generator=torch.Generator().manual_seed(2))
    found = sample_tokens(logits, seed=11, backend=backend, **options)
    truncated = warped(logits.double(), **options).log_softmax(-1).gather(1, found.ids[:, None])[:, 0]
    full = logits.double().log_softmax(-1).gather(1, found.ids[:, None])[:, 0]
    assert torch.isfinite(truncated).all()
    torch.testing.assert_close(found.logprobs.double(), truncated, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(found.full_logprobs.double(), full, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("options", [{}, *TRUNCATIONS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_backend_draws_the_same_ids(options, dtype):
    logits = (3 * torch.randn(5, 61, generator=torch.Generator().manual_seed(4))).to(dtype)
    expected, *others = (sample_tokens(logits, seed=5, backend=b, **options).ids for b in BACKENDS)
    assert all(torch.equal(ids, expected) for ids in others)


def test_a_row_draws_the_same_alone_and_in_any_batch(backend):
    logits, ids = torch.randn(9, 20, generator=torch.Generator().manual_seed(6)), torch.arange(9) + 100
    whole = sample_tokens(logits, seed=1, row_ids=ids, top_p=0.9, backend=backend)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(7))
    shuffled = sample_tokens(logits[order], seed=1, row_ids=ids[order], top_p=0.9, backend=backend)
    alone = [sample_tokens(logits[i, None], seed=1, row_ids=ids[i, None], top_p=0.9, backend=backend) for i in range(9)]
    for k in range(3):
        assert torch.equal(shuffled[k], whole[k][order])
        assert torch.equal(torch.cat([result[k] for result in alone]), whole[k])


def test_seed_step_and_row_each_change_the_draw(backend):
    logits = torch.zeros(24, 500)
    first = sample_tokens(logits, seed=1, backend=backend).ids
    assert first.unique().numel() > 18
    assert torch.equal(first, sample_tokens(logits, seed=torch.tensor(1), step=torch.tensor(0), backend=backend).ids)
    for other in ({"seed": 2}, {"seed": 1, "step": 1}, {"seed": 1, "row_ids": torch.arange(24) + 2**35}):
        assert (sample_tokens(logits, backend=backend, **other).ids == first).sum() < 5


def test_tied_logits_stay_together(backend):
    found = sample_tokens(torch.tensor([[1.0, 2.0, 1.0, 0.0]]).expand(30, 4), seed=0, top_k=2, backend=backend)
    assert set(found.ids.tolist()) == {0, 1, 2}


def test_a_forbidden_token_is_never_drawn(backend):
    logits = torch.full((30, 5), -torch.inf)
    logits[:, [1, 3]] = 0.0
    found = sample_tokens(logits, seed=0, top_k=4, backend=backend)
    assert set(found.ids.tolist()) == {1, 3}
    torch.testing.assert_close(found.logprobs, torch.full((30,), -math.log(2)))


@pytest.mark.parametrize("row", [[math.nan, 1.0], [-math.inf, -math.inf], [math.inf, 0.0]], ids=str)
def test_a_row_without_a_distribution_gives_nan(backend, row):
    found = sample_tokens(torch.tensor([row, [0.0, 1.0]]), seed=0, backend=backend)
    assert found.ids[0] == 0
    assert found.logprobs.isnan().tolist() == found.full_logprobs.isnan().tolist() == [True, False]


def test_a_confident_token_keeps_its_log_probability(backend):
    logits = torch.tensor([[20.0, 0.0]])
    found = sample_tokens(logits, seed=0, backend=backend)
    torch.testing.assert_close(found.full_logprobs, torch.tensor([-math.log1p(math.exp(-20))]), rtol=1e-5, atol=0)


def test_strided_rows_are_read_where_they_are(backend):
    logits = torch.randn(6, 4, 33, generator=torch.Generator().manual_seed(8))
    expected = sample_tokens(logits[:, -1].contiguous(), seed=2, backend=backend)
    found = sample_tokens(logits[:, -1], seed=2, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    columns = sample_tokens(logits[:, -1].t().contiguous().t(), seed=2, backend=backend)
    assert torch.equal(columns.ids, expected.ids)


def test_no_rows_give_no_samples(backend):
    assert sample_tokens(torch.zeros(0, 5), seed=0, backend=backend).ids.shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(3)}, ValueError, r"logits must be \(B, V\) with V >= 1, got \(3,\)"),
        ({"logits": torch.zeros(2, 3, dtype=torch.long)}, TypeError, "logits must be float32"),
        ({"top_k": 0}, ValueError, "top_k must be >= 1 or None, got 0"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        ({"min_p": 1.5}, ValueError, r"min_p must be in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0"),
        (
            {"temperature": torch.ones(3)},
            ValueError,
            r"temperature must be one number or one per row = \(2,\), got",
        ),
        ({"temperature": torch.tensor([1.0, 0.0])}, ValueError, "temperature must be > 0, row 1 is 0.0"),
        ({"row_ids": torch.arange(3)}, ValueError, r"row_ids must be \(B,\) = \(2,\), got \(3,\)"),
        ({"step": torch.zeros(1, dtype=torch.long)}, ValueError, r"step must be a number or a 0-d tensor = \(\), got"),
    ],
    ids=str,
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        sample_tokens(**{"logits": torch.zeros(2, 3), "seed": 0} | change)
