"""Critique and revision: what is asked in which order, what is dropped, and that the policy learns what is left."""

import json
import signal

import pytest
import torch

from rlhf_fast.algorithms import constitutional
from rlhf_fast.algorithms.launch import launch, single_stage
from rlhf_fast.algorithms.sft import loss_of
from rlhf_fast.data.encoding import Prompt
from rlhf_fast.data.reading import Row, read_jsonl
from rlhf_fast.errors import UserError
from rlhf_fast.signals import Stopped
from rlhf_fast.training import revision
from rlhf_fast.training.folder import written_rows
from rlhf_fast.training.revision import Draft, repetition, revised, sifted
from rlhf_fast.training.run import Run
from rlhf_fast.training.supervised import micro_batches
from tests.training.interruptions import contents, run
from tests.training.tiny_runs import assert_close, folder, job_of, values_of, write_jsonl


class Writer:
    """A speaker that answers with what it was asked for, and a number."""

    def __init__(self, chat):
        self.chat, self.asked = chat, []

    def write(self, texts, max_tokens):
        self.asked.append(list(texts))
        return [f"text {len(self.asked)}.{i}\n\nfurther text" for i in range(len(texts))]


def test_each_round_criticises_by_a_principle_and_revises_what_the_last_one_wrote():
    writer = Writer(chat=True)
    prompts = [Prompt("d:1", [1], "p", {"prompt": "p", "tag": 7})]
    (draft,) = revised(writer, prompts, ["first"], ["A.", "B."], rounds=2, critique_tokens=3, answer_tokens=5, seed=0)
    end = "\n\nfurther text"
    assert draft.answers == ["first", f"text 2.0{end}", f"text 4.0{end}"]
    assert draft.critiques == [f"text 1.0{end}", f"text 3.0{end}"]
    heads = [f"p|{draft.answers[i]}|{draft.principles[i]}|" for i in (0, 1)]
    assert [asked[0] for asked in writer.asked] == [
        text for head, critique in zip(heads, draft.critiques, strict=True)
        for text in (head + revision.CRITICISE, head + revision.REVISE.format(critique=critique))
    ]  # fmt: skip
    assert draft.row() == {"prompt": "p", "tag": 7, "completion": draft.answers[2], "original": "first", "revisions":
                           draft.answers[1:], "principles": draft.principles, "critiques": draft.critiques}  # fmt: skip


@pytest.mark.parametrize(("prompt", "lead"), [("p", " \n"), ([{"role": "user", "content": "p"}], "")])
def test_a_revision_is_parted_from_a_plain_prompt_as_the_answer_was(prompt, lead):
    """A plain prompt goes on with its completion: `The soup was` with ` good.`, not with `good.`."""
    writer = Writer(chat=True)
    (draft,) = revised(writer, [Prompt("d:1", [1], "p", {"prompt": prompt})], [" \nfirst "], ["A."], rounds=1,
                       critique_tokens=3, answer_tokens=5, seed=0)  # fmt: skip
    assert "|first|" in writer.asked[0][0]
    assert (draft.row()["original"], draft.row()["completion"]) == (f"{lead}first", f"{lead}{draft.answers[1]}")


def test_a_base_model_is_shown_examples_and_its_text_ends_with_the_part():
    writer = Writer(chat=False)
    prompts = [Prompt("d:1", [1], "p", {"prompt": "p"})]
    (draft,) = revised(writer, prompts, ["first"], ["A."], rounds=1, critique_tokens=3, answer_tokens=5, seed=0)
    assert (draft.critiques, draft.answers) == (["text 1.0"], ["first", "text 2.0"])
    critique, answer = (asked[0] for asked in writer.asked)
    assert critique.endswith("\n\np|first|A.|Critique:")
    assert answer == f"{critique} text 1.0\n\nRevision:"
    assert all(example[4] in critique for example in revision.EXAMPLES)


