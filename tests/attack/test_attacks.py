"""A sample of `make attack`, and that the attacks find what they look for."""

import json
import os
import random
from functools import partial
from pathlib import Path

import pytest

from benchmarks import catalogue
from rlhf_fast.training.folder import LOCK
from tests.attack import rows
from tests.attack.__main__ import Log, attack
from tests.attack.harness import KILLED, Fault, command, points


@pytest.mark.parametrize("flag", rows.STARTS)
def test_a_run_that_is_killed_anywhere_recovers(flag, tmp_path):
    cases = list(rows.crash_points_of("sft", flag))
    name, case = random.Random(f"{flag} {os.getpid()}").choice(cases)  # another one every time
    assert case(tmp_path) is None, name


def test_a_copy_is_what_a_kill_leaves(tmp_path):
    kept = rows.states_of("sft", "--resume=auto")
    name, first, last = random.Random(os.getpid()).choice(json.loads((kept / "states").read_text()))
    ended = command(
        rows.begun("sft", "--resume=auto", tmp_path), fault=Fault(tmp_path / "run", random.choice([first, last]))
    )
    assert ended.status == KILLED
    assert files_of(tmp_path / "run") == files_of(kept / name), name


def files_of(folder: Path) -> dict[str, object]:
    """Each file, and its size where a clock does not decide that."""
    timed = ("metrics.jsonl", "config.yaml", LOCK)
    return {str(path.relative_to(folder)): path.name.endswith(timed) or (path.is_file() and path.stat().st_size)
            for path in folder.rglob("*")}  # fmt: skip


def test_every_effect_of_a_run_is_a_point_where_it_can_be_killed():
    found = rows.points_of("sft", "")
    assert len(found) > 70
    assert points(["open a", *["half of write a"] * 9, "os.rename b"]) == [1, 2, 6, 10, 11]


def test_an_attack_counts_what_does_not_survive(tmp_path):
    """Of three runs one loses its checkpoints and starts again, as it may; one its marker; one ends with other bits."""

    def spoilt(how, place: Path):
        ended = command(rows.begun("sft", "", place), fault=Fault(place / "run", rows.points_of("sft", "")[-3]))
        assert ended.status == KILLED
        how(place / "run")
        return rows.recovers("sft", place)

    def forgets(run: Path) -> None:
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace("seed: 3", "seed: 4"))

    cases = {"nothing": lambda run: None, "marker": lambda run: (run / ".rlhf_fast_run").unlink(), "config": forgets}
    counted = attack(
        rows.Row("spoilt", "it resumes", lambda: ((name, partial(spoilt, how)) for name, how in cases.items())),
        Log(None),
    )
    assert (counted["tried"], counted["survived"]) == (3, 1)
    assert "seed is 3, but" in counted["failed"]["config"]
    assert set(counted["failed"]) == {"marker", "config"}


def test_the_page_shows_the_counts_of_the_committed_run():
    page = Path(catalogue.ROOT / "docs" / "reliability.md")
    assert page.read_text(encoding="utf-8") == catalogue.with_tables(page)
