"""What is found in data is kept under its content, the settings and the code, and is never trusted when damaged."""

import multiprocessing
import os

import numpy as np
import pytest

from rlhf_fast.data import cache, encoded, notes, rows, sources
from rlhf_fast.data.cache import Cache, packed, unpacked
from rlhf_fast.data.encoding import Encoder
from rlhf_fast.errors import UserError
from rlhf_fast.models.tiny import tiny
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.setup import NOT_OF_DATA, load_rows
from tests.data.test_rows import TABLE, config_of, write

PAIRS = [("prompt", "chosen", "rejected")]
ENTRY = {"places": np.arange(5), "said": packed(["é", {"a": None}])}


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """A few rows are many, and a large file."""
    monkeypatch.setattr(sources, "IN_MEMORY", 0)
    monkeypatch.setattr(encoded, "KEPT", 5)
    monkeypatch.setattr(rows, "CHUNK", 8)
    notes.forget()


def entries(folder):
    return [path for path in folder.iterdir() if "." not in path.name]


def made(folder, **options):
    """An entry of the folder, and how often it was made."""
    calls = []
    found = Cache(folder, **options).entry("x", lambda: calls.append(1) or ENTRY)
    assert found["places"].tolist() == [*range(5)]
    assert unpacked(found["said"]) == ["é", {"a": None}]
    return len(calls)


def test_an_entry_is_made_once_for_each_of_its_settings(tmp_path):
    assert [made(tmp_path), made(tmp_path), made(tmp_path, settings="other"), made(None), made(None)] == [1, 0, 1, 1, 1]
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("damage", [lambda x: x[:-1], lambda x: x[:40] + b"?" + x[41:], lambda x: b"", lambda x: b"a"])
def test_a_damaged_entry_is_made_again(damage, tmp_path):
    made(tmp_path)
    (path,) = entries(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert [made(tmp_path), made(tmp_path)] == [1, 0]
    assert path.read_bytes() == whole


def test_entries_unused_for_longest_go_and_foreign_files_stay(tmp_path):
    (tmp_path / "mine.txt").write_text("x" * 5000)
    for number in range(4):
        made(tmp_path, settings=str(number), most=1500)
        for path in entries(tmp_path):
            os.utime(path, (path.stat().st_mtime - 9, path.stat().st_mtime - 9))
    sizes = [path.stat().st_size for path in entries(tmp_path) if path.name != "mine.txt"]
    assert sum(sizes) <= 1500
    assert made(tmp_path, settings="3", most=1500) == 0
    assert made(tmp_path, settings="0", most=1500) == 1
    assert (tmp_path / "mine.txt").exists()


def test_a_folder_that_cannot_be_written_is_told_of(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert made(tmp_path / "file" / "folder") == 1
    assert "is not kept in" in capsys.readouterr().out


def _race(folder, log):
    def make():
        with log.open("a") as file:
            file.write("made\n")
        return ENTRY

    Cache(folder).entry("x", make)


def test_of_racing_processes_one_makes_the_entry(tmp_path):
    context = multiprocessing.get_context("fork")
    racing = [context.Process(target=_race, args=(tmp_path / "cache", tmp_path / "log")) for _ in range(4)]
    for process in racing:
        process.start()
    for process in racing:
        process.join()
    assert (tmp_path / "log").read_text() == "made\n"
    assert made(tmp_path / "cache") == 0


@pytest.fixture
def read(monkeypatch):
    """Numbers of the lines that are read."""
    seen, row = [], rows.line_row
    monkeypatch.setattr(rows, "line_row", lambda name, number, line: seen.append(number) or row(name, number, line))
    return seen


def test_a_second_start_reads_a_few_rows_and_says_and_finds_the_same(tmp_path, read, capsys):
    data = write(tmp_path / "x.jsonl", TABLE)
    keys = {"bad_rows": "skip", "eval_size": 5, "data_cache": str(tmp_path / "cache")}
    found = []
    for changes in ({}, {"learning_rate": 0.5, "output_dir": "other"}):
        notes.forget()
        read.clear()
        train, held_out = load_rows(config_of("dpo", data, **keys, **changes), PAIRS)
        found.append((len(read), capsys.readouterr().out, [*train], [*held_out]))
    (first, *before), (second, *after) = found
    assert first > 50 > 3 > second
    assert after == before
    assert "1 of 50 rows are left out" in before[0]
    TABLE_CHANGED = [*TABLE[:-1], {**TABLE[-1], "chosen": "another"}]
    write(tmp_path / "x.jsonl", TABLE_CHANGED)
    read.clear()
    train, _ = load_rows(config_of("dpo", data, **keys), PAIRS)
    assert len(read) > 50
    assert "another" in {row.values["chosen"] for row in [*train]}


def test_which_rows_are_left_out_is_known_at_a_second_start(tmp_path, monkeypatch, capsys):
    many = [rows.Row(f"x:{i}", {"prompt": "ask ", "completion": "yes " * (i % 7)}) for i in range(40)]
    calls, fitted = [], Encoder._fitted
    monkeypatch.setattr(Encoder, "_fitted", lambda *a: calls.append(1) or fitted(*a))
    said, kept = [], []
    for _ in range(2):
        notes.forget()
        calls.clear()
        one = Encoder(tiny(0, layers=1)[1], 64, 20, too_long="skip", known=Cache(tmp_path))
        kept.append([row.where for row in encoded.encode_rows(one, many, Encoder.completion, "data").rows])
        said.append(capsys.readouterr().out)
    assert calls == []
    assert 0 < len(kept[0]) < 40
    assert kept[1] == kept[0]
    assert said[1] == said[0] != ""
    shorter = Encoder(tiny(0, layers=1)[1], 2, 2, too_long="skip", known=Cache(tmp_path))
    with pytest.raises(UserError, match="no row of data is left"):
        encoded.encode_rows(shorter, many, Encoder.completion, "data")


def test_keys_that_the_cache_looks_past_are_keys():
    assert RolloutConfig.model_fields.keys() >= NOT_OF_DATA


def test_a_large_file_is_known_by_its_size_its_time_and_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_SAMPLED", 100)
    monkeypatch.setattr(cache, "_BLOCK", 4)
    path = tmp_path / "x"
    path.write_bytes(b"a" * 1000)
    before = cache.digest_of(path)
    assert cache.digest_of(path) == before
    path.write_bytes(b"b" + b"a" * 999)
    assert cache.digest_of(path) != before
