import pytest

from rlhf_fast import PolicyObjective
from rlhf_fast.algorithms import ALGORITHMS, load_algorithm
from rlhf_fast.errors import UserError
from rlhf_fast.training.config import parse, parse_overrides, read_yaml

PPO = load_algorithm("ppo").AlgorithmConfig
LEAST = {"algorithm": "ppo", "model": "m", "data": "d.jsonl", "reward": "r.py:f"}


def test_yaml_and_flags_give_the_same_values():
    words = ["learning_rate=1e-3", "--objective.clip-eps-low", "0.1", "--lora_targets=[q_proj, v_proj]", "chat=true",
             "lam=0.5"]  # fmt: skip
    config = parse(PPO, {**LEAST, **parse_overrides(words)})
    assert config.learning_rate == 1e-3
    assert config.objective == PolicyObjective(clip_eps_low=0.1, fixed_length=64)
    assert config.lora_targets == ["q_proj", "v_proj"]
    assert config.chat is True
    assert config.lam == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_ceof": 1}, "unknown key 'kl_ceof'; did you mean 'kl_coef'?"),
        ({"zzzzzz": 1}, "unknown key 'zzzzzz'$"),
        ({"quantization": "int4"}, "quantization: Input should be 'nf4' or 'int8', got 'int4'"),
        ({"lam": 2}, "lam: Input should be less than or equal to 1, got 2"),
        ({"model": None}, "model: Input should be a valid string, got None"),
        ({"model": {"fro": "sft"}}, "model: Input should be a valid string, got {'fro': 'sft'}"),
        ({"seed": 1 << 64}, "seed: Input should be less than"),
        ({"learning_rate": float("inf")}, "learning_rate: Input should be a finite number, got inf"),
        ({"columns": ["a"]}, "columns: Input should be a valid dictionary, got .'a'"),
        ({"columns": {"prompt": 1}}, "columns: Input should be a valid string, got 1"),
        ({"columns.prompt": [1]}, "columns: Input should be a valid string"),
        ({"reward_weights": [float("nan")]}, "reward_weights: Input should be a finite number"),
        ({"objective": "dappo"}, r"objective: variant must be one of .*, got 'dappo'; did you mean 'dapo'\?"),
        ({"objective": {"clip_eps_hihg": 0.3}}, "objective has no 'clip_eps_hihg', got 0.3 .* mean 'clip_eps_high'"),
        ({"objective.clip_eps_hihg": 0.3}, "objective has no 'clip_eps_hihg', got 0.3 .* mean 'clip_eps_high'"),
        ({"objective": {"clip_eps_low": -1}}, r"objective: clip_eps_low must be in \[0, 1\], got -1"),
        ({"objective": {"kl_coef": "much"}}, "objective: kl_coef must be a number, got 'much'"),
        ({"objective": {"correction_high": 3}}, r"objective\.correction_high is of sampler_correction: true, got 3"),
        ({"objective": 3}, "objective must be a name, a mapping or a PolicyObjective, got 3"),
        ({"clip_eps_low": 0.1}, "unknown key 'clip_eps_low'; did you mean 'objective.clip_eps_low'?"),
        ({"variant": "dapo"}, "unknown key 'variant': it is `objective`"),
        ({"batch_size": 10, "num_minibatches": 4}, "batch_size 10 must be a multiple of num_minibatches 4"),
    ],
)
def test_a_bad_key_or_value_is_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        parse(PPO, {**LEAST, **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [
    {"objective": "gspo"}, {"objective": {"variant": "gspo"}}, {"objective.variant": "gspo"},
    {"objective": {"variant": "gspo", "clip_eps_low": "3e-4"}}, {"objective": "gspo", "objective.clip_eps_low": 3e-4},
], ids=str)  # fmt: skip
def test_an_objective_is_a_name_or_a_mapping_in_the_file_and_its_numbers_are_flags(given):
    assert parse(PPO, {**LEAST, **given}).objective == PolicyObjective("gspo", fixed_length=64)


def test_a_loss_of_fixed_length_takes_that_of_the_completions():
    assert parse(PPO, {**LEAST, "objective": "dr_grpo", "max_new_tokens": 9}).objective.fixed_length == 9
    given = {"objective": {"variant": "dr_grpo", "fixed_length": 5}, "max_new_tokens": 9}
    assert parse(PPO, {**LEAST, **given}).objective.fixed_length == 5


def test_a_loss_of_pairs_that_needs_more_than_pairs_is_refused():
    with pytest.raises(UserError, match="objective hpo needs advantages, which algorithm hpo makes"):
        parse(
            load_algorithm("dpo").AlgorithmConfig, {"algorithm": "dpo", "model": "m", "data": "d", "objective": "hpo"}
        )


def test_a_missing_key_says_what_it_is():
    with pytest.raises(UserError, match=r"missing key 'model' \(model folder"):
        parse(PPO, {key: value for key, value in LEAST.items() if key != "model"})


def test_a_gradient_may_be_left_unclipped():
    assert parse(PPO, {**LEAST, **parse_overrides(["max_grad_norm=.inf"])}).max_grad_norm == float("inf")


@pytest.mark.parametrize(
    "words",
    [
        ["columns.prompt=question", "--columns.completion", "answer"],
        ["columns={prompt: question}", "columns.completion=answer"],
        ['columns={"prompt": "question", "completion": "answer"}'],
    ],
)
def test_columns_can_be_mapped_by_flags(words):
    given = {**LEAST, **parse_overrides(words)}
    assert parse(PPO, given).columns == {"prompt": "question", "completion": "answer"}
    given = {**LEAST, "columns": {"prompt": "q", "tag": "t"}, **parse_overrides(["columns.prompt=question"])}
    assert parse(PPO, given).columns == {"prompt": "question", "tag": "t"}


@pytest.mark.parametrize("words", [["--key"], ["--key", "--other", "1"], ["loose"], ["a={"]])
def test_words_that_are_no_setting_are_refused(words):
    with pytest.raises(UserError):
        parse_overrides(words)


def test_a_negative_number_is_a_value():
    assert parse_overrides(["--seed", "-1"]) == {"seed": -1}


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- a", "must hold .* lines, got list")])
def test_a_file_that_is_no_config_is_refused(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_yaml(tmp_path / "c.yaml")


def test_a_folder_is_no_config_file(tmp_path):
    with pytest.raises(UserError, match="is no config file"):
        read_yaml(tmp_path)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_config_survives_its_own_file(name):
    config_class = load_algorithm(name).AlgorithmConfig
    values = {**LEAST, "algorithm": name, "model": {"from": "sft"}, "teacher": "t", **ALGORITHMS[name].defaults}
    config = parse(config_class, {k: v for k, v in values.items() if k in config_class.model_fields})
    assert parse(config_class, config.values()) == config


def test_data_seed_orders_the_examples_and_is_the_seed_where_it_is_left_out():
    assert parse(PPO, {**LEAST, "seed": 5}).order_seed == 5
    assert parse(PPO, {**LEAST, "seed": 5, "data_seed": 0}).order_seed == 0
