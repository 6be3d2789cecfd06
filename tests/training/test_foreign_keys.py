"""Names of other trainers: the ones that mean the same are taken, the others are refused with the reason."""

from operator import attrgetter

import pytest

from rlhf_fast.algorithms import ALGORITHMS, load_algorithm
from rlhf_fast.algorithms.launch import all_stages, single_stage
from rlhf_fast.errors import UserError
from rlhf_fast.training.config import Config, keys_of, means_something, merged, unknown_key
from rlhf_fast.training.foreign_keys import ALIASES, NO_EQUAL

LEAST = {"algorithm": "sft", "model": "m", "data": "d.jsonl"}
CONFIGS = {name: load_algorithm(name).AlgorithmConfig for name in ALGORITHMS}
KEYS = {name: keys_of(config_class) for name, config_class in CONFIGS.items()}


def stage_of(*layers, algorithm="sft"):
    reward = {"reward": "r.py:f"} if "num_generations" in KEYS[algorithm] else {}
    return single_stage({**LEAST, "algorithm": algorithm, **reward}, *layers)


@pytest.mark.parametrize("name", ALIASES)
def test_every_alias_means_a_key_of_some_algorithm_and_is_no_key_there(name):
    meaning = [a for a in ALGORITHMS if means_something(name, CONFIGS[a], a) and name not in KEYS[a]]
    assert meaning
    for algorithm in meaning:
        ours, lines = merged(CONFIGS[algorithm], algorithm, {name: 2})
        assert set(ours) <= set(KEYS[algorithm])
        assert lines == [f"{name} -> {', '.join(ours)}"]


@pytest.mark.parametrize("name", NO_EQUAL)
def test_a_name_without_an_equal_is_refused_with_its_reason(name):
    refusing = [a for a in ALGORITHMS if not means_something(name, CONFIGS[a], a)]
    assert refusing, "an alias or a key everywhere needs no reason"
    with pytest.raises(UserError) as error:
        stage_of({name: 1}, algorithm=refusing[0])
    assert str(error.value) == f"unknown key {name!r}: {NO_EQUAL[name]}"


@pytest.mark.parametrize(("algorithm", "given", "expected"), [
    ("sft", {"lr": 0.5}, {"learning_rate": 0.5}),
    ("sft", {"num_train_epochs": 2}, {"epochs": 2.0}),
    ("sft", {"max_length": 77, "lora_r": 3, "logging_steps": 4}, {"max_tokens": 77, "lora_rank": 3, "log_every": 4}),
    ("sft", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
     {"batch_size": 6, "micro_batch_size": 2}),
    ("sft", {"per_device_train_batch_size": 2}, {"batch_size": 2, "micro_batch_size": None}),
    ("sft", {"batch_size": 8, "gradient_accumulation_steps": 4}, {"batch_size": 8, "micro_batch_size": 2}),
    ("sft", {"gradient_accumulation_steps": 4}, {"batch_size": 32, "micro_batch_size": 8}),
    ("dpo", {"beta": 0.3, "train_batch_size": 5}, {"objective.beta": 0.3, "batch_size": 5}),
    ("dpo", {"loss_type": "ipo", "label_smoothing": 0.0}, {"objective.variant": "ipo"}),
    ("simpo", {"beta": 3, "simpo_gamma": 1.5}, {"objective.beta": 3.0, "objective.gamma": 1.5}),
    ("dpo", {"reference_free": True}, {"objective.reference_free": True}),
    ("grpo", {"beta": 0.3, "max_completion_length": 9}, {"objective.kl_coef": 0.3, "max_new_tokens": 9}),
    ("dapo", {"beta": 0.3, "delta": 4.0}, {"objective.kl_coef": 0.3, "objective.dual_clip": 4.0}),
    ("rloo", {"beta": 0.3}, {"kl_coef": 0.3, "objective.kl_coef": 0.0}),
    ("grpo", {"epsilon": 0.1}, {"objective.clip_eps_low": 0.1, "objective.clip_eps_high": 0.1}),
    ("grpo", {"epsilon": 0.1, "epsilon_high": 0.3},
     {"objective.clip_eps_low": 0.1, "objective.clip_eps_high": 0.3}),
    ("ppo", {"cliprange": 0.1, "gae_lambda": 0.9},
     {"objective.clip_eps_low": 0.1, "objective.clip_eps_high": 0.1, "lam": 0.9}),
    ("ppo", {"ent_coef": 0.1}, {"objective.entropy_coef": 0.1}),
    ("ppo", {"init_kl_coef": 0.1, "kl_loss_coef": 0.2}, {"kl_coef": 0.1, "objective.kl_coef": 0.2}),
], ids=str)  # fmt: skip
def test_a_name_that_means_the_same_is_taken_and_said_aloud(algorithm, given, expected):
    stage = stage_of(given, algorithm=algorithm)
    assert {key: attrgetter(key)(stage.config) for key in expected} == expected
    foreign = set(given) - set(KEYS[algorithm])
    assert all(any(name in line for line in stage.aliases) for name in foreign)


