"""What a configuration may hold, from its own types, defaults and descriptions, for `rlhf_fast keys` and `--help`."""

import types
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from rlhf_fast.ops.core.loss import Objective
from rlhf_fast.training.config import Config, parse
from rlhf_fast.training.entries import EngineConfig, FromStage, JudgeConfig, VerifyConfig


class Key(NamedTuple):
    name: str
    type: str
    default: str
    description: str


def described(config_class: type[Config], defaults: Mapping[str, Any] | None = None) -> Iterator[Key]:
    """Every key of an algorithm in order, then the entries of `verify`, the numbers of its objective, and the entries
    of `judge` and `engine`.

    defaults: those of a preset.
    """
    required = [name for name, info in config_class.model_fields.items() if info.is_required()]
    least = dict.fromkeys(required, "") | ({"verify": "exact"} if "verify" in config_class.model_fields else {})
    config = parse(config_class, {**least, **(defaults or {})})
    for name, info in config_class.model_fields.items():
        value = None if name == "verify" else getattr(config, name)
        default = "(required)" if name in required else shown(getattr(value, "variant", getattr(value, "kind", value)))
        yield Key(name, type_name(info.annotation), default, info.description or "")
    if "verify" in config_class.model_fields:
        for name, info in VerifyConfig.model_fields.items():
            default = "(required)" if info.is_required() else shown(info.default)
            yield Key(f"verify.{name}", type_name(info.annotation), default, info.description or "")
    objective = getattr(config, "objective", None)
    if objective is not None:
        for field in fields(objective):
            kind = " or ".join(part for part in field.type.split(" | ") if part != "None")
            yield Key(f"objective.{field.name}", kind, shown(getattr(objective, field.name)), "")
    for key, entries in (("judge", JudgeConfig), ("engine", EngineConfig)):
        for name, info in entries.model_fields.items() if key in config_class.model_fields else ():
            yield Key(f"{key}.{name}", type_name(info.annotation), shown(info.default), info.description or "")


def shown(value: Any) -> str:
    return "-" if value is None else str(value)


def type_name(annotation: Any) -> str:
    """As a person would write it: int, str or list, gae or group."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(part) for part in inner if part is not types.NoneType))
    if origin is Literal:
        return " or ".join(map(str, inner))
    if annotation is FromStage:
        return "{from: STAGE}"
    if annotation is JudgeConfig:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, (EngineConfig, Objective, VerifyConfig)):
        return "name or mapping"
    return str((origin or annotation).__name__)
