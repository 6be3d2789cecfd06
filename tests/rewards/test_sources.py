import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.peft_io import save_adapter
from rlhf_fast.models.tiny import byte_tokenizer, tiny
from rlhf_fast.rewards import load_rewards, write_stats


def backbone() -> Backbone:
    return Backbone(tiny(0, hidden_size=32, layers=2, heads=2)[0])


@pytest.fixture
def adapter(tmp_path):
    trained = backbone()
    trained.add_adapter("reward", rank=2, seed=1)
    trained.add_head("reward")
    torch.nn.init.normal_(trained.head("reward").weight)
    save_adapter(trained, "reward", tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def function(tmp_path):
    (tmp_path / "fn.py").write_text("def length(completions):\n    return [len(c) for c in completions]\n")
    return f"{tmp_path}/fn.py:length"


def test_sources_are_weighted_and_adapter_scores_standardised(adapter, function):
    write_stats(adapter, mean=3.0, std=2.0)
    rewards = load_rewards({function: 0.5, str(adapter): 10.0}, backbone())
    total, parts, _ = rewards(["p", "p"], ["abcd", ""], {}, torch.tensor([3.0, 7.0]))
    assert parts[str(adapter)].tolist() == [0.0, 2.0]
    assert total.tolist() == [2.0, 20.0]


def test_an_adapter_without_statistics_counts_as_it_is(adapter):
    rewards = load_rewards({str(adapter): 1.0}, backbone())
    assert rewards([""], [""], {}, torch.tensor([4.0]))[0].tolist() == [4.0]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"mean": 0}',
        '{"mean": 0, "std": 0}',
        '{"mean": NaN, "std": 1}',
        '{"mean": 1%s, "std": 1}' % ("0" * 400),
        "[" * 100_000,
    ],
)
def test_broken_statistics_are_refused(adapter, text):
    (adapter / "reward_stats.json").write_text(text)
    with pytest.raises(UserError, match=r"reward_stats\.json"):
        load_rewards({str(adapter): 1.0}, backbone())


def test_a_second_adapter_is_refused(adapter):
    with pytest.raises(UserError, match="only one reward adapter"):
        load_rewards({str(adapter): 1.0, f"{adapter}/": 1.0}, backbone())


def test_an_adapter_without_a_score_head_is_refused(tmp_path):
    trained = backbone()
    trained.add_adapter("policy", rank=2, seed=1)
    save_adapter(trained, "policy", tmp_path / "policy")
    with pytest.raises(UserError, match="is an adapter without a score head, such as a policy's"):
        load_rewards({str(tmp_path / "policy"): 1.0}, backbone())


def classifier(folder, labels=1):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_labels=labels, pad_token_id=256,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def test_a_reward_model_folder_scores_prompt_and_completion_with_its_own_tokenizer(tmp_path):
    model = classifier(tmp_path / "rm")
    rewards = load_rewards({str(tmp_path / "rm"): 1.0}, backbone())
    total, *_ = rewards(["ab", "a"], ["c", "xyz"], {})
    for score, text in zip(total.tolist(), (b"abc", b"axyz"), strict=True):
        ids = torch.tensor([[257, *text, 258]])
        with torch.no_grad():
            assert score == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-5)


def test_a_reward_model_sees_conversations_through_its_chat_template(tmp_path):
    model = classifier(tmp_path / "rm")
    rewards = load_rewards({str(tmp_path / "rm"): 1.0}, backbone(), chat=True)
    total, *_ = rewards(["hi", [{"role": "user", "content": "hi"}]], ["yo", "yo"], {})
    ids = torch.tensor([[257, *b"user: hi\nassistant: yo", 258]])
    with torch.no_grad():
        assert total.tolist() == pytest.approx([model(input_ids=ids).logits.item()] * 2, abs=1e-5)


def test_a_model_without_a_score_head_is_no_reward_model(tmp_path):
    model, tokenizer = tiny(0, hidden_size=32, layers=1, heads=2)
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(UserError, match="has no score head with one output"):
        load_rewards({str(tmp_path / "lm"): 1.0}, backbone())


def three_outputs(folder, text):
    """A classifier with those outputs, and its logits for the text."""
    torch.manual_seed(0)
    names = {0: "verbose", 1: "helpful", 2: "harmless"}
    config = LlamaConfig(vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, id2label=names, pad_token_id=259)  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with torch.no_grad():
        return model(input_ids=torch.tensor([[257, *text, 258]])).logits[0].tolist()


def test_a_folder_and_a_label_are_the_reward_of_that_output(tmp_path):
    logits = three_outputs(tmp_path / "rm", b"ab")
    rewards = load_rewards({f"{tmp_path}/rm:helpful": 1.0, f"{tmp_path}/rm:2": 10.0}, backbone())
    total, parts, _ = rewards(["a"], ["b"], {})
    assert total.tolist() == pytest.approx([logits[1] + 10 * logits[2]], abs=1e-4)
    assert list(parts) == [f"{tmp_path}/rm:helpful", f"{tmp_path}/rm:2"]


@pytest.mark.parametrize(("label", "reason"), [
    ("", "has 3 outputs: choose one by ':LABEL'"), (":polite", "has no output 'polite'"), (":3", "has no output '3'"),
])  # fmt: skip
def test_a_label_that_is_missing_or_unknown_is_an_error_with_those_that_there_are(label, reason, tmp_path):
    three_outputs(tmp_path, b"ab")
    with pytest.raises(UserError) as error:
        load_rewards({f"{tmp_path}{label}": 1.0}, backbone())
    assert str(error.value) == f"reward model {tmp_path} {reason} (verbose, helpful, harmless)"


def test_a_folder_that_is_neither_is_refused(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="is neither"):
        load_rewards({str(tmp_path): 1.0}, backbone())