def test_principles_are_drawn_for_each_prompt_and_round():
    prompts = [Prompt("d", [1], str(i), {"prompt": str(i)}) for i in range(30)]

    def drawn(seed):
        drafts = revised(Writer(True), prompts, ["a"] * 30, list("ABC"), rounds=2, critique_tokens=1, answer_tokens=1,
                         seed=seed)  # fmt: skip
        return [draft.principles for draft in drafts]

    assert drawn(0) == drawn(0) != drawn(1)
    assert {principle for pair in drawn(0) for principle in pair} == set("ABC")
    assert any(first != second for first, second in drawn(0))


def test_the_share_of_windows_that_were_there_before():
    assert repetition("short") == 0.0
    assert repetition("every word here is another one") == 0.0
    # 12 + 24 letters: the windows that begin at 0..24 are 25, of which every third letter begins a new one.
    assert repetition("abc" * 12) == pytest.approx(1 - 3 / 25)


def test_revisions_that_are_empty_that_repeat_or_that_were_said_are_dropped_with_the_reason():
    texts = ["fine", "", "no no no no no no no no no no no", "fine", "old", "also fine"]
    drafts = [Draft(Prompt("d", [1], "p", {"prompt": "p"}), ["x", text]) for text in texts]
    kept, dropped = sifted(drafts, 0.3, {"old"})
    assert [draft.answers[-1] for draft in kept] == ["fine", "also fine"]
    assert [reason for reason, _ in dropped] == ["empty", "repeats itself", "same as another", "same as another"]
    reasons = [reason for reason, _ in dropped]
    assert revision.told(reasons, 6) == "4 of 6 revisions are dropped: 1 empty, 1 repeats itself, 2 same as another"
    assert revision.told([], 6) == "0 of 6 revisions are dropped"


def values(tmp_path, **changes):
    grpo = values_of("grpo")
    keys = ("model", "device", "report_to", "seed", "data", "batch_size", "max_new_tokens", "steps", "eval_size",
            "learning_rate", "lora_rank")  # fmt: skip
    # The tiny model's context of 128 bytes holds no long question.
    own = {"critique_tokens": 4, "max_repetition": 1.0, "principles": ["Be kind."], "output_dir": str(tmp_path / "run")}
    return {"algorithm": "constitutional", **{key: grpo[key] for key in keys}, **own, **changes}


@pytest.fixture(autouse=True)
def short_questions(monkeypatch):
    monkeypatch.setattr(revision, "CHOICE", "{prompt}|{answer}|{principle}|")
    monkeypatch.setattr(revision, "CRITICISE", "c")
    monkeypatch.setattr(revision, "REVISE", "{critique}r")


