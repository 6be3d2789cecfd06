"""The table of algorithms: each row is a module with defaults that stand below what the user says, and trains."""

import pytest
import torch
from rich.console import Console

from rlhf_fast.algorithms import ALGORITHMS, grpo, load_algorithm
from rlhf_fast.algorithms.launch import run_stage, single_stage
from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.errors import UserError
from rlhf_fast.ops.advantages.group_advantages import VARIANTS as COMPARISONS
from rlhf_fast.ops.advantages.group_advantages import group_advantages
from rlhf_fast.ops.policy.policy_loss import VARIANTS as POLICY_LOSSES
from rlhf_fast.ops.preference.preference_loss import VARIANTS as PREFERENCE_LOSSES
from rlhf_fast.ops.preference.unpaired_preference_loss import VARIANTS as UNPAIRED_LOSSES
from rlhf_fast.training.comparisons import OF_TOKENS
from rlhf_fast.training.experience import collect, prompts_of_step
from tests.training.tiny_runs import config_of, folder, job_of, values_of

# What a row needs besides its defaults, for the data and batches of tiny_runs.
REWARDS = f"{folder()}/reward.py"
NEEDS = {
    "dapo": {"mask_truncated_completions": False},  # so short, none is finished
    "pass_at_k": {"pass_k": 1},
    "process_grpo": {"reward": f"{REWARDS}:halves"},
    "pure": {"reward": f"{REWARDS}:halves"},
    "grpo_lagrangian": {"cost": f"{REWARDS}:even"},
    "ppo_lagrangian": {"cost": f"{REWARDS}:even"},
    "ppo_ptx": {"ptx_data": f"{folder()}/sft.jsonl"},
    "ppo_max": {"critic_warmup_steps": 0},
    "rs_dpo": {"batch_size": 16, "preference_temperature": 0.1},
    "iterative_dpo": {"batch_size": 16},
    "dpo_ranking": {"data": f"{folder()}/rankings.jsonl"},
    "spin": {"data": f"{folder()}/sft.jsonl"},
    "gkd": {"data": f"{folder()}/sft.jsonl", "teacher": f"{folder()}/teacher"},
    "on_policy_distillation": {"teacher": f"{folder()}/teacher"},
    "policy_gradient_distillation": {"teacher": f"{folder()}/teacher"},
    "sdpo": {"num_generations": 2},
    "ilql": {"data": f"{folder()}/judged.jsonl"},
    "nash_md": {"ppo_epochs": 1, "num_minibatches": 1},
}
NEEDS |= {name: {"data": f"{folder()}/judged.jsonl"} for name, row in ALGORITHMS.items() if "form" in row.defaults}
# label trains nothing, and the tiny model's context holds no question of constitutional: they have tests of their own.
TRAINED_HERE = [name for name in ALGORITHMS if name not in ("label", "constitutional")]


def values_of_row(name, **changes):
    family = load_algorithm(name).AlgorithmConfig.family
    values = values_of(name if name == "hpo" else family)
    for key in ("objective", "num_generations", "kl_coef", "kl_target", "reference_refresh_every"):
        values.pop(key, None)
    if ALGORITHMS[name].module in ("grpo", "best_of_n") and "num_generations" not in ALGORITHMS[name].defaults:
        values["num_generations"] = 2
    if "reward" in values:  # equal rewards of a group have no gradient
        values["reward"] = f"{folder()}/reward.py:apart"
    return {**values, **NEEDS.get(name, {}), "algorithm": name, "steps": 1, **changes}


