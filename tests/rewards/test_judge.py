"""Judges in this process: probabilities against transformers' own logits; what is asked, in which order, by what."""

import itertools
import re

import pytest
import torch

from rlhf_fast.data.encoding import Encoder
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.tiny import tiny
from rlhf_fast.rewards.judge import Judge
from rlhf_fast.rewards.speakers import LocalSpeaker, Question, exact_probabilities, read_verdict

LABELS = [str(number) for number in range(1, 11)]


@pytest.fixture(scope="module")
def backbone():
    model, tokenizer = tiny(0, hidden_size=32, layers=2, heads=2)
    backbone = Backbone(model)
    backbone.add_adapter("judge", rank=2, seed=1)
    with torch.no_grad():
        for parameter in backbone.parameters_of("judge"):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return backbone, tokenizer


def speaker(backbone, role=None, chat=False):
    return LocalSpeaker(backbone[0], Encoder(backbone[1], 400, 512, chat), role, rows_per_pass=2)


def next_probabilities(backbone, text, role):
    """transformers' own softmax behind the text, fp64."""
    model, tokenizer = backbone[0].model, backbone[1]
    with torch.no_grad(), backbone[0].using(role):
        return model(tokenizer(text, return_tensors="pt").input_ids).logits[0, -1].double().softmax(0)


@pytest.mark.parametrize("role", [None, "judge"])
@pytest.mark.parametrize("chat", [False, "auto"])
def test_the_probability_of_a_rating_is_that_of_its_tokens_and_no_more(role, chat, backbone):
    """Of the bytes "1" and "0", 10 is P(1) P(0 | 1), and 1 is what is left of P(1)."""
    questions = [Question("How good is it?", "Rating:"), Question("And this one, which is longer?", "Rating:")]
    found = speaker(backbone, role, chat).verdicts(questions, LABELS, 0)
    for question, row in zip(questions, found, strict=True):
        text = f"user: {question.text}\nassistant: " if chat else f"{question.text}\nRating:"
        space = "" if chat else " "
        if space:
            first = next_probabilities(backbone, text, role)[ord(" ")] * next_probabilities(backbone, text + " ", role)
        else:
            first = next_probabilities(backbone, text, role)
        ten = first[ord("1")] * next_probabilities(backbone, f"{text}{space}1", role)[ord("0")]
        expected = torch.stack([first[ord(label)] for label in LABELS[:-1]] + [ten])
        expected[0] -= ten
        torch.testing.assert_close(row, expected / expected.sum(), rtol=1e-4, atol=1e-7)


def test_labels_of_several_tokens_share_what_they_begin_with():
    """Against the sum over all sequences of three tokens of a small vocabulary, of which each begins with one label."""
    torch.manual_seed(0)
    table = {}

    def following(prefix, tokens):
        logits = table.setdefault(prefix, torch.randn(1, 3, dtype=torch.float64))
        return logits.log_softmax(1)[:, list(tokens)]

    labels = [(0,), (0, 1), (0, 1, 2), (2,)]
    found = exact_probabilities(labels, following)[0]
    mass = dict.fromkeys(labels, 0.0)
    for sequence in itertools.product(range(3), repeat=3):
        p = 1.0
        for i in range(3):
            p *= float(following(sequence[:i], range(3)).exp()[0, sequence[i]])
        begun = [label for label in labels if sequence[: len(label)] == label]
        if begun:
            mass[max(begun, key=len)] += p
    expected = torch.tensor([mass[label] for label in labels], dtype=torch.float64)
    torch.testing.assert_close(found, expected / expected.sum())


