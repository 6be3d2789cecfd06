"""Configurations are read by YAML 1.2's core schema, within a budget."""

import math
import time

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.training import core_yaml
from rlhf_fast.training.config import SamplingConfig, parse, parse_overrides, read_yaml

LEAST = {"algorithm": "sft", "model": "m", "data": "d"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("0o17", 15), ("0x1F", 31), ("-3", -3), ("1:30", "1:30"), ("1_000", "1_000"), ("1e-4", 1e-4),
        (".5", 0.5), ("-.INF", -math.inf), ("2024-01-01", "2024-01-01"), ("yes", "yes"), ("off", "off"), ("~", None),
        ("", None), ("TRUE", True), ("=", "="), ("<<", "<<"), ("'1'", "1"), ("!!str 1", "1"), ("!!float 1", 1.0),
    ],
)  # fmt: skip
def test_the_core_schema(text, value):
    found = core_yaml.load(f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))
    assert core_yaml.load(core_yaml.dump({"a": value})) == {"a": value}


def test_text_that_looks_like_something_else_comes_back_as_text():
    values = {"a": ["1e5", "010", "0o17", "true", "null", "~", ".inf", "", "<<", "a: b", "x\ny", "é", "1:30", "yes"]}
    assert core_yaml.load(core_yaml.dump(values)) == values


def test_merge_keys_are_kept():
    text = "base: &b {x: 1, y: 2}\nown:\n  <<: *b\n  y: 3"
    assert core_yaml.load(text)["own"] == {"x": 1, "y": 3}


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{y}: &{y} [{', '.join(f'*{x}' for _ in range(9))}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", r"the key 'a' is there twice \(line 2, column 1\)"),
        ("1: 2", "the key '1' is no text"),
        ("? [1]\n: 2", "is no text"),
        ("a: !!python/object:os.system x", "is none of the core schema"),
        ("a: !!timestamp 2024-01-01", "is none of the core schema"),
        ("a: !!int x", "'x' is no int"),
        ("a: !!map x", "no mapping"),
        ('a: "\\ud800"', r"U\+D800 is no character"),
        ('a: "\\0"', r"U\+0000 is no character"),
        ("a: " + "1" * 5000, "11... is no whole number of 64 bits"),
        ("a: &a [*a]", "an alias of what it is inside of"),
        (BOMB, "more than 20,000 values"),
        (BOMB.replace("[", "{<<: [").replace("]", "]}").replace("x, " * 8 + "x", ""), "more than 20,000 values"),
        ("[" * 100_000, "nested more than 32 deep"),
        ("a: x\n" * 100_000, "characters are more than a configuration has"),
        ("--- a\n--- b", "found another document"),
        ("a: [", "expected the node content"),
        ("a: \x07", "special characters are not allowed"),
    ],
)
def test_what_is_refused_is_refused_at_once_in_one_line(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(UserError, match=message) as error:
        read_yaml(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)
    assert time.process_time() - start < 2
    with pytest.raises(UserError, match=r"seed: cannot read the value .{,90}: "):
        parse_overrides([f"--seed={text}"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("learning_rate=true", "learning_rate: Input should be a valid number, got True"),
        ("learning_rate='1'", "learning_rate: Input should be a valid number, got '1'"),
        ("steps=1.0", "steps: Input should be a valid integer, got 1.0"),
        ("steps=true", "steps: Input should be a valid integer, got True"),
        ("steps=1:30", "steps: Input should be a valid integer, got '1:30'"),
        ("steps=10**400", r"steps: Input should be a valid integer, got '10\*\*400'"),
        ("steps=1" + "0" * 300, r"steps: cannot read the value '10+\.\.\.: '10+\.\.\. is no whole number of 64 bits"),
        ("gradient_checkpointing=yes", "gradient_checkpointing: Input should be a valid boolean, got 'yes'"),
        ("output_dir=7", "output_dir: Input should be a valid string, got 7"),
        ("model={from: 3}", "model: Input should be a valid string, got {'from': 3}"),
        ("judge={timeout: true}", "judge.timeout: Input should be a valid number, got True"),
        ("judge={thought_tokens: 1.0}", "judge.thought_tokens: Input should be a valid integer, got 1.0"),
    ],
)
def test_values_have_the_type_of_their_key(flag, message):
    with pytest.raises(UserError, match=message):
        parse(SamplingConfig, {**LEAST, **parse_overrides([flag])})


def test_a_date_may_be_a_name_of_a_folder():
    assert parse(SamplingConfig, {**LEAST, **parse_overrides(["output_dir=2024-01-01"])}).output_dir == "2024-01-01"
