import hashlib
import json
import random

import numpy
import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.training import checkpoint
from rlhf_fast.training.checkpoint import (
    last_good,
    list_checkpoints,
    load_checkpoint,
    newest_good_checkpoint,
    resume_from,
    save_checkpoint,
)
from rlhf_fast.training.files import WriteError
from rlhf_fast.training.job import random_state, set_random_state


def save(folder, step, keep=9, **rest):
    return save_checkpoint(folder, step, {"step": step, "x": torch.full((3,), float(step))}, keep=keep, **rest)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept(tmp_path):
    for step in (2, 9, 10, 11):
        save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-11", "step-10"]


def test_only_checkpoints_of_the_run_by_their_exact_name_are_removed(tmp_path):
    kept = ("step-1.bak", "step-01", "step-", "step-x", "step-1 (copy)", "notes", "step-3")
    for name in kept[:-1]:
        (tmp_path / name).mkdir()
    save(tmp_path, 3, run="another")
    (tmp_path / "step-4").symlink_to(tmp_path / "notes")
    for step in (1, 2, 5, 6):
        save(tmp_path, step, keep=2, run="ours")
    assert names(tmp_path) == sorted([*kept, "step-4", "step-5", "step-6"])
    assert newest_good_checkpoint(tmp_path, "ours")[0] == 6
    assert newest_good_checkpoint(tmp_path, "another")[0] == 3


@pytest.mark.parametrize("damage", ["flip", "no state", "no manifest", "bad manifest"])
def test_damaged_checkpoints_do_not_count(tmp_path, damage):
    for step in (1, 2):
        save(tmp_path, step, keep=2)
    path = tmp_path / "step-2"
    if damage == "flip":
        data = bytearray((path / "state.pt").read_bytes())
        data[len(data) // 2] ^= 1
        (path / "state.pt").write_bytes(data)
    elif damage == "bad manifest":
        (path / "manifest.json").write_text("[" * 100_000)
    else:
        (path / {"no state": "state.pt", "no manifest": "manifest.json"}[damage]).unlink()
    save(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-2", "step-3", "step-4"]


def test_the_last_good_one_before_bad_updates_stays(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep=2, good=step < 4)
    assert names(tmp_path) == ["step-3", "step-6", "step-7"]
    assert last_good(tmp_path).name == "step-3"
    save(tmp_path, 8, keep=2)
    assert names(tmp_path) == ["step-7", "step-8"]


def test_newer_ones_than_the_one_resumed_from_are_put_aside_and_never_lost(tmp_path, capsys):
    for step in (1, 2, 3):
        save(tmp_path, step)
    for left in (".step-7.tmp", ".step-2.old"):
        (tmp_path / left).mkdir()
    resume_from(tmp_path, 2)
    assert names(tmp_path) == ["aside", "step-1", "step-2"]
    assert "step-3 is newer than step 2 and is now" in capsys.readouterr().err
    assert newest_good_checkpoint(tmp_path)[0] == 2
    save(tmp_path, 3)
    resume_from(tmp_path, 2)
    assert names(tmp_path / "aside") == ["step-3", "step-3~1"]


@pytest.mark.parametrize("room", [0, 1])
def test_on_a_full_disk_the_checkpoint_that_would_go_anyway_goes_first(tmp_path, monkeypatch, room):
    """room: how many checkpoints still find place."""
    for step in (1, 2):
        save(tmp_path, step, keep=2)
    write = torch.save

    def full(state, file):
        if len(list_checkpoints(tmp_path)) + 1 > 1 + room:
            raise OSError(28, "No space left on device")
        write(state, file)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    if room:
        save(tmp_path, 3, keep=2)
        assert names(tmp_path) == ["step-2", "step-3"]
    else:
        with pytest.raises(WriteError, match=r"step-3 cannot be written: No space left on device"):
            save(tmp_path, 3, keep=2)
        assert names(tmp_path) == ["step-2"]


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04\x95"])
def test_a_state_whose_checksum_is_right_and_that_is_none_is_one_line(tmp_path, content):
    path = save(tmp_path, 1)
    (path / "state.pt").write_bytes(content)
    manifest = {"step": 1, "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="step-1 cannot be read") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_what_was_saved_comes_back(tmp_path):
    step, state = load_checkpoint(save(tmp_path, 4))
    assert step == 4
    assert state["x"].tolist() == [4.0, 4.0, 4.0]


@pytest.mark.parametrize("damage", ["truncate", "flip", "no manifest", "empty manifest"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before_and_said_so(tmp_path, capsys, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    data = bytearray((newest / "state.pt").read_bytes())
    if damage == "truncate":
        (newest / "state.pt").write_bytes(data[:-9])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        (newest / "state.pt").write_bytes(data)
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text("{}")
    found = newest_good_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == 1
    assert "step-2" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"step-2 is (damaged|incomplete)"):
        load_checkpoint(newest)


def test_a_kill_while_writing_leaves_the_older_one(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def killed(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1"]
    assert save(tmp_path, 2).name == "step-2"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again_by_itself(tmp_path):
    (save(tmp_path, 1) / "state.pt").write_bytes(b"half")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole; --overwrite starts again"):
        newest_good_checkpoint(tmp_path)


def test_no_checkpoint_is_none(tmp_path):
    assert newest_good_checkpoint(tmp_path / "none") is None


def test_random_states_survive_a_checkpoint(tmp_path):
    def draw():
        return random.random(), numpy.random.rand(), numpy.random.randn(), torch.rand(()).item()

    draw()
    numpy.random.randn()
    save_checkpoint(tmp_path, 1, {"random": random_state()}, keep=1)
    expected = draw()
    set_random_state(load_checkpoint(tmp_path / "step-1")[1]["random"])
    assert draw() == expected
