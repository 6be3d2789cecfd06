"""DPO from rankings: Plackett-Luce against its definition, by brute force, and what rankings must say."""

import itertools

import pytest
import torch
from rich.console import Console

from rlhf_fast.algorithms import preference
from rlhf_fast.algorithms.launch import run_stage, single_stage
from rlhf_fast.data.encoding import Example
from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.errors import UserError
from rlhf_fast.training import supervised
from rlhf_fast.training.optim import accumulate
from rlhf_fast.training.rankings import Ranking, implicit_ranking_loss
from tests.training.tiny_runs import config_of, folder, gradients, job_of, values_of, write_jsonl

BETA = 0.3


def chance(rewards, order):
    """Of drawing `order`, best first, without replacement, each with a chance proportional to exp(reward)."""
    left, total = list(range(len(rewards))), torch.ones((), dtype=torch.float64)
    for drawn in order:
        total = total * rewards[drawn].exp() / torch.stack([rewards[i].exp() for i in left]).sum()
        left.remove(drawn)
    return total


def test_the_loss_is_the_likelihood_of_the_ranking_under_plackett_luce():
    torch.manual_seed(0)
    logprobs = (-5 * torch.rand(7, dtype=torch.float64)).requires_grad_()
    references = -5 * torch.rand(2, 4, dtype=torch.float64)
    ranks = [(3, 1, 2), (2, 4, 1, 3)]
    rankings = [Ranking((Example([1], 0),) * len(r), r) for r in ranks]
    loss, _ = implicit_ranking_loss(
        logprobs, references, rankings, beta=BETA, variant="plackett_luce", denominator=2
    )  # fmt: skip
    rewards = [BETA * (logprobs[:3] - references[0, :3]), BETA * (logprobs[3:] - references[1])]
    assert sum(chance(rewards[0], order) for order in itertools.permutations(range(3))).item() == pytest.approx(1.0)
    expected = -(chance(rewards[0], (1, 2, 0)).log() + chance(rewards[1], (2, 0, 3, 1)).log()) / 2
    torch.testing.assert_close(loss, expected)
    found, theirs = (torch.autograd.grad(x, logprobs)[0] for x in (loss, expected))
    torch.testing.assert_close(found, theirs)


def ranking_config(**changes):
    values = {**values_of("dpo"), "algorithm": "dpo_ranking", "data": str(folder() / "rankings.jsonl"), **changes}
    return single_stage(values).config


def test_two_ranked_answers_are_dpo_on_a_pair(tmp_path):
    """Gradients too, by the data of DPO spelled as rankings and as scores, whatever the micro-batches."""
    pairs = read_jsonl(folder() / "pairs.jsonl")
    rows = [{"prompt": p["prompt"], "completions": [p["rejected"], p["chosen"]], "scores": [-1.0, 2.5]} for p in pairs]
    write_jsonl(tmp_path / "rankings.jsonl", rows)
    results = []
    for config in (config_of("dpo"), ranking_config(data=str(tmp_path / "rankings.jsonl"), micro_batch_size=3)):
        job = job_of(config)
        loss = preference.loss_of(job, config, job.train, preference.references_of(job, config, job.train))
        metrics = accumulate(loss, supervised.micro_batches(job, job.train, range(4), config.micro_batch_size))
        results.append((float(metrics["loss"]), gradients(job)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4)
    for name, value in results[1][1].items():
        scale = float(results[0][1][name].abs().max())
        torch.testing.assert_close(value, results[0][1][name], rtol=1e-3, atol=1e-4 * scale)


def test_the_better_ranked_answer_becomes_likelier(tmp_path):
    rows = [{"prompt": f"p{i}", "completions": ["aa", "bb", "cc"], "ranks": [1, 2, 3]} for i in range(20)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    values = {**values_of("dpo"), "algorithm": "dpo_ranking", "data": str(tmp_path / "data.jsonl"), "steps": 8,
              "eval_size": 4, "output_dir": str(tmp_path / "run")}  # fmt: skip
    run_stage(Console(quiet=True), single_stage(values), resume=None, overwrite=False)
    before, after = (row["metrics"] for row in read_jsonl(tmp_path / "run" / "eval.jsonl"))
    assert after["loss"] < before["loss"] - 0.1
    assert after["accuracy"] > 0.9


@pytest.mark.parametrize(("row", "message"), [
    ({"ranks": [1, 1]}, r"ranks list \[1, 1\] tell no two answers apart"),
    ({"ranks": [1, None]}, "tell no two answers apart"),
    ({"ranks": [1]}, "completions and ranks must be lists of one length"),
    ({"ranks": [1, "b"]}, "ranks must be finite numbers or null, got str 'b'"),
    ({"scores": [1.0, True]}, "scores must be finite numbers or null, got bool True"),
], ids=str)  # fmt: skip
def test_rankings_that_say_nothing_are_refused_with_their_row(row, message, tmp_path):
    write_jsonl(tmp_path / "data.jsonl", [{"prompt": f"p{i}", "completions": ["a", "b"], **row} for i in range(4)])
    with pytest.raises(UserError, match=rf"data.jsonl:\d+: .*{message}"):
        job_of(ranking_config(data=str(tmp_path / "data.jsonl"), eval_size=1))


def test_an_objective_of_pairs_has_no_ranking():
    with pytest.raises(UserError, match="ranking plackett_luce takes of the objective its beta alone"):
        ranking_config(objective="ipo")
