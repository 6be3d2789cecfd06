"""A process reward model pays the steps of a completion, tokenised as it was trained."""

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.peft_io import save_adapter
from rlhf_fast.models.tiny import byte_tokenizer, tiny
from rlhf_fast.rewards import load_rewards, write_stats
from rlhf_fast.rewards.adapter import Combination
from rlhf_fast.rewards.functions import Payment
from rlhf_fast.rewards.steps import ROLE, steps_of


def backbone() -> Backbone:
    return Backbone(tiny(0, hidden_size=32, layers=2, heads=2)[0])


@pytest.fixture
def folder(tmp_path):
    trained = backbone()
    trained.add_adapter("reward", rank=2, seed=1)
    trained.add_head("reward", seed=1)
    save_adapter(trained, "reward", tmp_path)
    write_stats(tmp_path, 0.5, 2.0, form="steps", step_separator="\n")
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_steps_end_behind_their_separator_and_blank_ones_are_none():
    assert list(steps_of("ab\n\n c\n", "\n")) == [(3, "ab"), (7, " c")]
    assert list(steps_of("ab\nc", "\n")) == [(3, "ab"), (4, "c")]
    assert list(steps_of("a##b##", "##")) == [(3, "a"), (6, "b")]
    assert list(steps_of("", "\n")) == [(0, "")]
    assert list(steps_of("\n", "\n")) == [(1, "\n")]


def test_every_step_is_paid_at_its_end_and_min_pays_the_worst(folder):
    ours = backbone()
    rewards = load_rewards({str(folder): 2.0}, ours)
    assert rewards.adapter is None
    judged = rewards(["q", "q"], ["ab\nc", "xyz"], {"completion_ids": [[0] * 4, [0] * 3]})
    expected = []
    for steps in (["ab", "c"], ["xyz"]):
        ids, ends = [257, *b"q"], []
        for step in steps:
            ids += [*step.encode(), 10]
            ends.append(len(ids) - 1)
        row = torch.tensor([ids])
        hidden = ours.hidden(row, torch.ones_like(row), [ROLE])[ROLE][0, ends]
        expected.append(((ours.head(ROLE)(hidden)[:, 0] - 0.5) / 2.0).tolist())
    for paid, scores, ends in zip(judged.payments, expected, [(3, 4), (3,)], strict=True):
        assert [payment.end for payment in paid] == list(ends)
        assert [payment.reward for payment in paid] == pytest.approx([2 * score for score in scores], abs=1e-5)
    assert judged.total.tolist() == pytest.approx([2 * sum(scores) for scores in expected], abs=1e-5)
    assert isinstance(judged.payments[0][0], Payment)
    worst = load_rewards({str(folder): 1.0}, backbone(), combination=Combination("min"))
    judged = worst(["q", "q"], ["ab\nc", "xyz"], {"completion_ids": [[0] * 4, [0] * 3]})
    assert judged.payments is None
    assert judged.total.tolist() == pytest.approx([min(scores) for scores in expected], abs=1e-5)


def test_another_combination_is_one_line(folder):
    with pytest.raises(UserError, match=r"reward_combine of the process reward model .* is mean or min, got uwo"):
        load_rewards({str(folder): 1.0}, backbone(), combination=Combination("uwo"))
