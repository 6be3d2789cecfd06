"""What the key `data` may name: a file, a folder of them, a pattern, or a data set of the hub."""

import importlib.util
import logging
import os
import re
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.data.reading import SUFFIXES, Row, data_suffix, is_lines, read_file, table_rows
from rlhf_fast.data.rows import Joined, Lines, Table
from rlhf_fast.errors import UserError, first_line

IN_MEMORY = 1 << 22  # bytes of files up to which their rows are read at once
GATHERED = 1 << 28  # bytes of larger files whose rows are brought into memory where they are needed together

# How the hub tells splits apart by the names of files (https://huggingface.co/docs/hub/datasets-file-names-and-splits).
_SPLIT_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_SAVED = ("state.json", "dataset_dict.json")  # written by save_to_disk: of one Dataset, of a DatasetDict


class Source(NamedTuple):
    """`place:config@split`, taken apart; config and split are None where they are not said."""

    place: str
    config: str | None
    split: str | None


def parse_source(text: str) -> Source:
    """`text` as it is where it names a file or folder, else without its `:config` and `@split`."""
    if os.path.exists(text):
        return Source(text, None, None)
    match = re.fullmatch(r"(.+?)(?::([^:@/\\]+))?(?:@([^@/\\]+))?", text, re.DOTALL)
    return Source(*match.groups()) if match else Source(text, None, None)  # type: ignore[arg-type]


def read_rows(data: str, *, may_be_empty: bool = False) -> Sequence[Row]:
    """All rows of `data`, which is one of

    file            .jsonl, .json (lines or one array), .ndjson, .csv, .tsv, each also as .gz, and .parquet
    folder          its shards in the order of their names: files of one format; or what `datasets` wrote with
                    save_to_disk, or a repository of the hub (data/train-00000-of-00001.parquet and so on)
    pattern         shards/*.jsonl
    org/name        a data set of the hub, through `datasets`: org/name:config@split

    The split is `train` where none is said. A file or folder wins over a hub id of the same name. Raises UserError for
    what is none of these, and, unless it may_be_empty, where there is no row.
    """
    try:
        rows = _read(data, parse_source(data))
    except OSError as error:
        raise UserError(f"data {data} cannot be read: {error.strerror or first_line(error)}") from None
    if not rows and not may_be_empty:
        raise UserError(f"{data} has no examples")
    return rows


def _read(data: str, source: Source) -> Sequence[Row]:
    if not data or "\0" in data:
        raise UserError(f"data {data!r} is no name of a file, a folder or a data set")
    path = Path(source.place)
    if os.path.isfile(source.place):
        return read_shards([path])
    if os.path.isdir(source.place):
        return _read_folder(path, source)
    if os.path.exists(source.place):
        raise UserError(f"data {data} is neither a file nor a folder")
    if any(sign in source.place for sign in "*?["):
        found = sorted(Path(name) for name in glob(source.place, recursive=True))
        if not found:
            raise UserError(f"data {data}: no file has such a name")
        return read_shards(found)
    if _may_be_on_the_hub(source.place):
        return _load_dataset(source)
    raise UserError(f"data file {source.place} does not exist")


def read_shards(paths: Sequence[Path]) -> Sequence[Row]:
    """The rows of the files; more than IN_MEMORY bytes of them stay where they are (JSON lines, parquet)."""
    for path in paths:
        if not data_suffix(path):
            suffix = path.suffix or path.name
            raise UserError(f"{path}: unknown data format {suffix!r}; use one of {', '.join(SUFFIXES)}")
    large = sum(path.stat().st_size for path in paths) > IN_MEMORY
    opened = [path for path in paths if large and (data_suffix(path) == ".parquet" or is_lines(path))]
    if not opened:
        return [row for path in paths for row in read_file(path)]
    parts = [(Table if data_suffix(path) == ".parquet" else Lines)(path) if path in opened else read_file(path)
             for path in paths]  # fmt: skip
    return Joined(parts)


def _read_folder(folder: Path, source: Source) -> Sequence[Row]:
    if any((folder / name).is_file() for name in _SAVED):
        return _load_saved(folder, source)
    shards = sorted(path for path in folder.iterdir() if path.is_file() and data_suffix(path))
    if source.config is not None or not shards or _has_card(folder):
        if not any(path.is_file() and data_suffix(path) for path in folder.rglob("*")):
            raise UserError(f"data folder {folder} holds no file of {', '.join(SUFFIXES)}")
        return _load_dataset(source)
    formats = sorted({data_suffix(path) for path in shards})
    if len(formats) > 1:
        raise UserError(f"data folder {folder} holds files of several formats ({', '.join(formats)}): name one of them")
    splits = {path: split_of(path) for path in shards}
    if source.split is None and len(set(splits.values())) == 1:
        return read_shards(shards)
    wanted = source.split or "train"
    chosen = [path for path, split in splits.items() if split == wanted]
    if not chosen:
        found = ", ".join(sorted({split or "no split" for split in splits.values()}))
        raise UserError(f"data folder {folder} has no split {wanted!r}; it has: {found}; write {folder}@split")
    return read_shards(chosen)


def _has_card(folder: Path) -> bool:
    """Whether the folder is a repository of the hub: its README.md begins with metadata in YAML."""
    card = folder / "README.md"
    return card.is_file() and card.read_bytes().startswith(b"---")


def split_of(path: Path) -> str | None:
    """The split that a file's name says, such as train-00000-of-00002.parquet."""
    words = re.split(r"[^a-z]+", path.name.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _may_be_on_the_hub(place: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", place) is not None and not data_suffix(Path(place))


def _datasets(data: str) -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"data {data} needs the package datasets: pip install 'rlhf_fast[hub]'")
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it raises is said by us
    return datasets


def _load_saved(folder: Path, source: Source) -> list[Row]:
    datasets = _datasets(source.place)
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # noqa: BLE001 - a damaged folder raises whatever reading it raises
        raise UserError(f"data folder {folder} cannot be read by datasets: {first_line(error)}") from None
    if isinstance(saved, datasets.DatasetDict):
        split = source.split or "train"
        if split not in saved:
            raise UserError(f"data folder {folder} has no split {split!r}; it has: {', '.join(saved)}")
        return _rows_of(saved[split], f"{folder.name}@{split}")
    if source.split is not None:
        raise UserError(f"data folder {folder} is one data set without splits; leave out @{source.split}")
    return _rows_of(saved, folder.name)


def _load_dataset(source: Source) -> list[Row]:
    datasets = _datasets(source.place)
    split = source.split or "train"
    local = Path(source.place).is_dir()
    try:
        loaded = datasets.load_dataset(source.place, source.config, split=split)
    except Exception as error:  # noqa: BLE001 - the hub, the network and a builder each raise their own
        place = "" if local else "there is no such file or folder, and as a data set of the hub: "
        asked = ":".join(filter(None, (source.place, source.config)))
        raise UserError(f"data {asked}@{split} cannot be loaded: {place}{first_line(error)}") from None
    return _rows_of(loaded, f"{Path(source.place).name}@{split}")


def _rows_of(dataset: Any, name: str) -> list[Row]:
    try:
        return list(table_rows(dataset.with_format("arrow")[:], name))
    except (ValueError, OverflowError) as error:
        raise UserError(f"{name} holds a value that Python has no type for: {first_line(error)}") from None
