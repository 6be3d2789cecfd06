"""Forks that do a part of the work give what one process gives, and are gone afterwards."""

import os
import signal
from pathlib import Path

import pytest

from rlhf_fast.data import encoded, notes, processes, rows, sources
from rlhf_fast.data.cache import NONE
from rlhf_fast.data.encoding import Encoder
from rlhf_fast.data.processes import Ahead, in_order
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.models.tiny import tiny
from rlhf_fast.training.setup import load_rows
from tests.data.test_rows import TABLE, config_of, write


@pytest.fixture(autouse=True)
def four(monkeypatch):
    """Four processors."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    notes.forget()


def children():
    return {int(x) for x in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def test_results_come_in_order_from_other_processes():
    before = children()
    found = [*in_order(lambda x: (x, os.getpid()), range(11))]
    assert [x for x, _ in found] == [*range(11)]
    assert len({process for _, process in found}) == 4
    assert os.getpid() not in {process for _, process in found}
    assert children() == before


def test_the_first_item_in_order_that_raises_is_the_one_that_is_raised():
    def work(item):
        if item in (3, 6):
            raise UserError(f"no {item}")
        return item

    before, found = children(), []
    with pytest.raises(UserError, match="no 3"):
        found.extend(in_order(work, range(20)))
    assert children() == before
    with pytest.raises(RuntimeError, match="has died"):
        [*in_order(lambda item: os.kill(os.getpid(), signal.SIGKILL), range(4))]


def test_alone_nothing_is_forked():
    assert {*in_order(lambda _: os.getpid(), range(9), alone=True)} == {os.getpid()}


def test_several_processes_find_and_say_what_one_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "IN_MEMORY", 0)
    monkeypatch.setattr(rows, "CHUNK", 8)
    data, found = write(tmp_path / "x.jsonl", TABLE), []
    for least in (1 << 30, 0):
        monkeypatch.setattr(rows, "FORKED", least)
        notes.forget()
        config = config_of("dpo", data, bad_rows="skip", eval_size=5, data_cache=None)
        train, held_out = load_rows(config, [("prompt", "chosen", "rejected")])
        found.append((capsys.readouterr().out, [*train], [*held_out]))
    assert found[1] == found[0]
    assert "1 of 50 rows are left out" in found[0][0]


ROWS = [Row(f"x:{i}", {"prompt": f"ask {i} ", "completion": "yes " * (i % 9)}) for i in range(60)]


@pytest.mark.parametrize("rule", ["skip", "truncate"])
def test_several_processes_leave_out_and_note_what_one_does(rule, monkeypatch, capsys):
    monkeypatch.setattr(encoded, "KEPT", 5)
    monkeypatch.setattr(encoded, "LOOKED_AT", 20)
    monkeypatch.setattr(encoded, "_PART", 7)
    found = []
    for least in (1 << 30, 0):
        monkeypatch.setattr(encoded, "FORKED", least)
        notes.forget()
        one = Encoder(tiny(0, layers=1)[1], 24, 24, too_long=rule, known=NONE)
        found.append(([*encoded.encode_rows(one, ROWS, Encoder.completion, "data")], capsys.readouterr().out))
    assert found[1] == found[0]
    assert found[0][1]


def test_what_is_asked_for_ahead_is_the_work_of_another_process_and_the_same():
    ahead = Ahead(lambda item: (item, os.getpid()))
    ahead.ask([1, 2, 3])
    first = [ahead.get(item) for item in (1, 3)]
    ahead.ask([4, 5])
    found = [*first, *(ahead.get(item) for item in (2, 5, 4))]
    assert [item for item, _ in found] == [1, 3, 2, 5, 4]
    (child,) = {process for _, process in found}
    assert child != os.getpid()
    assert ahead.get(9) == (9, os.getpid())
    ahead.ask([6])
    os.kill(child, signal.SIGKILL)
    assert ahead.get(7) == (7, os.getpid())
    ahead.ask([8, 10])
    assert [ahead.get(item)[0] for item in (8, 6, 10)] == [8, 6, 10]
    del ahead
    assert child not in children()


def test_what_is_raised_ahead_is_raised_when_it_is_asked_for():
    def work(item):
        raise UserError(f"no {item} in {os.getpid()}")

    ahead = Ahead(work)
    ahead.ask([1])
    with pytest.raises(UserError, match=f"no 1 in {os.getpid()}"):
        ahead.get(1)


def test_rows_that_were_asked_for_ahead_are_those_of_this_process(monkeypatch, capsys):
    monkeypatch.setattr(encoded, "KEPT", 20)
    monkeypatch.setattr(encoded, "LOOKED_AT", 3)

    def examples():
        notes.forget()
        one = Encoder(tiny(0, layers=1)[1], 24, 24, too_long="truncate")
        return encoded.encode_rows(one, [*ROWS[:9], *ROWS[:40]], Encoder.completion, "data")

    plain, early = examples(), examples()
    capsys.readouterr()
    notes.forget()
    early.ahead([30, 12, 33])
    assert [early[i] for i in (30, 33, 5, 12)] == [plain[i] for i in (30, 33, 5, 12)]
    assert early._ahead is not None
    assert processes.Ahead is type(early._ahead)
