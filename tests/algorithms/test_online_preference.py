"""Preferences between the policy's own samples: pairs, losses and gradients against the papers' formulas in float64."""

import math

import pytest
import torch
from rich.console import Console

from rlhf_fast.algorithms import online_preference
from rlhf_fast.algorithms.launch import run_stage, single_stage
from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.errors import UserError
from rlhf_fast.models.tiny import tiny
from rlhf_fast.training import on_policy
from rlhf_fast.training.checkpoint import load_checkpoint
from rlhf_fast.training.duels import duels_of, pick_pairs, win_rates
from rlhf_fast.training.experience import collect, prompts_of_step
from rlhf_fast.training.optim import accumulate
from tests.training.interruptions import assert_resumes
from tests.training.tiny_runs import folder, gradients, job_of, values_of, write_jsonl

REWARDS = torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0], [5.0, 5.0, 4.5]])


@pytest.mark.parametrize(("pick", "expected"), [
    ("best_worst", [(1, 0), (6, 8)]),
    ("margin", [(1, 0)]),
    ("all_above", [(1, 0), (1, 2), (2, 0)]),
    # s(2 / 0.8) = 0.92, s(1 / 0.8) = 0.78, s(0.5 / 0.8) = 0.65
    ("threshold", [(1, 0), (1, 2), (2, 0)]),
])  # fmt: skip
def test_which_completions_make_pairs_and_ties_never_do(pick, expected):
    found = pick_pairs(REWARDS, pick, margin=1.0, threshold=0.75, temperature=0.8)
    assert sorted(map(tuple, found.tolist())) == expected


def test_rs_dpo_pairs_are_those_above_its_threshold_by_its_formula():
    torch.manual_seed(0)
    rewards, tau, eta = torch.randn(5, 6, dtype=torch.float64).round(decimals=1), 0.7, 0.85
    expected = [
        (6 * p + i, 6 * p + j)
        for p in range(5) for i in range(6) for j in range(6)
        if 1 / (1 + math.exp(-(rewards[p, i] - rewards[p, j]) / tau)) >= eta
    ]  # fmt: skip
    found = pick_pairs(rewards, "threshold", margin=0.0, threshold=eta, temperature=tau)
    assert sorted(map(tuple, found.tolist())) == sorted(expected)
    assert 0 < len(expected) < 5 * 15


def test_a_win_rate_counts_the_completion_itself_as_a_draw():
    found = win_rates(torch.tensor([[0.0, math.log(3.0)]]), temperature=1.0)
    torch.testing.assert_close(found, torch.tensor([[(0.5 + 0.25) / 2, (0.75 + 0.5) / 2]]))


def values_of_row(name, **changes):
    values = values_of("online_dpo")
    for key in ("num_generations", "pick", "reference_refresh_every", "ppo_epochs", "num_minibatches"):
        del values[key]
    if name == "spin":
        values["data"] = str(folder() / "sft.jsonl")
    return {**values, "algorithm": name, **changes}


def prepared(name, **changes):
    config = single_stage(values_of_row(name, **changes)).config
    job = job_of(config)
    torch.manual_seed(5)
    experience = collect(job, config, prompts_of_step(job, config, 0))
    return job, config, experience, duels_of(job, config, experience)


def logprob(job, role, ids, mask, temperature):
    """(): of the tokens that count, in float64 from the logits that transformers itself gives."""
    with job.backbone.using(role):
        logits = job.backbone.model(input_ids=ids[None]).logits[0, :-1].double() / temperature
    return (logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1) * mask[1:]).sum()


def log_ratios(job, config, duels, rows):
    """(log pi, log pi - log ref) of the rows of everyone, (M,) each."""
    batch = duels.everyone.batch
    found = []
    for row in rows:
        length = int(batch.attention_mask[row].sum())
        ids, mask = batch.input_ids[row, :length], batch.mask[row, :length]
        reference = "reference" if "reference" in job.backbone.adapters else None
        with torch.no_grad():
            base = logprob(job, reference, ids, mask, config.temperature)
        policy = logprob(job, "policy", ids, mask, config.temperature)
        found.append(torch.stack([policy, policy - base]))
    return torch.stack(found).unbind(1)


def check_gradient(job, config, duels, units, expected):
    """Loss and gradient of all units in micro-batches, beside those of `expected`."""
    expected.backward()
    theirs = gradients(job)
    rows = on_policy.micro_batches(job, config, duels.everyone, tuple(u.T.flatten() for u in units.split(2)))
    metrics = accumulate(online_preference.loss_of(config, duels), rows)
    assert float(metrics["loss"]) == pytest.approx(float(expected.detach()), rel=1e-3)
    for name, value in gradients(job).items():
        scale = float(theirs[name].abs().max())
        torch.testing.assert_close(value, theirs[name], rtol=2e-3, atol=2e-4 * scale)


