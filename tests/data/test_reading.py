import pytest

from rlhf_fast.data.reading import infer_algorithm, read_rows, require_columns
from rlhf_fast.errors import UserError


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_jsonl_rows_carry_their_line_and_blank_lines_are_skipped(tmp_path):
    rows = read_rows(write(tmp_path / "a.jsonl", '{"prompt": "ä"}\n\n{"prompt": "b", "n": 1}\n'))
    assert [row.where for row in rows] == ["a.jsonl:1", "a.jsonl:3"]
    assert [row.values for row in rows] == [{"prompt": "ä"}, {"prompt": "b", "n": 1}]


def test_csv_rows_may_hold_line_breaks(tmp_path):
    rows = read_rows(write(tmp_path / "a.csv", 'prompt,n\n"a\nb",1\nc,2\n'))
    assert [row.values for row in rows] == [{"prompt": "a\nb", "n": "1"}, {"prompt": "c", "n": "2"}]
    assert rows[1].where == "a.csv:4"


@pytest.mark.parametrize(("name", "text"), [("a.csv", "prompt,n\na,1\n"), ("a.jsonl", '{"prompt": "a", "n": "1"}\n')])
def test_the_byte_order_mark_of_a_spreadsheet_is_no_part_of_the_first_column(tmp_path, name, text):
    (row,) = read_rows(write(tmp_path / name, "\ufeff" + text))
    assert row.values == {"prompt": "a", "n": "1"}


def test_parquet_rows_keep_lists_of_messages(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    messages = [{"role": "user", "content": "hi"}]
    parquet.write_table(pyarrow.table({"prompt": [messages]}), tmp_path / "a.parquet")
    (row,) = read_rows(tmp_path / "a.parquet")
    assert row.values == {"prompt": messages}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "has no examples"),
        ("a.jsonl", '{"a": 1}\n{"a": ', r"a\.jsonl:2: not JSON, one object per line: Expecting value \(column 7\)"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: each line must be one JSON object with named columns, got list \[1\]"),
        ("a.txt", "x", r"unknown data format '\.txt'"),
        ("a.csv", "prompt,n\na\n", r"a\.csv:2: must have 2 fields"),
        ("a.parquet", "x", "is not a parquet file"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        read_rows(write(tmp_path / name, text))


def test_bytes_that_are_no_text_are_reported(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_rows(tmp_path / "a.jsonl")


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is not a file"):
        read_rows(tmp_path)


def test_every_row_must_have_the_layout_of_the_first(tmp_path):
    rows = read_rows(write(tmp_path / "a.jsonl", '{"prompt": "a"}\n{"completion": "b"}\n'))
    with pytest.raises(UserError, match=r"a\.jsonl:2: column 'prompt' must be text or .*, got NoneType"):
        require_columns(rows, [("prompt",)], "ppo")
    with pytest.raises(UserError, match="dpo needs the columns prompt/chosen or chosen; found: prompt"):
        require_columns(rows, [("prompt", "chosen"), ("chosen",)], "dpo")


@pytest.mark.parametrize(
    ("columns", "algorithm"),
    [
        ('{"chosen": "a", "rejected": "b"}', "dpo"),
        ('{"prompt": "a", "completion": "b"}', "sft"),
        ('{"messages": []}', "sft"),
        ('{"text": "a"}', "sft"),
        ('{"prompt": "a"}', None),
    ],
)
def test_columns_decide_the_algorithm_only_where_they_can(tmp_path, columns, algorithm):
    assert infer_algorithm(read_rows(write(tmp_path / "a.jsonl", columns))) == algorithm
