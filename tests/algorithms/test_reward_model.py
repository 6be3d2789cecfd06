"""What each form of judgement teaches, against formulas written here on separate rows of tokens made here."""

import json
import math
from itertools import combinations

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerFast

from rlhf_fast.algorithms import reward_model
from rlhf_fast.algorithms.launch import run_stage, single_stage
from rlhf_fast.data.encoding import Encoder
from rlhf_fast.data.reading import Row, read_jsonl
from rlhf_fast.errors import UserError
from rlhf_fast.models.tiny import _byte_letters
from rlhf_fast.rewards.steps import steps_of
from rlhf_fast.training import supervised
from rlhf_fast.training.ensemble import all_scores
from rlhf_fast.training.experience import collect, prompts_of_step
from rlhf_fast.training.optim import accumulate
from rlhf_fast.training.reward_data import Reading, encode_judged
from tests.training.tiny_runs import assert_close, config_of, folder, gradients, job_of, judged, values_of, write_jsonl

ROWS = [judged(i) for i in range(4)]


def config_for(form: str, **changes):
    data = str(folder() / "judged.jsonl")
    return config_of("reward_model", **{"data": data, "eval_data": data, "form": form, **changes})


def ids_of(prompt: str, *answers: str, end: int | None = 258) -> list[int]:
    """BOS, the bytes, EOS."""
    return [257, *prompt.encode(), *b"".join(a.encode() for a in answers), *([] if end is None else [end])]


def score_of(job, ids: list[int], places=(-1,), role: str = "reward") -> torch.Tensor:
    """(places, outputs) of one row alone."""
    row = torch.tensor([ids])
    hidden = job.backbone.hidden(row, torch.ones_like(row), [role])[role]
    return job.backbone.head(role)(hidden[0, list(places)]).double()


def bradley_terry(better, worse, margin=0.0, chance=1.0):
    h = better - worse - margin
    return -(chance * logsigmoid(h) + (1 - chance) * logsigmoid(-h))


def answers_of(job, row):
    ranked = [(rank, a) for rank, a in zip(row["ranks"], row["completions"], strict=True) if rank is not None]
    return [(rank, score_of(job, ids_of(row["prompt"], a))[0]) for rank, a in sorted(ranked)]


def pairs(job, row):
    better, worse = (score_of(job, ids_of(row["prompt"], row[name])) for name in ("chosen", "rejected"))
    return bradley_terry(better, worse, row["margin"], row["preference"])


def all_pairs(job, row):
    return torch.stack(
        [bradley_terry(x, y) for (r, x), (s, y) in combinations(answers_of(job, row), 2) if r < s]
    ).mean()


def plackett_luce(job, row):
    """log of the product of exp(r_i) / the sum over those not yet drawn."""
    scores = torch.cat([score for _, score in answers_of(job, row)])
    return -sum(scores[i] - scores[i:].logsumexp(0) for i in range(len(scores)))


def ratings(job, row):
    score = score_of(job, ids_of(row["prompt"], row["completion"]))[0]
    said = torch.tensor([[x["ratings"][name] for name in ("help", "style")] for x in map(judged, range(12))]).double()
    target = (torch.tensor([row["ratings"]["help"], row["ratings"]["style"]]).double() - said.mean(0)) / said.std(
        0, correction=0
    )
    return 0.5 * (score - target).square().mean()


def likes(job, row):
    score = score_of(job, ids_of(row["prompt"], row["completion"]))
    return -logsigmoid(score) if row["label"] else -logsigmoid(-score)


def steps(job, row):
    """The sum over the steps."""
    ids, ends = ids_of(row["prompt"], end=None), []
    for step in row["completions"]:
        ids += [*step.encode(), 10]
        ends.append(len(ids) - 1)
    scores = score_of(job, ids, ends)[:, 0]
    return sum(-logsigmoid(s if y else -s) for s, y in zip(scores, row["labels"], strict=True))


