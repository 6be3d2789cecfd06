"""Tiny models of several families, built from their configs with random weights."""

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from rlhf_fast.models.backbone import Backbone

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=4),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=8),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neo": lambda: GPTNeoConfig(  # its layers return a tuple
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global"], 4]],
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def make_model(family: str, attention: str | None = None) -> PreTrainedModel:
    """The same weights at every call, in fp32."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()


def scramble(backbone: Backbone, name: str, seed: int = 0) -> None:
    """Random values in the whole adapter and head, so that the role differs from the base in every layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters_of(name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask (3, 7): padded on the left, on the right, and full."""
    input_ids = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(5))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :2] = 0
    attention_mask[1, 5:] = 0
    return input_ids, attention_mask


def add_roles(backbone: Backbone, top_layers: int | None = 2) -> Backbone:
    """policy, critic (another rank) and reward, all away from their start; reference is the base."""
    backbone.add_adapter("policy", rank=4, top_layers=top_layers)
    backbone.add_adapter("critic", rank=3, top_layers=top_layers)
    backbone.add_adapter("reward", rank=2, top_layers=top_layers, trainable=False)
    for name in ("critic", "reward"):
        backbone.add_head(name, trainable=name == "critic")
    for seed, name in enumerate(("policy", "critic", "reward")):
        scramble(backbone, name, seed)
    return backbone


def four_roles(family: str = "llama", top_layers: int | None = 2, attention: str | None = None) -> Backbone:
    return add_roles(Backbone(make_model(family, attention)), top_layers)