def test_nash_mds_gradient_is_that_of_the_regularised_game():
    """E[(P - 1/2 - beta rho) grad log pi]: the policy's samples against those of the mixture."""
    job, config, experience, duels = prepared("nash_md", objective={"beta": 0.3}, preference_temperature=2.0)
    count = len(experience.batch)
    assert len(duels.everyone.batch) == 2 * count
    # The same prompts meet, and completions of another model.
    width = int((experience.batch.mask.cumsum(1) == 0).sum(1).min())
    assert torch.equal(duels.everyone.batch.input_ids[:count, :width], duels.everyone.batch.input_ids[count:, :width])
    gap = (experience.rewards - duels.everyone.rewards[count:]).double() / 2.0
    assert (gap != 0).any()
    logprobs, ratios = log_ratios(job, config, duels, range(count))
    advantages = torch.sigmoid(gap) - 0.5 - 0.3 * ratios.detach()
    check_gradient(job, config, duels, torch.arange(count)[:, None], -(advantages * logprobs).mean())


def test_sppos_loss_is_the_regression_on_the_win_rate():
    job, config, experience, duels = prepared("sppo_online", objective={"beta": 0.05})
    rewards = experience.rewards.double().view(-1, 4)
    chances = torch.sigmoid(rewards[:, :, None] - rewards[:, None, :]).mean(2).flatten()
    _, ratios = log_ratios(job, config, duels, range(len(chances)))
    expected = (ratios - (chances - 0.5) / 0.05).square().mean()
    check_gradient(job, config, duels, torch.arange(len(chances))[:, None], expected)


def test_online_dpo_is_dpo_on_the_best_and_the_worst():
    job, config, experience, duels = prepared("online_dpo", num_generations=4, objective={"beta": 0.4})
    rewards = experience.rewards.view(-1, 4)
    expected = [(4 * p + int(r.argmax()), 4 * p + int(r.argmin())) for p, r in enumerate(rewards) if r.max() > r.min()]
    assert list(map(tuple, duels.pairs.tolist())) == expected
    assert expected
    _, chosen = log_ratios(job, config, duels, [i for i, _ in expected])
    _, rejected = log_ratios(job, config, duels, [j for _, j in expected])
    loss = -torch.nn.functional.logsigmoid(0.4 * (chosen - rejected)).mean()
    check_gradient(job, config, duels, duels.pairs, loss)


def test_xpo_adds_the_likelihood_of_what_the_reference_said():
    job, config, experience, duels = prepared("xpo", optimism=0.2)
    count = len(experience.batch)
    rewards = duels.everyone.rewards.view(2, count)
    pairs = [(i, i + count) if a > b else (i + count, i) for i, (a, b) in enumerate(rewards.T.tolist()) if a != b]
    assert list(map(tuple, duels.pairs.tolist())) == pairs
    _, chosen = log_ratios(job, config, duels, [i for i, _ in pairs])
    _, rejected = log_ratios(job, config, duels, [j for _, j in pairs])
    of_rivals, _ = log_ratios(job, config, duels, [max(pair) for pair in pairs])
    loss = (-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)) + 0.2 * of_rivals).mean()
    check_gradient(job, config, duels, duels.pairs, loss)


def test_spin_prefers_the_data_to_its_own_sample_without_a_reward():
    values = values_of_row("spin")
    del values["reward"]
    config = single_stage(values).config
    job = job_of(config)
    experience = collect(job, config, prompts_of_step(job, config, 0))
    duels = duels_of(job, config, experience)
    count = len(experience.batch)
    assert duels.pairs.tolist() == [[i + count, i] for i in range(count)]
    batch, tokenizer = duels.everyone.batch, job.encoder.tokenizer
    for row, prompt in enumerate(experience.rollout.prompts):
        answer = batch.input_ids[row + count][batch.mask[row + count].bool()]
        assert tokenizer.decode(answer, skip_special_tokens=True) == prompt.columns["completion"]
    assert "reward" not in online_preference.evaluate(job, config)["metrics"]


def run(values, *, resume=None):
    run_stage(Console(quiet=True), single_stage(values), resume=resume, overwrite=False)


