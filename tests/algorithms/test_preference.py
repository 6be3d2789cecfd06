"""The reference of DPO: scored once, for the pairs that the run uses, and kept in the run folder."""

import pytest
import torch
from rich.console import Console

from rlhf_fast.algorithms import preference
from rlhf_fast.algorithms.launch import run_stage, single_stage
from rlhf_fast.data.batches import shuffled_indices
from rlhf_fast.training import reference_cache
from rlhf_fast.training.run import read_jsonl
from tests.training.interruptions import contents
from tests.training.tiny_runs import config_of, job_of, values_of, write_jsonl


class Folder:
    """A run, as far as `references_of_run` sees it."""

    def __init__(self, path):
        self.folder = path

    def track(self, what, parts):
        return parts


def references_of_run(job, config, run):
    return reference_cache.references_of_run(
        job, config, run, lambda pairs: preference.references_of(job, config, pairs)
    )


@pytest.fixture
def many_pairs(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a" * (i % 5), "rejected": "b" * (i % 3)} for i in range(40)]
    write_jsonl(tmp_path / "many.jsonl", rows)
    return str(tmp_path / "many.jsonl")


@pytest.fixture
def scored(monkeypatch):
    """Every list of pairs that the reference scores."""
    lists, score = [], preference.references_of

    def counted(job, config, pairs):
        lists.append(list(pairs))
        return score(job, config, pairs)

    monkeypatch.setattr(preference, "references_of", counted)
    return lists


def test_only_the_pairs_of_the_run_are_scored_and_they_are_the_right_ones(many_pairs, tmp_path, scored):
    config = config_of("dpo", data=many_pairs, steps=3, batch_size=4, data_seed=8)
    job = job_of(config)
    references = references_of_run(job, config, Folder(tmp_path))
    used = [i for step in range(3) for i in shuffled_indices(len(job.train), 8, step * 4, 4)]
    assert sorted(references[:, 0].isfinite().nonzero().squeeze(1).tolist()) == sorted(used)
    assert sum(map(len, scored)) == 12
    expected = preference.references_of(job, config, [job.train[i] for i in used])
    torch.testing.assert_close(references[used], expected, rtol=1e-4, atol=1e-5)


def test_what_was_scored_is_kept_and_only_what_is_missing_is_added(many_pairs, tmp_path, scored):
    config = config_of("dpo", data=many_pairs, steps=3)
    first = references_of_run(job_of(config), config, Folder(tmp_path))
    scored.clear()
    again = references_of_run(job_of(config), config, Folder(tmp_path))
    assert scored == []
    assert torch.equal(again.nan_to_num(1.0), first.nan_to_num(1.0))
    longer = config.model_copy(update={"steps": 4})
    more = references_of_run(job_of(longer), longer, Folder(tmp_path))
    assert [len(pairs) for pairs in scored] == [4]
    assert torch.equal(more[first.isfinite()], first[first.isfinite()])


@pytest.mark.parametrize("objective", ["simpo", {"reference_free": True}])
def test_a_loss_without_a_reference_scores_none(objective, tmp_path, scored):
    values = values_of("dpo", objective=objective, output_dir=str(tmp_path / "run"), steps=1)
    run_stage(Console(quiet=True), single_stage(values), resume=None, overwrite=False)
    assert scored == []
    run_stage(Console(quiet=True), single_stage(values_of("dpo", output_dir=str(tmp_path / "dpo"), steps=1)),
              resume=None, overwrite=False)  # fmt: skip
    assert scored != []


@pytest.mark.parametrize("change", ["data", "model", "reference", "attention", "cut off", "other file"])
def test_what_another_run_kept_is_never_used(change, many_pairs, tmp_path, scored):
    config = config_of("dpo", data=many_pairs, steps=1)
    job = job_of(config)
    references_of_run(job, config, Folder(tmp_path))
    scored.clear()
    if change == "data":
        first, second, *others = job.train.rows
        job.train = job.train.of([second, first, *others])
    elif change == "model":
        with torch.no_grad():
            next(job.backbone.model.parameters()).neg_()
    elif change == "reference":
        job.backbone.add_adapter("reference", copy_of="policy", trainable=False)
    elif change == "attention":
        job.backbone.model.config._attn_implementation = "eager"
    else:
        path = tmp_path / "reference_logprobs.jsonl"
        path.write_bytes(path.read_bytes()[:100] if change == "cut off" else b"hello")
    references_of_run(job, config, Folder(tmp_path))
    assert [len(pairs) for pairs in scored] == [4]


def test_a_continued_run_is_the_longer_run_bit_for_bit(many_pairs, tmp_path):
    def run(name, resume=None, **changes):
        values = values_of("dpo", data=many_pairs, output_dir=str(tmp_path / name), micro_batch_size=3, **changes)
        run_stage(Console(quiet=True), single_stage(values), resume=resume, overwrite=False)

    run("whole", steps=4)
    run("longer", steps=2)
    run("longer", steps=4, resume="auto")
    whole, longer = contents(tmp_path / "whole"), contents(tmp_path / "longer")
    assert longer["metrics.jsonl"] == whole["metrics.jsonl"]
    assert longer["adapter_model.safetensors"] == whole["adapter_model.safetensors"]
    assert len(read_jsonl(tmp_path / "whole" / "metrics.jsonl")) == 4
