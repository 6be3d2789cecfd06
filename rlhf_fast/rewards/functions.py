"""Reward functions in Python: `fn(prompts, completions, **columns) -> one number per completion`."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.errors import UserError

Function = Callable[..., Any]
OURS = ("prompts", "completions")


def load_function(spec: str) -> Function:
    """The function named by 'pkg.mod:function' or 'path/file.py:function'; UserError when it cannot be had."""
    place, _, name = spec.rpartition(":")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"reward {spec}: importing it failed: {_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"reward {spec}: {place} has no function {name!r}")
    return function


def check_columns(name: str, function: Function, columns: Sequence[str]) -> None:
    """UserError when `function` has a required parameter that is no column of the data."""
    for parameter in _parameters(function):
        required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        if required and parameter.name not in (*OURS, *columns):
            raise UserError(
                f"reward {name} needs {parameter.name!r}, which is no column of the data ({', '.join(columns)})"
            )


def call(
    name: str, function: Function, prompts: Sequence[Any], completions: Sequence[str], columns: dict[str, list[Any]]
) -> Tensor:
    """The function's scores as (B,) fp32. It gets the columns that it names, or all with **kwargs.

    UserError, with the function's name and the example's index, when it raises, exits, or returns anything but one
    number per completion that is finite in fp32.
    """
    arguments = _arguments(function, prompts, completions, columns)
    try:
        values = function(**arguments)
    except (Exception, SystemExit) as error:
        where = _failing_example(function, arguments, len(completions))
        raise UserError(f"reward {name} raised {_line(error)} ({where})") from error
    return _checked(name, values, len(completions))


def _checked(name: str, values: Any, expected: int) -> Tensor:
    if isinstance(values, Tensor) or hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise UserError(f"reward {name} must return a list of {expected} numbers, got {type(values).__name__}")
    if len(values) != expected:
        raise UserError(f"reward {name} returned {len(values)} values for {expected} completions")
    for i, value in enumerate(values):
        try:
            fine = value is not None and abs(value) <= torch.finfo(torch.float32).max
        except TypeError:
            fine = False
        if not fine:
            raise UserError(f"reward {name} returned {value!r} for example {i}; it must be a finite float32 number")
    return torch.tensor([float(value) for value in values])


def _failing_example(function: Function, arguments: dict[str, Any], size: int) -> str:
    """Which example raises on its own; the batch is small and the run is over, so trying each is cheap."""
    for i in range(size):
        try:
            function(**{key: [values[i]] for key, values in arguments.items()})
        except (Exception, SystemExit):  # noqa: BLE001 - a user's function may raise anything, and that is the question here
            return f"example {i}: completion {arguments['completions'][i][:60]!r}"
    return f"in a batch of {size}; every example alone is fine"


def _arguments(
    function: Function, prompts: Sequence[Any], completions: Sequence[str], columns: dict[str, list[Any]]
) -> dict[str, Any]:
    everything = {**columns, "prompts": list(prompts), "completions": list(completions)}
    parameters = _parameters(function)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return everything
    return {p.name: everything[p.name] for p in parameters if p.name in everything}


def _parameters(function: Function) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _import_module(name: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"reward file {path} does not exist")
    module_spec = importlib.util.spec_from_file_location(f"rlhf_fast_reward_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None, "a .py suffix always has a loader"
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    return module


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
