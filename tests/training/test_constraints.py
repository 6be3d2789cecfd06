"""Costs that are held at a limit: the multiplier's numbers, the test's bounds, what a run does with them."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from rlhf_fast.algorithms.launch import launch, run_stage, single_stage
from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.errors import UserError
from rlhf_fast.rewards import Rewards
from rlhf_fast.training.constraints import Constraints, student_t_quantile, upper_bound
from rlhf_fast.training.experience import collect, evaluate_policy, prompts_of_step
from rlhf_fast.training.on_policy import constrained
from tests.training.interruptions import assert_resumes, run
from tests.training.test_experience import trained
from tests.training.tiny_runs import config_of, folder, job_of, save_supple_model, values_of

EVEN = f"{folder()}/reward.py:even"


def constraints(held_out=8, limits=None, **changes):
    config = {"cost_multiplier": 0.5, "cost_multiplier_rate": 0.2, "cost_multiplier_max": 2.0, "cost_window": 3,
              "cost_confidence": None, "cost_range": None, "eval_every": None, "steps": 10}  # fmt: skip
    return Constraints(Rewards(), limits or {"c": 1.0}, SimpleNamespace(**{**config, **changes}), held_out)


def test_the_multiplier_climbs_by_the_mean_of_the_window_over_the_limit():
    found = constraints()
    assert found.multipliers["c"] == pytest.approx(0.5)
    metrics = found.ascend({"c": torch.tensor([2.0, 4.0])})
    first = math.log(0.5) + 0.2 * 0.5 * (3.0 - 1.0)
    assert found.log_multipliers["c"] == pytest.approx(first, rel=1e-12)
    assert metrics == pytest.approx({"cost": 3.0, "cost_multiplier": math.exp(first)})
    found.ascend({"c": torch.tensor([0.0, -2.0])})  # of the last three: 4, 0, -2
    second = first + 0.2 * math.exp(first) * (2 / 3 - 1.0)
    assert found.log_multipliers["c"] == pytest.approx(second, rel=1e-6)
    found.ascend({"c": torch.tensor([100.0])})
    assert found.multipliers["c"] == pytest.approx(2.0)


def test_rewards_are_paid_less_the_costs_over_one_plus_the_multipliers():
    found = constraints(limits={"a": 1.0, "b": 0.0})
    found.log_multipliers = {"a": math.log(0.5), "b": math.log(1.5)}
    costs = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.0, -1.0])}
    found.recent = {"a": [1.0, 2.0], "b": [0.0, -1.0]}
    paid = found.paid(torch.tensor([3.0, 4.0]), costs)
    assert paid.tolist() == pytest.approx([(3 - 0.5) / 3, (4 - 1.0 + 1.5) / 3])


def test_with_a_test_the_cost_is_the_one_of_the_bound():
    """The score-function gradient of the cost that is paid for is that of mean + kappa std, by autograd."""
    values, probabilities = torch.tensor([0.0, 1.0, 3.0]).double(), torch.tensor([0.25, 0.25, 0.5]).double()
    found = constraints(cost_confidence=0.95, cost_window=4000, held_out=10)
    found.ascend({"c": values[[0, 1, 2, 2]].repeat(1000)})
    # t quantiles of tables: 3999 and 9 degrees of freedom.
    kappa = 1.6452 / math.sqrt(4000) + 1.8331 / math.sqrt(10)
    assert found.caution("c") == pytest.approx(kappa, rel=1e-4)
    logits = probabilities.log().requires_grad_()
    p = logits.softmax(0)
    mean = (p * values).sum()
    (mean + kappa * (p * (values - mean).square()).sum().sqrt()).backward()
    multiplier = found.multipliers["c"]
    paid = found.paid(torch.zeros(3).double(), {"c": values}) * (1 + multiplier) / -multiplier
    log_p = torch.autograd.functional.jacobian(lambda z: z.log_softmax(0), logits.detach())
    torch.testing.assert_close((probabilities * paid) @ log_p, logits.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("probability", "freedom", "t"), [
    (0.95, 1, 6.313752), (0.95, 2, 2.919986), (0.975, 3, 3.182446), (0.95, 10, 1.812461), (0.975, 30, 2.042272),
    (0.99, 5, 3.364930), (0.995, 120, 2.617421),
])  # fmt: skip
def test_student_s_quantiles_are_those_of_the_tables(probability, freedom, t):
    assert student_t_quantile(probability, freedom) == pytest.approx(t, abs=1e-6)


def test_upper_bounds():
    costs = torch.tensor([1.0, 2.0, 3.0])
    assert upper_bound(costs, 0.05) == pytest.approx(2 + 2.919986 / math.sqrt(3), abs=1e-6)
    assert upper_bound(costs, 0.05, (0.0, 4.0)) == pytest.approx(2 + 4 * math.sqrt(math.log(20) / 6))
    with pytest.raises(UserError, match=r"cost_range 0 to 2 does not hold costs of 1 to 3"):
        upper_bound(costs, 0.05, (0, 2))
    with pytest.raises(UserError, match="needs two held-out prompts"):
        upper_bound(costs[:1], 0.05)


def test_the_bound_of_student_holds_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, 8, generator=generator).double()
    t = student_t_quantile(0.9, 7)
    held = (draws.mean(1) + t * draws.std(1) / math.sqrt(8) >= 0).double().mean()
    assert abs(float(held) - 0.9) < 4 * math.sqrt(0.09 / 4000)


def test_the_chance_of_a_mistake_is_shared_by_the_evaluations():
    costs = {"c": torch.tensor([0.0, 1.0, 0.0, 1.0])}
    once = constraints(cost_confidence=0.9, eval_every=3)  # before, after, and after 3, 6 and 9 of 10 steps
    assert once.evaluations == 5
    tested = once.tested(costs)
    bound = 0.5 + student_t_quantile(1 - 0.1 / 5, 3) * math.sqrt(1 / 3) / 2
    assert tested == pytest.approx({"cost": 0.5, "cost_upper": bound, "cost_passed": float(bound <= 1.0)})
    assert "cost_upper" not in constraints().tested(costs)


def test_the_multiplier_rises_until_the_limit_holds(tmp_path):
    """What the reward asks for is what costs: without the constraint nearly every byte is of that kind in the end."""
    save_supple_model(tmp_path / "model")
    (tmp_path / "reward.py").write_text(
        "def odd(completions):\n    return [sum(not ' ' <= x <= '~' for x in c) / 8 for c in completions]\n"
    )
    odd = f"{tmp_path}/reward.py:odd"
    common = {"model": str(tmp_path / "model"), "reward": odd, "num_generations": 8, "batch_size": 32,
              "max_new_tokens": 8, "objective": "ppo_clip", "learning_rate": 0.01,
              "reference_refresh_every": None}  # fmt: skip
    _, free = trained("grpo", 20, **common)
    assert free[-1]["reward"] > 0.8
    held = {"cost": odd, "cost_limit": 0.5, "cost_multiplier": 0.1, "cost_multiplier_rate": 3.0, "cost_window": 32}
    _, log = trained("grpo", 30, **common, **held)
    costs, multipliers = [m["cost"] for m in log], [m["cost_multiplier"] for m in log]
    assert max(costs) > 0.8, "the reward pulls over the limit first"
    assert multipliers[0] < 0.2 < 1 < max(multipliers)
    assert sum(costs[-10:]) / 10 < 0.6
    assert log[0]["reward"] == pytest.approx(log[0]["cost"]), "the metric is the reward, not what is paid"


def test_a_run_keeps_the_last_policy_that_passed(tmp_path, capsys):
    def finished(name, limit):
        values = values_of("grpo", cost=EVEN, cost_limit=limit, cost_confidence=0.9, steps=2)
        run({**values, "output_dir": str(tmp_path / name)})
        return [row["metrics"]["cost_passed"] for row in read_jsonl(tmp_path / name / "eval.jsonl")]

    assert finished("passes", 1e3) == [1, 1]
    policy, safe = (load_file(tmp_path / "passes" / name / "adapter_model.safetensors") for name in ("", "safe"))
    assert all(torch.equal(policy[key], safe[key]) for key in policy)
    assert "costs: the last policy that passed is in safe/" in capsys.readouterr().out
    assert finished("fails", -1e3) == [0, 0]
    assert not (tmp_path / "fails" / "safe").exists()
    assert "costs: no policy passed" in capsys.readouterr().out


def test_a_killed_run_with_costs_and_resampling_resumes_bit_for_bit(tmp_path, monkeypatch):
    values = values_of(
        "grpo", cost=f"{folder()}/reward.py:score", cost_limit=1.0, cost_confidence=0.9, cost_window=6, reward=EVEN,
        max_resamples=2, save_every=2, eval_every=1,
    )  # fmt: skip
    metrics = assert_resumes(values, tmp_path, monkeypatch, step=3)["metrics.jsonl"]
    assert len({row["cost_multiplier"] for row in metrics}) == len(metrics), "the multiplier moves"
    assert sum(row["dropped_groups"] for row in metrics) > 0


def test_a_cost_adapter_is_scored_as_a_role_of_its_own(tmp_path):
    model = {"output_dir": str(tmp_path / "rm"), "steps": 1}
    run_stage(Console(quiet=True), single_stage(values_of("reward_model", **model)), resume=None, overwrite=False)
    place = str(tmp_path / "rm")
    config = config_of("grpo", reward=place, cost=place, cost_limit=0.0)
    job = job_of(config, scrambled=False)
    experience = collect(job, config, prompts_of_step(job, config, 0))
    assert {"reward", "cost"} <= {*job.backbone.heads}
    assert experience.scores.costs.abs().sum() > 0
    torch.testing.assert_close(experience.costs[place], experience.parts[place])
    stats = json.loads((tmp_path / "rm" / "reward_stats.json").read_text())
    expected = (experience.scores.scores - stats["mean"]) / stats["std"]
    torch.testing.assert_close(experience.costs[place], expected)


def test_the_evaluations_of_a_run_that_counts_epochs_are_counted():
    values = values_of("grpo", cost=EVEN, cost_limit=1.0, cost_confidence=0.9, epochs=2.0, eval_every=2)
    del values["steps"]
    config = single_stage(values).config
    job = job_of(config)
    # 7 prompts twice, 2 in a step: 7 steps, with evaluations before, after, and after 2, 4 and 6.
    assert (len(job.train), config.for_data(7).steps, job.constraints.evaluations) == (7, 7, 5)


def test_a_cost_may_be_what_an_earlier_stage_has_trained(tmp_path):
    pairs, prompts = str(folder() / "pairs.jsonl"), str(folder() / "prompts.jsonl")
    shared = {"model": str(folder() / "model"), "device": "cpu", "report_to": "none", "steps": 1, "batch_size": 4,
              "eval_size": 2, "output_dir": str(tmp_path / "run")}  # fmt: skip
    stages = [
        {"algorithm": "reward_model", "name": "harm", "data": pairs},
        {"algorithm": "grpo_lagrangian", "data": prompts, "reward": EVEN, "cost": {"from": "harm"},
         "num_generations": 2, "max_new_tokens": 4},
    ]  # fmt: skip
    (tmp_path / "stages.yaml").write_text(json.dumps({**shared, "stages": stages}))
    launch(str(tmp_path / "stages.yaml"), {}, dry_run=False, resume=None, overwrite=False)
    (metrics,) = read_jsonl(tmp_path / "run" / "grpo_lagrangian" / "metrics.jsonl")
    assert metrics["cost"] != 0
    assert metrics["cost_multiplier"] != 1


@pytest.mark.parametrize(("changes", "message"), [
    ({"cost": EVEN}, "cost_limit needs one number for each of 1 costs, got None"),
    ({"cost": EVEN, "cost_limit": [1.0, 2.0]}, r"cost_limit needs one number for each of 1 costs, got \[1.0, 2.0\]"),
    ({"cost_confidence": 0.9}, "cost_confidence 0.9 is of a cost or of reward_floors, and there is none"),
    ({"cost": EVEN, "cost_limit": 1.0, "cost_multiplier": 9.0}, "cost_multiplier 9.0 is above cost_multiplier_max 5.0"),
    ({"cost": EVEN, "cost_limit": 1.0, "cost_range": [1, 0]}, r"cost_range must be \[lowest, highest\], got"),
    ({"cost": EVEN, "cost_limit": 1.0, "advantage": "gdpo"}, "gdpo compares every reward by itself"),
])  # fmt: skip
def test_costs_that_do_not_fit_are_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        single_stage(values_of("grpo", **changes))


def test_a_limit_without_a_cost_is_one_line():
    with pytest.raises(UserError, match=r"grpo: cost_limit 1\.0 needs a cost"):
        job_of(config_of("grpo", cost_limit=1.0))


@pytest.fixture
def two_rewards(tmp_path):
    """Two sources, and the keys of a run that has them."""
    (tmp_path / "two.py").write_text(
        "def one(completions):\n    return [1.0 + len(c) % 3 for c in completions]\n\n\n"
        "def two(completions):\n    return [10.0 * (len(c) % 2) for c in completions]\n"
    )
    names = [f"{tmp_path}/two.py:{name}" for name in ("one", "two")]
    return names, {"reward": names, "reward_weights": [1.0, 0.0]}


@pytest.mark.parametrize(("schedule", "steps", "shares"), [
    ("linear", None, [0, 0.25, 0.5, 0.75, 1]), ("cosine", None, [0, (1 - 0.5**0.5) / 2, 0.5, (1 + 0.5**0.5) / 2, 1]),
    ("linear", 3, [0, 0.5, 1, 1, 1]),
])  # fmt: skip
def test_reward_weights_go_from_one_to_the_other(schedule, steps, shares, two_rewards):
    (one, two), keys = two_rewards
    keys = {**keys, "final_reward_weights": [3.0, -1.0], "reward_schedule": schedule, "reward_schedule_steps": steps}
    _, log = trained("grpo", 5, **keys)
    expected = [(1 + 2 * s) * m[f"reward/{one}"] - s * m[f"reward/{two}"] for s, m in zip(shares, log, strict=True)]
    assert [m["reward"] for m in log] == pytest.approx(expected, rel=1e-5)


def test_evaluations_weigh_rewards_as_the_end_does(two_rewards):
    (one, two), keys = two_rewards
    config = config_of("grpo", **keys, final_reward_weights=[0.0, 2.0])
    job = job_of(config)
    first = evaluate_policy(job, config, job.held_out)
    assert job.rewards.weights == {one: 0.0, two: 2.0}
    twos = [10.0 * (len(sample["completion"]) % 2) for sample in first["samples"]]
    assert [sample["reward"] for sample in first["samples"]] == pytest.approx([2 * x for x in twos])


def test_a_reward_below_its_floor_gets_a_weight_that_grows(two_rewards):
    (one, two), keys = two_rewards
    config = config_of("grpo", **keys, reward_floors=[None, 20.0], cost_multiplier=0.5, cost_window=4)
    job = job_of(config)
    experience = collect(job, config, prompts_of_step(job, config, 0))
    assert job.constraints.limits == {f"-{two}": -20.0}
    scores = {name: part.double() for name, part in experience.parts.items()}
    multiplier = 0.5 * math.exp(0.1 * 0.5 * (20.0 - float(scores[two].mean())))
    paid = constrained(job, experience)
    assert paid.metrics["cost_multiplier"] == pytest.approx(multiplier, rel=1e-6)
    expected = (scores[one] + multiplier * scores[two]) / (1 + multiplier)
    torch.testing.assert_close(paid.rewards.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(paid.judged, experience.rewards)


@pytest.mark.parametrize("key", ["final_reward_weights", "reward_floors"])
def test_one_number_for_each_reward(key, two_rewards):
    with pytest.raises(UserError, match=rf"{key} has 1 entries for 2 rewards"):
        job_of(config_of("grpo", **two_rewards[1], **{key: [1.0]}))
