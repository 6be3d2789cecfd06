"""YAML of configurations: the core schema of YAML 1.2, within a budget.

In YAML 1.1, which PyYAML reads by itself, `1:30` is 90, `010` is 8, `no` is false, 1e-4 is text, and a date is an
object; a document of 415 bytes may stand for 10^9 values. Here only null, true, false and numbers in their usual forms
are more than text (YAML 1.2.2, section 10.3.2), and a document that expands to more than NODES values is refused.
Merge keys (`<<`), which 1.2 has no more, are kept.
"""

import re
from typing import Any, ClassVar

import yaml

from rlhf_fast.errors import short

SIZE = 1 << 18  # characters of a document
NODES = 20_000  # values, each alias counted as the whole of what it stands for
DEPTH = 32

_CORE = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN\0"),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "tag:yaml.org,2002:merge": ("<<", "<"),
}  # fmt: skip
_KNOWN = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map", *_CORE)


class _CoreSchema:
    """The implicit types of the core schema, in place of those of YAML 1.1."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


for tag, (pattern, starts) in _CORE.items():
    for start in starts:
        known = _CoreSchema.yaml_implicit_resolvers.setdefault("" if start == "\0" else start, [])
        known.append((tag, re.compile(rf"(?:{pattern})\Z")))


class _Loader(_CoreSchema, yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEPTH:
            raise _refusal(f"nested more than {DEPTH} deep", self.peek_event())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _expanded(node, {})
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if node.tag not in _KNOWN:
            raise _refusal(f"the tag {node.tag} is none of the core schema", node)
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError) as error:  # !!int x, !!bool x
            raise _refusal(f"{node.value[:40]!r} is no {node.tag.rpartition(':')[2]}: {error}", node) from None

    def text(self, node: Any) -> str:
        """Text that files and terminals can hold."""
        value = str(self.construct_scalar(node))
        bad = next((character for character in value if character == "\0" or "\ud800" <= character <= "\udfff"), None)
        if bad is not None:
            raise _refusal(f"U+{ord(bad):04X} is no character of a text", node)
        return value

    def whole(self, node: Any) -> int:
        value = str(self.construct_scalar(node))
        # Leading zeros are decimal. Python itself refuses to read more than 4,300 digits.
        number = int(value, {"0o": 8, "0x": 16}.get(value[:2], 10)) if len(value) < 100 else 1 << 64
        if not -(1 << 63) <= number < 1 << 63:
            raise _refusal(f"{short(value)} is no whole number of 64 bits", node)
        return number

    def real(self, node: Any) -> float:
        value = str(self.construct_scalar(node))
        return float(value.lower().replace(".inf", "inf").replace(".nan", "nan"))

    def mapping(self, node: Any) -> Any:
        if not isinstance(node, yaml.MappingNode):
            raise _refusal("this is no mapping", node)
        names = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        seen = set()
        for key in names:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise _refusal(f"the key {str(getattr(key, 'value', key))[:40]!r} is no text", key)
            if key.value in seen:
                raise _refusal(f"the key {key.value[:40]!r} is there twice", key)
            seen.add(key.value)
        self.flatten_mapping(node)
        return dict(self.construct_pairs(node, deep=True))


_Loader.yaml_constructors = {
    **{tag: yaml.SafeLoader.yaml_constructors[tag] for tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:bool",
                                                               "tag:yaml.org,2002:seq")},
    "tag:yaml.org,2002:str": _Loader.text, "tag:yaml.org,2002:merge": _Loader.text,
    "tag:yaml.org,2002:int": _Loader.whole, "tag:yaml.org,2002:float": _Loader.real,
    "tag:yaml.org,2002:map": _Loader.mapping,
}  # fmt: skip


class _Dumper(_CoreSchema, yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _refusal(why: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=why, problem_mark=place.start_mark)


def _expanded(node: Any, sizes: dict[int, int]) -> int:
    """How many values the node stands for. An alias of what it is inside of stands for no end of them."""
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise _refusal("an alias of what it is inside of", node)
        return sizes[id(node)]
    sizes[id(node)] = 0
    inside = [] if isinstance(node, yaml.ScalarNode) else node.value
    size = 1 + sum(_expanded(part, sizes) for item in inside for part in (item if isinstance(item, tuple) else [item]))
    if size > NODES:
        raise _refusal(f"more than {NODES:,} values, those that aliases stand for counted", node)
    sizes[id(node)] = size
    return size


def load(text: str) -> Any:
    """The value of the one document in `text`. Raises ValueError, with the line where there are several."""
    if len(text) > SIZE:
        raise ValueError(f"{len(text):,} characters are more than a configuration has ({SIZE:,})")
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        raise ValueError(f"{error.problem or error.context}{place}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def dump(values: Any) -> str:
    """A document that `load` reads back."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False))
