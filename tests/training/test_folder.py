"""--overwrite removes what an earlier run made, and nothing else."""

import json
import os
from pathlib import Path

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.training.folder import MARKER, check_folder, claim_folder, inputs_of, saving
from tests.training.tiny_runs import config_of


def made(folder: Path, stages=()) -> Path:
    """A run folder with a saved adapter, a checkpoint and metrics."""
    claim_folder(folder, {"algorithm": "sft"}, resume=False, overwrite=False, stages=stages)
    for name in ("metrics.jsonl", "checkpoints/step-1/state.pt", "tensorboard/events.out.tfevents.1.2"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    with saving(folder):
        (folder / "adapter_model.safetensors").write_text("old")
        (folder / "critic").mkdir()
        (folder / "critic" / "adapter_model.safetensors").write_text("old")
    return folder


def overwrite(folder: Path, *inputs: Path) -> None:
    claim_folder(folder, {"algorithm": "sft"}, resume=False, overwrite=True, inputs=inputs)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_run_is_replaced_and_files_that_no_run_made_stay(tmp_path, capsys):
    run = made(tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    (run / "critic" / "notes.txt").write_text("mine")
    (run / "empty").mkdir()
    overwrite(run)
    assert names(run) == {MARKER, "config.yaml", "notes.txt", "critic", "critic/notes.txt", "empty"}
    assert f"left in {run}, because no run made it: critic, empty, notes.txt" in capsys.readouterr().err


def test_the_stages_of_a_run_are_replaced_with_it_and_another_run_beside_them_stays(tmp_path):
    run = made(tmp_path / "run", stages=["sft", "second", "round-1/ppo", "round-2/ppo"])
    for name in ("sft", "second", "round-1/ppo", "round-2/ppo", "another"):
        made(run / name)
    overwrite(run)
    assert {path.name for path in run.iterdir()} == {MARKER, "config.yaml", "another"}
    assert (run / "another" / "metrics.jsonl").is_file()


def test_links_in_a_run_folder_are_not_followed(tmp_path):
    run = made(tmp_path / "run", stages=["sft"])
    elsewhere = made(tmp_path / "elsewhere")
    (run / "sft").symlink_to(elsewhere)
    (run / "summary.json").symlink_to(elsewhere / "metrics.jsonl")
    before = names(elsewhere)
    overwrite(run)
    assert names(elsewhere) == before


@pytest.mark.parametrize("place", [".", "..", "../..", "{cwd}", "/", "~", "link"])
def test_the_working_directory_the_home_directory_and_all_above_are_never_replaced(place, tmp_path, monkeypatch):
    home = tmp_path / "home" / "user"
    work = home / "project" / "work"
    work.mkdir(parents=True)
    (home / "project" / "link").symlink_to(home / "project")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    for folder in (work, work.parent, home, home.parent):
        (folder / "config.yaml").write_text("a: 1\n")
        (folder / MARKER).write_text('{"stages": [], "saved": []}')
    path = {"{cwd}": work, "~": home, "link": home / "project" / "link"}.get(place, Path(place))
    with pytest.raises(UserError, match="--overwrite does not replace that"):
        check_folder(path, resume=False, overwrite=True)


@pytest.mark.parametrize("kind", ["inside", "itself", "above", "linked", "relative", "link to the run"])
def test_a_folder_that_holds_or_lies_in_an_input_is_not_replaced(kind, tmp_path, monkeypatch):
    (tmp_path / "outer").mkdir()
    run = made(tmp_path / "outer" / "run")
    (run / "data.jsonl").write_text("{}")
    (tmp_path / "data_link").symlink_to(run / "data.jsonl")
    (tmp_path / "run_link").symlink_to(run)
    monkeypatch.chdir(tmp_path / "outer")
    folder, given = {
        "inside": (run, run / "data.jsonl"),
        "itself": (run, run),
        "above": (run, tmp_path / "outer"),
        "linked": (run, tmp_path / "data_link"),
        "relative": (Path("run"), Path("./run/../run/data.jsonl")),
        "link to the run": (tmp_path / "run_link", run / "data.jsonl"),
    }[kind]
    before = names(run)
    with pytest.raises(UserError, match="which this run reads: choose another one"):
        overwrite(folder, given)
    assert names(run) == before


@pytest.mark.parametrize("content", [None, "", "[]", '{"stages": [], "saved": ["../../precious"]}',
                                     '{"stages": ["/"], "saved": []}'])  # fmt: skip
def test_a_folder_without_a_marker_of_ours_is_left_as_it_is(content, tmp_path):
    """A config.yaml alone says nothing, and a marker names nothing outside its folder."""
    (tmp_path / "precious").write_text("x")
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("algorithm: sft\n")
    if content is not None:
        (folder / MARKER).write_text(content)
    with pytest.raises(UserError, match="left as it is") as error:
        overwrite(folder)
    assert "\n" not in str(error.value)
    assert (folder / "config.yaml").is_file()
    assert (tmp_path / "precious").is_file()


def test_a_kill_while_an_earlier_run_is_removed_leaves_a_folder_that_can_be_overwritten(tmp_path, monkeypatch):
    run = made(tmp_path / "run")
    unlink, count = Path.unlink, []

    def killed(self, **options):
        count.append(self)
        if len(count) == 3:
            raise KeyboardInterrupt
        unlink(self, **options)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        overwrite(run)
    monkeypatch.undo()
    overwrite(run)
    assert names(run) == {MARKER, "config.yaml"}


def test_the_inputs_of_a_run_are_its_model_and_that_ones_base_its_data_and_its_rewards(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/the/base"}))
    config = config_of(
        "grpo", model=str(tmp_path / "adapter"), data="d.jsonl", eval_data="sub/e.jsonl",
        reward=["sub/file.py:f", "package.module:g", "reward_folder"],
    )  # fmt: skip
    expected = ("d.jsonl", "sub/e.jsonl", "sub/file.py", "package/module.py", "reward_folder", "/the/base")
    found = inputs_of(config)
    assert {Path(name) for name in expected} | {tmp_path / "adapter"} <= set(found)
    assert not any(os.fspath(path) in ("", ".", "/") for path in found)
