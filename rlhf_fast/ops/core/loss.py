"""What all losses share: how their numbers are given, and what they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rlhf_fast.ops.core import check

F = TypeVar("F", bound=Callable[..., Any])
O = TypeVar("O", bound="Objective")  # noqa: E741


def once(function: F) -> F:
    """`function`, called once for the same hashable arguments; torch.compile traces through it instead."""
    remembered = lru_cache(function)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        return function(*arguments) if torch.compiler.is_compiling() else remembered(*arguments)

    return call  # type: ignore[return-value]


class Loss(NamedTuple):
    """What a loss returns: `loss, metrics = ...` unpacks it."""

    loss: Tensor  # 0-d
    metrics: dict[str, Tensor]  # by name: 0-d, detached


class Objective:
    """A loss with all of its numbers. Subclasses are frozen dataclasses; their field `variant` names the loss."""

    @classmethod
    def of(cls: type[O], given: str | Mapping[str, Any] | O, **defaults: Any) -> O:
        """The objective that `given` spells: the name of a variant, a mapping of fields (as in YAML), or one itself.

        In a mapping a number may be text ("3e-4", which YAML does not take for a number). defaults: fields for a name
        or a mapping that does not have them. Raises ValueError, with the key and its value, for what does not fit.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, str):
            if not defaults:
                return _preset(cls, given)
            given = {"variant": given}
        if not isinstance(given, Mapping):
            raise ValueError(f"objective must be a name, a mapping or a {cls.__name__}, got {given!r}")
        fields = cls.__dataclass_fields__  # type: ignore[attr-defined]
        values = {**defaults, **given}
        for name, value in values.items():
            if name not in fields:
                raise ValueError(f"objective has no {name!r}, got {value!r} for it{check.nearest(str(name), fields)}")
            if isinstance(value, str) and check.takes_number(fields[name].type):
                values[name] = _number_of(value)
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(str(error)) from None

    def values(self) -> tuple[Any, ...]:
        """The fields as an op takes them: a variant that may be weights of several losses is weights of one or more."""
        fields: dict[str, Any] = self.__dataclass_fields__  # type: ignore[attr-defined]
        values = [getattr(self, name) for name in fields]
        weighted = [isinstance(x, str) and "Mapping" in f.type for x, f in zip(values, fields.values(), strict=True)]
        return tuple({x: 1.0} if several else x for x, several in zip(values, weighted, strict=True))


@once
def _preset(cls: type[O], name: str) -> O:
    return cls(variant=name)  # type: ignore[call-arg]


def _number_of(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # the dataclass says what is wrong with it
