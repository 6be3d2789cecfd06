"""What runs in the process of a reward function (worker.py starts it): the standard library and what the function's own
module imports, nothing of this package.

A request is a pickle. An answer is JSON, so that what the function returns runs no code where it is read.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import pickle
import random
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

IDS = "completion_ids"  # lists of integers, which travel as arrays
LARGEST = 1 << 28  # bytes of an answer


def main() -> None:
    process, connection = os.getpid(), Connection(int(sys.argv[1]))
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    with contextlib.suppress(OSError):  # where memory runs out, this process goes and not the one that trains
        Path("/proc/self/oom_score_adj").write_text("1000")
    place, name, sys.path[:] = pickle.loads(connection.recv_bytes())
    sys.argv[1:] = []
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    function, answer = None, b""
    try:
        function = _named(place, name)
        answer = b'{"absent": true}' if function is None else _described(function)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the process that trains says it
        answer = _failed(error)
    while True:
        if os.getpid() != process:  # a fork that the function made, and that came back from it
            os._exit(0)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # the function may have closed it
                stream.flush()
        try:
            connection.send_bytes(answer)
            request = connection.recv_bytes()
        except (EOFError, BrokenPipeError, ConnectionResetError):  # nobody asks any more
            return
        assert function is not None, "nobody asks where importing it failed"
        try:
            _seed(request)
            answer = json.dumps({"values": _plain(function(**_arguments(request)))}).encode()
            if len(answer) > LARGEST:
                raise ValueError(f"it returned {len(answer) >> 20} MB")
        except BaseException as error:  # noqa: BLE001
            answer = _failed(error)


def _end_with(life: int) -> None:
    """End this process when the other end of the pipe is closed: the process that trains is gone."""
    os.read(life, 1)
    os._exit(1)


def _named(place: str, name: str) -> Callable[..., Any] | None:
    module = _file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    function = getattr(module, name, None)
    return function if callable(function) else None


def _file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"rlhf_fast_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None, "a .py suffix always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _described(function: Callable[..., Any]) -> bytes:
    parameters = [
        (p.name, int(p.kind), p.default is not p.empty) for p in inspect.signature(function).parameters.values()
    ]
    return json.dumps({"parameters": parameters, "one_by_one": bool(getattr(function, "one_by_one", False))}).encode()


def _arguments(request: bytes) -> dict[str, Any]:
    arguments: dict[str, Any] = pickle.loads(request)
    if IDS in arguments:
        arguments[IDS] = [ids.tolist() for ids in arguments[IDS]]
    return arguments


def _seed(request: bytes) -> None:
    """The generators, by what is asked: the same call draws the same numbers, also in a run that is resumed."""
    seed = int.from_bytes(hashlib.blake2b(request, digest_size=4).digest(), "big")
    random.seed(seed)
    for library, seeder in (("numpy", "random.seed"), ("torch", "manual_seed")):
        seeded: Any = sys.modules.get(library)
        for attribute in seeder.split("."):
            seeded = getattr(seeded, attribute, None)  # a module that is only half imported has none
        if seeded is not None:
            seeded(seed)


def _plain(value: Any) -> Any:
    """Numbers, lists of such, and of anything else its type and how it looks."""
    if isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63):
        return float(value) if isinstance(value, float) else int(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
        return value if isinstance(value, (int, float)) else _plain(value)
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if hasattr(value, "__float__") and not isinstance(value, int):  # Decimal, Fraction
        return float(value)
    shown = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else repr(value)[:200]
    return {"type": type(value).__name__, "repr": shown}


def _failed(error: BaseException) -> bytes:
    try:
        said = str(error).strip().splitlines()
    except Exception:  # noqa: BLE001 - it is the function's own class
        said = []
    line = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
    text = "".join(traceback.format_exception(error))
    return json.dumps({"error": line, "traceback": text}).encode()


if __name__ == "__main__":
    main()
