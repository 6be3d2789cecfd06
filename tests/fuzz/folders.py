"""Folders of models, adapters and runs with something in them spoiled."""

import json
import math
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.fuzz.values import as_json, as_yaml, atom, changed, changed_bytes, safe, several, template

# Entries that libraries look at, and further values of them.
ENTRIES: dict[str, dict[str, list[Any]]] = {
    "config.json": {
        "architectures": [["LlamaForCausalLM"], ["GPT2LMHeadModel"], ["T5ForConditionalGeneration"], ["BertModel"],
        [""]],
        "model_type": ["gpt2", "t5", "bert", "mixtral", "llava", "mamba", "qwen2", "gemma2", "opt", "encoder-decoder"],
        "torch_dtype": ["float16", "float8_e4m3fn", "int8", "float128"], "dtype": ["bfloat16", "float64", "bool"],
        "quantization_config": [
            {}, {"quant_method": "gptq"}, {"quant_method": "bitsandbytes", "load_in_4bit": True},
            {"quant_method": "fp8"},
            {"load_in_8bit": True}, [],
        ],
        "rope_scaling": [{}, {"type": "linear", "factor": 0}, {"rope_type": "yarn", "factor": -1}, {"rope_type": "x"}],
        "rope_parameters": [{}, {"rope_type": "dynamic"}, {"rope_theta": 0}], "rope_theta": [0, -1, 1e308],
        "vocab_size": [0, 1, 100, 257, 1 << 20], "hidden_size": [0, 1, 31, 33, 64], "intermediate_size": [0, 1,
        1 << 20],
        "num_hidden_layers": [0, 1, 3, 5000], "num_attention_heads": [0, 1, 3, 64], "num_key_value_heads": [0, 3, 64],
        "head_dim": [0, 1, 7, 1 << 20], "max_position_embeddings": [0, 1, 2, 1 << 30], "tie_word_embeddings": [True,
        False],
        "hidden_act": ["gelu", "x"], "rms_norm_eps": [0, -1, 1e30], "initializer_range": [-1, 1e30],
        "eos_token_id": [[]],
        "bos_token_id": [1 << 40, [1]], "pad_token_id": [-1, 1 << 40], "attention_dropout": [0.5, 1.0, 2.0],
        "use_cache": [False], "is_encoder_decoder": [True], "attn_implementation": ["x", "eager"], "pretraining_tp": [2,
        0],
        "_attn_implementation": ["flash_attention_2"], "layer_types": [["x"], []], "auto_map": [{},
        {"AutoConfig": "x.y"}],
        "text_config": [{}, {"model_type": "llama"}], "final_logit_softcapping": [0, -1, 1e-30], "logit_scale": [0, -1],
        "transformers_version": ["99.0", "x"], "num_labels": [0, 5], "id2label": [{"0": "x"}], "mlp_bias": [True],
        "attention_bias": [True], "torchscript": [True], "problem_type": ["x"], "task_specific_params": [{"x": 1}],
    },
    "generation_config.json": {
        "eos_token_id": [[], [1, 2], -1, 1 << 40], "pad_token_id": [-1, 1 << 40], "bos_token_id": [[1]],
        "temperature": [0, -1, 2.0], "top_p": [0, 2], "top_k": [-1], "num_beams": [0, 4], "do_sample": [True, False],
        "max_length": [0, -1], "cache_implementation": ["static", "x"], "stop_strings": [["x"], "a"],
        "watermarking_config": [{}], "_from_model_config": [True], "prompt_lookup_num_tokens": [3],
    },
    "tokenizer_config.json": {
        "tokenizer_class": ["LlamaTokenizer", "GPT2Tokenizer", "BertTokenizer", "T5TokenizerFast", "ByT5Tokenizer", "X",
        ""],
        "chat_template": [[], [{"name": "default", "template": "x"}], {"default": "{{ messages }}"},
        "{{ 'x' * 10**9 }}"],
        "model_max_length": [0, -1, 1, 10**30, 1e30], "padding_side": ["left", "x"], "truncation_side": ["left", "x"],
        "eos_token": ["x", "ab", {"content": "</s>", "lstrip": True}, {"__type": "AddedToken", "content": "</s>"}, {}],
        "bos_token": ["", "q", {}], "pad_token": ["", "x"], "unk_token": ["", "zz"], "add_bos_token": [True],
        "add_eos_token": [True], "added_tokens_decoder": [{}, {"0": {"content": "x"}}, {"x": {}},
        {"-1": {"content": "y"}}],
        "additional_special_tokens": [["x"], ["x"] * 3, [{}], "x"], "extra_special_tokens": [["a"], {"a": "b"},
        {"a": 1}],
        "clean_up_tokenization_spaces": [True], "legacy": [True, False], "split_special_tokens": [True],
        "auto_map": [{}, {"AutoTokenizer": "x"}], "sp_model_kwargs": [{"x": 1}], "add_prefix_space": [True],
    },
    "tokenizer.json": {
        "normalizer": [{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Replace", "pattern": {"Regex": "(a+)+$"},
        "content": ""}],
        "pre_tokenizer": [{"type": "Whitespace"}, {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
        "invert": False}],
        "post_processor": [{"type": "BertProcessing", "sep": ["x", 0], "cls": ["y", 1 << 40]}, {"type": "X"}],
        "decoder": [{"type": "Strip", "content": "x", "start": 1 << 40, "stop": -1}, {"type": "ByteFallback"},
        {"type": "Fuse"}],
        "model": [{"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, {"type": "Unigram", "vocab": [["a",
        -1.0]], "unk_id": 9},
                  {"type": "BPE", "vocab": {}, "merges": []}, {"type": "WordPiece", "vocab": {"x": 1 << 31}}],
        "truncation": [{"max_length": 1, "strategy": "LongestFirst", "stride": 5, "direction": "Left"}],
        "padding": [{"strategy": {"Fixed": 1 << 40}, "direction": "Right", "pad_id": 0, "pad_type_id": 0,
        "pad_token": "x"}],
        "added_tokens": [[], [{"id": 1 << 31, "content": "x", "special": True}]], "version": ["2.0"],
    },
    "adapter_config.json": {
        "peft_type": ["LORA", "IA3", "PROMPT_TUNING", "lora"], "task_type": ["SEQ_CLS", "CAUSAL_LM", "X"], "r": [0, 1,
        2, 64],
        "lora_alpha": [0, -1, 1e30], "rank_pattern": [{"q_proj": 2}, {"(": 3}, {"x": 0}], "alpha_pattern": [{".*": 3},
        {"(a+)+": 1}],
        "target_modules": [[], ["q_proj"], "all-linear", ".*", ["x"], ["lm_head"]], "use_dora": [True],
        "use_rslora": [True],
        "modules_to_save": [["score"], ["lm_head"], ["embed_tokens"], [], ["score", "classifier"]], "bias": ["all",
        "lora_only"],
        "fan_in_fan_out": [True], "layers_to_transform": [[0], 5, [99]], "layers_pattern": ["x", ["layers"]],
        "init_lora_weights": ["pissa", "gaussian", "olora", "loftq", False], "target_parameters": [["x"]],
        "use_qalora": [True],
        "exclude_modules": [["q_proj"]], "lora_bias": [True], "layer_replication": [[[0, 2]]], "megatron_config": [{}],
        "trainable_token_indices": [[1]], "lora_dropout": [1.0, 2.0, -1], "revision": ["main", "x"],
        "inference_mode": [False],
        "base_model_name_or_path": ["tiny", "", ".", "/", "x/y", "x/y@main", "/nowhere", "../model"],
        "peft_version": ["99"],
        "auto_mapping": [{}], "corda_config": [{}], "eva_config": [{}], "loftq_config": [{"x": 1}],
        "arrow_config": [{}],
    },
    "model.safetensors.index.json": {
        "weight_map": [{}, {"x": "../../etc/passwd"}, {"model.norm.weight": "/etc/passwd"}, [], {"x": 5}],
        "metadata": [{}, None, {"total_size": -1}],
    },
}  # fmt: skip
RAN = "foreign_code_ran"


