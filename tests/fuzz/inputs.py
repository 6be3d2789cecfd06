"""What the fuzzer feeds to the command: valid configs, flags, data, adapters, models and run folders, with one to three
things in them changed. The same random numbers give the same input."""

import csv
import gzip
import io
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlhf_fast.algorithms import ALGORITHMS, load_algorithm
from rlhf_fast.training.config import keys_of
from rlhf_fast.training.foreign_keys import ALIASES, NO_EQUAL
from tests.training.tiny_runs import ALGORITHMS as RUNS
from tests.training.tiny_runs import judged, values_of

LARGE = "9" * 5000
DEEP: Any = "x"
for _ in range(60):
    DEEP = [DEEP]
BOMB = "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True))

ATOMS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 1 << 31, 1 << 62, 1 << 64, 10**400, 0.5, -0.0, 1e-300, 1e308, math.inf,
    -math.inf,
    math.nan, "", " ", "\n", "x", "1", "1e-4", "010", "1:30", "yes", "null", "2024-01-01", "10**400", LARGE, "x" * 5000,
    "é\u2028\U0001f600", "\0", "\ud800", "\udcff", "\x1b[31m", "[/red]", "[bold", "{0.__class__}", "{prompt}", "%s%n",
    "{{ 1 }}", "..", ".", "/", "../../x", "/dev/null", "/dev/zero", "/proc/self/mem", "/etc/passwd", "~", "-", "--help",
    "nobody/nothing", "nobody/nothing@main", "a:b", "a:b:c", ":", "@", "*", "?", "[", "**/*", "tiny", "auto", "cpu",
    "cuda:99",
    "meta", "(a+)+$", "(" * 300, "x{99999999}", "file:///etc/passwd", "http://127.0.0.1:9/v1", "os:getcwd",
    "data.jsonl",
    [], [[]], [None], [1, 2], ["x"], ["x", "x"], [True], {}, {"": ""}, {"x": 1}, {"from": "x"}, {"from": None},
    {"from": "sft"},
    {"kind": "exact"}, {"by": "backbone"}, {"variant": "dapo"}, DEEP, ["x"] * 300,
]  # fmt: skip
FRAGMENTS = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n", b"\t", b"{", b"}", b"[", b"]", b'"',
    b"'", b"\\", b":",
    b": ", b"- ", b"&a ", b"*a", b"<<: ", b"!!python/object:os.system x", b"!!int ", b"%YAML 9\n", b"---\n", b"...\n",
    b"? ", b"|\n",
    b"#", b",", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"\\ud800",
    b"\xe2\x80\xa8", BOMB.encode(),
]  # fmt: skip
Choose = Callable[[], Any]


def atom(random: Random) -> Any:
    return random.choice(ATOMS)


def changed(random: Random, value: Any, depth: int = 0) -> Any:
    """The JSON-like value with one thing inside of it replaced, removed, repeated or added."""
    inside = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inside or depth > 5 or random.random() < 0.15 * (depth > 0):
        if isinstance(value, str) and random.random() < 0.3:
            place = random.randint(0, len(value))
            return value[:place] + str(atom(random)) + value[place:]
        if isinstance(value, int | float) and not isinstance(value, bool) and random.random() < 0.4:
            return random.choice([-value, value + 1, value * 1000, float(value), str(value), [value]])
        return atom(random)
    place = random.choice(inside)
    action = random.random()
    if isinstance(value, dict):
        if action < 0.15:
            return {key: item for key, item in value.items() if key != place}
        if action < 0.25:
            name = random.choice([str(atom(random)), place + "s", place.upper(), place[:-1]])
            return {name if key == place else key: item for key, item in value.items()}
        return {**value, place: changed(random, value[place], depth + 1)}
    if action < 0.15:
        return value[:place] + value[place + 1 :]
    if action < 0.25:
        return value[:place] + [value[place]] * 3 + value[place + 1 :]
    return [*value[:place], changed(random, value[place], depth + 1), *value[place + 1 :]]


def several(random: Random, change: Callable[[Any], Any], value: Any) -> Any:
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        value = change(value)
    return value


