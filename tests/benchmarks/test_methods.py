"""Seeds that a method lacks are run, and none is kept of other settings."""

import pytest
import yaml

from benchmarks import methods

pytestmark = pytest.mark.filterwarnings("error")
FILE = {"algorithm": "dpo", "data": "examples/tiny/preferences.jsonl", "steps": 30}


@pytest.fixture
def told(tmp_path):
    """Digest of the settings of `name` with a file of these keys."""

    def digest(name, head="", **changes):
        path = tmp_path / "preference.yaml"
        path.write_text(head + yaml.safe_dump(FILE | changes))
        return methods.settings(name, path)

    return digest


def test_settings_are_the_preset_and_the_file_but_not_its_comments(told):
    assert told("dpo") == told("dpo", head="# Pairs.\n")
    others = [told("ipo"), told("dpo", steps=31), told("dpo", data="examples/tiny/sft.jsonl")]
    assert len({told("dpo"), *others}) == 4


def test_settings_are_what_the_named_files_hold(told, tmp_path, monkeypatch):
    before = told("dpo")
    monkeypatch.setattr(methods, "ROOT", tmp_path)
    for name in ("examples/tiny/sft.jsonl", "examples/tiny/preferences.jsonl", "examples/tiny/prompts_train.jsonl",
                 "examples/tiny/prompts_heldout.jsonl", "examples/tiny/word_reward.py"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((methods.EXAMPLES.parents[1] / name).read_bytes())
    assert told("dpo") == before
    (tmp_path / "examples/tiny/word_reward.py").write_text("")
    assert told("dpo") != before


def test_runs_with_other_settings_go_and_missing_seeds_are_run_seed_by_seed():
    results = {"methods": {"dpo": [{"settings": "a", "seed": 0}, {"settings": "b", "seed": 1}], "gone": [{"seed": 0}]}}
    runs = methods.kept(results, {"dpo": "a", "new": "c"})
    assert runs == {"dpo": [{"settings": "a", "seed": 0}], "new": []}
    assert methods.missing(runs, 2) == [("new", 0), ("dpo", 1), ("new", 1)]


def test_every_row_has_an_example_and_no_file_runs_twice_for_nothing():
    known = methods.methods()
    assert set(methods.ALGORITHMS) <= set(known)
    alone = [path for name, path in known.items() if name not in methods.ALGORITHMS]
    assert not set(alone) & {known[name] for name in methods.ALGORITHMS}
