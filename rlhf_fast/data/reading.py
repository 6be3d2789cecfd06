"""Rows of JSON, CSV and parquet files, each with the place it came from for error messages.

A line ends in a line feed and in nothing else: U+2028, U+2029 and U+0085 are text.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from rlhf_fast.errors import UserError, first_line, short

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
LINE = 1 << 28  # bytes of a line
ROWS_PER_BYTE = 10_000  # of parquet, where a value that repeats takes no room
_DELIMITERS = ",;\t"
_BLANK = " \t\r\n"  # JSON's own idea of it
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Row(NamedTuple):
    """One example: `where` is 'file:line' (or 'file:row N'), `values` maps column to value."""

    where: str
    values: dict[str, Any]


def data_suffix(path: Path) -> str:
    """The format of a data file by its name, in lower case and without `.gz`; "" where it is none of SUFFIXES."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def read_file(path: Path) -> list[Row]:
    """All rows of one file: JSON lines or a JSON array, CSV (with `,`, `;` or tab), parquet; text also in gzip.

    Text is UTF-8, or UTF-16 or UTF-32 as json.detect_encoding finds it. Raises UserError, which names the line, for
    what is none of these; also for a column that is there twice, a NUL byte, and half a surrogate pair.
    """
    readers = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    try:
        return list(readers.get(data_suffix(path), _json)(path))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a damaged or cut-off gzip file: {first_line(error)}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or first_line(error)}") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file that this package wrote; none where there is no file.

    UserError names the line of what it did not write so.
    """
    try:
        lines = split_lines(path) if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parsed(f"{path}:{number}", line, "damaged")
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: damaged: must be an object, got {shown(row)}")
        rows.append(row)
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file that this package wrote; UserError where it is damaged."""
    try:
        found = _parsed(str(path), path.read_text(encoding="utf-8"), "damaged")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: damaged: must be an object, got {shown(found)}")
    return found


def split_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, each with its line feed, which only the last may lack."""
    with path.open("rb") as file:
        return [line.decode() for line in file]


def line_row(name: str, number: int, line: bytes) -> Row:
    """The row of one line of a UTF-8 file of JSON lines."""
    where = f"{name}:{number}"
    return _line_row(where, _checked_text(where, _decoded_line(where, line, first=number == 1)))


def table_rows(table: Any, name: str, *, first: int = 1) -> Iterator[Row]:
    """The rows of a pyarrow table or batch, called `name:row N`, N from `first` on.

    Fields of structs that are null are left out: a row has them only because another row does.
    """
    _once(table.column_names, name)
    number = first
    for batch in table.to_batches() if hasattr(table, "to_batches") else [table]:
        for values in batch.to_pylist():
            yield Row(f"{name}:row {number}", {column: _without_nulls(value) for column, value in values.items()})
            number += 1


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        # A message without text, such as a call of a tool, says so.
        return {k: _without_nulls(v) for k, v in value.items() if v is not None or k in ("role", "content")}
    return value


def _once(names: Iterable[str], where: str) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{where}: column {twice!r} is there twice")


def _json(path: Path) -> Iterator[Row]:
    lines = enumerate(_lines(path), start=1)
    first = True
    for number, line in lines:
        if not line.strip(_BLANK):
            continue
        if first and line.lstrip(_BLANK).startswith("["):
            # The blank lines before it are put back for the sake of the line number in an error.
            yield from _array(path, "\n" * (number - 1) + line + "".join(rest for _, rest in lines))
            return
        first = False
        yield _line_row(f"{path.name}:{number}", line)


def _line_row(where: str, line: str) -> Row:
    return _json_row(where, _parsed(where, line, "not JSON, one object per line"), _SURROGATE.search(line))


def _array(path: Path, text: str) -> Iterator[Row]:
    suspect = _SURROGATE.search(text)
    for number, value in enumerate(_parsed(path.name, text, "not a JSON array"), start=1):
        yield _json_row(f"{path.name}:row {number}", value, suspect)


def _parsed(where: str, text: str, otherwise: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise UserError(f"{where}: {otherwise}: {error.msg} ({place})") from None
    except RecursionError:
        raise UserError(f"{where}: {otherwise}: nested too deeply") from None
    except ValueError as error:  # a key that is there twice, an integer of thousands of digits
        raise UserError(f"{where}: {otherwise}: {first_line(error)}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} is there twice")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # json.loads would make one for each row


def _json_row(where: str, value: Any, suspect: object) -> Row:
    """The row of a parsed object, whose strings are looked through for half of a surrogate pair where `suspect`."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object with named columns, got {shown(value)}")
    if suspect:
        for column, content in value.items():
            try:
                json.dumps([column, content], ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(error.object[error.start]):x}"
                raise UserError(f"{where}: column {column!r} has {half}, half of a surrogate pair: no text") from None
    return Row(where, value)