def changed_bytes(random: Random, content: bytes) -> bytes:
    """The content with bytes put in, taken out, cut, doubled or turned over."""
    first, last = sorted(random.randint(0, len(content)) for _ in range(2))
    last = min(last, first + random.choice([1, 10, 1000]))
    action = random.randrange(6)
    if action == 0:
        return content[:first] + random.choice(FRAGMENTS) + content[first:]
    if action == 1:
        return content[:first] + random.choice(FRAGMENTS) + content[last:]
    if action == 2:
        return content[:first]
    if action == 3:
        return content[:first] + content[first:last] * 2 + content[last:]
    if action == 4 and first < len(content):
        return content[:first] + bytes([content[first] ^ (1 << random.randrange(8))]) + content[first + 1 :]
    return content[:first] + b"\0" * (last - first) + content[last:]


def as_json(value: Any) -> str:
    try:
        return json.dumps(value)
    except ValueError:  # an integer of too many digits
        return json.dumps(str(value)[:100] if isinstance(value, int) else None)


def as_yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, sort_keys=False))


def safe(value: Any) -> Any:
    """What YAML and JSON can be made of: 10**400 has more digits than Python prints."""
    if isinstance(value, dict):
        return {str(key).encode("utf-8", "replace").decode(): safe(item) for key, item in value.items()}
    if isinstance(value, list):
        return [safe(item) for item in value]
    return value


# Each takes (random, the folder to write into, the folder of valid things) and gives the arguments of the command.


def base_values(random: Random, source: Path, algorithm: str | None = None) -> dict[str, Any]:
    """A valid config that reads the files in `source`."""
    algorithm = algorithm or random.choice(RUNS)
    values = values_of(algorithm, steps=1, batch_size=4, output_dir="run", self_test=False)
    home = str(Path(values["model"]).parent)
    return {key: value.replace(home, str(source)) if isinstance(value, str) else value for key, value in values.items()}


def with_keys(random: Random, values: dict[str, Any]) -> dict[str, Any]:
    """With one more key that there is, here or in another trainer, and a value for it."""
    fields = load_algorithm(own if isinstance(own := values.get("algorithm"), str) and own in ALGORITHMS else "sft")
    fields = fields.AlgorithmConfig.model_fields
    if random.random() < 0.7:
        name = random.choice(list(fields))
        return {**values, name: fitting(random, fields[name].annotation)}
    other = load_algorithm(random.choice(list(ALGORITHMS))).AlgorithmConfig
    return {**values, random.choice([*keys_of(other), *ALIASES, *NO_EQUAL]): atom(random)}