def test_the_policy_learns_the_revisions_that_were_written(tmp_path, capsys):
    """The loss of the first step, where the adapter is zero, from transformers' own logits in fp64."""
    run(values(tmp_path, steps=3, batch_size=50))
    rows = written_rows(tmp_path / "run")
    dropped = written_rows(tmp_path / "run", "dropped")
    assert rows
    assert len(rows) + len(dropped) == 7
    assert f"{len(dropped)} of 7 revisions are dropped" in capsys.readouterr().out
    config = single_stage(values(tmp_path)).config
    job = job_of(config, scrambled=False)
    total, count = 0.0, 0
    for row in rows:
        ids = [257, *(row["prompt"] + row["completion"]).encode(), 258]
        with torch.no_grad():
            logs = job.backbone.model.double()(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = 1 + len(row["prompt"].encode())
        total -= sum(float(logs[t - 1, ids[t]]) for t in range(start, len(ids)))
        count += len(ids) - start
    metrics = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    # A step of fifty examples takes each row as often as it goes into fifty: the mean is near that of one pass.
    assert metrics[0]["loss"] == pytest.approx(total / count, rel=0.1)
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_the_loss_is_the_mean_over_the_tokens_of_the_revisions(tmp_path):
    """Its gradient too, against PyTorch's cross-entropy of the whole logits."""
    job = job_of(single_stage(values(tmp_path)).config)
    job.train = [
        job.encoder.completion(Row("r", {"prompt": p, "completion": c})) for p, c in (("a", "bcd"), ("ef", "g"))
    ]
    (rows,) = micro_batches(job, job.train, [0, 1], None)
    loss, _ = loss_of(job, single_stage(values(tmp_path)).config)(rows)
    parameter = job.backbone.parameters_of("policy")[0]
    (gradient,) = torch.autograd.grad(loss, parameter)
    with job.backbone.using("policy"):
        logits = job.backbone.model(rows.batch.input_ids, attention_mask=rows.batch.attention_mask).logits
    targets = rows.batch.input_ids.where(rows.batch.mask.bool(), -100)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    assert_close({"": gradient}, {"": torch.autograd.grad(expected, parameter)[0]})


def test_a_run_that_is_stopped_while_it_revises_goes_on_behind_the_last_part(tmp_path, monkeypatch):
    run(values(tmp_path, output_dir=str(tmp_path / "whole")))
    stopped = values(tmp_path, output_dir=str(tmp_path / "stopped"))
    made, make = [], constitutional.drafts_of

    def drafts_of(job, config, prompts, part):
        made.append(part)
        if len(made) == 2:
            signal.raise_signal(signal.SIGTERM)
        return make(job, config, prompts, part)

    monkeypatch.setattr(constitutional, "drafts_of", drafts_of)
    with pytest.raises(Stopped, match="stopped at revisions"):
        run(stopped)
    assert made == [0, 0], "a trial, and the first part"
    run(stopped, resume="auto")
    assert made == [0, 0, 0, 0, 1], "a part that a signal came in is made again"
    assert written_rows(tmp_path / "stopped") == written_rows(tmp_path / "whole")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_revisions_alone_and_helpful_answers_beside_them(tmp_path, monkeypatch):
    run(values(tmp_path, data_only=True, reward=f"{folder()}/reward.py:score"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    evaluated = read_jsonl(tmp_path / "run" / "eval.jsonl")
    assert evaluated[0]["metrics"]["revisions"] == 0 < evaluated[1]["metrics"]["revisions"]
    assert "reward" in evaluated[1]["metrics"]
    seen = []
    log = Run.log
    monkeypatch.setattr(
        Run, "log", lambda self, *rest, **more: (seen.append(len(self.job.train)), log(self, *rest, **more))
    )
    run(values(tmp_path, helpful_data=str(folder() / "sft.jsonl"), steps=1, output_dir=str(tmp_path / "more")))
    assert seen == [len(written_rows(tmp_path / "more")) + 9]


def test_all_revisions_dropped_is_an_error_that_says_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(revision, "repetition", lambda text: 0.5)
    with pytest.raises(UserError, match=r"no revision is left of 7: look at .*/run/dropped, or raise max_repetition"):
        run(values(tmp_path, max_repetition=0.3))


def test_its_revisions_feed_another_stage_and_its_adapter_a_third(tmp_path):
    own = {key: value for key, value in values(tmp_path, steps=1).items() if key != "output_dir"}
    write_jsonl(tmp_path / "held.jsonl", [{"prompt": "h", "completion": "x"}])
    sft = {"algorithm": "sft", "model": {"from": "constitutional"}, "data": {"from": "constitutional"}, "steps": 1,
           "eval_data": str(tmp_path / "held.jsonl"), "report_to": "none"}  # fmt: skip
    (tmp_path / "s.yaml").write_text(json.dumps({"output_dir": str(tmp_path / "run"), "stages": [own, sft]}))
    launch(str(tmp_path / "s.yaml"), {}, dry_run=False, resume=None, overwrite=False)
    assert len(read_jsonl(tmp_path / "run" / "sft" / "metrics.jsonl")) == 1
