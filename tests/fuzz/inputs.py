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


_TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
# A row of each layout that people know.
LAYOUTS: dict[str, dict[str, Any]] = {
    "oasst": {"message_id": "1", "parent_id": None, "role": "prompter", "text": "q"},
    "prm800k": {"question": {"problem": "p"}, "label": {"steps": [
        {"completions": [{"text": "a", "rating": 1}, {"text": "b", "rating": -1}], "chosen_completion": 0,
         "human_completion": None}]}},
    "math_shepherd": {"input": "p Step 1: a ки\nStep 2: b ки", "label": "p Step 1: a +\nStep 2: b -"},
    "helpsteer": {"prompt": "p", "response": "a", "helpfulness": 3, "correctness": 2, "coherence": 4, "complexity": 1,
                  "verbosity": 0},
    "shp": {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
    "summaries": {"info": {"post": "p", "title": "t", "subreddit": "s"}, "summaries": [{"text": "a"}, {"text": "b"}],
                  "choice": 1},
    "hh": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    "ultrafeedback": {"prompt": "q", "score_chosen": 8.0, "score_rejected": 2.0,
                      "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
                      "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
    "sharegpt_pairs": {"conversations": _TURNS[:1], "chosen": _TURNS[1], "rejected": {"from": "gpt", "value": "b"}},
    "sharegpt": {"conversations": _TURNS, "system": "s"}, "lmsys": {"conversation": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "alpaca": {"instruction": "q", "input": "i", "output": "a", "history": [["x", "y"]]},
    "gsm8k": {"question": "q", "answer": "a #### 4"}, "text": {"text": "abc"}, "classes": {"text": "a", "label": 1},
    "tools": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f",
                                                                                               "arguments": "{}"}}]},
        {"role": "tool", "name": "f", "content": "4"}, {"role": "assistant", "content": "a"}]},
}  # fmt: skip
# Base -> the rows that it learns from.
DATA = {
    "sft": ("sft", "chat", "sharegpt", "lmsys", "alpaca", "gsm8k", "text", "tools", "oasst", "classes"),
    "reward_model": ("pairs", "judged", "chat_pairs", "helpsteer", "prm800k", "math_shepherd"),
    "dpo": ("pairs", "chat_pairs", "shp", "summaries", "hh", "ultrafeedback", "sharegpt_pairs"),
    "kto": ("answers", "pairs"), "grpo": ("prompts", "gsm8k", "judged"), "ppo": ("prompts",), "hpo": ("pairs",),
    "rating": ("judged", "helpsteer"), "ensemble": ("rankings", "judged"), "like": ("judged", "answers"),
    "dpo_ranking": ("rankings",), "steps": ("judged", "prm800k", "math_shepherd"), "ilql": ("judged",), "gkd": ("sft",),
    "label": ("prompts",), "constitutional": ("prompts",), "spin": ("sft", "chat"), "several files": ("sft", "chat"),
    **{name: ("checked",) for name in ("exact", "math", "regex", "json_schema", "choice", "code")},
}  # fmt: skip
SUFFIXES = [".jsonl", ".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz", ".ndjson"]


