"""Numbers of a model's config.json."""

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from rlhf_fast.errors import UserError
from rlhf_fast.models.architecture import config_number, context_length, logit_transforms

NOT_NUMBERS = ("2", [2.0], {"a": 1}, True, float("nan"), float("inf"))


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", ["logit_scale", "lm_head_multiplier", "logits_scaling", "final_logit_softcapping"])
def test_what_scales_logits_and_is_no_number_is_a_line(name, value):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1, **{name: value}))
    with pytest.raises(UserError, match=rf"^config.json of the model: {name} must be a finite number, got .*$"):
        logit_transforms(model)


def test_the_context_is_a_number_or_endless():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1, n_positions=32))
    assert context_length(model) == 32
    assert config_number(LlamaConfig(), "nowhere") is None