def spoil_tensors(random: Random, path: Path) -> None:
    tensors = load_file(path)
    name = random.choice(list(tensors))
    tensor = tensors[name]
    action = random.randrange(12)
    if action == 0:
        tensors[name] = tensor.clone().fill_(random.choice([math.nan, math.inf, -math.inf, 1e30, 0.0]))
    elif action == 1:
        kinds = [
            torch.int8,
            torch.int64,
            torch.bool,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
            torch.float64,
            torch.float16,
            torch.complex64,
        ]
        tensors[name] = tensor.to(random.choice(kinds))
    elif action == 2:
        shapes = [
            tensor[:0],
            tensor[..., :0],
            tensor.reshape(tensor.shape[::-1]),
            tensor[None],
            tensor.flatten(),
            tensor[:1],
            tensor.sum(),
            tensor.repeat(2, *[1] * (tensor.dim() - 1)),
        ]
        tensors[name] = random.choice(shapes).contiguous()
    elif action == 3:
        del tensors[name]
    elif action == 4:
        tensors[
            random.choice(
                ["x", name + ".x", name.replace("0", "9"), name.replace("lora_A", "lora_B"), "base_model.model.", ""]
            )
        ] = tensors.pop(name)
    elif action == 5:
        tensors = {}
    elif action == 6:
        tensors["base_model.model.score.weight"] = random.choice(
            [torch.ones(1, 32), torch.ones(3, 32), torch.ones(32), torch.ones(0, 32), torch.ones(1, 5)]
        )
    elif action == 7:
        tensors = {key: tensor.half() for key, tensor in tensors.items()}
    if action < 8:
        save_file(tensors, path)
    elif action < 10:
        path.write_bytes(changed_bytes(random, path.read_bytes()))
    else:
        spoil_header(random, path)