def data(random: Random, place: Path, source: Path) -> list[str]:
    name = random.choice(list(DATA))
    several_files = name == "several files" or random.random() < 0.1
    if several_files:
        (place / "data").mkdir()
    wanted = random.choice(DATA[name])
    files = []
    for number in range(3 if several_files else 1):
        suffix = random.choice(SUFFIXES) if number == 0 or random.random() < 0.2 else suffix  # noqa: F821
        rows = rows_of(random, source, wanted)
        if number == 0 or random.random() < 0.3:
            rows = several(random, partial(changed, random), rows)
        content = encoded_rows(random, rows if isinstance(rows, list) else [rows], suffix)
        if random.random() < 0.25:
            content = several(random, partial(changed_bytes, random), content)
        split = random.choice(["", "train-", "test-", "validation-"]) if several_files else ""
        files.append(f"data/{split}{number}{suffix}" if several_files else f"data{suffix}")
        (place / files[-1]).write_bytes(content)
    if several_files and random.random() < 0.1:
        card = several(
            random, partial(changed_bytes, random), b"---\nconfigs:\n- config_name: default\n  data_files: x\n---\n"
        )
        (place / "data" / "README.md").write_bytes(card)
    given: Any = random.choice([files, "data", "data/*", "data@train"]) if several_files else files[0]
    changes = {
        "data": given, **random.choice([{}, {}, {"bad_rows": "skip"}]), **random.choice([{}, {"too_long": "truncate"}]),
        **random.choice([{}, {}, {}, {"columns": {"prompt": atom(random)}}, {"chat": True}, {"eval_size": 1}]),
    }  # fmt: skip
    if isinstance(given, list):
        changes["data_weights"] = random.choice([None, [1.0] * 3, [0.1, 1.0, 9.0]])
    values = base(name, source, **changes)
    return [
        "train",
        *(f"{key}={word(value)}" for key, value in values.items()),
        *(["--dry-run"] if random.random() < 0.8 else []),
    ]


def encoded_rows(random: Random, rows: list[Any], suffix: str) -> bytes:
    if suffix.startswith(".csv") or suffix == ".tsv":
        file = io.StringIO()
        names = list(dict.fromkeys(str(key) for row in rows if isinstance(row, dict) for key in row))
        writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
        writer.writerow(names)
        for row in rows:
            writer.writerow(
                [as_json(x) if isinstance(x, list | dict) else word(x) for x in row.values()]
                if isinstance(row, dict)
                else [word(row)]
            )
        content = file.getvalue().encode("utf-8", "surrogateescape")
    elif suffix == ".parquet":
        try:
            table = pa.Table.from_pylist([row if isinstance(row, dict) else {"x": row} for row in rows])
        except (pa.ArrowException, ValueError, OverflowError, TypeError, UnicodeError, AttributeError):
            kinds = [pa.array([b"\xff"]), pa.array([10**11], pa.timestamp("s")), pa.array([1], pa.duration("ns")),
                     pa.array([1.5], pa.float16()), pa.array([{"a": None}]), pa.array([[]]),
                     pa.array(["x"]).dictionary_encode()]  # fmt: skip
            table = pa.table({"prompt": random.choice(kinds), "completion": random.choice(kinds)})
        target = io.BytesIO()
        pq.write_table(table, target)
        return target.getvalue()
    elif suffix == ".json":
        content = ("[" + ",".join(map(as_json, rows)) + "]").encode()
    else:
        content = "".join(as_json(row) + "\n" for row in rows).encode()
    return gzip.compress(content, mtime=0) if suffix.endswith(".gz") else content


