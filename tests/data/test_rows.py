"""Files whose rows stay where they are: everything is as with rows in memory, which is the oracle of these tests."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_fast.algorithms.launch import prepare, single_stage
from rlhf_fast.data import notes, rows, sources
from rlhf_fast.data.rows import Joined, Lines, Picked, View, facts_of
from rlhf_fast.data.sources import read_rows
from rlhf_fast.errors import UserError
from rlhf_fast.training import setup
from rlhf_fast.training.setup import load_rows

CHAT = [{"role": "user", "content": "hi"}]
TABLE = [{"prompt": f"é {i // 2}", "chosen": "yes " * (i % 5), "rejected": None if i == 7 else f"no {i}", "n": {"a": i}}
         for i in range(50)]  # fmt: skip
CONVERSATIONS = [{"chosen": [*CHAT, {"role": "assistant", "content": f"a{i}"}],
                  "rejected": [*CHAT, {"role": "assistant", "content": "b"}]} for i in range(30)]  # fmt: skip
ALGORITHMS = {"dpo": TABLE, "kto": TABLE, "reward_model": CONVERSATIONS, "sft": [
    {"instruction": f"do {i}", "input": "", "output": f"done {i}"} for i in range(40)
]}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "CHUNK", 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notes.forget()


def write(path, table):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path, row_group_size=17)
    else:
        blank = {3: "\n", 9: "  \n"}
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" + blank.get(i, "")
                                for i, row in enumerate(table)), encoding="utf-8")  # fmt: skip
    return str(path)


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr(sources, "IN_MEMORY", 0)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_of_a_large_file_are_those_of_a_small_one(suffix, tmp_path, monkeypatch):
    data = write(tmp_path / f"x{suffix}", TABLE)
    expected = read_rows(data)
    assert isinstance(expected, list)
    monkeypatch.setattr(sources, "IN_MEMORY", 0)
    found = read_rows(data)
    assert isinstance(found, View)
    assert [*found] == expected
    assert [found[i] for i in (49, 0, -1, 17, 10)] == [expected[i] for i in (49, 0, -1, 17, 10)]
    assert found[5:30:4] == expected[5:30:4]
    with pytest.raises(IndexError):
        found[50]


def config_of(algorithm, data, **keys):
    return single_stage({"algorithm": algorithm, "data": data, "model": "tiny", **keys}).config


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_over_a_large_file_is_that_over_a_small_one(algorithm, suffix, tmp_path, monkeypatch, capsys):
    """Examples in their order, what is held out, and what is said; one row is bad and left out."""
    data = write(tmp_path / f"x{suffix}", ALGORITHMS[algorithm])
    jobs, said = [], []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(sources, "IN_MEMORY", limit)
        notes.forget()
        jobs.append(prepare(single_stage(
            {"algorithm": algorithm, "data": data, "model": "tiny", "bad_rows": "skip", "eval_size": 5}
        )))  # fmt: skip
        said.append(sorted(capsys.readouterr().out.splitlines()))
    memory, disk = jobs
    assert isinstance(disk.train.rows, View)
    assert [*disk.train] == [*memory.train]
    assert [*disk.held_out] == [*memory.held_out]
    assert disk.train.key == memory.train.key
    assert said[1] == said[0]
    if algorithm in ("dpo", "kto"):
        assert "1 of 50 rows are left out" in str(said[0])


def test_a_file_is_read_a_fixed_number_of_times_and_a_row_of_it_alone(tmp_path, large, monkeypatch):
    """One pass to find the lines, one to check the rows; then a row costs one row and the first, however large the
    file is."""
    read = []
    row = rows.line_row
    monkeypatch.setattr(rows, "line_row", lambda name, number, line: read.append(number) or row(name, number, line))
    train, held_out = load_rows(
        config_of("sft", write(tmp_path / "x.jsonl", ALGORITHMS["sft"])), [("prompt", "completion")]
    )
    assert len(read) <= 40 + 2
    read.clear()
    assert train[11].values["output"].startswith("done")
    assert len(read) == 1
    assert len(train) + len(held_out) == 40


def test_a_row_unlike_the_first_is_named(tmp_path, large):
    table = [dict(row) for row in TABLE]
    table[7]["rejected"] = "no"
    del table[33]["chosen"]
    with pytest.raises(UserError, match=r"x.jsonl:36 lacks the column 'chosen', which x.jsonl:1 has"):
        load_rows(config_of("dpo", write(tmp_path / "x.jsonl", table)), [("prompt", "chosen", "rejected")])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{\n", "not JSON"),
        (b'{"prompt": "\xff"}\n', "not UTF-8 text"),
        (b'{"a": "\0"}\n', "a NUL byte"),
        (b"5\n", "object"),
    ],
)
def test_a_line_that_is_no_row_is_named(line, message, tmp_path, large):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n' * 20 + line)
    with pytest.raises(UserError, match=rf"x.jsonl:21: .*{message}"):
        load_rows(config_of("sft", str(path)), [("prompt", "completion")])


def test_a_file_that_changes_under_a_run_is_told_of(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a"}\n' * 3)
    found = Lines(path)
    path.write_text('{"prompt": "b"}\n' * 4)
    with pytest.raises(UserError, match="has changed since"):
        found[1]


def test_an_array_and_a_compressed_file_are_read_at_once(tmp_path, large):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(TABLE))
    assert isinstance(read_rows(str(path)), list)


def test_some_rows_of_several_sequences(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(20)))
    both = Joined([Lines(path), [], read_rows(str(path))[:5]])
    assert [row.values["prompt"] for row in both] == [*map(str, range(20)), *map(str, range(5))]
    some = Picked(both, [24, 3, 3, 19, 20])
    assert [row.values["prompt"] for row in some] == ["4", "3", "3", "19", "0"]
    assert facts_of(some, "says").tolist() == facts_of([*some], "says").tolist()
    assert len(set(facts_of(some, "asks").tolist())) == 4


def test_a_file_of_several_forms_of_feedback_is_refused_where_it_is_too_large_to_be_read_at_once(
    tmp_path, large, monkeypatch
):
    monkeypatch.setattr(setup, "GATHERED", 0)
    table = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 20 + [{"prompt": "a", "original": "b", "edited": "c"}]
    with pytest.raises(UserError, match=r"x.jsonl:23 has edit, x.jsonl:1 has pair"):
        load_rows(config_of("dpo", write(tmp_path / "x.jsonl", table)), [("prompt", "chosen", "rejected")])


WEIGHED = [("prompt", "completion")]


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_places_have_their_shares_of_the_rows_and_every_row_comes(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "IN_MEMORY", limit)
    names = [write(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{i}", "completion": name} for i in range(size)])
             for name, size in (("a", 60), ("b", 20), ("c", 7))]  # fmt: skip
    config = config_of("sft", names, data_weights=[2.0, 1.0, 1.0], eval_size=9)
    train, held_out = load_rows(config, WEIGHED)
    counts = [sum(row.values["completion"] == name for row in train) for name in "abc"]
    plain, same = load_rows(config.model_copy(update={"data_weights": None}), WEIGHED)
    assert [*same] == [*held_out]
    own = [sum(row.values["completion"] == name for row in plain) for name in "abc"]
    assert sum(own) == 87 - 9
    longest = max(own[0] / 2, own[1], own[2])
    assert counts == [round(longest * 2), round(longest), round(longest)]
    assert {row.where for row in train} == {row.where for row in plain}
    times = [sum(row.values["prompt"] == wanted.values["prompt"] for row in train) for wanted in plain]
    assert all(n in (counts[2] // own[2], counts[2] // own[2] + 1) for n in times[sum(own[:2]) :])


@pytest.mark.parametrize(
    ("data", "weights", "message"),
    [("a.jsonl", [1.0], "data_weights has 1 entries for .*a.jsonl"), (["a.jsonl"], [1.0, 2.0], "has 2 entries")],
)
def test_weights_are_of_places(data, weights, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", ALGORITHMS["sft"])
    with pytest.raises(UserError, match=message):
        load_rows(config_of("sft", data, data_weights=weights), WEIGHED)


def test_of_long_rows_fewer_are_in_memory_together(large, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "READ", 4096)
    short, long = ({"prompt": "ask", "completion": "yes" * times} for times in (1, 400))
    seen, take = [], Lines.take
    monkeypatch.setattr(Lines, "take", lambda self, places: seen.append(len(places)) or take(self, places))
    for row, most in ((short, 8), (long, 3)):
        data = write(tmp_path / f"{most}.jsonl", [row] * 20)
        seen.clear()
        load_rows(single_stage({"algorithm": "sft", "data": data, "model": "none"}).config, [("prompt", "completion")])
        assert max(seen) == most
