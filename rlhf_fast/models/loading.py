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

    attn_implementation: "auto" is flash_attention_2 on a GPU where flash-attn is installed, else sdpa where the
    architecture has it.
    Raises UserError for a path that is no model, an architecture that is no causal LM, or missing weights.
    """
    attention = _attention(attn_implementation, torch.device(device))
    _check_folder(path)
    try:
        config = AutoConfig.from_pretrained(path)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        place = "" if Path(path).exists() else "there is no such folder, and as a hub id: "
        raise UserError(f"model {path} cannot be loaded: {place}{str(error).strip().splitlines()[0]}") from error
    model, report = loaded
    absent = [*report["missing_keys"], *report["mismatched_keys"]]
    if absent:
        raise UserError(f"model {path} lacks {len(absent)} of its weights, such as {absent[0]}")
    return model.to(device).eval()


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


def _attention(name: str, device: torch.device) -> str | None:
    """The name for transformers; its own choice (None) is sdpa where the architecture has it, else eager."""
    if name not in ATTENTION:
        raise UserError(f"attn_implementation must be one of {', '.join(ATTENTION)}, got {name!r}")
    if name != "auto":
        return name
    has_flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if has_flash else None
