"""docs/architectures.md says what is so: of every causal model of transformers, walked again."""

import pytest

from tests.models.walk import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, PAGE, page, walk

# One of each kind of what sets an architecture apart.
KINDS = [
    "hyperclovax",  # multiplies its logits where others divide them
    "minicpm3",  # scales what the head is given
    "bloom",  # alibi, one row per sequence and head
    "mpt",  # alibi without sequences
    "gpt_bigcode",  # a mask of its own
    "openai-gpt",  # layers that return lists
    "falcon",  # a subclass of nn.Linear
    "mamba",  # weights that are used without a call, no attention
    "deepseek_v3",  # experts that PEFT knows under other names
    "deepseek_v32",  # linears that only choose tokens
    "gemma3n_text",  # four streams per layer, inputs for each layer
    "gemma4",  # a multimodal model whose layers share keys and values
    "roberta",  # positions that start at two
    "rwkv",  # no attention mask
    "xlnet",  # looks ahead
    "gemma4_assistant",  # takes more than text
]


def written() -> list[str]:
    return [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("model_type", KINDS)
def test_the_page_says_what_holds_for_each_kind_of_architecture(model_type):
    assert str(walk(model_type)) in written()


def test_the_page_has_every_causal_model_and_no_other():
    assert [line.split("`")[1] for line in written()] == list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.slow
def test_the_page_is_what_the_walk_writes():
    assert page([walk(model_type) for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]) == PAGE.read_text()