def test_spins_reference_is_the_iterate_before(tmp_path):
    """Refreshed behind steps 2 and 4: at step 5 the reference is the policy of step 4."""
    values = values_of_row("spin", reference_refresh_every=2, save_every=1, keep_checkpoints=9, steps=5)
    run({**values, "output_dir": str(tmp_path)})
    adapters = {
        step: load_checkpoint(tmp_path / "checkpoints" / f"step-{step}")[1]["adapters"] for step in (1, 2, 3, 4, 5)
    }
    for step, iterate in ((2, 2), (3, 2), (4, 4), (5, 4)):
        for name, value in adapters[step]["reference"].items():
            assert torch.equal(value, adapters[iterate]["policy"][name]), (step, name)
    assert any(not torch.equal(adapters[2]["policy"][n], v) for n, v in adapters[4]["policy"].items())
    assert any(not torch.equal(adapters[1]["reference"][n], v) for n, v in adapters[2]["reference"].items())


@pytest.mark.parametrize("row", ["spin", "nash_md", "sppo_online"])
def test_a_killed_run_resumes_bit_for_bit(row, tmp_path, monkeypatch):
    values = values_of_row(row, save_every=2, eval_every=1, steps=4, reference_refresh_every=1)
    assert_resumes(values, tmp_path, monkeypatch, step=2)


@pytest.mark.parametrize("row", ["online_dpo", "sppo_online"])
def test_the_reward_rises_far_beyond_noise(row, tmp_path):
    """A model that mostly repeats printable bytes is paid for the other ones, of which one more wins almost surely."""
    model, tokenizer = tiny(0, hidden_size=32, layers=2, heads=2, max_length=128)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(4)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "reward.py").write_text(
        "def score(completions):\n    return [sum(not ' ' <= x <= '~' for x in c) / 2 for c in completions]\n"
    )
    write_jsonl(tmp_path / "held_out.jsonl", [{"prompt": "ab"}] * 40)
    values = values_of_row(
        row, model=str(tmp_path / "model"), reward=f"{tmp_path}/reward.py:score", steps=12, batch_size=32,
        max_new_tokens=8, learning_rate=0.01, eval_data=str(tmp_path / "held_out.jsonl"), eval_size=40,
        output_dir=str(tmp_path / "run"), preference_temperature=0.1,
    )  # fmt: skip
    run(values)
    before, after = (row["metrics"] for row in read_jsonl(tmp_path / "run" / "eval.jsonl"))
    noise = (before["reward_se"] ** 2 + after["reward_se"] ** 2) ** 0.5
    assert after["reward"] - before["reward"] > 4 * noise


def test_a_reward_that_tells_nothing_apart_is_an_error_and_a_step_without_pairs_is_none(tmp_path):
    (tmp_path / "same.py").write_text("def score(completions):\n    return [1.0] * len(completions)\n")
    values = values_of_row("online_dpo", reward=f"{tmp_path}/same.py:score", output_dir=str(tmp_path / "run"), steps=2)
    with pytest.raises(UserError, match=r"no two completions .* made a pair in 2 steps \(pick: best_worst\)"):
        run(values)
    assert [row["pairs"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 0]


@pytest.mark.parametrize(("row", "changes", "message"), [
    ("online_dpo", {"num_generations": 1}, "rival samples compares .* num_generations is 1, needs 2"),
    ("online_dpo", {"early_stop_kl": 0.1}, "early_stop_kl is of policy losses, got 0.1 for online_dpo"),
    ("online_dpo", {"optimism": 0.1}, "optimism is of learn: pairs and rival: mixture, got pairs and samples"),
    ("nash_md", {"objective": "ipo"}, "learn policy_gradient takes of the objective its beta alone"),
    ("nash_md", {"num_minibatches": 2}, "takes one update of a rollout, ppo_epochs x num_minibatches is 2"),
    ("nash_md", {"rival": "samples", "num_generations": 2}, "learn policy_gradient is for rival: mixture, got samples"),
    ("online_dpo", {"objective": "hpo"}, "needs advantages, which algorithm hpo makes"),
], ids=str)  # fmt: skip
def test_settings_that_do_not_fit_are_one_line(row, changes, message):
    with pytest.raises(UserError, match=message) as error:
        single_stage(values_of_row(row, **changes))
    assert "\n" not in str(error.value)


def test_data_without_answers_has_none_to_prefer():
    with pytest.raises(
        UserError, match=r"prompts.jsonl:\d+: rival data needs the column 'completion'; found: prompt, tag"
    ):
        job_of(single_stage(values_of_row("spin", data=str(folder() / "prompts.jsonl"))).config)


def test_a_run_without_a_reward_says_so():
    values = values_of_row("online_dpo")
    del values["reward"]
    with pytest.raises(UserError, match="missing key 'reward'"):
        job_of(single_stage(values).config)
