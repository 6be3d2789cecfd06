import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast.data.sources import parse_source, read_rows, split_of
from rlhf_fast.errors import UserError


def write(path, *prompts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def prompts(data):
    return [row.values["prompt"] for row in read_rows(str(data))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", ("a.jsonl", None, None)),
        ("org/name", ("org/name", None, None)),
        ("org/name@test", ("org/name", None, "test")),
        ("org/name:main", ("org/name", "main", None)),
        ("org/name:main@train[:10]", ("org/name", "main", "train[:10]")),
        ("org/name@train[:10%]", ("org/name", None, "train[:10%]")),
        ("/a@b/c.jsonl", ("/a@b/c.jsonl", None, None)),
        ("./folder@test", ("./folder", None, "test")),
    ],
)
def test_a_source_is_a_place_with_a_config_and_a_split(text, expected):
    assert tuple(parse_source(text)) == expected


def test_a_file_wins_over_the_meaning_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "org" / "a:b@c.jsonl", "x")
    assert prompts("org/a:b@c.jsonl") == ["x"]


def test_a_folder_of_shards_is_read_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "part-1.jsonl", "c")
    write(tmp_path / "part-0.JSONL", "a", "b")
    write(tmp_path / ".hidden", "no")
    write(tmp_path / "_SUCCESS")
    rows = read_rows(str(tmp_path))
    assert [row.where for row in rows] == ["part-0.JSONL:1", "part-0.JSONL:2", "part-1.jsonl:1"]
    assert [row.values["prompt"] for row in rows] == ["a", "b", "c"]
    assert prompts(tmp_path / "*1.jsonl") == ["c"]


def test_a_folder_never_mixes_splits(tmp_path):
    write(tmp_path / "train-0.jsonl", "a")
    write(tmp_path / "train-1.jsonl", "b")
    write(tmp_path / "test.jsonl", "c")
    assert prompts(tmp_path) == ["a", "b"]
    assert prompts(f"{tmp_path}@test") == ["c"]
    with pytest.raises(UserError, match="has no split 'validation'; it has: test, train"):
        read_rows(f"{tmp_path}@validation")
    write(tmp_path / "other.csv")
    with pytest.raises(UserError, match=r"files of several formats \(\.csv, \.jsonl\)"):
        read_rows(str(tmp_path))


def test_a_folder_without_training_data_says_what_it_has(tmp_path):
    write(tmp_path / "test.jsonl", "c")
    write(tmp_path / "dev.jsonl", "d")
    with pytest.raises(UserError, match=r"has no split 'train'; it has: test, validation; write .*@split"):
        read_rows(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "split"),
    [("train-00000-of-00002.parquet", "train"), ("my_val.jsonl", "validation"), ("Test.csv", "test"),
     ("trainable.jsonl", None), ("latest.jsonl", None), ("part-0.jsonl", None)],
)  # fmt: skip
def test_the_name_of_a_file_says_its_split(tmp_path, name, split):
    assert split_of(tmp_path / name) == split


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("none.jsonl", r"data file .*none\.jsonl does not exist"),
        ("none", "data file .*none does not exist"),
        ("a.txt", r"a\.txt: unknown data format '\.txt'; use one of \.jsonl"),
        ("a.jsonl.zst", r"unknown data format '\.zst'"),
        ("empty.jsonl", r"empty\.jsonl has no examples"),
        ("folder", r"data folder .*folder holds no file of \.jsonl"),
        ("*.csv", r"data .*\*\.csv: no file has such a name"),
    ],
)
def test_a_source_that_is_none_is_one_line(tmp_path, data, message):
    for name in ("a.txt", "a.jsonl.zst", "empty.jsonl"):
        write(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=message):
        read_rows(str(tmp_path / data))


