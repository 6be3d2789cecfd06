"""Chat templates in the manner of well-known models, and tokenizers of every kind, trained on a few lines."""

import json
from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)  # fmt: skip
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_python import PythonBackend

SPECIALS = [
    "<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>",
    "<tool_call>", "</tool_call>", "<|start|>", "<|message|>", "<|return|>",
]  # fmt: skip

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "chatml with a default system message": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
        + CHATML
    ),
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>"
        "\\n\\n' %}{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "phi": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
    ),
    "qwen 3": (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}"
        "{{ '<think>\\n' + (m['reasoning_content'] | default('')).strip() + '\\n</think>\\n\\n' }}{% endif %}"
        "{{ m['content'] or '' }}"
        "{% for call in m['tool_calls'] or [] %}"
        "{{ '\\n<tool_call>\\n' + (call['function'] | tojson) + '\\n</tool_call>' }}{% endfor %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "tools": (
        "{% if tools %}{{ '<|im_start|>system\\nTools: ' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + (m['content'] or '') }}"
        "{% for call in m['tool_calls'] or [] %}{{ '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}"
        "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "generation": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "text parts": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% for part in m['content'] if part is mapping %}{{ part['text'] }}{% endfor %}{{ '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}
# A last answer ends otherwise than the others.
RETURNING = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# What opens an answer is not how an answer is rendered.
THINKING = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'].split('</think>')[-1] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)
# No token ends a turn.
SPOKEN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

LINES = [
    "The capital of France is Paris, the capital of Italy is Rome.",
    "user assistant system model tool You are helpful. You are brief.",
    "What is the weather? It is sunny and warm, quite warm.",
    "hello world, say yes or no: yes it is, no it is not.",
] * 8


def _dress(raw: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", **names}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def _added(raw: Tokenizer) -> Tokenizer:
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return raw


def _around(raw: Tokenizer, before: str, behind: str = "") -> None:
    tokens = [(token, raw.token_to_id(token)) for token in (before, behind) if token]
    raw.post_processor = processors.TemplateProcessing(single=f"{before} $A {behind}".strip(), special_tokens=tokens)


def byte_level(*, trim: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's kind, without a BOS of its own accord. trim: offsets leave out the space before a word."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False))
    _added(raw)
    raw.post_processor = processors.ByteLevel(trim_offsets=trim)
    return _dress(raw)


def _byte_fallback() -> Tokenizer:
    """SentencePiece's BPE: merges inside of words, bytes for what the letters lack."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    raw.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=500, special_tokens=tokens, show_progress=False))
    return raw


def llama() -> PreTrainedTokenizerBase:
    """Transformers' own LlamaTokenizer, with BOS."""
    state = json.loads(_byte_fallback().to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    tokenizer = LlamaTokenizer(vocab=state["vocab"], merges=merges, add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [s for s in SPECIALS if s not in state["vocab"]]})
    return tokenizer


def legacy_llama() -> PreTrainedTokenizerFast:
    """The older conversion: a normaliser puts a space before every stretch of text between special tokens."""
    raw = _byte_fallback()
    raw.pre_tokenizer = None
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _added(raw)
    _around(raw, "<s>")
    return _dress(raw)


def unigram() -> PreTrainedTokenizerFast:
    """T5's kind: </s> behind every text."""
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIALS, unk_token="<unk>", initial_alphabet=[chr(i) for i in range(32, 127)],
        show_progress=False,
    )  # fmt: skip
    raw.train_from_iterator(LINES, trainer)
    _around(raw, "", "</s>")
    return _dress(raw)


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind: no upper case, no spaces, [CLS] text [SEP], and no EOS but for the name."""
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=260, special_tokens=SPECIALS, initial_alphabet=[chr(i) for i in range(33, 127)], show_progress=False
    )
    raw.train_from_iterator(LINES, trainer)
    _around(raw, "<s>", "</s>")
    return _dress(raw)


class SlowTokenizer(PythonBackend):
    """Written in Python, without offsets: the two letters "ab" are one token, every other character is its own."""

    def __init__(self, **names):
        self.letters = ["ab", *map(chr, range(10, 127))]
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", **names}
        super().__init__(**names)
        self.add_tokens(SPECIALS, special_tokens=True)

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self):
        return {token: i for i, token in enumerate(self.letters)} | self.added_tokens_encoder

    def _tokenize(self, text, **ignored):
        tokens = []
        while text:
            tokens.append("ab" if text.startswith("ab") else text[0])
            text = text[len(tokens[-1]) :]
        return tokens

    def _convert_token_to_id(self, token):
        return self.letters.index(token) if token in self.letters else self.unk_token_id

    def _convert_id_to_token(self, index):
        return self.letters[index]


TOKENIZERS = {
    "byte level": byte_level, "byte level, offsets trimmed": lambda: byte_level(trim=True), "llama": llama,
    "legacy llama": legacy_llama, "unigram": unigram, "word piece": word_piece, "slow": SlowTokenizer,
}  # fmt: skip


@cache
def _tokenizer(kind: str) -> PreTrainedTokenizerBase:
    return TOKENIZERS[kind]()


def tokenizer_of(kind: str, template: str | None = CHATML) -> PreTrainedTokenizerBase:
    """The tokenizer of that kind with this template."""
    tokenizer = _tokenizer(kind)
    tokenizer.chat_template = template
    return tokenizer
