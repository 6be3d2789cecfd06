"""Rows of a local JSONL, CSV or parquet file, each with the place it came from for error messages."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.errors import UserError


class Row(NamedTuple):
    """One example: `where` is 'file:line' (or 'file:row N'), `values` maps column to value."""

    where: str
    values: dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a .jsonl, .json (lines), .csv or .parquet file.

    Raises UserError for a missing or empty file, an unknown suffix, a line that is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"data file {path} does not exist" if not path.exists() else f"{path} is not a file")
    readers = {".jsonl": _jsonl, ".json": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise UserError(f"{path}: unknown data format {path.suffix!r}; use one of {', '.join(readers)}")
    rows = list(readers[path.suffix](path))
    if not rows:
        raise UserError(f"{path} has no examples")
    return rows


def require_columns(rows: Sequence[Row], layouts: Sequence[Sequence[str]], algorithm: str) -> Sequence[str]:
    """The first of `layouts` (sets of columns) that the first row has; every row must then have it too."""
    first = rows[0]
    layout = next((names for names in layouts if set(names) <= set(first.values)), None)
    if layout is None:
        wanted = " or ".join("/".join(names) for names in layouts)
        have = ", ".join(first.values) or "none"
        raise UserError(f"{first.where}: {algorithm} needs the columns {wanted}; found: {have}")
    for row in rows:
        for name in layout:
            value = row.values.get(name)
            if not isinstance(value, (str, list)):
                raise UserError(f"{row.where}: column {name!r} must be text or a list of messages, got {_shown(value)}")
    return layout


def infer_algorithm(rows: Sequence[Row]) -> str | None:
    """The algorithm that the columns allow without doubt, else None."""
    columns = set(rows[0].values)
    if {"chosen", "rejected"} <= columns:
        return "dpo"
    if "messages" in columns or "text" in columns or {"prompt", "completion"} <= columns:
        return "sft"
    return None


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Row(f"{path.name}:{number}", _json_object(f"{path.name}:{number}", line))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error}") from None


def _json_object(where: str, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON, one object per line: {error.msg} (column {error.colno})") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: each line must be one JSON object with named columns, got {_shown(value)}")
    return value


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            for values in reader:
                if None in values or None in values.values():
                    raise UserError(f"{path.name}:{reader.line_num}: must have {len(reader.fieldnames or [])} fields")
                yield Row(f"{path.name}:{reader.line_num}", dict(values))
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} is not a UTF-8 CSV file: {error}") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from None
    for number, values in enumerate(table.to_pylist(), start=1):
        yield Row(f"{path.name}:row {number}", values)


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