def _csv(path: Path) -> Iterator[Row]:
    start = 1
    with _long_fields():
        try:
            for start, fields, names in _csv_records(path):
                where = f"{path.name}:{start}"
                if len(fields) != len(names):
                    raise UserError(f"{where}: must have {len(names)} fields, as the header has, got {len(fields)}")
                # A column without a name, such as the index that pandas writes, can be asked for by nobody.
                yield Row(where, {name: field for name, field in zip(names, fields, strict=True) if name})
        except csv.Error as error:
            message = first_line(error).partition(" - ")[0]
            raise UserError(f"{path.name}: not CSV after line {start}: {message}") from None


def _csv_records(path: Path) -> Iterator[tuple[int, list[str], list[str]]]:
    """(line that it begins in, fields, names of the header) of every record that is not empty."""
    lines = _lines(path)
    header = next((line for line in lines if line.strip()), "")
    delimiter = max(_DELIMITERS, key=lambda d: len(next(csv.reader([header], delimiter=d), [])))
    reader = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
    names = [name.strip() for name in next(reader, [])]
    _once(filter(None, names), f"{path.name}:1")
    end = reader.line_num
    for fields in reader:
        if fields:
            yield end + 1, fields, names
        end = reader.line_num


@contextmanager
def _long_fields() -> Iterator[None]:
    """Fields of a CSV file may be longer than 131,072 characters; the limit belongs to the whole process."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow

    try:
        table = parquet_file(path).read()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is not a parquet file: {first_line(error)}") from None
    try:
        yield from table_rows(table, path.name)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise UserError(f"{path} holds a value that Python has no type for: {first_line(error)}") from None


def parquet_file(path: Path) -> Any:
    """The opened file. UserError where it is none."""
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is not a parquet file: {first_line(error)}") from None
    rows, size = file.metadata.num_rows, path.stat().st_size
    if rows > ROWS_PER_BYTE * size:
        raise UserError(f"{path} says that its {size:,} bytes are {rows:,} rows: it is no data")
    return file


def is_lines(path: Path) -> bool:
    """Whether a file is JSON lines in UTF-8, not compressed, and no array: each line can be found by its place."""
    if data_suffix(path) not in (".jsonl", ".ndjson", ".json"):
        return False
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(0)
        first = next((line for line in file if line.strip()), b"")
    plain = not head.startswith(b"\x1f\x8b") and json.detect_encoding(head).startswith("utf-8")
    return plain and not first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, each with its line feed."""
    with _opened(path) as file:
        head = file.read(4)
        file.seek(0)
        encoding = json.detect_encoding(head)
        for number, line in enumerate(_decoded(path, file, encoding), start=1):
            yield _checked_text(f"{path.name}:{number}", line)


def _decoded(path: Path, file: IO[bytes], encoding: str) -> Iterator[str]:
    if not encoding.startswith("utf-8"):
        try:
            yield from io.StringIO(file.read().decode(encoding), newline="\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path.name}: not {encoding.upper()} text: {error.reason}") from None
        return
    # As `for line in file`, but a few bytes of gzip may stand for a line without end.
    for number, line in enumerate(iter(lambda: file.readline(LINE + 1), b""), start=1):
        yield _decoded_line(f"{path.name}:{number}", line, first=number == 1)


def _decoded_line(where: str, line: bytes, *, first: bool) -> str:
    if len(line) > LINE:
        raise UserError(f"{where}: a line of more than {LINE >> 20} MiB")
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x} at {error.start + 1}"
        raise UserError(f"{where}: not UTF-8 text: {error.reason} ({byte})") from None


def _checked_text(where: str, line: str) -> str:
    if "\0" in line:
        raise UserError(f"{where}: a NUL byte, so this is no text")
    return line


def _opened(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if compressed else path.open("rb")  # type: ignore[return-value]


def shown(value: object) -> str:
    """A value in an error message: its type and the start of it."""
    return f"{type(value).__name__} {short(value)}"