@pytest.mark.parametrize("name", TRAINED_HERE)
def test_every_row_trains(name, tmp_path):
    values = values_of_row(name, output_dir=str(tmp_path / "run"))
    run_stage(Console(quiet=True), single_stage(values), resume=None, overwrite=False)
    (metrics,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert metrics["skipped"] == 0
    still = {"ilql": "grad_norm_value"}.get(name)  # its targets are 0 until they have moved
    assert all(v > 0 for key, v in metrics.items() if key.startswith("grad_norm") and key != still), metrics


def test_every_comparison_and_every_loss_that_the_loop_can_feed_has_a_row():
    defaults = {name: load_config(name) for name in ALGORITHMS}
    comparisons = {c.advantage for c in defaults.values() if hasattr(c, "advantage")}
    assert comparisons == {*COMPARISONS, *OF_TOKENS}
    objectives = [c.objective for c in defaults.values() if hasattr(c, "objective")]
    losses = {name for o in objectives for name, _ in getattr(o, "terms", ((o.variant, 1.0),))}
    # dro's old log-probabilities are the reference's.
    assert losses == {*POLICY_LOSSES, *PREFERENCE_LOSSES, *UNPAIRED_LOSSES} - {"dro"}


def load_config(name):
    return single_stage(values_of_row(name)).config


def test_what_the_user_says_stands_above_a_row_and_the_rest_of_the_row_stays():
    assert load_config("dapo").objective.clip_eps_high == 0.28
    said = single_stage(values_of_row("dapo"), {"objective.clip_eps_low": "1e-1"}).config.objective
    assert (said.variant, said.clip_eps_low, said.clip_eps_high) == ("dapo", 0.1, 0.28)
    said = single_stage(values_of_row("dapo", objective={"clip_eps_high": 0.5})).config.objective
    assert (said.variant, said.clip_eps_high) == ("dapo", 0.5)
    said = single_stage(values_of_row("simpo", objective={"variant": "ipo"})).config.objective
    assert (said.variant, said.beta) == ("ipo", 0.1)
    assert load_config("sigmoid_norm").objective.beta == 5.0  # Tulu 3's: it averages over the tokens
    assert single_stage(values_of_row("rloo"), {"advantage": "opo"}).config.advantage == "opo"
    assert single_stage(values_of_row("rloo", kl_coef=0.0)).config.kl_coef == 0


def test_an_unknown_name_is_told_the_nearest_one():
    with pytest.raises(UserError, match=r"unknown algorithm 'dr_gropo'; did you mean 'dr_grpo'\?"):
        load_algorithm("dr_gropo")


def experience_of(job, config):
    torch.manual_seed(5)
    return collect(job, config, prompts_of_step(job, config, 0))


@pytest.mark.parametrize("variant", sorted({*COMPARISONS} - {*OF_TOKENS}))
def test_completions_are_compared_as_the_op_does_less_the_penalty(variant):
    changes = {"pass_k": 2} if variant == "pass_at_k" else {}
    changes |= {"reward_weights": [2.0]} if variant == "gdpo" else {"kl_coef": 0.5, "reward_clip": 1.5}
    config = config_of("grpo", advantage=variant, **changes)
    job = job_of(config)
    experience = experience_of(job, config)
    found = grpo.advantages_of(job, config, experience)
    assert found.shape == (4,)
    paid = experience.rewards.clamp(-1.5, 1.5) - 0.5 * experience.kl.sum(1)
    if variant == "gdpo":
        expected = group_advantages(experience.rewards[:, None], group_size=2, variant="gdpo", reward_weights=[2.0])
    elif variant == "pass_at_k":
        expected = group_advantages(paid, group_size=2, variant="pass_at_k", k=2)
    elif variant == "opo":
        expected = group_advantages(paid, group_size=2, variant="opo", lengths=experience.batch.counts)
    else:
        grouped = {"group_size": 2} if COMPARISONS[variant].grouped else {}
        expected = group_advantages(paid, variant=variant, **grouped)
    torch.testing.assert_close(found, expected)


def test_a_comparison_without_a_critic_needs_no_critic():
    config = config_of("grpo", kl_coef=0.1)
    job = job_of(config)
    assert set(job.optimizers) == {"policy"}
    assert "critic" not in job.backbone.adapters
    prompts = [p.text for p in experience_of(job, config).rollout.prompts]
    assert prompts[0::2] == prompts[1::2]


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_generations": 1}, "advantage grpo compares the completions of a prompt: num_generations is 1, needs 2"),
    ({"advantage": "pass_at_k"}, "advantage pass_at_k needs pass_k from 1 to num_generations, got None and 2"),
    ({"advantage": "pass_at_k", "pass_k": 3}, "needs pass_k from 1 to num_generations, got 3 and 2"),
    ({"advantage": "gdpo", "kl_coef": 0.1}, "gdpo compares every reward by itself: there is no sum for kl_coef"),
    ({"advantage": "gae"}, "advantage: Input should be 'grpo', .*, got 'gae'"),
], ids=str)  # fmt: skip
def test_a_comparison_that_cannot_be_made_is_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        single_stage(values_of("grpo", **changes))
    assert "\n" not in str(error.value)
