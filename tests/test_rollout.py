import pytest
import torch

from rlhf_fast.data.encoding import Prompt
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.tiny import tiny
from rlhf_fast.rollout import roll_out, stop_ids

EOS, PAD = 258, 256


@pytest.fixture
def backbone() -> Backbone:
    made = Backbone(tiny(0, hidden_size=32, layers=2, heads=2)[0])
    made.add_adapter("policy", rank=2, seed=0)
    return made


@pytest.fixture
def tokenizer():
    return tiny(0, hidden_size=32, layers=1, heads=2)[1]


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt("", [257, *text.encode()], text, {"prompt": text, "n": i}) for i, text in enumerate(texts)]


def scripted(backbone, *rows: list[int]):
    """Let generation return these completions, whatever the model says."""

    def generate(input_ids, attention_mask, generation_config):
        width = max(map(len, rows))
        tail = torch.tensor([[*row, *[generation_config.pad_token_id] * (width - len(row))] for row in rows])
        return torch.cat([input_ids, tail], dim=1)

    backbone.model.generate = generate


def test_a_completion_ends_with_its_first_eos_and_the_mask_marks_just_it(backbone, tokenizer):
    scripted(backbone, [97, EOS, 98, 99], [100, 101, 102, 103])
    rollout = roll_out(backbone, tokenizer, prompts("a", "bcd"), max_new_tokens=4)
    assert rollout.completions == ["a", "defg"]
    assert rollout.finished.tolist() == [True, False]
    batch = rollout.batch
    assert batch.input_ids.tolist() == [[257, 97, 97, EOS, *[PAD] * 4], [257, 98, 99, 100, 100, 101, 102, 103]]
    assert batch.mask.tolist() == [[0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert batch.attention_mask.sum(1).tolist() == [4, 8]


def test_a_policy_without_finite_hidden_states_is_one_line(backbone, tokenizer):
    with torch.no_grad():
        for parameter in backbone.parameters_of("policy"):
            parameter.fill_(float("nan"))
    with pytest.raises(UserError, match="hidden states are not finite: a lower learning_rate"):
        roll_out(backbone, tokenizer, prompts("a"), max_new_tokens=2)


def test_an_immediate_eos_is_an_empty_completion_of_one_token(backbone, tokenizer):
    scripted(backbone, [EOS], [EOS])
    rollout = roll_out(backbone, tokenizer, prompts("a", "b"), max_new_tokens=4)
    assert rollout.completions == ["", ""]
    assert rollout.batch.mask.sum(1).tolist() == [1, 1]


def test_a_tokenizer_whose_pad_is_eos_still_ends_completions_at_the_eos(backbone, tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    scripted(backbone, [97, EOS], [98, 99])
    rollout = roll_out(backbone, tokenizer, prompts("a", "b"), max_new_tokens=2)
    assert rollout.batch.mask.sum(1).tolist() == [2, 2]
    assert rollout.finished.tolist() == [True, False]


def test_the_models_own_stop_tokens_stop_too(backbone, tokenizer):
    backbone.model.generation_config.eos_token_id = [10, 11]
    assert stop_ids(backbone, tokenizer) == [10, 11, EOS]


def test_sampling_settings_of_the_model_folder_do_not_leak_in(backbone, tokenizer):
    def sample():
        torch.manual_seed(1)
        return roll_out(backbone, tokenizer, prompts("a") * 8, max_new_tokens=6).completions

    plain = sample()
    backbone.model.generation_config.update(top_k=1, top_p=0.1, repetition_penalty=5.0, min_new_tokens=6)
    assert sample() == plain
    assert len(set(plain)) > 4


def test_left_padding_for_generation_changes_no_token(backbone, tokenizer):
    """A cold temperature makes the choice deterministic: alone and beside a longer prompt it must be the same."""
    alone = roll_out(backbone, tokenizer, prompts("ab"), max_new_tokens=5, temperature=1e-4)
    beside = roll_out(backbone, tokenizer, prompts("ab", "a much longer prompt"), max_new_tokens=5, temperature=1e-4)
    assert beside.completions[0] == alone.completions[0]


def test_it_is_the_policy_that_writes(backbone, tokenizer):
    def sample():
        torch.manual_seed(1)
        return roll_out(backbone, tokenizer, prompts("a") * 4, max_new_tokens=8).completions

    before = sample()
    with torch.no_grad():
        for parameter in backbone.parameters_of("policy"):
            parameter.add_(torch.randn(parameter.shape))
    assert sample() != before


def test_passes_of_few_rows_keep_the_order(backbone, tokenizer):
    texts = ["a", "bb", "ccc", "d", "e"]
    whole = roll_out(backbone, tokenizer, prompts(*texts), max_new_tokens=3, temperature=1e-4)
    parts = roll_out(backbone, tokenizer, prompts(*texts), max_new_tokens=3, temperature=1e-4, rows_per_pass=2)
    assert parts.completions == whole.completions
    assert parts.columns() == {"n": [0, 1, 2, 3, 4]}