CASES = {
    "pairs": (config_for("pairs"), pairs), "rankings": (config_for("rankings"), all_pairs),
    "plackett_luce": (config_for("rankings", ranking="plackett_luce"), plackett_luce),
    "ratings": (config_for("ratings"), ratings), "likes": (config_for("likes"), likes),
    "steps": (config_for("steps"), steps),
}  # fmt: skip


def backward(job, config, count: int = 4) -> dict[str, torch.Tensor]:
    rows = supervised.micro_batches(job, job.train, range(count), config.micro_batch_size)
    return accumulate(reward_model.loss_of(job, config), rows)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_the_gradient_is_that_of_the_formula_on_separate_rows(case, micro_batch_size):
    config, formula = CASES[case]
    config = config.model_copy(update={"micro_batch_size": micro_batch_size})
    job = job_of(config)
    metrics = backward(job, config)
    ours = gradients(job)
    parts = [formula(job, row).sum() for row in ROWS]
    divisor = len(parts) if case != "steps" else sum(len(row["labels"]) for row in ROWS)
    expected = sum(parts) / divisor
    expected.backward()
    assert float(metrics["loss"]) == pytest.approx(expected.item(), rel=1e-5)
    assert_close(ours, gradients(job))


def test_scores_do_not_depend_on_whether_prompts_are_computed_once():
    configs = [config_for("rankings", padding_free=padding_free) for padding_free in (True, False)]
    jobs = [job_of(config) for config in configs]
    ours, theirs = (all_scores(job, config, job.train) for job, config in zip(jobs, configs, strict=True))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_ties_and_missing_ranks_are_dropped_and_scores_rank_from_the_greatest(tmp_path):
    rows = [{"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [0.5, None, 2.0, 0.5]}] * 3
    write_jsonl(tmp_path / "d.jsonl", rows)
    job = job_of(config_for("auto", data=str(tmp_path / "d.jsonl"), eval_data=None, eval_size=1))
    (one,) = {judgement.targets for judgement in job.train}
    assert one == (2.0, 1.0, 2.0)
    assert job.train[0].comparisons == [(1, 0), (1, 2)]


def test_a_chance_below_a_half_turns_the_pair_round(tmp_path):
    row = {"prompt": "p", "chosen": "bad", "rejected": "good", "preference": 0.25, "margin": 0.5}
    write_jsonl(tmp_path / "d.jsonl", [row] * 3)
    job = job_of(config_for("auto", data=str(tmp_path / "d.jsonl"), eval_data=None, eval_size=1))
    assert job.train[0].targets == (-0.5, 0.75)
    good = score_of(job, ids_of("p", "good"))
    torch.testing.assert_close(
        all_scores(job, config_for("pairs"), job.train[:1])[:1].double(), good, rtol=1e-5, atol=1e-5
    )


def test_the_weighted_sum_of_ratings_is_one_output():
    config = config_for("ratings", criterion_weights={"style": 0.25, "help": 2.0})
    job = job_of(config)
    said = torch.tensor([2.0 * x["ratings"]["help"] + 0.25 * x["ratings"]["style"] for x in map(judged, range(12))])
    expected = (said - said.mean()) / said.std(correction=0)
    torch.testing.assert_close(torch.tensor([one.targets[0] for one in job.train]), expected)
    assert job.backbone.heads["reward"].out_features == 1


BAD = {
    "rank count": ({"completions": ["a"], "ranks": [1, 2]}, "rankings", "ranks has 2 entries for 1 completions"),
    "all tie": ({"completions": ["a", "b"], "ranks": [1, 1]}, "rankings", r"ranks list \[1, 1\] tell no two answers"),
    "preference": ({"preference": 1.5}, "pairs", r"preference must be in \[0, 1\], got 1.5"),
    "margin": ({"margin": "much"}, "pairs", "margin must be a number, got str 'much'"),
    "label": ({"label": "maybe"}, "likes", "label must be a number, got str 'maybe'"),
    "label number": ({"label": 2}, "likes", "label must be true or false, got int 2"),
    "step label": ({"labels": [2, 0, 1]}, "steps", r"labels must be in \[0, 1\]"),
    "step text": ({"completions": [1, "a", "b"]}, "steps", "completions must be a list of texts, one for each step"),
    "criteria": ({"ratings": {"help": 1}}, "ratings", "ratings must have help, style, got dict"),
    "rating": ({"ratings": {"help": 1, "style": None}}, "ratings", "style must be a number, got NoneType None"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_judgement_is_one_line_with_its_place(case, tmp_path):
    change, form, message = BAD[case]
    write_jsonl(tmp_path / "d.jsonl", [judged(0), {**judged(0), **change}, judged(1)])
    config = config_for(form, data=str(tmp_path / "d.jsonl"), eval_data=str(folder() / "judged.jsonl"))
    with pytest.raises(UserError, match=rf"d\.jsonl:2: {message}"):
        job_of(config)
    assert len(job_of(config.model_copy(update={"bad_rows": "skip"})).train) == 2


def test_a_form_whose_columns_are_not_there_is_refused():
    with pytest.raises(UserError, match=r"needs the columns prompt/completions/ranks or .*; found: prompt"):
        job_of(config_of("reward_model", form="rankings"))


def test_criteria_and_ensembles_must_fit():
    for changes, message in (
        ({"form": "ratings", "ensemble": 2}, "ensemble 2 needs one score, and the ratings have 2 criteria"),
        ({"form": "likes", "bound": True}, "bound: true is for pairs and rankings, and .* has likes"),
        ({"form": "ratings", "criterion_weights": {"help": 1.0}}, "criterion_weights must have help, style, got help"),
    ):
        with pytest.raises(UserError, match=message):
            job_of(config_for(**changes))


def run(tmp_path, name: str, **changes):
    values = {
        **values_of("reward_model"),
        "data": str(folder() / "judged.jsonl"),
        "steps": 4,
        "data_seed": 3,
        **changes,
    }
    run_stage(Console(quiet=True), single_stage({**values, "output_dir": str(tmp_path / name)}), resume=None,
              overwrite=False)  # fmt: skip
    return tmp_path / name


@pytest.mark.parametrize("form", ["pairs", "rankings"])
def test_the_members_of_an_ensemble_are_the_models_that_would_be_trained_alone(form, tmp_path):
    together = run(tmp_path, "ensemble", form=form, ensemble=3)
    for number in range(3):
        alone = run(tmp_path, f"alone_{number}", form=form, seed=3 + number)
        member = together / f"member_{number}" if number else together
        ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (member, alone))
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-5)
        stats = [json.loads((place / "reward_stats.json").read_text()) for place in (member, alone)]
        assert stats[0]["mean"] == pytest.approx(stats[1]["mean"], abs=1e-4)
        assert stats[0]["std"] == pytest.approx(stats[1]["std"], rel=1e-3)
    first, second = (load_file(place / "adapter_model.safetensors") for place in (together, together / "member_1"))
    name = "base_model.model.score.weight"
    assert not torch.allclose(first[name], second[name], rtol=0.05), "members that are equal are no ensemble"


def test_heads_on_one_adapter_learn_each_from_its_own_score():
    config = config_for("pairs", ensemble=3, ensemble_of="heads")
    job = job_of(config)
    metrics = backward(job, config)
    ours = gradients(job)
    losses = 0.0
    for row in ROWS:
        better, worse = (score_of(job, ids_of(row["prompt"], row[name])) for name in ("chosen", "rejected"))
        losses = losses + bradley_terry(better, worse, row["margin"], row["preference"])[0]
    assert losses.std() > 0.01, "the heads must differ"
    (losses / len(ROWS)).mean().backward()
    assert float(metrics["loss"]) == pytest.approx((losses / len(ROWS)).mean().item(), rel=1e-5)
    assert_close(ours, gradients(job))


def test_heads_start_apart_and_a_single_one_at_zero():
    heads = job_of(config_for("pairs", ensemble=2, ensemble_of="heads"), scrambled=False).backbone.heads
    weight = heads["reward"].weight.detach()
    assert weight.shape == (2, 32)
    assert float(weight.std()) == pytest.approx(33**-0.5, rel=0.3)
    assert not job_of(config_for("pairs"), scrambled=False).backbone.head("reward").weight.any()


def test_an_ensemble_goes_on_from_its_own_folder_and_not_from_a_single_model(tmp_path):
    together = run(tmp_path, "ensemble", ensemble=2, form="pairs")
    again = job_of(config_for("pairs", model=str(together), ensemble=2), scrambled=False)
    saved = load_file(together / "member_1" / "adapter_model.safetensors")
    ours = again.backbone.named_parameters_of("reward_1")
    assert all(torch.equal(saved[f"base_model.model.{name}"], p.detach()) for name, p in ours.items())
    with pytest.raises(UserError, match="has 2 members: it goes on with ensemble 2, got 1"):
        job_of(config_for("pairs", model=str(together)))
    alone = run(tmp_path, "alone", form="pairs")
    with pytest.raises(UserError, match="is one reward model: 2 members that start from it would stay the same"):
        job_of(config_for("pairs", model=str(alone), ensemble=2))


def test_scores_are_centred_on_the_reference_answers(tmp_path):
    write_jsonl(tmp_path / "references.jsonl", [{"prompt": "ab", "completion": text} for text in ("one", "two", "x")])
    place = run(tmp_path, "run", form="pairs", center_on=str(tmp_path / "references.jsonl"))
    job = job_of(config_for("pairs", model=str(place)), scrambled=False)
    scores = torch.cat([score_of(job, ids_of("ab", text)) for text in ("one", "two", "x")])
    stats = json.loads((place / "reward_stats.json").read_text())
    assert stats["mean"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert stats["std"] == pytest.approx(scores.std().item(), rel=1e-3)
    held_out = json.loads(
        (run(tmp_path, "other", form="pairs", center_on="held_out") / "reward_stats.json").read_text()
    )
    assert held_out["mean"] != pytest.approx(stats["mean"], abs=1e-4)


@pytest.mark.parametrize("form", ["pairs", "rankings", "ratings", "likes", "steps"])
def test_a_few_steps_teach_what_was_said(form, tmp_path):
    """Every form tells "good" from "bad"; the held-out loss falls and the order is learnt."""
    rows = [{**judged(i), "prompt": f"ab{i}", "ranks": [3, 1, 2, 2][: 3 + i % 2], "margin": 0, "preference": 1,
             "ratings": {"help": 5 if i % 3 else 1, "style": 4 if i % 3 else 2}} for i in range(24)]  # fmt: skip
    write_jsonl(tmp_path / "d.jsonl", rows)
    place = run(tmp_path, "run", form=form, data=str(tmp_path / "d.jsonl"), eval_size=8, steps=30, batch_size=8)
    before, after = (row["metrics"] for row in read_jsonl(place / "eval.jsonl"))
    assert after["loss"] < 0.8 * before["loss"]
    key = "spearman_rating_1" if form == "ratings" else "accuracy"
    assert after[key] > 0.85
    assert math.isfinite(sum(after.values()))
    assert (place / "reward_report.json").is_file()
    assert (place / "reliability.png").is_file() == (form != "ratings")


def test_sigma_is_the_sum_over_the_pairs_that_were_told_apart(tmp_path):
    """Of a ranking every two answers of different ranks; phi at the last token, of the weights that were saved."""
    place = run(tmp_path, "run", form="rankings", bound=True, bound_ridge=0.5, eval_data=str(folder() / "judged.jsonl"))
    sigma = load_file(place / "reward_covariance.safetensors")["sigma"]
    job = job_of(config_for("rankings", model=str(place)), scrambled=False)
    expected = 0.5 * torch.eye(32).double()
    for row in map(judged, range(12)):
        ranked = [(r, a) for r, a in zip(row["ranks"], row["completions"], strict=True) if r is not None]
        states = []
        for rank, answer in ranked:
            ids = torch.tensor([ids_of(row["prompt"], answer)])
            states.append((rank, job.backbone.hidden(ids, torch.ones_like(ids), ["reward"])["reward"][0, -1].detach()))
        for (r, x), (s, y) in combinations(states, 2):
            if r != s:
                expected += torch.outer((x - y).double(), (x - y).double())
    torch.testing.assert_close(sigma, expected, rtol=1e-4, atol=1e-4)


def test_a_policy_is_paid_by_the_ensemble_that_an_earlier_stage_trained(tmp_path):
    place = run(tmp_path, "ensemble", ensemble=2, form="pairs")
    config = config_of("ppo", reward=str(place), reward_combine="pessimistic", reward_combine_coef=0.5)
    job = job_of(config, scrambled=False)
    torch.manual_seed(7)
    experience = collect(job, config, prompts_of_step(job, config, 0))
    columns = []
    for number in range(2):
        member = place / f"member_{number}" if number else place
        stats = json.loads((member / "reward_stats.json").read_text())
        alone = job_of(config_for("pairs", model=str(member)), scrambled=False) if number else None
        backbone = job.backbone if alone is None else alone.backbone
        hidden = backbone.hidden(experience.batch.input_ids, experience.batch.attention_mask, ["reward"])["reward"]
        last = experience.batch.attention_mask.sum(1) - 1
        raw = (hidden[torch.arange(len(last)), last] @ backbone.head("reward").weight[0]).double()
        columns.append((raw - stats["mean"]) / stats["std"])
    normal = torch.stack(columns)
    expected = normal.mean(0) - 0.5 * normal.std(0, correction=0)
    torch.testing.assert_close(experience.rewards.double(), expected.detach(), rtol=1e-4, atol=1e-4)


def test_steps_are_tokenised_one_by_one(tmp_path):
    """A tokenizer that joins a full stop and a line break in running text must not move the end of a step."""
    letters = {letter: i for i, letter in enumerate(_byte_letters())}
    joined = Tokenizer(models.BPE(vocab={**letters, ".Ċ": 256, "<eos>": 257}, merges=[(".", "Ċ")]))
    joined.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    joined.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=joined, eos_token="<eos>")
    assert tokenizer("a.\nb")["input_ids"] == [97, 256, 98]
    row = Row("d:1", {"prompt": "q", "completions": ["a.", "b"], "labels": [1, 0]})
    (one,) = encode_judged(Encoder(tokenizer, 50, 50), [row], "steps", Reading("\n", ()), "data")
    assert one.rows[0].ids == [*b"q", *b"a.\n", *b"b\n"]
    assert one.ends == ((0, 3), (0, 5))
    assert one.rows[0].mask == [0, 0, 0, 1, 0, 1]
    short = Encoder(tokenizer, 50, 5, too_long="truncate")
    (one,) = encode_judged(short, [row], "steps", Reading("\n", ()), "data")
    assert (one.rows[0].ids, one.targets) == ([*b"qa.\n"], (1.0,))
    with pytest.raises(UserError, match="prompt and steps have more tokens than the budget, 5"):
        encode_judged(Encoder(tokenizer, 50, 5), [row], "steps", Reading("\n", ()), "data")


def test_a_policy_is_paid_by_the_steps_of_a_process_reward_model(tmp_path):
    place = run(tmp_path, "prm", form="steps", step_separator="o")
    stats = json.loads((place / "reward_stats.json").read_text())
    assert (stats["form"], stats["step_separator"]) == ("steps", "o")
    config = config_of("ppo", reward=str(place))
    job = job_of(config, scrambled=False)
    torch.manual_seed(7)
    experience = collect(job, config, prompts_of_step(job, config, 0))
    ends = [len(list(steps_of(text, "o"))) for text in experience.rollout.completions]
    assert experience.steps.ends.sum(1).tolist() == ends
    torch.testing.assert_close(experience.final_rewards, torch.zeros(len(ends)), rtol=0, atol=1e-5)
