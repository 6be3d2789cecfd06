"""Causal language models of transformers from a local folder, or from the hub when that is reachable."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf_fast.errors import UserError

ATTENTION = ("auto", "eager", "sdpa", "flash_attention_2")


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype,
    attn_implementation: str = "auto",
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The causal language model in the folder `path` (or of that hub id), in `dtype` on `device`, in eval mode.

    attn_implementation: "auto" is flash_attention_2 on a GPU where flash-attn is installed, else sdpa.
    Raises UserError for a path that is no model, an architecture that is no causal LM, or missing weights.
    """
    attention = _attention(attn_implementation, torch.device(device))
    try:
        config = AutoConfig.from_pretrained(path)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"model {path} cannot be loaded: {_reason(path, error)}") from error
    model, report = loaded
    absent = [*report["missing_keys"], *report["mismatched_keys"]]
    if absent:
        raise UserError(f"model {path} lacks {len(absent)} of its weights, such as {absent[0]}")
    return model.to(device).eval()


def _reason(path: str | Path, error: Exception) -> str:
    folder = Path(path)
    if not folder.exists() and (folder.is_absolute() or str(path).count("/") != 1 or str(path).startswith(".")):
        return "there is no such folder"
    if folder.is_file():
        return "it is a file; the folder that holds config.json is needed"
    if folder.is_dir() and not (folder / "config.json").is_file():
        return "the folder has no config.json"
    return str(error).strip().splitlines()[0]


def _attention(name: str, device: torch.device) -> str:
    if name not in ATTENTION:
        raise UserError(f"attn_implementation must be one of {', '.join(ATTENTION)}, got {name!r}")
    if name != "auto":
        return name
    has_flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if has_flash else "sdpa"
