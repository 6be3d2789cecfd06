"""What the fuzzer feeds to the command: valid configs, options, data, models, adapters, runs, reward functions and
answers of an endpoint, with one to three things in them changed. The same random numbers give the same input."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
import yaml

from rlhf_fast.algorithms import ALGORITHMS, load_algorithm
from rlhf_fast.cli import app
from rlhf_fast.training.config import keys_of
from rlhf_fast.training.foreign_keys import ALIASES, NO_EQUAL
from tests.fuzz.answers import ANSWERS
from tests.fuzz.folders import spoiled
from tests.fuzz.values import (
    as_json,
    as_yaml,
    atom,
    changed,
    changed_bytes,
    fitting,
    large,
    several,
    template,
    word,
)
from tests.training.tiny_runs import judged, values_of

# Every method is in one of these, beside the configs of tests/training/tiny_runs. {}: the folder of valid things.
_SAMPLED = {"data": "{}/prompts.jsonl", "reward": "{}/reward.py:score", "max_new_tokens": 4}
_CHECKED = {"algorithm": "grpo", "data": "{}/checked.jsonl", "num_generations": 2, "max_new_tokens": 4}
BASES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("sft", "reward_model", "ppo", "grpo", "dpo", "kto", "online_dpo", "hpo")},
    "chat": {"algorithm": "sft", "data": "{}/chat.jsonl", "train_on": "all_assistant"},
    "several files": {"algorithm": "sft", "data": ["{}/sft.jsonl", "{}/chat.jsonl"], "data_weights": [1.0, 2.0]},
    "whole model": {"algorithm": "sft", "lora_rank": 0},
    "dora": {"algorithm": "dpo", "use_dora": True, "use_rslora": True, "lora_targets": ["q_proj"], "top_layers": 1},
    "ensemble": {"algorithm": "ranking", "data": "{}/judged.jsonl", "ensemble": 2, "bound": True},
    "rating": {"algorithm": "rating", "data": "{}/judged.jsonl", "criterion_weights": {"help": 1.0, "style": 0.5}},
    "like": {"algorithm": "like", "data": "{}/judged.jsonl"},
    "steps": {"algorithm": "process_reward_model", "data": "{}/judged.jsonl"},
    "ilql": {"algorithm": "ilql", "data": "{}/judged.jsonl"},
    "dpo_ranking": {"algorithm": "dpo_ranking", "data": "{}/rankings.jsonl"},
    "label": {"algorithm": "label", **_SAMPLED, "num_generations": 2, "write": "pairs"},
    "constitutional": {"algorithm": "constitutional", **_SAMPLED, "principles": ["Be kind."], "critique_tokens": 2},
    "raft": {"algorithm": "raft", **_SAMPLED, "num_generations": 2},
    "gkd": {"algorithm": "gkd", "data": "{}/sft.jsonl", "teacher": "{}/teacher", "max_new_tokens": 4},
    "sdpo": {"algorithm": "sdpo", **_SAMPLED, "num_generations": 2, "success": 0.0},
    "spin": {"algorithm": "spin", "data": "{}/sft.jsonl", "max_new_tokens": 4},
    "process_grpo": {"algorithm": "process_grpo", **_SAMPLED, "reward": "{}/reward.py:halves", "num_generations": 2},
    "costs": {"algorithm": "ppo_lagrangian", **_SAMPLED, "cost": "{}/reward.py:even", "cost_limit": 0.5},
    "ptx": {"algorithm": "ppo_ptx", **_SAMPLED, "ptx_data": "{}/sft.jsonl", "reward": "{}/reward_run",
            "num_minibatches": 2},
    "several rewards": {
        "algorithm": "grpo", **_SAMPLED, "reward": ["{}/reward.py:score", "{}/reward.py:even", "{}/reward_run"],
        "reward_weights": [1.0, 0.5, 0.1], "num_generations": 2, "reward_floors": [None, 0.1, None],
    },
    "exact": {**_CHECKED, "verify": {"kind": "exact", "answer": "word"}},
    "math": {**_CHECKED, "verify": {"kind": "math", "answer": "formula"}},
    "regex": {**_CHECKED, "verify": {"kind": "regex", "answer": "regex"}},
    "json_schema": {**_CHECKED, "verify": {"kind": "json_schema", "answer": "schema"}},
    "choice": {**_CHECKED, "verify": {"kind": "choice", "answer": "letter"}},
    "code": {**_CHECKED, "verify": {"kind": "code", "answer": "tests"}},
    "judge": {"algorithm": "grpo", **_SAMPLED, "num_generations": 2,
              "judge": {"by": "backbone", "scale": "1-5", "principles": ["Be kind."]}},
    "compared": {"algorithm": "online_dpo", **_SAMPLED, "num_generations": 2, "judge": {"by": "backbone",
    "form": "compare"}},
}  # fmt: skip
# Runs that are finished, and continued, exported, sampled from: name -> (base, further keys).
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft_run": ("sft", {}), "reward_run": ("reward_model", {}), "dora_run": ("dora", {}), "steps_run": ("steps", {}),
    "grpo_run": ("grpo", {"save_every": 1, "steps": 2}),
}  # fmt: skip


def placed(value: Any, source: Path) -> Any:
    """With the folder of valid things in the place of {}."""
    if isinstance(value, dict):
        return {key: placed(item, source) for key, item in value.items()}
    if isinstance(value, list):
        return [placed(item, source) for item in value]
    return value.replace("{}", str(source)) if isinstance(value, str) else value


def base(name: str, source: Path, **changes: Any) -> dict[str, Any]:
    """A valid config of BASES that reads the files in `source`, and makes one step."""
    own = BASES[name]
    values = values_of(own.get("algorithm", name), steps=1, batch_size=4, output_dir="run", self_test=False)
    home = str(Path(values["model"]).parent)
    values = {key: value.replace(home, "{}") if isinstance(value, str) else value for key, value in values.items()}
    return placed({**values, **own, **changes}, source)


# Each takes (random, the folder to write into, the folder of valid things) and gives the arguments of the command.


def with_keys(random: Random, values: dict[str, Any]) -> dict[str, Any]:
    """With one more key that there is, here or in another trainer, and a value for it."""
    fields = load_algorithm(own if isinstance(own := values.get("algorithm"), str) and own in ALGORITHMS else "sft")
    fields = fields.AlgorithmConfig.model_fields
    if random.random() < 0.7:
        name = random.choice(list(fields))
        return {**values, fields[name].alias or name: fitting(random, fields[name].annotation)}
    other = load_algorithm(random.choice(list(ALGORITHMS))).AlgorithmConfig
    return {**values, random.choice([*keys_of(other), *ALIASES, *NO_EQUAL]): atom(random)}


def config_values(random: Random, source: Path) -> dict[str, Any]:
    values = base(random.choice(list(BASES)), source)
    if random.random() < 0.1:
        values["algorithm"] = random.choice(list(ALGORITHMS))
    if random.random() < 0.25:
        values = pipeline(random, values, source)
    return several(
        random, lambda v: (with_keys if random.random() < 0.6 and isinstance(v, dict) else changed)(random, v), values
    )


def pipeline(random: Random, values: dict[str, Any], source: Path) -> dict[str, Any]:
    """Stages, of which some take what others made, and some are repeated."""
    shared = {key: values.pop(key) for key in ("output_dir", "seed", "device", "report_to") if key in values}
    first = {"name": "first", **values}
    second = {**first, "name": "second", "model": {"from": "first"}}
    label, learn = (
        {key: value for key, value in base(name, source).items() if key not in shared} for name in ("label", "dpo")
    )
    learn |= {"data": {"from": "label"}, "eval_data": f"{source}/pairs.jsonl"}
    rounds = {"model": {"from": "dpo", "first": f"{source}/model"}}
    return {**shared, **random.choice([
        {"stages": [first]}, {"stages": [first, second]}, {"stages": [label, learn]},
        {"repeat": 2, "stages": [{**label, **rounds}, {**learn, **rounds, "data": {"from": "label", "rounds": "all"}}]},
        {"stages": [first, {"repeat": 2, "stages": [second]}]}, {"repeat": 2, "stages": [first, second]},
    ])}  # fmt: skip


def config(random: Random, place: Path, source: Path) -> list[str]:
    values = config_values(random, source)
    if not isinstance(values, dict):
        values = {"stages": values}
    runs = random.random() < 0.15 and not large(values)
    if runs:
        values = {**values, "output_dir": "run"}
    try:
        text = as_yaml(values).encode("utf-8", "surrogatepass")
    except ValueError:
        text = as_yaml({"steps": 1 << 70}).encode()
    if not runs and random.random() < 0.5:
        text = several(random, partial(changed_bytes, random), text)
    (place / "config.yaml").write_bytes(text)
    return ["train", "config.yaml", *([] if runs else ["--dry-run"])]


def flags(random: Random, place: Path, source: Path) -> list[str]:
    values = config_values(random, source)
    words = []
    for key, value in values.items() if isinstance(values, dict) else []:
        name, text = word(key), word(value)
        words += random.choice([[f"{name}={text}"], [f"--{name}={text}"], [f"--{name}", text]])
    for _ in range(random.choice([0, 0, 1, 2])):
        words.insert(
            random.randint(0, len(words)),
            word(random.choice([atom(random), "--resume", "--overwrite", "--config", "=", "--"])),
        )
    return ["train", *words, "--dry-run"]


def rows_of(random: Random, source: Path, name: str) -> list[dict[str, Any]]:
    if name == "judged":
        return [judged(i) for i in range(6)]
    if name == "chat":
        turns = [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
        ]
        return [{"messages": turns[i % 2 :], "tools": None} for i in range(5)]
    if name == "chat_pairs":
        return [{"prompt": [{"role": "user", "content": "q" * i}], "chosen": [{"role": "assistant", "content": "a"}],
                 "rejected": [{"role": "assistant", "content": "b" * i}]} for i in range(1, 6)]  # fmt: skip
    if name == "checked":
        schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
        tests = [{"input": "1\n", "output": "1"}], ["assert f(1) == 1"]
        return [{"prompt": "p" * (1 + i % 3), "word": "x", "formula": "\\frac{1}{2}", "regex": "a+b", "letter": "A",
                 "schema": schema, "tests": tests[i % 2]} for i in range(6)]  # fmt: skip
    if name in LAYOUTS:
        return [json.loads(json.dumps(LAYOUTS[name])) for _ in range(6)]
    return [json.loads(line) for line in (source / f"{name}.jsonl").read_text().splitlines()][:6]


_TURNS = (
    "config", "data", "adapter", "model", "commands", "flags", "run", "data", "model", "config", "adapter", "data",
    "commands", "model", "run", "config", "flags", "adapter", "reward", "data", "model", "adapter", "judge", "data",
)  # fmt: skip
