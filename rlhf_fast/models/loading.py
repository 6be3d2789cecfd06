"""Causal language models of transformers from a local folder, or from the hub when that is reachable."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from rlhf_fast.errors import UserError, refusing, short
from rlhf_fast.models.quantized import is_quantized, quantization_state

ATTENTION = ("auto", "eager", "sdpa", "flash_attention_2")
MOST_LAYERS = 4096
# Arguments of BitsAndBytesConfig. "nf4" is what QLoRA (arXiv 2305.14314) uses: the scales are quantised as well.
QUANTIZATION: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype,
    attn_implementation: str = "auto",
    device: torch.device | str = "cpu",
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal language model in the folder `path`, or of the hub id `org/name@revision`, in `dtype` on `device`, in
    eval mode.

    Code in the folder is run with trust_remote_code only. The commit of a hub id is the attribute `base_commit` of the
    model.

    attn_implementation: "auto" is flash_attention_2 on a GPU where flash-attn is installed, else sdpa where the
    architecture has it.
    quantization: "nf4" or "int8" makes bitsandbytes quantise the linear layers as they are read; embeddings, norms and
    the head stay in `dtype`. None for a folder that was saved quantised.
    Raises UserError for a path that is no model, an architecture that is no causal LM, weights that are missing or not
    finite, or a quantization that cannot be made.
    """
    attention = attention_for(attn_implementation, torch.device(device))
    place, revision = hub_id(path)
    _check_folder(place)
    options = _quantized(quantization, device) | revision
    prefix = "" if Path(place).exists() else ": there is no such folder, and as a hub id"
    with refusing(f"model {path} cannot be loaded{prefix}"):
        check_files(Path(place))
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **revision)
        if quantization is not None and hasattr(config, "quantization_config"):
            raise UserError(f"model {path} was saved quantised: leave out quantization {quantization}")
        _check_depth(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, config=config, dtype=dtype, attn_implementation=attention, output_loading_info=True,
            trust_remote_code=trust_remote_code, **options,
        )  # fmt: skip
        _check_stops(loaded[0].generation_config)
    model, report = loaded
    model.base_commit = _commit(place, revision)
    absent = [*report["missing_keys"], *report["mismatched_keys"]]
    if absent:
        raise UserError(f"model {path} lacks {len(absent)} of its weights, such as {absent[0]}")
    check_finite(model, f"model {path}")
    return model.to(device).eval()


def _check_stops(config: GenerationConfig | None) -> None:
    stops = getattr(config, "eos_token_id", None)
    for stop in stops if isinstance(stops, list) else [] if stops is None else [stops]:
        if isinstance(stop, bool) or not isinstance(stop, int):
            raise ValueError(f"eos_token_id of its generation config is {short(stop)}, not the id of a token")


def _check_depth(config: PretrainedConfig) -> None:
    """ValueError for more layers than any model has: each takes milliseconds to make, before its weights are missed."""
    for name, value in vars(config.get_text_config(decoder=True)).items():
        if name.endswith("layers") and isinstance(value, int) and value > MOST_LAYERS:
            raise ValueError(f"its config has {name} {value}, and more than {MOST_LAYERS} are not made")


def check_files(folder: Path) -> None:
    """ValueError for what is no file of the folder and would be read as one: a device has no end, a pipe no beginning,
    and the index of a model in several files may name any path."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if not path.is_file() and not path.is_dir():
            raise ValueError(f"{path.name} is no file")
        if path.name.endswith(".index.json"):
            names = json.loads(path.read_text()).get("weight_map", {}).values()
            for name in dict.fromkeys(names):
                if Path(name).name != name or not (folder / name).is_file():
                    raise ValueError(f"{path.name} names {short(name)}, which is no file of the folder")


def hub_id(path: str | Path) -> tuple[str, dict[str, str]]:
    """`org/name@revision` as org/name and the argument of `from_pretrained` for the revision. A folder is itself,
    whatever its name."""
    place, _, revision = str(path).rpartition("@")
    if os.path.exists(path) or not place or not revision:
        return str(path), {}
    return place, {"revision": revision}


def check_finite(model: nn.Module, what: str) -> None:
    """UserError that names the first weight with NaN or Inf in it, or buffer with NaN: a mask may be infinite."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if is_quantized(module):
            tensors |= {f"{name} (its scales)": state for state in quantization_state(module)}
    buffers = dict(model.named_buffers())
    for name, tensor in {**tensors, **buffers}.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # One pass without a copy, at the speed of memory, and NaN survives it. PyTorch finds no ends of eight bits.
        whole = tensor.detach().to(torch.float32) if tensor.dtype.itemsize == 1 else tensor.detach()
        ends = torch.stack(whole.aminmax())
        if ends.isnan().any() or (name not in buffers and ends.isinf().any()):
            raise UserError(f"{what} has weights that are not finite numbers, the first in {name}")


def _commit(place: str, revision: dict[str, str]) -> str | None:
    """The commit of a hub id in the local cache; None for a folder."""
    if Path(place).exists():
        return None
    found = try_to_load_from_cache(place, "config.json", **revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _check_folder(path: str | Path) -> None:
    """A path that cannot be a hub id ("name" or "owner/name") must be a folder with a config.json."""
    folder = Path(path)
    reason = None
    if folder.is_file():
        reason = "it is a file; the folder that holds config.json is needed"
    elif folder.is_dir():
        reason = None if (folder / "config.json").is_file() else "the folder has no config.json"
    elif folder.is_absolute() or str(path).startswith(".") or len(folder.parts) > 2:
        reason = "there is no such folder"
    if reason is not None:
        raise UserError(f"model {path} cannot be loaded: {reason}")


def _quantized(name: str | None, device: torch.device | str) -> dict[str, Any]:
    """Further arguments of `from_pretrained`; quantised layers are made on their device."""
    if name is None:
        return {}
    if name not in QUANTIZATION:
        raise UserError(f"quantization must be one of {', '.join(QUANTIZATION)}, got {name!r}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"quantization {name} needs bitsandbytes: pip install 'rlhf_fast[quant]'")
    return {"quantization_config": BitsAndBytesConfig(**QUANTIZATION[name]), "device_map": {"": device}}


def attention_for(name: str, device: torch.device) -> str | None:
    """The name for transformers; its own choice (None) is sdpa where the architecture has it, else eager."""
    if name not in ATTENTION:
        raise UserError(f"attn_implementation must be one of {', '.join(ATTENTION)}, got {name!r}")
    if name != "auto":
        return name
    has_flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if has_flash else None


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids the model has an embedding for; its tokenizer may have more, or fewer."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return int(weight.shape[0])