@given(st.text(max_size=12) | st.text("/.@:*?[]a~\0", max_size=8))
def test_any_name_is_rows_or_one_line(tmp_path_factory, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        patch.setattr("rlhf_fast.data.sources._load_dataset", lambda source: [])
        with pytest.raises(UserError):
            read_rows(f"x{name}")
        for odd in ("", "x" * 300, "\0", "x\0*"):
            with pytest.raises(UserError):
                read_rows(odd)


def test_a_device_is_no_data():
    with pytest.raises(UserError, match="data /dev/null is neither a file nor a folder"):
        read_rows("/dev/null")


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The library, with a cache of its own."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return library


def test_what_save_to_disk_wrote_is_read(tmp_path, datasets):
    train = datasets.Dataset.from_list([{"prompt": MESSAGES, "n": i} for i in range(4)])
    train.select([3, 1]).save_to_disk(tmp_path / "one")
    rows = read_rows(str(tmp_path / "one"))
    assert [row.where for row in rows] == ["one:row 1", "one:row 2"]
    assert [row.values for row in rows] == [{"prompt": MESSAGES, "n": 3}, {"prompt": MESSAGES, "n": 1}]
    with pytest.raises(UserError, match="one data set without splits; leave out @test"):
        read_rows(f"{tmp_path}/one@test")
    datasets.DatasetDict(train=train, test=train.select([0])).save_to_disk(tmp_path / "all")
    assert len(read_rows(str(tmp_path / "all"))) == 4
    assert [row.where for row in read_rows(f"{tmp_path}/all@test")] == ["all@test:row 1"]
    with pytest.raises(UserError, match="has no split 'dev'; it has: train, test"):
        read_rows(f"{tmp_path}/all@dev")


def test_a_repository_of_the_hub_is_read(tmp_path, datasets):
    folder = tmp_path / "repo"
    for name in ("data", "more"):
        (folder / name).mkdir(parents=True)
    for split in ("train", "test"):
        rows = datasets.Dataset.from_list([{"prompt": split, "n": i} for i in range(3)])
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    datasets.Dataset.from_list([{"prompt": "more"}]).to_parquet(folder / "more" / "rows.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: default\n  data_files:\n"
        "  - split: train\n    path: data/train-*\n  - split: test\n    path: data/test-*\n"
        "- config_name: more\n  data_files: more/rows.parquet\n---\n# A card\n"
    )
    rows = read_rows(str(folder))
    assert [tuple(row) for row in rows[:2]] == [
        ("repo@train:row 1", {"prompt": "train", "n": 0}), ("repo@train:row 2", {"prompt": "train", "n": 1}),
    ]  # fmt: skip
    assert prompts(f"{folder}@test") == ["test"] * 3
    assert prompts(f"{folder}@train[:2]") == ["train"] * 2
    assert prompts(f"{folder}:more") == ["more"]
    for wrong in ("@dev", ":less"):
        with pytest.raises(UserError, match=r"data .* cannot be loaded: ") as error:
            read_rows(f"{folder}{wrong}")
        assert "\n" not in str(error.value)


def test_a_hub_id_goes_to_datasets_with_its_config_and_split(monkeypatch, datasets):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list([{"prompt": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("org/name:main@train[:1]")
    assert asked == [(("org/name", "main"), {"split": "train[:1]"})]
    assert rows[0].where == "name@train[:1]:row 1"
    read_rows("org/name")
    assert asked[1] == (("org/name", None), {"split": "train"})


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, datasets):
    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach 'org/name' on the Hub\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = "there is no such file or folder, and as a data set of the hub: Couldn't reach 'org/name' on the Hub$"
    with pytest.raises(UserError, match=f"data org/name@train cannot be loaded: {message}"):
        read_rows("org/name")


def test_without_datasets_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"data org/name needs the package datasets: pip install 'rlhf_fast\[hub\]'"):
        read_rows("org/name")


def test_files_are_read_without_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert prompts(write(tmp_path / "a.jsonl", "x")) == ["x"]
