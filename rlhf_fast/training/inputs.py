"""What a run reads: model, data, rewards. Their hashes are kept, and a run that is resumed on others says which.

Of a file above LIMIT bytes, parts of it stand for the whole: its ends and what lies evenly between.
"""

import base64
import binascii
import hashlib
import json
import os
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_fast.data.reading import data_suffix
from rlhf_fast.errors import UserError
from rlhf_fast.models.peft_io import CONFIG_NAME
from rlhf_fast.training.config import Config, listed
from rlhf_fast.training.files import replace_file
from rlhf_fast.training.folder import FILES, INPUTS_FILE, MARKER

LIMIT = 1 << 30
BLOCKS, BLOCK = 64, 1 << 20
_LINES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # formats of which each line has a checksum


def inputs_of(config: Config) -> list[Path]:
    """The files and folders that the run reads, and the base models under adapters among them."""
    keys = ("reward", "cost", "ptx_data", "helpful_data", "principles", "teacher")
    judge = getattr(config, "judge", None)
    named = [config.model, config.data, config.eval_data, *(getattr(config, key, None) for key in keys)]
    named += [judge.by, judge.adapter, judge.prompt, judge.principles] if judge is not None else []
    flat = [item for value in named for item in listed(value)]
    paths = [Path(item) for item in flat if isinstance(item, str) and item]
    for item in flat:
        place = item.rpartition(":")[0] if isinstance(item, str) else ""
        if place:  # of a function: a file, or a module that is looked for from the working directory
            paths += [Path(place)] if "/" in place else [Path(place), Path(f"{place.replace('.', '/')}.py")]
    return [*paths, *(base for path in paths for base in _base(path))]


def _base(folder: Path) -> list[Path]:
    try:
        name = json.loads((folder / CONFIG_NAME).read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return []  # no adapter, or one that will be refused when it is loaded
    return [Path(name)] if isinstance(name, str) else []


def hashes(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """File -> its size, sha256 and, of rows in text, a checksum of every line. Of a folder the files right in it and in
    its data/ count, less what a run writes there besides adapters."""
    files = sorted({file for path in paths for file in _files_of(path)})
    return {str(file): _hash(file) for file in files}


def _files_of(path: Path) -> Iterator[Path]:
    if os.path.isfile(path):
        yield path
    elif os.path.isdir(path):
        for folder in (path, path / "data"):
            if folder.is_dir():
                yield from (file for file in folder.iterdir() if file.is_file() and not _is_of_a_run(path, file))


def _is_of_a_run(folder: Path, file: Path) -> bool:
    if file.name.startswith("."):
        return True
    ran = (folder / MARKER).is_file() and file.parent == folder
    return ran and any(file.match(name) for name in FILES if "/" not in name)


def _hash(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), path.stat().st_size
    found: dict[str, Any] = {"size": size}
    with path.open("rb") as file:
        if size > LIMIT:
            for number in range(BLOCKS):
                file.seek(number * (size - BLOCK) // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
        elif data_suffix(path) in _LINES and not path.name.lower().endswith(".gz"):
            sums = array("I")
            for line in file:
                digest.update(line)
                sums.append(zlib.crc32(line))
            found["lines"] = base64.b64encode(zlib.compress(sums.tobytes(), 1)).decode()
        else:
            while block := file.read(1 << 22):
                digest.update(block)
    return {**found, "sha256": digest.hexdigest()}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str]]:
    """(file, what of it is another): of each file that changed, came or went; "row 17" where it has rows."""
    found = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if old is None or new is None:
            found.append((name, "it is new" if old is None else "it is gone"))
        elif (old["size"], old["sha256"]) != (new["size"], new["sha256"]):
            found.append((name, _first_row(name, _sums(old), _sums(new))))
    return found


def _sums(entry: dict[str, Any]) -> list[int]:
    sums = array("I")
    try:
        sums.frombytes(zlib.decompress(base64.b64decode(entry.get("lines", ""))) if "lines" in entry else b"")
    except (ValueError, TypeError, zlib.error, binascii.Error):
        return []
    return list(sums)


def _first_row(name: str, old: list[int], new: list[int]) -> str:
    if not old or not new:
        return "its content"
    same = zip(old, new, strict=False)
    number = next((i for i, (a, b) in enumerate(same, start=1) if a != b), min(len(old), len(new)) + 1)
    return f"{'row' if data_suffix(Path(name)) in ('.jsonl', '.ndjson') else 'line'} {number}"


def write_inputs(folder: Path, found: dict[str, dict[str, Any]]) -> None:
    replace_file(folder / INPUTS_FILE, json.dumps(found, indent=1) + "\n")


def read_inputs(folder: Path) -> dict[str, dict[str, Any]] | None:
    """What `write_inputs` wrote; None where it did not yet. UserError where that is damaged."""
    path = folder / INPUTS_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        fine = all(isinstance(entry["size"], int) and isinstance(entry["sha256"], str) for entry in found.values())
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        fine = False
    if not fine:
        raise UserError(f"{path} is damaged, so it is unknown whether model, data and rewards are those of the run; "
                        "remove it to go on without knowing")  # fmt: skip
    return found


def check_inputs(before: dict[str, Any], now: dict[str, Any], step: int, *, allowed: bool) -> list[str]:
    """A line for each input that changed since the checkpoint of `step`; the first is a UserError unless `allowed`."""
    lines = [f"{name} changed since step {step}: {what}" for name, what in differences(before, now)]
    if lines and not allowed:
        raise UserError(f"{lines[0]}; bring it back, or go on with what it is now by allow_changed_inputs: true")
    return lines
