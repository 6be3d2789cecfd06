import random

import numpy
import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.training import checkpoint
from rlhf_fast.training.checkpoint import list_checkpoints, load_checkpoint, newest_good_checkpoint, save_checkpoint
from rlhf_fast.training.job import random_state, set_random_state


def save(folder, step, keep=9):
    return save_checkpoint(folder, step, {"step": step, "x": torch.full((3,), float(step))}, keep=keep)


def test_the_newest_are_kept(tmp_path):
    for step in (2, 9, 10, 11):
        save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-11", "step-10"]


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

    def killed(state, path):
        path.write_bytes(b"half")
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