def fitting(random: Random, annotation: Any) -> Any:
    """A value of that type, as far as it is one of the usual."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        return random.choice(inner)
    if get_origin(annotation) in (Union, UnionType):
        return fitting(random, random.choice(inner))
    numbers = {int: [0, 1, 2, 3, 5, 64, 1 << 31, 1 << 62], float: [0.0, 0.1, 0.5, 1.0, 1.5, 3, 1e-300, 1e-8, 1e308]}
    if annotation in numbers:
        return random.choice(numbers[annotation])
    return random.choice([True, False]) if annotation is bool else atom(random)


def config_values(random: Random, source: Path) -> dict[str, Any]:
    values = base_values(random, source)
    if random.random() < 0.2:
        values["algorithm"] = random.choice(list(ALGORITHMS))
    if random.random() < 0.2:
        shared = {key: values.pop(key) for key in ("output_dir", "seed", "device", "report_to") if key in values}
        stage = {"name": "first", **values}
        second = {**stage, "name": "second", "model": {"from": "first"}}
        values = {
            **shared,
            "stages": random.choice([[stage], [stage, second], [{"repeat": 2, "stages": [stage, second]}]]),
        }
    return several(
        random, lambda v: (with_keys if random.random() < 0.6 and isinstance(v, dict) else changed)(random, v), values
    )


def config(random: Random, place: Path, source: Path) -> list[str]:
    values = config_values(random, source)
    if not isinstance(values, dict):
        values = {"stages": values}
    try:
        text = as_yaml(values).encode("utf-8", "surrogatepass")
    except ValueError:
        text = as_yaml({"steps": 1 << 70}).encode()
    if random.random() < 0.4:
        text = several(random, partial(changed_bytes, random), text)
    (place / "config.yaml").write_bytes(text)
    return ["train", "config.yaml", "--dry-run"]


def word(value: Any) -> str:
    text = value if isinstance(value, str) else as_json(value)
    return (
        text.replace("\0", "")
        .encode("utf-8", "surrogateescape" if "\ud800" not in text else "replace")
        .decode("utf-8", "surrogateescape")
    )


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
    return [json.loads(line) for line in (source / f"{name}.jsonl").read_text().splitlines()][:6]


DATA = {
    "sft": ("sft", "chat"), "reward_model": ("pairs", "judged", "chat_pairs"), "dpo": ("pairs", "chat_pairs"),
    "kto": ("answers",),
    "grpo": ("prompts",), "ppo": ("prompts",), "rating": ("judged",), "ranking": ("rankings", "judged"),
    "like": ("judged",),
    "hpo": ("pairs",), "dpo_ranking": ("rankings",), "process_reward_model": ("judged",),
}  # fmt: skip


def data(random: Random, place: Path, source: Path) -> list[str]:
    algorithm = random.choice(list(DATA))
    rows = several(random, partial(changed, random), rows_of(random, source, random.choice(DATA[algorithm])))
    rows = rows if isinstance(rows, list) else [rows]
    suffix = random.choice([".jsonl", ".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz"])
    content = encoded_rows(random, rows, suffix)
    if random.random() < 0.3:
        content = several(random, partial(changed_bytes, random), content)
    (place / f"data{suffix}").write_bytes(content)
    values = base_values(random, source, algorithm if algorithm in RUNS else "reward_model")
    values |= {
        "algorithm": algorithm,
        "data": f"data{suffix}",
        **random.choice([{}, {"bad_rows": "skip"}, {"too_long": "truncate"}]),
    }
    return [
        "train",
        *(f"{key}={word(value)}" for key, value in values.items()),
        *(["--dry-run"] if random.random() < 0.7 else []),
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
    return gzip.compress(content) if suffix.endswith(".gz") else content


def spoil_tensors(random: Random, path: Path) -> None:
    tensors = load_file(path)
    name = random.choice(list(tensors))
    tensor = tensors[name]
    action = random.randrange(10)
    if action == 0:
        tensors[name] = tensor.clone().fill_(random.choice([math.nan, math.inf, -math.inf, 1e30, 0.0]))
    elif action == 1:
        kinds = [
            torch.int8,
            torch.int64,
            torch.bool,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
            torch.float64,
            torch.float16,
            torch.complex64,
        ]
        tensors[name] = tensor.to(random.choice(kinds))
    elif action == 2:
        shapes = [
            tensor[:0],
            tensor[..., :0],
            tensor.T,
            tensor[None],
            tensor.flatten(),
            tensor[:1],
            tensor.sum(),
            tensor.repeat(2, *[1] * (tensor.dim() - 1)),
        ]
        tensors[name] = random.choice(shapes).contiguous()
    elif action == 3:
        del tensors[name]
    elif action == 4:
        tensors[
            random.choice(
                ["x", name + ".x", name.replace("0", "9"), name.replace("lora_A", "lora_B"), "base_model.model.", ""]
            )
        ] = tensors.pop(name)
    elif action == 5:
        tensors = {}
    elif action == 6:
        tensors["base_model.model.score.weight"] = random.choice(
            [torch.ones(1, 32), torch.ones(3, 32), torch.ones(32), torch.ones(0, 32), torch.ones(1, 5)]
        )
    elif action == 7:
        tensors = {key: tensor.half() for key, tensor in tensors.items()}
    if action < 8:
        save_file(tensors, path)
    else:
        path.write_bytes(changed_bytes(random, path.read_bytes()))


def spoil_file(random: Random, path: Path) -> None:
    """Change one file of a folder by its kind; or the file itself: gone, empty, a folder, a link."""
    action = random.random()
    if action < 0.12:
        path.unlink()
        other = random.choice(["missing", "empty", "folder", "/etc/passwd", "/dev/null", path.name, "../../outside"])
        if other == "empty":
            path.touch()
        elif other == "folder":
            path.mkdir()
        elif other != "missing":
            path.symlink_to(other)
    elif action < 0.75 and path.suffix in SPOILED and path.stat().st_size < 1 << 20:
        try:
            SPOILED[path.suffix](random, path)
        except (ValueError, SafetensorError, yaml.YAMLError, RuntimeError):  # it is spoiled already
            path.write_bytes(changed_bytes(random, path.read_bytes()))
    else:
        path.write_bytes(several(random, partial(changed_bytes, random), path.read_bytes()))


def spoil_json(random: Random, path: Path) -> None:
    path.write_text(as_json(several(random, partial(changed, random), json.loads(path.read_text()))))


def spoil_jsonl(random: Random, path: Path) -> None:
    lines = path.read_text().splitlines()
    index = random.randrange(max(1, len(lines)))
    lines[index : index + 1] = [as_json(safe(changed(random, json.loads(x)))) for x in lines[index : index + 1]]
    path.write_text("\n".join(lines))


def spoil_yaml(random: Random, path: Path) -> None:
    path.write_bytes(as_yaml(changed(random, yaml.safe_load(path.read_text()))).encode("utf-8", "surrogatepass"))


SPOILED: dict[str, Callable[[Random, Path], None]] = {
    ".safetensors": spoil_tensors, ".json": spoil_json, "": spoil_json, ".jsonl": spoil_jsonl, ".yaml": spoil_yaml,
    ".jinja": lambda random, path: path.write_text(template(random)) and None,
}  # fmt: skip


def template(random: Random) -> str:
    """A chat template that does what none should."""
    good = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    bad = [
        "{{ 'x' * 999999999 }}", "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ 9**9**9 }}",
        "{{ messages[99]['content'] }}", "{{ raise_exception('no') }}", "{% include 'x' %}",
        "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% if %}", "{{", "", "x", "{{ strftime_now('%Y') }}",
        "{{ messages | tojson }}",
        "{{ lipsum(n=100000) }}", "{{ ('%0999999999d' % 1) }}", "{{ range(10**10) | list }}",
        "{{ 'a' | center(999999999) }}",
        "{{ messages | string * 9999999 }}", "\0", "{{ '\\ud800' }}",
        "{% set x = namespace(n=0) %}{% for i in cycler %}x{% endfor %}",
    ]  # fmt: skip
    return random.choice([random.choice(bad), good + random.choice(bad), random.choice(bad) + good])


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def spoiled(random: Random, source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)
    for _ in range(random.choice([1, 1, 2])):
        found = files(target)
        if found:
            spoil_file(random, random.choice(found))


COMMANDS = {
    "train": ["train", "algorithm=sft", "model=X", "data={}/sft.jsonl", "--dry-run", "device=cpu"],
    "grpo": ["train", "algorithm=grpo", "model=X", "data={}/prompts.jsonl", "reward={}/reward.py:score", "batch_size=4",
             "num_generations=2", "max_new_tokens=4", "--dry-run", "device=cpu"],
    "reward": ["train", "algorithm=ppo", "model={}/model", "data={}/prompts.jsonl", "reward=X", "max_new_tokens=4",
    "--dry-run",
               "device=cpu", "batch_size=4"],
    "chat": ["train", "algorithm=sft", "model=X", "data={}/chat.jsonl", "--dry-run", "device=cpu"],
    "export": ["export", "X", "--out", "out", "--to", "peft"],
    "merge": ["export", "X", "--out", "out", "--to", "merged"],
    "soup": ["soup", "X", "X", "--out", "out"],
    "sample": ["sample", "X", "--prompt", "a", "--max-new-tokens", "4", "--device", "cpu"],
    "probe": ["probe", "X", "--device", "cpu"],
}  # fmt: skip


def command(random: Random, names: str, source: Path) -> list[str]:
    return [word.replace("{}", str(source)) for word in COMMANDS[random.choice(names.split())]]


def adapter(random: Random, place: Path, source: Path) -> list[str]:
    kind = random.choice(["sft_run", "reward_run"])
    spoiled(random, source / kind, place / "X")
    return command(
        random, "train grpo soup export merge sample" if kind == "sft_run" else "reward reward probe", source
    )


def model(random: Random, place: Path, source: Path) -> list[str]:
    spoiled(random, source / "model", place / "X")
    if random.random() < 0.25:
        path = place / "X" / "chat_template.jinja"
        if not path.is_dir() and not path.is_symlink():
            path.write_text(template(random))
    return command(random, "train grpo chat chat sample export", source)


def run(random: Random, place: Path, source: Path) -> list[str]:
    """A finished run, spoiled, that is continued, replaced or used."""
    spoiled(random, source / "sft_run", place / "run")
    config = yaml.safe_load((source / "sft_run" / "config.yaml").read_text())
    words = [f"{key}={word(value)}" for key, value in {**config, "output_dir": "run", "steps": 2}.items()]
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
}  # fmt: skip
