"""Functions that judge each completion by itself: scores and errors of the batch, while others are sampled."""

import json
import threading
import time

import pytest
import torch

from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.rewards.functions import call, check_rows, load_function
from rlhf_fast.rewards.one_by_one import OneByOne
from rlhf_fast.rollout.decoder import Decoder
from rlhf_fast.training.experience import collect, prompts_of_step
from rlhf_fast.training.job import seed_everything
from tests.training.test_experience import trained
from tests.training.tiny_runs import config_of, job_of

PROMPTS, COMPLETIONS = ["p", "q", "p"], ["a", "bbb", "cc"]
COLUMNS = {"tag": [[1], [2], [3]], "completion_ids": [[1, 9], [2, 2, 2, 9], [3, 3, 9]]}


def ask(function, timeout=None):
    return call("fn", function, PROMPTS, COMPLETIONS, COLUMNS, timeout)


def steps(prompts, completions, completion_ids, tag):
    rows = zip(prompts, completions, completion_ids, tag, strict=True)
    return [[(1, len(ids) + tag[0]), (len(text), ord(prompt))] for prompt, text, ids, tag in rows]


@pytest.mark.parametrize("function", [
    lambda completions: [len(c) for c in completions],
    lambda completions: torch.tensor([0.5 * len(c) for c in completions]),
    lambda completion_ids: [[0.5] * len(ids) for ids in completion_ids],
    lambda **given: [len(text) * tag[0] for text, tag in zip(given["completions"], given["tag"], strict=True)],
    steps,
])  # fmt: skip
def test_scores_and_payments_are_those_of_the_batch(function):
    alone, together = ask(OneByOne(function)), ask(function)
    torch.testing.assert_close(alone.scores, together.scores)
    assert alone.payments == together.payments


@pytest.mark.parametrize(("function", "message"), [
    (lambda completions: [1 / (len(c) - 3) for c in completions], r"raised ZeroDivisionError: .*\(example 1: comp.*'b"),
    (lambda completions: [None if c == "cc" else 1.0 for c in completions], "returned None for example 2"),
    (lambda completions: [[0.5] for _ in completions], "returned 1 numbers for example 0, which has 2 tokens"),
    (lambda completions: 1.0, "must return a list of 3 numbers, got float"),
    (lambda completions: [], "returned 0 values for 3 completions"),
    (lambda completions: exit(3), r"raised SystemExit: 3 \(example 0"),
])  # fmt: skip
def test_errors_are_those_of_the_batch(function, message):
    for asked in (function, OneByOne(function)):
        with pytest.raises(UserError, match=message):
            ask(asked)


def test_one_that_hangs_has_the_time_of_the_batch_and_is_named():
    def score(completions):
        if completions == ["bbb"]:
            time.sleep(30)
        return [0.0] * len(completions)

    begin = time.monotonic()
    with pytest.raises(
        UserError, match=r"TimeoutError: no answer in 0.3 s \(reward_timeout\) \(example 1: comp.*'bbb'"
    ):
        ask(OneByOne(score), timeout=0.3)
    assert time.monotonic() - begin < 5


def test_calls_are_made_one_at_a_time_in_the_order_in_which_rows_come():
    seen, inside = [], []

    def score(completions, tag):
        inside.append(1)
        time.sleep(0.01)
        seen.append((completions[0], len(inside), threading.current_thread() is threading.main_thread()))
        inside.pop()
        return [float(tag[0][0])]

    function = OneByOne(score)
    rows = [{"completions": [c], "tag": [t]} for c, t in zip(COMPLETIONS, COLUMNS["tag"], strict=True)]
    function.submit(2, rows[2])
    function.submit(0, rows[0])
    assert ask(function).scores.tolist() == [1.0, 2.0, 3.0]
    assert seen == [("cc", 1, False), ("a", 1, False), ("bbb", 1, False)]
    assert ask(function).scores.tolist() == [1.0, 2.0, 3.0]
    assert len(seen) == 6, "a batch is asked anew"


def test_what_was_submitted_of_another_row_is_asked_again():
    function = OneByOne(lambda completions, tag: [len(c) + t[0] for c, t in zip(completions, tag, strict=True)])
    function.submit(0, {"completions": ["of an earlier batch"], "tag": [COLUMNS["tag"][0]]})
    function.submit(1, {"completions": ["bbb"], "tag": [[7]]})
    assert ask(function).scores.tolist() == [2.0, 5.0, 5.0]


def test_an_attribute_of_the_function_asks_for_it_and_columns_are_checked(tmp_path):
    (tmp_path / "f.py").write_text(
        "def score(completions, answer):\n    return [0.0] * len(completions)\n"
        "def alone(completions, answer):\n    return [0.0] * len(completions)\n"
        "alone.one_by_one = True\n"
    )
    assert not isinstance(load_function(f"{tmp_path}/f.py:score"), OneByOne)
    alone = load_function(f"{tmp_path}/f.py:alone")
    assert isinstance(alone, OneByOne)
    with pytest.raises(UserError, match="fn needs 'answer', which is no column"):
        check_rows("fn", alone, [Row("d:1", {"prompt": "p"})])


REWARD = """
import json


def score(prompts, completions, completion_ids, tag):
    with open(__file__ + ".seen", "a") as file:
        file.writelines(json.dumps(c) + "\\n" for c in completions)
    return [len(c) % 7 + 0.1 * len(ids) + 0.01 * t for c, ids, t in zip(completions, completion_ids, tag)]


def alone(prompts, completions, completion_ids, tag):
    return score(prompts, completions, completion_ids, tag)


alone.one_by_one = True
"""


@pytest.mark.parametrize("as_cost", [False, True])
def test_finished_rows_are_judged_while_others_are_generated(as_cost, tmp_path, monkeypatch):
    (tmp_path / "reward.py").write_text(REWARD)
    changes = {"cost": f"{tmp_path}/reward.py:alone", "cost_limit": 1.0} if as_cost else {}
    config = config_of("grpo", batch_size=16, max_new_tokens=24, **changes | (
        {} if as_cost else {"reward": f"{tmp_path}/reward.py:alone"}
    ))  # fmt: skip
    job, eos, early = job_of(config), 258, []
    likely = job.backbone.model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: logits + 3.0 * (torch.arange(logits.shape[-1]) == eos)
    )
    place = tmp_path / "reward.py.seen"

    def seen():
        return [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []

    run = Decoder.run

    def generated(self, rows, tokens):
        run(self, rows, tokens)
        finished = sum(row.tokens[-1] == eos for row in rows)
        until = time.monotonic() + 5  # generation has not returned yet: the other thread may be slow
        while len(seen()) < finished and time.monotonic() < until:
            time.sleep(0.001)
        early.extend(seen())

    monkeypatch.setattr(Decoder, "run", generated)
    seed_everything(0)
    place.unlink()  # of the trial before the run
    rollout = collect(job, config, prompts_of_step(job, config, 0)).rollout
    likely.remove()
    done = [text for text, finished in zip(rollout.completions, rollout.finished.tolist(), strict=True) if finished]
    assert 4 < len(done) < 16
    assert sorted(early) == sorted(done)
    assert sorted(seen()) == sorted(rollout.completions), "each once"


def test_a_run_is_the_same_either_way(tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    runs = [
        trained("grpo", 3, reward=f"{tmp_path}/reward.py:{name}", max_new_tokens=8, micro_batch_size=2)[1]
        for name in ("score", "alone")
    ]
    assert runs[0] == runs[1]
