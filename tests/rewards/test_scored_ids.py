"""The same reward model, as an adapter of the backbone and as a folder, must read the same ids at the same place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BertForSequenceClassification,
    DebertaV2ForSequenceClassification,
    FNetForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaForSequenceClassification,
)

from rlhf_fast.data.batches import Batch
from rlhf_fast.data.encoding import Encoder, Prompt
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.classifier import classify
from rlhf_fast.rewards.model import RewardModel
from rlhf_fast.rollout import roll_out
from tests.data.chat import TEMPLATES, tokenizer_of
from tests.rollout.script import Script

USER = {"role": "user", "content": "What is the weather?"}
PREFILL = {"role": "assistant", "content": "It is"}


def both_models(vocab: int) -> tuple[Backbone, LlamaForSequenceClassification]:
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_labels=1
    )
    torch.manual_seed(0)
    backbone, classifier = Backbone(LlamaForCausalLM(config).eval()), LlamaForSequenceClassification(config).eval()
    classifier.model.load_state_dict(backbone.model.model.state_dict())
    backbone.add_adapter("policy", rank=2, seed=0)
    backbone.add_adapter("reward", rank=2, seed=1)  # its delta is zero
    backbone.add_head("reward")
    with torch.no_grad():
        backbone.head("reward").weight.copy_(classifier.score.weight)
    return backbone, classifier


@pytest.mark.parametrize("name", ["chatml", "llama 2", "llama 3", "phi", "zephyr"])
def test_a_reward_adapter_and_a_reward_model_folder_give_the_same_score(name, tmp_path):
    tokenizer = tokenizer_of("byte level", TEMPLATES[name])
    backbone, classifier = both_models(len(tokenizer))
    classifier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = Encoder(tokenizer, 200, 200)
    folder = RewardModel(str(tmp_path), device=torch.device("cpu"))
    cases = [
        ([USER], " sunny", True),
        ([USER, PREFILL], " warm", True),
        ("It is", " no", False),
        ([USER], "yes", False),
    ]
    for given, answer, closed in cases:
        prompt = encoder.prompt(Row("", {"prompt": given}))
        batch, completion = answered(backbone, tokenizer, prompt, answer, closed=closed)
        assert completion.strip() == answer.strip()
        assert folder.encoder.scored(given, completion) == batch.input_ids[0].tolist()
        scores = backbone.score(batch.input_ids, batch.attention_mask, batch.mask).scores
        torch.testing.assert_close(folder([given], [completion]), scores, rtol=0, atol=1e-5)
    # And a reward model is trained on those: the oracle is the template's rendering of the whole conversation.
    conversation = [USER, {"role": "assistant", "content": " sunny"}]
    oracle = tokenizer.apply_chat_template(conversation, return_dict=False)
    assert encoder.pair(Row("", {"chosen": conversation, "rejected": conversation}))[0].ids == oracle
    batch, _ = answered(backbone, tokenizer, encoder.prompt(Row("", {"prompt": [USER]})), " sunny", closed=True)
    assert batch.input_ids[0].tolist() == oracle


def answered(backbone: Backbone, tokenizer, prompt: Prompt, answer: str, *, closed: bool) -> tuple[Batch, str]:
    """A rollout in which the policy has written this answer as the template has it, with or without its end."""
    given = Row("", {"prompt": prompt.columns["prompt"], "completion": answer})
    example = Encoder(tokenizer, 200, 200).completion(given)
    written = [i for i, m in zip(example.ids, example.learnt, strict=True) if m]
    if not closed:
        written = written[: -1 - prompt.turn_end.ids.index(prompt.turn_end.stop)]

    rollout = roll_out(backbone, tokenizer, [prompt], max_new_tokens=len(written), drawing=Script(written))
    assert rollout.finished.item() == closed
    return rollout.batch, rollout.completions[0]


def test_a_text_that_ends_in_any_id_is_scored_at_its_end():
    """transformers' classifiers look for the last token that is not the padding."""
    _, classifier = both_models(40)
    rows = [[5, 6, 0], [5, 1], [7, 2, 3, 4]]
    alone = torch.cat([classify(classifier, [row]) for row in rows])
    classifier.config.pad_token_id = 39
    with torch.no_grad():
        oracle = torch.stack([classifier(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])
    torch.testing.assert_close(classify(classifier, rows), oracle)
    torch.testing.assert_close(alone, oracle)


LETTERS = [mark + letter for mark in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz"] + ["?"]
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def bert_tokenizer() -> PreTrainedTokenizerBase:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = Tokenizer(models.WordPiece({token: id for id, token in enumerate([*special, *LETTERS])}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def saved_classifier(kind: type, folder: Path, **entries: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier of BERT's kind, whose tokenizer has [CLS] and [SEP] and no EOS."""
    tokenizer = bert_tokenizer()
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**BERT, "vocab_size": len(tokenizer), **entries})).eval()
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


PROMPT, ANSWER = "Is it?", " It is sunny"


def own_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits


@pytest.mark.parametrize(
    "kind", [BertForSequenceClassification, RobertaForSequenceClassification, DebertaV2ForSequenceClassification]
)
def test_a_reward_model_of_berts_kind_reads_what_its_tokenizer_makes_of_the_text(kind, tmp_path):
    model, tokenizer = saved_classifier(kind, tmp_path, max_position_embeddings=24, num_labels=1)
    folder = RewardModel(str(tmp_path), device=torch.device("cpu"))
    oracle = torch.cat([own_logits(model, tokenizer, PROMPT + answer)[:, 0] for answer in (ANSWER, " no")])
    torch.testing.assert_close(folder([PROMPT] * 2, [ANSWER, " no"]), oracle, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [BertForSequenceClassification, RobertaForSequenceClassification])
def test_a_text_longer_than_its_positions_loses_the_prompts_first_words_and_no_special_token(kind, tmp_path):
    _, tokenizer = saved_classifier(kind, tmp_path, max_position_embeddings=24, num_labels=1)
    folder = RewardModel(str(tmp_path), device=torch.device("cpu"))
    ids = folder.encoder.scored(PROMPT * 20, ANSWER)
    room = 24 if kind is BertForSequenceClassification else 22  # RoBERTa's positions start at 2
    assert (len(ids), ids[0], ids[-1]) == (room, tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert folder([PROMPT * 20], [ANSWER]).isfinite().all()


@pytest.mark.parametrize(("label", "output"), [("helpful", 1), ("2", 2), ("harmless: yes", 2)])
def test_a_label_says_which_of_several_outputs_is_the_reward(label, output, tmp_path):
    names = {0: "verbose", 1: "helpful", 2: "harmless: yes"}
    model, tokenizer = saved_classifier(BertForSequenceClassification, tmp_path, id2label=names)
    folder = RewardModel(str(tmp_path), label, device=torch.device("cpu"))
    oracle = own_logits(model, tokenizer, PROMPT + ANSWER)[:, output]
    torch.testing.assert_close(folder([PROMPT], [ANSWER]), oracle, rtol=0, atol=1e-5)


def test_a_classifier_whose_score_depends_on_the_padding_is_refused(tmp_path):
    saved_classifier(FNetForSequenceClassification, tmp_path, num_labels=1)
    with pytest.raises(UserError, match=r"padding changes the score of a FNetForSequenceClassification by \d"):
        RewardModel(str(tmp_path), device=torch.device("cpu"))