def test_the_reward_is_the_expected_rating_on_the_scale_from_minus_one_to_one(backbone):
    judge = Judge(speaker(backbone), scale=(1, 10))
    rewards = judge.rewards(["p", "p"], ["good", "bad"], {})
    asked = ("Question:\np\n\nAnswer:\ngood\n\nRate the answer from 1 to 10, 10 being the best. "
             "Answer with a number from 1 to 10 alone.")  # fmt: skip
    p = judge.speaker.verdicts([Question(asked, "Rating:")], LABELS, 0)[0]
    expected = 2 * (sum((i + 1) * float(p[i]) for i in range(10)) - 1) / 9 - 1
    assert rewards[0].item() == pytest.approx(expected, abs=1e-6)


class Scripted:
    """A speaker whose verdicts are a function of the question; it remembers what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked, self.written, self.calls = answer, [], [], 0

    def verdicts(self, questions, labels, thought_tokens):
        self.asked += [q.text for q in questions]
        return torch.tensor([self.answer(q.text) for q in questions], dtype=torch.float64)

    def write(self, texts, max_tokens):
        self.written += texts
        return [f"argument {len(self.written)}" for _ in texts]


def likes_long_and_first(text):
    """0.8 for the longer answer, and 0.1 more for the place of the first."""
    first, second = re.search(r"Answer 1:\n(.*)\n\nAnswer 2:\n(.*)\n\n", text).groups()
    p = 0.5 + 0.3 * ((len(first) > len(second)) - (len(first) < len(second))) + 0.1
    return [p, 1 - p]


def test_both_orders_are_averaged_and_contradictions_counted():
    judge = Judge(Scripted(likes_long_and_first), form="compare")
    compared = judge.compare(["q", "q", "q"], ["long", "x", "ab"], ["x", "long", "cd"], {})
    # The place cancels: (0.9 + (1 - 0.3)) / 2; of equal lengths both orders take the first.
    assert compared.probability.tolist() == pytest.approx([0.8, 0.2, 0.5])
    assert judge.metrics()["judge_inconsistent"] == pytest.approx(1 / 3)
    assert judge.metrics()["judge_inconsistent"] == 0.0, "counted since the last call"


def test_after_thinking_probabilities_stay_in_the_middle():
    judge = Judge(Scripted(likes_long_and_first), form="compare", clamp=0.4)
    assert judge.compare(["q", "q"], ["long", "x"], ["x", "long"], {}).probability.tolist() == [0.6, 0.4]


def test_a_comparison_as_a_reward_is_the_share_of_games_won_within_the_prompt():
    judge = Judge(Scripted(likes_long_and_first), form="compare")
    rewards = judge.rewards(["a", "b", "a", "a"], ["xxx", "alone", "xx", "x"], {})
    # 0.8 and 0.8 won, 0.2 and 0.8, 0.2 and 0.2; what has no rival is even.
    assert rewards.tolist() == pytest.approx([0.6, 0.0, 0.0, -0.6])
    against = Judge(Scripted(likes_long_and_first), form="compare", against="gold")
    assert against.rewards(["a", "a"], ["xxx", "x"], {"gold": ["xx", "xx"]}).tolist() == pytest.approx([0.6, -0.6])


def test_columns_that_the_policy_does_not_see_and_criteria_reach_the_question():
    judge = Judge(Scripted(lambda text: [0.0] * 9 + [1.0]), template="{prompt}|{facts}|{completion}|{criterion}",
                  criteria=["honesty", "brevity"])  # fmt: skip
    scores = judge.scores([[{"role": "user", "content": "hi"}]], ["yo {x}"], {"facts": ["sky: blue"]})
    assert scores.tolist() == [[10.0, 10.0]]
    assert judge.speaker.asked == [f"user: hi|sky: blue|yo {{x}}|Look at this alone: {name}. "
                                   for name in ("honesty", "brevity")]  # fmt: skip
    judge.check_rows([Row("d:1", {"prompt": "", "facts": ""})])
    with pytest.raises(UserError, match=r"judge asks for 'facts', which is no column of the data \(prompt, other\)"):
        judge.check_rows([Row("d:1", {"prompt": "", "other": ""})])


def test_one_principle_is_drawn_for_both_orders_by_what_is_judged_and_the_seed():
    def drawn(seed):
        judge = Judge(Scripted(likes_long_and_first), form="compare", principles=list("ABCD"), seed=seed)
        compared = judge.compare(["q"] * 40, [f"a{i}" for i in range(40)], ["b"] * 40, {})
        said = [re.search(r"principle: (\w)", text)[1] for text in judge.speaker.asked]
        assert said[:40] == said[40:] == compared.principles
        return compared.principles

    assert drawn(0) == drawn(0) != drawn(1)
    assert set(drawn(0)) == set("ABCD")


def test_a_debate_is_argued_in_turns_and_read_by_the_judge():
    judge = Judge(Scripted(likes_long_and_first), form="compare", debate=2)
    judge.compare(["q"], ["long"], ["x"], {})
    written = judge.speaker.written
    assert len(written) == 2 * 2 * 2  # turns, sides, orders
    assert ["answer 1 is the better" in text for text in written] == [True, True, False, False] * 2
    assert "For answer 1: argument" in written[-1]
    assert judge.speaker.asked[0].count("For answer 1: argument") == judge.speaker.asked[0].count("For answer 2:") == 2


def test_what_cannot_be_read_is_even_and_counted():
    answers = iter([[0.9, 0.1], [torch.nan] * 2, [torch.nan] * 2, [torch.nan] * 2])
    judge = Judge(Scripted(lambda text: next(answers)), form="compare")
    compared = judge.compare(["q", "q"], ["a", "b"], ["c", "d"], {})
    assert compared.probability[0].item() == pytest.approx(0.9)
    assert compared.probability[1].isnan()
    assert judge.metrics()["judge_unreadable"] == 0.75


@pytest.mark.parametrize(("text", "last", "expected"), [
    ("7", False, "7"), ("Rating: 10.", False, "10"), ("7 of 10", False, "7"), ("First 3, in the end 8", True, "8"),
    ("about 11", False, None), ("10x", False, None), ("none", False, None),
])  # fmt: skip
def test_verdicts_are_read_as_whole_words(text, last, expected):
    row = read_verdict(text, None, LABELS, last=last)
    assert (None if row.isnan().any() else LABELS[int(row.argmax())]) == expected


def test_a_verdict_whose_token_may_go_on_to_a_longer_label_counts_as_certain():
    tokens = [["1", {"1": 0.6, "2": 0.4}]]
    assert read_verdict("10", tokens, LABELS, last=False)[9] == 1.0, "the token 1 is not the verdict 10"
    assert read_verdict("1", tokens, LABELS, last=False)[0] == 1.0, "P(1) may be that of 10"
    assert read_verdict("1", tokens, LABELS[:2], last=False).tolist() == [0.6, 0.4]


def test_a_local_judge_thinks_first_and_then_is_read(backbone, monkeypatch):
    thinker = speaker(backbone, "judge", "auto")
    monkeypatch.setattr(LocalSpeaker, "write", lambda self, texts, tokens: [f"thought of {tokens}"] * len(texts))
    found = thinker.verdicts([Question("q", "Better answer:")], ["1", "2"], 5)
    text = "user: q\nassistant: thought of 5\nBetter answer:"
    p = next_probabilities(backbone, text + " ", "judge")
    torch.testing.assert_close(found[0], (p[[ord("1"), ord("2")]] / p[[ord("1"), ord("2")]].sum()), rtol=1e-4, atol=0)


def test_writing_is_greedy_and_by_the_role(backbone):
    state = torch.get_rng_state()
    first = speaker(backbone, "judge").write(["ab", "c"], 4)
    torch.set_rng_state(state)
    assert first == speaker(backbone, "judge").write(["ab", "c"], 4)
    ids = backbone[1]("ab").input_ids
    for _ in range(4):
        with torch.no_grad(), backbone[0].using("judge"):
            ids.append(int(backbone[0].model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert first[0] == backbone[1].decode(ids[3:], skip_special_tokens=True).strip()
