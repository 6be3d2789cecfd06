"""A tiny Llama-style model and byte-level tokenizer made by code, so that a whole run needs no download.

`model: tiny` in a config means this model. It starts from random weights, so a run teaches it to write first
(SFT, every parameter trained) and only then freezes it under adapters.
"""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_fast.errors import UserError

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"

# One line per turn; the end of an assistant turn is the token that ends generation.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def byte_tokenizer(*, max_length: int = 512) -> PreTrainedTokenizerFast:
    """Tokenizer whose tokens are the 256 bytes (id = value of the byte) and PAD 256, BOS 257, EOS 258.

    Any text decodes to itself; one that spells a special token becomes that token, as in other tokenizers.
    BOS is put before a text unless `add_special_tokens=False`.
    Padding goes to the left, where generation needs it. `max_length` is in tokens.
    """
    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    for token in (PAD, BOS, EOS):
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def tiny(
    seed: int, *, hidden_size: int = 128, layers: int = 3, heads: int = 4, max_length: int = 512
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Random fp32 model on the CPU and its tokenizer; the same seed gives the same bits.

    The global random state is left as it was. `max_length` is the longest sequence in tokens.
    Raises ValueError when `hidden_size` is not a multiple of 2 * `heads` (rotary embeddings turn pairs).
    """
    if hidden_size % (2 * heads):
        raise ValueError(f"hidden_size must be a multiple of 2 * heads, got {hidden_size} and {heads} heads")
    tokenizer = byte_tokenizer(max_length=max_length)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # What a model this shallow needs to learn from scratch in a few hundred steps.
        initializer_range=hidden_size**-0.5 / 2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), tokenizer


def build_tiny(folder: str | Path, *, seed: int) -> Path:
    """Write `tiny(seed)` as a Hugging Face folder that loads offline, and return its path.

    The folder appears whole or not at all. Raises UserError when it exists already.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already: give another folder for the tiny model, or delete it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = tiny(seed)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        os.chmod(scratch, 0o755)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch)
        raise
    return folder


def _byte_letters() -> list[str]:
    """The printable letter that `ByteLevel` writes for each byte, in byte order (the table of GPT-2)."""
    printable = {byte for first, last in ("!~", "¡¬", "®ÿ") for byte in range(ord(first), ord(last) + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