@pytest.mark.parametrize(("given", "message"), [
    ({"lr": 1e-4, "learning_rate": 1e-4}, "lr and learning_rate are both learning_rate: give one of them"),
    ({"epsilon": 0.2, "objective": {"clip_eps_low": 0.1}}, "epsilon and objective.clip_eps_low are both objective"),
    ({"lr": 1e-4, "actor_lr": 1e-4}, "actor_lr and lr are both learning_rate"),
    ({"per_device_train_batch_size": 2, "batch_size": 4}, "per_device_train_batch_size already say batch_size"),
    ({"gradient_accumulation_steps": 2, "micro_batch_size": 4}, "already say micro_batch_size"),
    ({"gradient_accumulation_steps": 5}, "gradient_accumulation_steps 5 does not divide batch_size 32"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: must be a whole number from 1, got 0"),
    ({"steps": 5, "epochs": 1}, "epochs and steps exclude each other, got 1.0 and 5"),
    ({"max_steps": 5, "num_train_epochs": 1}, "epochs and steps exclude each other"),
    ({"warmup_ratio": 0.1, "warmup_steps": 3}, "warmup_ratio and warmup_steps exclude each other"),
    ({"gradient_acumulation_steps": 2}, "did you mean 'gradient_accumulation_steps'"),
    ({"num_train_epoch": 2}, "did you mean 'num_train_epochs'"),
], ids=str)  # fmt: skip
def test_names_that_contradict_each_other_are_one_line(given, message):
    with pytest.raises(UserError, match=message) as error:
        stage_of(given, algorithm="grpo" if "epsilon" in given else "sft")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("file", "flags", "expected"), [
    ({"learning_rate": 1.0}, {"lr": 2.0}, {"learning_rate": 2.0}),
    ({"lr": 1.0}, {"learning_rate": 2.0}, {"learning_rate": 2.0}),
    ({"steps": 9}, {"epochs": 2}, {"epochs": 2.0}),
    ({"epochs": 2}, {"steps": 9}, {"steps": 9, "epochs": None}),
    ({"batch_size": 8, "micro_batch_size": 1}, {"per_device_train_batch_size": 3}, {"batch_size": 3}),
    ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, {"batch_size": 8}, {"batch_size": 8}),
], ids=str)  # fmt: skip
def test_a_flag_stands_above_the_file_under_whatever_name(file, flags, expected):
    config = stage_of(file, flags).config
    assert {key: getattr(config, key) for key in expected} == expected


def test_the_same_name_may_mean_something_else_to_another_stage():
    values = {
        "model": "m", "data": "d.jsonl", "beta": 0.25, "lr": 0.5,
        "stages": [{"algorithm": "sft"}, {"algorithm": "dpo"}, {"algorithm": "grpo", "reward": "r.py:f"}],
    }  # fmt: skip
    sft, dpo, grpo = all_stages(values, {"dpo.lr": 0.75, "grpo.num_train_epochs": 2})
    assert (dpo.config.objective.beta, grpo.config.objective.kl_coef) == (0.25, 0.25)
    assert [stage.config.learning_rate for stage in (sft, dpo, grpo)] == [0.5, 0.75, 0.5]
    assert grpo.config.epochs == 2
    with pytest.raises(UserError, match=r"unknown key 'beta': it is objective\.kl_coef"):
        all_stages({**values, "stages": values["stages"][:1]}, {})


def test_steps_follow_from_epochs_and_the_number_of_examples():
    config = stage_of({"epochs": 1.5, "batch_size": 4, "warmup_ratio": 0.2}).config
    assert (config.for_data(10).steps, config.for_data(10).warmup_steps) == (4, 1)
    assert stage_of({"epochs": 0.1, "batch_size": 1}).config.for_data(30).steps == 3
    grpo = stage_of({"epochs": 2, "batch_size": 8, "num_generations": 4}, algorithm="grpo").config
    assert grpo.for_data(10).steps == 10
    assert stage_of({"steps": 7}).config.for_data(10).steps == 7


def test_a_config_with_epochs_survives_its_own_file():
    config = stage_of({"epochs": 2, "warmup_ratio": 0.1}).config.for_data(100)
    again = single_stage(config.values()).config
    assert again.for_data(100).steps == config.steps
    assert again.values() == config.values()


def test_nothing_is_renamed_that_is_only_near():
    assert merged(Config, "sft", {"learnin_rate": 1})[0] == {"learnin_rate": 1}
    assert unknown_key("learnin_rate", Config.model_fields) == (
        "unknown key 'learnin_rate'; did you mean 'learning_rate'?"
    )
