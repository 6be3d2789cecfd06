"""What a program in the sandbox cannot do, each tried with a bounded stand-in, and what it is judged by."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.rewards import sandbox
from rlhf_fast.rewards.sandbox import Limits, check_sandbox, output_of, parse_tests, passed, values_of

try:
    check_sandbox()
except UserError as error:
    pytestmark = pytest.mark.skip(reason=str(error))

SMALL = Limits(seconds=30, memory=256, files=1, processes=12)


def leftovers(mark: str) -> list[str]:
    """Processes whose command line has the mark."""
    return [
        line for line in subprocess.check_output(["ps", "axww", "-o", "args"], text=True).splitlines() if mark in line
    ]


def test_a_program_is_run_with_its_input_and_its_output_is_compared_outside():
    double = "print(2 * int(input()))"
    assert output_of(double, "21\n") == "42\n"
    tests = parse_tests([{"input": "1\n", "output": "2"}, {"input": "2\n", "output": "5\n"}])
    assert passed(double, tests) == [True, False]


def test_assertions_are_evaluated_inside_and_compared_outside():
    program = (
        "from collections import Counter\ndef f(x):\n    print('noise')\n    return x + 1\ndef g(s): return Counter(s)"
    )
    assertions = [
        "assert f(1) == 2", "assert f(1) == 3", "assert f(1) == sum([1, 1])", "assert f(-1) is 0", "assert f(1)",
        "assert not f(-1)", "assert f('a') == 2", "assert f(1) > 1", "assert f(1) in (1, 3)", "assert f(1) < 'a'",
        "assert g('aab') == {'a': 2, 'b': 1}", "assert {f(1)} == set([2])",
    ]  # fmt: skip
    assert passed(program, parse_tests(assertions)) == [
        True, False, True, True, True, True, False, True, False, False, True, True,
    ]  # fmt: skip
    assert passed(program, parse_tests("\n".join(assertions[:2]))) == [True, False]


@pytest.mark.parametrize(("tests", "reason"), [
    ([], "must be a list of assertions"), (None, "got None"), ([3], "a test is `assert ...`"),
    (["f(1)"], "is no assertion"),
    (["assert f( =="], "is not Python"), (["assert f(1) == unknown"], "unknown has no value that can be written down"),
    (["assert f(1) == 1 and f(2) == 2"], "is one comparison"), (["assert 1 < f(1) < 3"], "is one comparison"),
    ([{"output": "1", "stdin": ""}], "a test is `assert ...`"),
])  # fmt: skip
def test_tests_that_cannot_be_used_are_refused(tests, reason):
    with pytest.raises(ValueError, match=reason.replace("(", r"\(").replace("...", r"\.\.\.")):
        parse_tests(tests)


# Each of them leaves the verdict of the real function, which is wrong, or none at all.
CHEATS = {
    "leaves with status 0": "import os\nos._exit(0)",
    "raises SystemExit": "raise SystemExit(0)",
    "an object that equals everything": "class Any:\n    def __eq__(self, other): return True\ndef f(x): return Any()",
    "patches what compares": "import ast, builtins, json\nast.literal_eval = lambda text: 7\n"
                             "builtins.repr = lambda v: '7'\njson.dumps = lambda v: '[true]'\ndef f(x): return 0",
    "writes a verdict": "import os\nos.write(1, b'[\"True\"]')\nos._exit(0)",
    "writes verdicts for more": "import json, os\nos.write(1, json.dumps(['1'] * 9).encode())\nos._exit(0)",
    "nested out of reach": "def f(x):\n    v = []\n    for _ in range(100000): v = [v]\n    return v",
}  # fmt: skip


@pytest.mark.parametrize("cheat", CHEATS)
def test_no_program_passes_without_the_answer(cheat):
    assert passed(CHEATS[cheat], parse_tests(["assert f(20) == 10946"]), SMALL) == [False]


@pytest.mark.parametrize("cheat", [
    "bool = lambda value: True\ndef f(x): return True",
    "import builtins\nbuiltins.repr = lambda v: 'True'\ndef f(x): return 0",
    "import os\nos.write(1, b'[\"True\", \"True\"]')\nos._exit(0)",
    "class Any:\n    def __bool__(self): raise SystemExit(0)\ndef f(x): return Any()",
])  # fmt: skip
def test_no_program_passes_a_test_and_its_opposite(cheat):
    assert False in passed(cheat, parse_tests(["assert f(3)", "assert not f(4)"]), SMALL)


def test_the_answers_are_nowhere_in_the_process():
    """Whatever a program can find of itself: its frames, its arguments, its input and the objects that are alive."""
    search = (
        "import gc, os, sys\n"
        "def f(x):\n"
        "    frame, seen = sys._getframe(), []\n"
        "    while frame: seen.append(repr(frame.f_globals) + repr(frame.f_locals)); frame = frame.f_back\n"
        "    os.lseek(0, 0, 0)\n"
        "    seen += [repr(sys.argv), repr(os.environ), os.read(0, 1 << 20).decode()]\n"
        "    seen += [repr(o) for o in gc.get_objects() if isinstance(o, (str, int, list, tuple, dict))]\n"
        "    answer = ''.join(chr(ord(c) - 1) for c in '21:57')\n"  # 10946, which so is not in the program itself
        "    return [s for s in seen if answer in s]\n"
    )
    assert values_of(search, ["f(20)"], SMALL) == ["[]"]
    assert passed(search, parse_tests(["assert f(20) == 10946"]), SMALL) == [False]


def test_a_fork_bomb_stays_small_and_is_gone_with_its_sandbox():
    bomb = (
        "import os, sys, time\nborn = 0\n"
        "for _ in range(40):\n"
        "    try: child = os.fork()\n"
        "    except OSError: break\n"
        "    if child == 0: time.sleep(600)\n"
        "    born += 1\n"
        "print(born, flush=True)\nos._exit(0)"
    )
    before = len(leftovers("bwrap"))
    born = int(output_of(bomb, limits=SMALL))
    assert 0 < born < SMALL.processes
    forever = bomb.replace("print(born, flush=True)\nos._exit(0)", "time.sleep(600)")
    start = time.monotonic()
    assert output_of(forever, limits=Limits(seconds=2, processes=12)) is None
    assert time.monotonic() - start < 20
    deadline = time.monotonic() + 10
    while len(leftovers("bwrap")) > before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(leftovers("bwrap")) <= before


def test_a_memory_bomb_ends_at_its_limit():
    bomb = "kept = []\nfor _ in range(1000): kept.append(bytearray(1 << 20))\nprint(len(kept))"
    assert output_of(bomb, limits=SMALL) is None
    assert output_of(bomb.replace("1000", "10"), limits=SMALL) == "10\n"


def test_an_endless_loop_and_an_endless_sleep_end():
    for program in ("while True: pass", "import time\ntime.sleep(600)"):
        start = time.monotonic()
        assert output_of(program, limits=Limits(seconds=1)) is None
        assert time.monotonic() - start < 15


@pytest.mark.parametrize("where", ["loopback", "outside"])
def test_there_is_no_network(where):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        address = ("127.0.0.1", server.getsockname()[1]) if where == "loopback" else ("192.0.2.1", 80)
        connect = (
            f"import socket\ntry: socket.create_connection({address!r}, 5); print('in')\nexcept OSError: print('out')"
        )
        with socket.create_connection(server.getsockname()) as client:  # it does listen
            server.accept()[0].close()
            client.close()
        assert output_of(connect, limits=SMALL) == "out\n"
        with pytest.raises(TimeoutError):
            server.accept()


def test_it_writes_to_its_own_folder_only_and_reads_nothing_of_ours(tmp_path):
    secret = tmp_path / "answers.txt"
    secret.write_text("10946")
    tmp_path.chmod(0o777)
    program = (
        "import json, os\ndone = {}\n"
        f"for path in ['here', '/x', '/usr/x', '/dev/x', '/tmp/../x', {str(tmp_path / 'new')!r}, {str(secret)!r}]:\n"
        "    try: open(path, 'w').write('x'); done[path] = True\n"
        "    except OSError: done[path] = False\n"
        f"print(json.dumps([[p for p in done if done[p]], os.path.exists({str(secret)!r}), os.path.exists('/proc/1')]))"
    )
    assert json.loads(output_of(program, limits=SMALL)) == [["here"], False, False]
    assert secret.read_text() == "10946"
    assert not (tmp_path / "new").exists()


def test_files_and_output_are_bounded():
    write = "for i in range(64): open(f'f{i}', 'wb').write(bytes(1 << 17))\nprint('all')"  # 8 MiB in small files
    assert output_of(write, limits=SMALL) is None
    assert output_of(write, limits=Limits(files=16)) == "all\n"
    start = time.monotonic()
    assert output_of("while True: print('x' * 4096)", limits=SMALL) is None
    assert time.monotonic() - start < 25


def test_it_has_no_privileges():
    program = (
        "import os\nprint(os.getuid() != 0, os.getgroups())\n"
        "try: os.setuid(0); print('root')\nexcept OSError: print('nobody')\n"
        "try: os.chroot('/tmp'); print('root')\nexcept OSError: print('nobody')"
    )
    groups = "[]" if os.geteuid() == 0 else None
    lines = output_of(program, limits=SMALL).splitlines()
    assert lines[1:] == ["nobody", "nobody"]
    assert groups is None or lines[0] == "True []"


def test_a_machine_without_bubblewrap_is_told_what_is_missing(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    monkeypatch.setattr(sandbox, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no bwrap: pip install 'rlhf_fast\[verify\]'"):
        check_sandbox()


def test_a_sandbox_that_cannot_be_made_is_an_error_and_no_verdict(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sandbox, "bubblewrap", lambda: str(fake))
    for attempt in (check_sandbox, lambda: passed("", parse_tests(["assert f(1) == 2"]))):
        with pytest.raises(UserError, match="no sandbox can be made here: bwrap: No permissions"):
            attempt()


UNPRIVILEGED = """
import importlib.util, json, os, sys, types
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for name in ("rlhf_fast", "rlhf_fast.errors"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["rlhf_fast.errors"].UserError = RuntimeError
spec = importlib.util.spec_from_file_location("sandbox", sys.argv[1])
sandbox = sys.modules["sandbox"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sandbox)
bomb = "import os, time\\nborn = 0\\nfor _ in range(40):\\n    try:\\n        if os.fork() == 0: time.sleep(600)\\n"
bomb += "    except OSError: break\\n    born += 1\\nprint(born, flush=True)\\nos._exit(0)"
connect = "import socket\\ntry: socket.create_connection(('127.0.0.1', %s), 5); print('in')\\n"
connect += "except OSError: print('out')"
print(json.dumps([
    sandbox.output_of("print(1)"), sandbox.output_of(bomb, limits=sandbox.Limits(processes=12)),
    sandbox.output_of(connect % sys.argv[2]), sandbox.output_of("open('/x', 'w')"),
    sandbox.output_of("x = bytearray(1 << 30)"),
]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="this user has no privileges: the other tests are of that way")
def test_a_user_without_privileges_has_the_same_walls():
    """The other way in, by a user namespace."""
    python = next(p for p in ("/usr/bin/python3", sys.executable) if os.access(p, os.X_OK))
    path = f"{os.path.dirname(sandbox.bubblewrap())}:/usr/bin:/bin"
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = subprocess.run(
            [python, "-c", UNPRIVILEGED, sandbox.__file__, str(server.getsockname()[1])], capture_output=True,
            text=True, env={"PATH": path}, cwd="/",
        )  # fmt: skip
    if "Permission denied" in done.stderr:
        pytest.skip(f"only root may read {python}, {sandbox.__file__} or bwrap")
    printed, born, connected, written, allocated = json.loads(done.stdout)
    assert [printed, connected, written, allocated] == ["1\n", "out\n", None, None], done.stderr
    assert 0 < int(born) < 12
