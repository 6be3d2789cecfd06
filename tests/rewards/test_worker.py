"""Whatever a reward function does to its process, the one that trains goes on, or ends with a line."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.rewards.functions import begun, call, load_function
from rlhf_fast.rewards.worker import Worker
from tests.training.interruptions import contents, run
from tests.training.tiny_runs import values_of

COMPLETIONS = ["a", "bb"]


def loaded(tmp_path, body, timeout=30.0, name="reward"):
    """The function `score` of a file with this body."""
    (tmp_path / f"{name}.py").write_text("import os, random, signal, sys, threading, time\n" + body)
    return load_function(f"{tmp_path / name}.py:score", timeout)


def ask(function, timeout=30.0):
    return call("fn", function, ["p", "q"], COMPLETIONS, {"completion_ids": [[1, 2], [3]], "tag": [{"x": 1}, None]},
                timeout).scores.tolist()  # fmt: skip


def function(*lines):
    """The source of a function that does this and pays as it should."""
    return "\n    ".join(["def score(completions):", *lines, "return [float(len(c)) for c in completions]\n"])


def waits_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


HARMLESS = {
    "moves": "os.chdir('/')",
    "seeds": "random.seed(0)",
    "forks and both return": "completions = completions if os.fork() else ['x' * 9] * 2",
    "leaves a thread": "threading.Thread(target=time.sleep, args=(60,)).start()",
    "ends its group": "signal.signal(signal.SIGTERM, signal.SIG_IGN); os.killpg(0, signal.SIGTERM)",
    "closes its output": "sys.stdout.close(); sys.stderr = None",
    "changes the environment": "os.environ.clear()",
    "takes the alarm": "signal.signal(signal.SIGALRM, signal.SIG_IGN); signal.alarm(1)",
    "changes what it was given": "completions = list(completions); completions.reverse(); completions.reverse()",
}


@pytest.mark.parametrize("does", HARMLESS)
def test_what_it_does_to_its_process_is_not_done_to_the_run(does, tmp_path):
    def state():
        return (os.getcwd(), random.getstate(), dict(os.environ), threading.active_count(), sys.stdout,
                [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM)])  # fmt: skip

    score = loaded(tmp_path, function(HARMLESS[does]))
    before = state()
    assert ask(score) == ask(score) == [1.0, 2.0]
    assert state() == before


FAILS = {
    "leaves at once": ("os._exit(3)", r"fn ended its process with exit status 3 \(example 0: completion 'a'\)"),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", r"fn ended its process: SIGKILL \(out of memory\?\)"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "fn ended its process: SIGSEGV"),
    "exits": ("sys.exit(3)", "fn raised SystemExit: 3"),
    "is interrupted": ("raise KeyboardInterrupt", "fn raised KeyboardInterrupt"),
    "raises for one": ("1 / (len(completions[-1]) - 2)", r"fn raised ZeroDivisionError: .*\(example 1: completion 'b"),
    "closes every file": ("os.closerange(3, 99)", "fn ended its process with exit status 1"),
    "leaves a fork that holds the socket": ("os.fork() and os._exit(4); time.sleep(60)", "fn ended .* exit status 4"),
    "reads the terminal": ("input()", "fn raised EOFError"),
    "takes all its memory": (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29)); bytearray(1 << 30)",
        "fn raised MemoryError",
    ),
    "returns what is no list": ("return score", "fn must return a list of 2 numbers, got function"),
    "returns what cannot be sent": ("return [1.0, threading.Lock()]", "fn returned <unlocked .*> for example 1"),
    "returns what lies": ("return [1.0, type('Odd', (), {'__reduce__': lambda s: (os._exit, (9,))})()]",
                          "fn returned <.*Odd object at .*> for example 1"),
    "returns too large a number": ("return [1.0, 10 ** 9999]", "fn returned an integer of 33216 bits for example 1"),
    "raises what cannot be shown": (
        "raise type('Odd', (Exception,), {'__str__': lambda s: 1 / 0})", r"fn raised Odd \(example 0"),
    "returns itself": ("x = [1.0]; x.append(x); return x", "fn raised RecursionError"),
}  # fmt: skip


@pytest.mark.parametrize("does", FAILS)
def test_what_fails_twice_is_one_line_and_the_run_is_as_before(does, tmp_path, capfd):
    body, message = FAILS[does]
    score = loaded(tmp_path, function(body))
    with pytest.raises(UserError, match=message):
        ask(score, timeout=20.0)
    assert "warning" not in capfd.readouterr().err


def test_one_that_hangs_is_ended_with_the_example_that_does_and_what_it_started(tmp_path):
    mark = tmp_path / "pid"
    score = loaded(tmp_path, function(
        "if 'bb' in completions:",
        f"    pid = os.fork(); pid or time.sleep(60); open({str(mark)!r}, 'w').write(str(pid)); time.sleep(60)",
    ))  # fmt: skip
    begin = time.monotonic()
    message = r"fn raised TimeoutError: no answer in 0.5 s \(reward_timeout\) \(example 1: completion 'bb'\)"
    with pytest.raises(UserError, match=message):
        ask(score, timeout=0.5)
    assert time.monotonic() - begin < 10
    assert waits_for(lambda: gone(int(mark.read_text())))


def gone(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(("failure", "line"), [
    ("os._exit(1)", "ended its process with exit status 1"),
    ("time.sleep(60)", r"had no answer in 2 s \(reward_timeout\)"),
    ("raise OSError('no connection')", "raised OSError: no connection"),
])  # fmt: skip
def test_what_fails_once_is_asked_again_and_said(failure, line, tmp_path, capsys):
    first = f"if not os.path.exists({str(tmp_path / 'failed')!r}):"
    score = loaded(tmp_path, function(first, f"    open({str(tmp_path / 'failed')!r}, 'w').close(); {failure}"))
    assert ask(score, timeout=2.0) == [1.0, 2.0]
    said = rf"warning: reward {tmp_path}/reward\.py:score {line}; asked again, it answered\n"
    assert re.search(said, capsys.readouterr().err)


def test_one_whose_file_is_gone_when_it_starts_anew_fails_at_once(tmp_path):
    score = loaded(tmp_path, function("os.remove(__file__) if os.path.exists(__file__) else None", "os._exit(1)"))
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"fn could not be imported: FileNotFoundError: .*reward\.py"):
        ask(score, timeout=60.0)
    assert time.monotonic() - begin < 20


def test_a_module_keeps_its_state_between_calls_and_each_worker_has_its_own(tmp_path):
    body = "calls = []\ndef score(completions):\n    calls.append(1)\n    return [len(calls)] * len(completions)\n"
    first, second = loaded(tmp_path, body), loaded(tmp_path, body)
    assert [ask(first), ask(first), ask(second)] == [[1, 1], [2, 2], [1, 1]]


def test_it_is_given_what_it_was_given_in_the_process_itself(tmp_path):
    body = (
        "def score(prompts, completions, completion_ids, tag, absent=7):\n"
        "    seen = (prompts, completions, completion_ids, tag, absent, os.getcwd(), __name__, sys.argv[1:])\n"
        "    assert seen == EXPECTED, seen\n    return [0.0, 1.0]\n"
    )
    expected = (
        ["p", "q"], COMPLETIONS, [[1, 2], [3]], [{"x": 1}, None], 7, os.getcwd(), "rlhf_fast_reward_reward", []
    )  # fmt: skip
    assert ask(loaded(tmp_path, f"EXPECTED = {expected!r}\n{body}")) == [0.0, 1.0]


def test_numbers_of_libraries_come_back_as_numbers(tmp_path):
    body = (
        "import decimal, fractions, numpy\n"
        "def score(completions):\n"
        "    return numpy.array([0.1, 0.2]) if random.random() < 2 else None\n"
        "def mixed(completions):\n"
        "    return decimal.Decimal('0.5'), [(numpy.int64(1), numpy.float32(0.25)), (2, fractions.Fraction(1, 4))]\n"
    )
    assert ask(loaded(tmp_path, body)) == pytest.approx([0.1, 0.2])
    assert ask(load_function(f"{tmp_path / 'reward.py'}:mixed")) == [0.5, 0.5]


def test_what_it_prints_is_shown(tmp_path, capsys):
    score = loaded(tmp_path, "print('imported')\n" + function("print('asked', len(completions))",
                                                              "print('told', file=sys.stderr)"))  # fmt: skip
    ask(score)
    seen = {"out": "", "err": ""}

    def shown():
        new = capsys.readouterr()
        seen["out"], seen["err"] = seen["out"] + new.out, seen["err"] + new.err
        return (seen["out"], seen["err"]) == ("imported\nasked 2\n", "told\n")

    assert waits_for(shown), seen


def test_the_same_call_draws_the_same_numbers_and_another_call_others(tmp_path):
    body = "def score(completions, tag):\n    return [random.random() for _ in completions]\n"
    first, second = loaded(tmp_path, body), loaded(tmp_path, body)
    assert ask(first) == ask(first) == ask(second)
    assert call("fn", first, ["p"], ["c"], {"tag": [1]}).scores.tolist()[0] != ask(first)[0]


@pytest.mark.parametrize(("body", "message"), [
    ("time.sleep(60)", "importing it took more than 0.5 s"),
    ("os._exit(5)", "ended its process with exit status 5 while it was imported"),
    ("sys.exit(5)", "could not be imported: SystemExit: 5"),
    ("os.fork()", None),
])  # fmt: skip
def test_an_import_that_goes_wrong_is_one_line(body, message, tmp_path):
    source = f"{body}\n{function('pass')}"
    if message is None:
        assert ask(loaded(tmp_path, source)) == [1.0, 2.0]
        return
    with pytest.raises(UserError, match=message):
        loaded(tmp_path, source, timeout=0.5 if "sleep" in body else 30.0)


def test_it_ends_with_its_worker_and_with_the_process_that_trains(tmp_path):
    score = loaded(tmp_path, function("open(__file__ + '.pid', 'w').write(str(os.getpid()))", "pass"))
    ask(score)
    pid = int((tmp_path / "reward.py.pid").read_text())
    assert not gone(pid)
    del score
    assert waits_for(lambda: gone(pid))
    code = (
        "import sys; sys.path[:] = eval(sys.argv[2])\n"
        "from rlhf_fast.rewards.worker import Worker\n"
        "Worker(sys.argv[1]).ask({'completions': []})"
    )
    loaded(tmp_path, function("print(os.getpid(), flush=True)", "time.sleep(60)"))
    words = [sys.executable, "-c", code, f"{tmp_path / 'reward.py'}:score", repr(sys.path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as trains:
        pid = int(trains.stdout.readline())
        trains.kill()
    assert waits_for(lambda: gone(pid))


def test_it_starts_before_it_is_waited_for(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(0.5)\ndef score(completions):\n    return [0.0]\n")
    begin = time.monotonic()
    worker = Worker(f"{tmp_path / 'slow.py'}:score")
    time.sleep(max(0.0, begin + 3.0 - time.monotonic()))
    begin = time.monotonic()
    worker.ready()
    assert time.monotonic() - begin < 0.4


def test_what_has_begun_is_what_is_loaded(tmp_path):
    (tmp_path / "f.py").write_text(
        "open(__file__ + '.times', 'a').write('.')\ndef score(completions):\n    return []\n"
    )
    with begun([f"{tmp_path / 'f.py'}:score", f"{tmp_path / 'f.py'}:other"]):
        worker = load_function(f"{tmp_path / 'f.py'}:score", 30.0)
        with pytest.raises(UserError, match=r"f\.py has no function 'other'"):
            load_function(f"{tmp_path / 'f.py'}:other", 30.0)
    assert worker.ask({"completions": []}) == []
    assert (tmp_path / "f.py.times").read_text() == ".."


def test_a_run_is_the_same_whatever_its_reward_seeds_and_wherever_it_moves(tmp_path, monkeypatch):
    pays = "return [len(c) % 7 / 3 for c in completions]\n"
    (tmp_path / "calm.py").write_text(f"def score(completions):\n    {pays}")
    (tmp_path / "wild.py").write_text(
        "import os, random, torch\ndef score(completions):\n"
        f"    os.chdir('/')\n    random.seed(0)\n    torch.manual_seed(0)\n    {pays}"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("calm", "wild"):
        run(values_of("grpo", reward=f"{name}.py:score", output_dir=f"{name}_run", steps=3))
    assert contents(tmp_path / "wild_run") == contents(tmp_path / "calm_run")
    samples = contents(tmp_path / "calm_run")["samples.jsonl"]
    assert len({sample["completion"] for sample in samples}) > 2
    assert torch.initial_seed() != 0