def spoil_header(random: Random, path: Path) -> None:
    """What safetensors has before the tensors: eight bytes of its length, and JSON."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    entry = header[random.choice(names)]
    numbers = [-1, 0, 1, 7, 1 << 20, 1 << 40, 1 << 62, 1 << 64, 10**400, 1.5, "4", None, []]
    action = random.randrange(7)
    if action == 0:
        entry["dtype"] = random.choice(["F4", "F8_E5M2", "I64", "BOOL", "BF16", "", "F32 ", 5, None, ["F32"]])
    elif action == 1:
        entry["shape"] = random.choice([[], [0], [random.choice(numbers)], [1 << 40, 1 << 40], "x", None])
    elif action == 2:
        entry["data_offsets"] = random.choice([[random.choice(numbers), random.choice(numbers)], [0], [], "x", None])
    elif action == 3:
        header[random.choice(["x", "", "a" * 5000, "\ud800", "__metadata__"])] = random.choice([entry, atom(random)])
    elif action == 4:
        header = random.choice(
            [{}, [], None, header | {"__metadata__": {"format": random.choice(["tf", "mlx", "", "x"])}}]
        )
    elif action == 5:
        header = several(random, partial(changed, random), header)
    text = as_json(header).encode()
    size = random.choice([0, 1, len(text) - 1, 1 << 33, (1 << 64) - 1]) if action == 6 else len(text)
    path.write_bytes(size.to_bytes(8, "little") + text + body)


def spoil_file(random: Random, path: Path) -> None:
    """Change one file of a folder by its kind; or the file itself: gone, empty, a folder, a link."""
    action = random.random()
    if action < 0.12:
        path.unlink()
        other = random.choice(["missing", "empty", "folder", "/etc/passwd", "/dev/null", path.name, "../../outside"])
        if other == "empty":
            path.touch()
        elif other == "folder":
            path.mkdir()
        elif other != "missing":
            path.symlink_to(other)
    elif action < 0.75 and path.suffix in SPOILED and path.stat().st_size < 1 << 20:
        try:
            SPOILED[path.suffix](random, path)
        except (ValueError, SafetensorError, yaml.YAMLError, RuntimeError, IndexError):  # it is spoiled already
            path.write_bytes(changed_bytes(random, path.read_bytes()))
    else:
        path.write_bytes(several(random, partial(changed_bytes, random), path.read_bytes()))


def spoil_json(random: Random, path: Path) -> None:
    value = json.loads(path.read_text())
    if random.random() < 0.4 and path.name in ENTRIES and isinstance(value, dict):
        value = several(random, partial(with_entry, random, path.name), value)
    else:
        value = several(random, partial(changed, random), value)
    path.write_text(as_json(value))


def with_entry(random: Random, name: str, value: dict[str, Any]) -> dict[str, Any]:
    """With another value of an entry that libraries look at in a file of that name."""
    known = ENTRIES[name]
    entry = random.choice(list(known))
    return {**value, entry: random.choice(known[entry]) if known[entry] and random.random() < 0.7 else atom(random)}


def spoil_jsonl(random: Random, path: Path) -> None:
    lines = path.read_text().splitlines()
    index = random.randrange(max(1, len(lines)))
    lines[index : index + 1] = [as_json(safe(changed(random, json.loads(x)))) for x in lines[index : index + 1]]
    path.write_text("\n".join(lines))


def spoil_yaml(random: Random, path: Path) -> None:
    path.write_bytes(as_yaml(changed(random, yaml.safe_load(path.read_text()))).encode("utf-8", "surrogatepass"))


SPOILED: dict[str, Callable[[Random, Path], None]] = {
    ".safetensors": spoil_tensors, ".json": spoil_json, "": spoil_json, ".jsonl": spoil_jsonl, ".yaml": spoil_yaml,
    ".jinja": lambda random, path: path.write_text(template(random)) and None,
}  # fmt: skip


def foreign_code(random: Random, folder: Path) -> None:
    """Code beside the weights, and a file that asks for it; where it runs, RAN is in the folder above."""
    code = f"open({str(folder.parent / RAN)!r}, 'w').close()\n"
    action = random.randrange(5)
    if action == 0:
        kept = random.random() < 0.5
        for path in [] if kept else files(folder):
            if path.suffix == ".safetensors":
                path.unlink()
        names = ["pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "state.pt", "model.pkl"]
        (folder / random.choice(names)).write_bytes(pickle.dumps(_Runs(code)))
        return
    (folder / "foreign.py").write_text(code + "class Foreign:\n    pass\n")
    if action == 1:
        classes = {name: "foreign.Foreign" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
        changes = {
            "auto_map": classes,
            **random.choice([{}, {"model_type": "foreign"}, {"architectures": ["Foreign"]}]),
        }
        _update(folder / "config.json", changes)
    elif action == 2:
        classes = {
            "AutoTokenizer": random.choice([["foreign.Foreign", None], ["foreign.Foreign"] * 2, "foreign.Foreign"])
        }
        _update(
            folder / "tokenizer_config.json",
            {"auto_map": classes, **random.choice([{}, {"tokenizer_class": "Foreign"}])},
        )
    elif action == 3:
        (folder / "custom_generate").mkdir(exist_ok=True)
        (folder / "custom_generate" / "generate.py").write_text(code + "def generate(*a, **k):\n    pass\n")
    else:
        changes = {
            "auto_mapping": {"base_model_class": "Foreign", "parent_library": "foreign"},
            "custom_modules": "foreign",
        }
        _update(folder / "adapter_config.json", changes)


class _Runs:
    """What a pickle runs where it is read."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.code,)


def _update(path: Path, changes: dict[str, Any]) -> None:
    if path.is_file():
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def spoiled(random: Random, source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)
    if random.random() < 0.1:
        foreign_code(random, target)
        if random.random() < 0.6:
            return
    for _ in range(random.choice([1, 1, 2])):
        found = files(target)
        if found:
            spoil_file(random, random.choice(found))
