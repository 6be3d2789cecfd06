"""Ranks of sampled tokens by the reference, against transformers' logits sorted."""

import pytest
import torch

from rlhf_fast.models import backbone as backbone_module
from rlhf_fast.training.experience import collect, evaluate_policy, token_shift
from tests.training.tiny_runs import config_of, job_of


@pytest.mark.parametrize("rows_of_a_tile", [None, 3])
def test_ranks_are_the_places_among_the_sorted_logits_of_the_base(rows_of_a_tile, monkeypatch):
    if rows_of_a_tile is not None:
        monkeypatch.setattr(backbone_module, "default_chunk_tokens", lambda weight: rows_of_a_tile)
    config = config_of("grpo", reference_refresh_every=None)
    job = job_of(config)
    torch.manual_seed(0)
    experience = collect(job, config, job.train[:4], ranks=True)
    batch, ranks = experience.batch, experience.scores.ref_ranks
    with torch.no_grad():
        logits = job.backbone.model(batch.input_ids, attention_mask=batch.attention_mask).logits
    order = logits.argsort(-1, descending=True)
    assert ranks[batch.mask == 0].eq(0).all()
    counted = batch.mask.nonzero().tolist()
    assert len(counted) == int(batch.mask.sum())
    for row, token in counted:
        place = order[row, token - 1].tolist().index(int(batch.input_ids[row, token])) + 1
        assert int(ranks[row, token]) == place


def test_shares_by_hand():
    shares = token_shift(torch.tensor([[0, 1, 1, 2], [3, 4, 250, 0]]))
    assert {name: float(share) for name, share in shares.items()} == pytest.approx(
        {"tokens_unshifted": 2 / 6, "tokens_marginal": 2 / 6, "tokens_shifted": 2 / 6}
    )


def test_a_policy_of_the_likeliest_token_is_not_shifted_while_it_is_the_reference():
    """And every evaluation has the shares, which sum to 1."""
    greedy = config_of("grpo", top_k=1)
    metrics = evaluate_policy(job_of(greedy, scrambled=False), greedy, job_of(greedy).held_out)["metrics"]
    assert (metrics["tokens_unshifted"], metrics["tokens_marginal"], metrics["tokens_shifted"]) == (1.0, 0.0, 0.0)
    moved = job_of(greedy)
    metrics = evaluate_policy(moved, greedy, moved.held_out)["metrics"]
    assert metrics["tokens_unshifted"] < 1
    assert sum(metrics[f"tokens_{name}"] for name in ("unshifted", "marginal", "shifted")) == pytest.approx(1)