MODEL = ["train", "algorithm=sft", "model=X", "device=cpu", "data={}/sft.jsonl", "--dry-run"]
COMMANDS = {
    "train": MODEL, "model step": [*MODEL[:-1], "steps=1", "batch_size=4", "eval_size=2", "report_to=none"],
    "grpo": ["train", "algorithm=grpo", "model=X", "data={}/prompts.jsonl", "reward={}/reward.py:score", "batch_size=4",
             "num_generations=2", "max_new_tokens=4", "--dry-run", "device=cpu"],
    "teacher": ["train", "algorithm=gkd", "model={}/model", "teacher=X", "data={}/sft.jsonl", "max_new_tokens=4",
                "batch_size=4", "--dry-run", "device=cpu"],
    "reward": ["train", "algorithm=ppo", "model={}/model", "data={}/prompts.jsonl", "reward=X", "max_new_tokens=4",
               "--dry-run", "device=cpu", "batch_size=4"],
    "paid": ["train", "algorithm=grpo", "model={}/model", "data={}/prompts.jsonl", "reward=X", "max_new_tokens=4",
             "device=cpu", "batch_size=4", "num_generations=2", "steps=1", "eval_size=2", "report_to=none"],
    "learnt chat": ["train", "algorithm=sft", "model=X", "data={}/chat.jsonl", "--dry-run", "device=cpu"],
    "chat": ["chat", "X", "--max-new-tokens", "3", "--device", "cpu"],
    "export": ["export", "X", "--out", "out", "--to", "peft"],
    "merge": ["export", "X", "--out", "out", "--to", "merged"],
    "gguf": ["export", "X", "--out", "out", "--to", "gguf"],
    "soup": ["soup", "X", "X", "--out", "out"],
    "sample": ["sample", "X", "--prompt", "a", "--max-new-tokens", "4", "--device", "cpu"],
    "best": ["sample", "X", "--prompts", "{}/prompts.jsonl", "--best-of", "2", "--reward", "{}/reward.py:score",
             "--max-new-tokens", "3", "--device", "cpu", "--no-before", "--out", "samples.jsonl"],
    "probe": ["probe", "X", "--device", "cpu"],
    "frontier": ["frontier", "X", "--out", "x.png"],
    "keys": ["keys", "sft"],
}  # fmt: skip
# Run -> the commands that it is given to; those of a model, too.
TAKERS = {
    "sft_run": "train grpo teacher soup export merge gguf sample best chat frontier",
    "dora_run": "train grpo soup export merge gguf sample", "grpo_run": "train export sample best frontier",
    "reward_run": "reward paid probe", "steps_run": "reward paid probe",
    "model": "train train grpo learnt-chat learnt-chat sample chat export gguf teacher",
    "sharded": "train train sample merge",
}  # fmt: skip


def command(name: str, source: Path, run: str = "X") -> list[str]:
    """A command of COMMANDS for the model, adapter or run at `run`."""
    return [word.replace("{}", str(source)).replace("X", run) for word in COMMANDS[name.replace("-", " ")]]


def adapter(random: Random, place: Path, source: Path) -> list[str]:
    kind = random.choice(["sft_run", "reward_run", "reward_run", "dora_run", "steps_run"])
    spoiled(random, source / kind, place / "X")
    return command(random.choice(TAKERS[kind].split()), source)


def model(random: Random, place: Path, source: Path) -> list[str]:
    kind = random.choice(["model", "model", "model", "sharded"])
    spoiled(random, source / kind, place / "X")
    if random.random() < 0.25:
        path = place / "X" / "chat_template.jinja"
        if not path.is_dir() and not path.is_symlink():
            path.write_text(template(random))
    _talk(random, place)
    return command(random.choice(TAKERS[kind].split()), source)


def _talk(random: Random, place: Path) -> None:
    """What is said to `chat`."""
    lines = several(random, partial(changed_bytes, random), b"hello\n/reset\nwhat?\n")
    (place / "stdin").write_bytes(lines[:20_000])


