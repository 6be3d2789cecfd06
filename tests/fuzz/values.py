"""Values that no one expects, and valid ones with something in them changed. The same random numbers give the same."""

import json
import math
from collections.abc import Callable
from dataclasses import is_dataclass
from random import Random
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel

LARGE = "9" * 5000
DEEP: Any = "x"
for _ in range(60):
    DEEP = [DEEP]
BOMB = "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True))

ATOMS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 1 << 31, -(1 << 31), 1 << 62, 1 << 63, 1 << 64, 10**400, -(10**400), 0.5, -0.0,
    1e-300, 1e308, math.inf,
    -math.inf,
    math.nan, "", " ", "\n", "x", "1", "1e-4", "010", "1:30", "yes", "null", "2024-01-01", "10**400", LARGE, "x" * 5000,
    "é\u2028\U0001f600", "\0", "\ud800", "\udcff", "\x1b[31m", "\u202egpj", "\ufeff", "\x85", "a\0b", "[/red]", "[bold",
    "{0.__class__}", "{prompt}", "%s%n",
    "{{ 1 }}", "..", ".", "/", "../../x", "/dev/null", "/dev/zero", "/proc/self/mem", "/etc/passwd", "~", "-", "--help",
    "nobody/nothing", "nobody/nothing@main", "a:b", "a:b:c", ":", "@", "*", "?", "[", "**/*", "tiny", "auto", "cpu",
    "cuda:99",
    "meta", "(a+)+$", "(" * 300, "x{99999999}", "file:///etc/passwd", "http://127.0.0.1:9/v1", "os:getcwd",
    "data.jsonl",
    [], [[]], [None], [1, 2], ["x"], ["x", "x"], [True], {}, {"": ""}, {"x": 1}, {"from": "x"}, {"from": None},
    {"from": "sft"}, {"from": "first", "rounds": "all"}, {"from": "first", "first": "tiny"}, {"from": ["first"]},
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


def word(value: Any) -> str:
    text = value if isinstance(value, str) else as_json(value)
    return (
        text.replace("\0", "")
        .encode("utf-8", "surrogateescape" if "\ud800" not in text else "replace")
        .decode("utf-8", "surrogateescape")
    )


def fitting(random: Random, annotation: Any) -> Any:
    """A value of that type, as far as it is one of the usual."""
    inner, origin = get_args(annotation), get_origin(annotation)
    if origin is Annotated:
        return fitting(random, inner[0])
    if origin is Literal:
        return random.choice(inner)
    if origin in (Union, UnionType):
        return fitting(random, random.choice(inner))
    if origin in (list, tuple):
        return [fitting(random, inner[0]) for _ in range(random.choice([0, 1, 2, 3]))]
    if origin is dict:
        return {word(fitting(random, inner[0])): fitting(random, inner[1])}
    fields = entries(annotation)
    if fields:
        names = random.sample(list(fields), min(len(fields), random.choice([1, 2, 3])))
        return {name: fitting(random, fields[name]) if random.random() < 0.8 else atom(random) for name in names}
    numbers = {int: [0, 1, 2, 3, 5, 64, 1 << 31, 1 << 62], float: [0.0, 0.1, 0.5, 1.0, 1.5, 3, 1e-300, 1e-8, 1e308]}
    if annotation in numbers:
        return random.choice(numbers[annotation])
    return random.choice([True, False]) if annotation is bool else atom(random)


def entries(annotation: Any) -> dict[str, Any]:
    """The names of the entries that a value of this type has, and their types."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {field.alias or name: field.annotation for name, field in annotation.model_fields.items()}
    return get_type_hints(annotation) if is_dataclass(annotation) else {}


def large(value: Any) -> bool:
    """Whether there is a number in it that may ask for a long time."""
    if isinstance(value, dict | list):
        return any(map(large, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) <= 64


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
