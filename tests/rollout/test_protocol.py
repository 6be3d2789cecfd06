"""Engines that give less than they were asked for, or something else; and transformers', which draw as the decoder."""

import threading

import pytest
import torch

from rlhf_fast.data.encoding import Prompt
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.tiny import tiny
from rlhf_fast.rollout import agreement, roll_out
from rlhf_fast.rollout.engines.continuous import ContinuousBatching
from rlhf_fast.rollout.engines.protocol import Ask, Rule, Sampled, sample_all

EOS = 258


@pytest.fixture
def backbone() -> Backbone:
    backbone = Backbone(tiny(0, hidden_size=32, layers=2, heads=2)[0])
    backbone.add_adapter("policy", rank=2, seed=0)
    torch.manual_seed(1)
    for parameter in backbone.parameters_of("policy"):
        parameter.data.normal_(std=0.3)
    return backbone


TOKENIZER = tiny(0, hidden_size=32, layers=1, heads=2)[1]
TEXTS = ("a", "bcd", "bcd", "a longer prompt", "a")
PROMPTS = [Prompt("", [257, *text.encode()], text, {"prompt": text}) for text in TEXTS]


class Scripted:
    """Gives what it is told to give."""

    name = "engine scripted"

    def __init__(self, *given):
        self.given, self.closed = given, False

    def sample(self, backbone, role, asked, rule):
        try:
            yield from self.given
        finally:
            self.closed = True


GOOD = Sampled([5, EOS], [-1.0, -2.0], [-1.0, -2.0])


@pytest.mark.parametrize(("given", "message"), [
    ([(1, GOOD)], "engine scripted gave 1 of 2 completions"),
    ([(0, GOOD), (0, GOOD)], "engine scripted gave 1 of 2 completions"),
    ([(1, GOOD), (0, Sampled([], [], []))], "completion 1 of 2: it has no token"),
    ([(1, Sampled([5], [-1.0], [-1.0])), (0, GOOD)], "2 of 2: it ends after 1 of 3 tokens without a stop token"),
    ([(0, Sampled([EOS, 5], [-1.0] * 2, [-1.0] * 2))], "it has 2 tokens and should have ended after 1"),
    ([(0, Sampled([5] * 4, [-1.0] * 4, [-1.0] * 4))], "it has 4 tokens and should have ended after 3"),
    ([(0, Sampled([5, 900, 5], [-1.0] * 3, [-1.0] * 3))], "token 900 is none of the model's 259"),
    ([(0, Sampled([5, EOS], [-1.0], [-1.0]))], "it has 1 log-probabilities for 2 tokens"),
    ([(0, Sampled([5, EOS], [-1.0, -9999.0], [0.0, 0.0]))], "-9999.0 is no log-probability of a token that was"),
    ([(0, Sampled([5, EOS], [-1.0, float("nan")], [-1.0, float("nan")]))], "nan is no log-probability"),
], ids=lambda x: x[:30] if isinstance(x, str) else "")  # fmt: skip
def test_what_comes_back_is_counted(given, message, backbone):
    engine = Scripted(*given)
    with pytest.raises(UserError, match=message):
        sample_all(engine, backbone, "policy", [Ask([1], 0), Ask([2], 1)], Rule(3, (EOS,), 0, logprobs=True))
    assert engine.closed


def test_completions_are_kept_by_prompt_and_what_was_kept_is_not_asked_for(backbone):
    asked = [Ask([1], 0), Ask([1], 1), Ask([2], 2), Ask([3], 3)]
    stored, told = {}, []

    def keep(name, make):
        return stored[name] if name in stored else stored.setdefault(name, make())

    rule = Rule(2, (EOS,), 0)
    one = [Sampled([token, 9], [], []) for token in range(4)]
    lost = Scripted((1, one[1]), (3, one[3]), (0, one[0]))
    with pytest.raises(UserError, match="gave 3 of 4"):
        sample_all(lost, backbone, "policy", asked, rule, keep=keep, ended=lambda *row: told.append(row))
    assert told == [(1, [1, 9]), (3, [3, 9]), (0, [0, 9])]
    again = Scripted((1, one[3]), (0, one[2]))
    assert sample_all(again, backbone, "policy", asked, rule, keep=keep) == one
    assert len(stored) == 3


def rolled(backbone, engine, rows=range(5), **options):
    torch.manual_seed(3)  # with which the first row and the third end
    return roll_out(
        backbone, TOKENIZER, [PROMPTS[row] for row in rows], max_new_tokens=30, temperature=1.3, keep_logprobs=True,
        row_ids=list(rows), engine=engine, **options,
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["transformers", ContinuousBatching()], ids=["generate", "continuous"])
def test_transformers_own_engines_draw_what_the_decoder_draws_by_the_adapter(engine, backbone):
    ended = []
    theirs = rolled(backbone, engine, top_k=200, on_finished=lambda *row: ended.append(row))
    ours = rolled(backbone, "local", top_k=200)
    assert theirs.completion_ids() == ours.completion_ids()
    assert 0 < int(ours.finished.sum()) < 5, "some end and some do not"
    finished = [row for row in range(5) if ours.finished[row]]
    assert sorted(ended) == [(row, ours.completions[row], ours.completion_ids()[row]) for row in finished]
    torch.testing.assert_close(theirs.sampler.logprobs, ours.sampler.logprobs, rtol=0, atol=2e-5)
    torch.testing.assert_close(theirs.sampler.drawn, ours.sampler.drawn, rtol=0, atol=2e-5)
    assert agreement(backbone, theirs.batch, theirs.sampler, 1.3).holds
    assert rolled(backbone, engine, top_k=200, role=None).completion_ids() != ours.completion_ids()
    part = rolled(backbone, engine, [3, 1], top_k=200)
    assert part.completion_ids() == [ours.completion_ids()[row] for row in (3, 1)]


def test_a_failure_in_the_thread_of_continuous_batching_is_one_line(backbone, capfd):
    forward, calls, before = backbone.model.forward, iter(range(100)), threading.active_count()

    def failing(*args, **options):
        if next(calls) == 5:
            raise RuntimeError("the device is gone\nwith more lines")
        return forward(*args, **options)

    backbone.model.forward = failing
    with pytest.raises(UserError, match=r"^engine transformers \(continuous batching\) failed: the device is gone$"):
        rolled(backbone, ContinuousBatching())
    assert "Traceback" not in capfd.readouterr().err
    assert threading.active_count() == before


def test_weights_that_are_not_finite_are_one_line(backbone):
    for parameter in backbone.parameters_of("policy"):
        parameter.data.fill_(torch.nan)
    with pytest.raises(UserError, match="are not finite: a lower learning_rate"):
        rolled(backbone, ContinuousBatching())


def test_engines_sample_from_one_role(backbone):
    with pytest.raises(UserError, match="samples from one role; a mixture of two, or steering, takes engine: local"):
        rolled(backbone, ContinuousBatching(), mixture=0.5)
    base = rolled(backbone, "local", role=None)
    assert rolled(backbone, ContinuousBatching(), mixture=1.0).completion_ids() == base.completion_ids()