@cache
def options() -> dict[str, list[Any]]:
    """Command -> its options."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {name: [one for one in made.params if one.opts[0].startswith("-")] for name, made in commands.items()}


def commands(random: Random, place: Path, source: Path) -> list[str]:
    """Commands other than train with options of theirs."""
    name = random.choice(["sample", "best", "chat", "export", "merge", "soup", "probe", "frontier", "keys"])
    runs = [run for run in RUNS if name in TAKERS[run].split()] or ["sft_run"]
    words = command(name, source, str(source / random.choice(runs)))
    for _ in range(random.choice([1, 1, 2, 3])):
        if random.random() < 0.25:
            at = random.randint(1, len(words) - 1)
            words[at] = word(changed(random, words[at]))
        elif options()[words[0]]:
            option = random.choice(options()[words[0]])
            said = random.choice([*option.opts, *option.secondary_opts])
            few = [
                -1,
                0,
                1,
                2,
                3,
                0.5,
                1.5,
                "nan",
                "inf",
                "-inf",
                1e308,
                "peft",
                "gguf",
                "float16",
                "bfloat16",
                "0.5,0.5",
            ]
            value = random.choice(few) if random.random() < 0.5 else atom(random)
            if not large(value) or isinstance(value, str):
                words += [said] if getattr(option, "is_flag", False) else [said, word(value)]
    if random.random() < 0.05:
        words.append(random.choice(["--help", "--version", "--", "-h", "", "x"]))
    _talk(random, place)
    return words


REWARDS = [
    "return [1.0] * len(completions)", "return [float('nan')] * len(completions)",
    "return [10**400] * len(completions)",
    "return [float('inf')] * len(completions)", "return ['x'] * len(completions)", "return None", "return 1.0",
    "return []",
    "return [1.0] * (len(completions) + 1)", "return [[1.0]] * len(completions)", "return [None] * len(completions)",
    "return [True] * len(completions)", "return (float(i) for i, _ in enumerate(completions))",
    "raise ValueError('no\\nno')",
    "raise KeyboardInterrupt", "raise SystemExit(3)", "import os; os._exit(7)", "import os; os.kill(os.getpid(), 9)",
    "import os; os.abort()", "import os; os.fork(); return [1.0] * len(completions)",
    "import os; os.chdir('/'); return [1.0] * len(completions)",
    "import torch; return torch.ones(len(completions))",
    "import torch; return torch.ones(len(completions), 1) * float('nan')",
    "import numpy; return numpy.ones(len(completions), dtype=object)", "return {c: 1.0 for c in completions}",
    "return 'x' * len(completions)",
    "print('x' * 100000); return [1.0] * len(completions)",
    "import sys; sys.stdout.close(); return [1.0] * len(completions)",
    "import sys; sys.setrecursionlimit(100); return score(prompts, completions)", "return score(prompts, completions)",
    "import time; time.sleep(99)", "while True: pass", "x = []\n    while True: x.append(bytearray(1 << 24))",
    "raise MemoryError",
    "return [[(1, 1.0), (99, 1.0)]] * len(completions)", "return [[(2, 1.0), (1, 'x')]] * len(completions)",
    "return [[]] * len(completions)",
    "return [[(-1, 1.0)]] * len(completions)", "return [{'x': 1.0}] * len(completions)",
    "return [1e308, -1e308] * (len(completions) // 2)",
    "return [complex(1, 1)] * len(completions)",
    "class E(Exception):\n        def __str__(self): raise ValueError\n    raise E",
    "class F(float): pass\n    return [F(1)] * len(completions)", "yield 1.0",
    "import signal; signal.raise_signal(signal.SIGTERM)",
    "import signal; signal.alarm(1); signal.pause()",
    "import threading; threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start(); return [1.0] * 4",
    "raise BaseException('\\ud800')", "return ['1.0'] * len(completions)", "raise Exception('x' * 10**6)",
    "import nowhere",
    "del prompts[:]; return [1.0] * len(completions)",
    "import gc; return [1.0 for _ in completions] if gc.collect() else None",
]  # fmt: skip
SIGNATURES = [
    "def score(prompts, completions, **columns):", "def score(prompts, completions):", "def score(completions, tag):",
    "def score():", "def score(*args):", "def score(completions, nowhere):", "async def score(prompts, completions):",
    "def score(prompts, completions, /):", "def score(self, prompts, completions, x, y=2):",
    "class score:\n  def __call__(self, prompts, completions):",
    "@print\ndef score(prompts, completions):", "import os\nos._exit(3)\ndef score(prompts, completions):",
    "raise ValueError('at import')\ndef score(x):",
    "def other(prompts, completions):", "score = 5\ndef other(prompts, completions):",
    "while True: pass\ndef score(x):", "(", "import os; os.chdir('/')\ndef score(prompts, completions):",
]  # fmt: skip


def reward(random: Random, place: Path, source: Path) -> list[str]:
    """A reward function that does what none should, in a run that calls it."""
    signature = random.choice(SIGNATURES) if random.random() < 0.3 else SIGNATURES[0]
    code = f"{signature}\n    {random.choice(REWARDS)}\n".encode("utf-8", "surrogatepass")
    if random.random() < 0.1:
        code = several(random, partial(changed_bytes, random), code)
    (place / "own.py").write_bytes(code)
    name = random.choice(
        ["grpo", "ppo", "process_grpo", "online_dpo", "raft", "label", "hpo", "costs", "several rewards", "sdpo"]
    )
    values = base(name, source, eval_size=1, reward_timeout=2.0)
    own = word(f"own.py:{random.choice(['score'] * 9 + [atom(random)])}")
    values["cost" if name == "costs" else "reward"] = (
        [own, f"{source}/reward.py:score"] if name == "several rewards" else own
    )
    values["reward_weights"] = None
    if name == "several rewards":
        values["reward_floors"] = None
    return ["train", *(f"{key}={word(value)}" for key, value in values.items())]


def judge(random: Random, place: Path, source: Path) -> list[str]:
    """A judge behind an endpoint that answers what none should, in a run that asks it."""
    name = random.choice(["judge", "compared", "label"])
    url = f"{(source / 'url').read_text()}/{random.randrange(len(ANSWERS))}/v1"
    options = {"by": url, "model": "m", "retries": random.choice([0, 0, 1]), "timeout": 2.0, "cache": "cache.sqlite",
               "form": random.choice(["score", "compare"]) if name != "judge" else "score"}  # fmt: skip
    options = {
        **options,
        **random.choice([{}, {"thought_tokens": 3}, {"criteria": ["kind", "short"]}, {"concurrency": 1}]),
    }
    if random.random() < 0.2:
        (place / "cache.sqlite").write_bytes(random.choice([b"", b"x" * 5000, b"SQLite format 3\0" + b"\0" * 4000]))
    values = base(name, source, judge=options, eval_size=1)
    if name == "label":
        del values["reward"]
    if random.random() < 0.2:
        values = several(random, partial(changed, random), values)
    if not isinstance(values, dict) or large(values):
        values = base("judge", source, judge=options)
    return ["train", *(f"{word(key)}={word(value)}" for key, value in {**values, "output_dir": "run"}.items())]


def run(random: Random, place: Path, source: Path) -> list[str]:
    """A finished run, spoiled, that is continued, replaced or used."""
    kind = random.choice(["sft_run", "sft_run", "grpo_run", "steps_run"])
    spoiled(random, source / kind, place / "run")
    config = yaml.safe_load((source / kind / "config.yaml").read_text())
    words = [
        f"{key}={word(value)}" for key, value in {**config, "output_dir": "run", "steps": config["steps"] + 1}.items()
    ]
    action = random.choice(["resume", "resume", "resume", "overwrite", "frontier", "sample", "neither"])
    if action == "frontier":
        return ["frontier", "run", "--out", "x.png"]
    if action == "sample":
        return ["sample", "run", "--prompt", "a", "--max-new-tokens", "2", "--device", "cpu"]
    return [
        "train",
        *words,
        *{
            "resume": ["--resume", random.choice(["auto", "run", "run/checkpoints/step-1", "x", ""])],
            "overwrite": ["--overwrite"],
        }.get(action, []),
    ]


KINDS: dict[str, Callable[[Random, Path, Path], list[str]]] = {
    "config": config, "flags": flags, "data": data, "adapter": adapter, "model": model, "run": run,
    "commands": commands, "reward": reward, "judge": judge,
}  # fmt: skip
# The kinds in turn: those that always train take longer.
ORDER = (
    "config", "data", "adapter", "model", "commands", "flags", "run", "data", "model", "config", "adapter", "data",
    "commands", "model", "run", "config", "flags", "adapter", "reward", "data", "model", "adapter", "judge", "data",
)  # fmt: skip
