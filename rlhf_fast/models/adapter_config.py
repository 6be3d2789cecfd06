"""adapter_config.json of an adapter in PEFT's format: read as what somebody else may have written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf_fast.errors import UserError, short

CONFIG_NAME = "adapter_config.json"
HEAD = "score"
DEFAULT_ALPHA = 8  # PEFT's
SIZE = 1 << 24  # bytes; a config with every module of a large model by name has less
# Entries that change what the adapter computes, or the base under it, in ways that a plain LoRA cannot follow.
_UNSUPPORTED = (
    "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "layer_replication",
    "target_parameters", "trainable_token_indices", "arrow_config", "monteclora_config", "kasa_config",
)  # fmt: skip
_BASE_CHANGING_STARTS = ("pissa", "olora", "loftq", "corda", "lora_ga")
_QUANTIFIERS = "*+?{"


class _Entries(BaseModel):
    """The entries that are read, with their types; others may be there."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int = Field(8, ge=1)
    lora_alpha: float = Field(DEFAULT_ALPHA, gt=0)
    alpha_pattern: dict[str, float] | None = None
    lora_dropout: float | None = Field(None, ge=0, lt=1)
    use_rslora: bool | None = None
    use_dora: bool | None = None
    bias: str | None = None
    modules_to_save: list[str] | None = None


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, checked to be a LoRA or DoRA. Raises UserError."""
    path = own_file(folder, CONFIG_NAME)
    try:
        if not path.is_file():
            raise UserError(f"{folder} is not an adapter: it has no {CONFIG_NAME}")
        with path.open("rb") as file:
            content = file.read(SIZE + 1)
        if len(content) > SIZE:
            raise UserError(f"{path} has more than {SIZE >> 20} MiB, so it is no config of an adapter")
        config = json.loads(content)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{path}: peft_type must be LORA, got {short(kind)}")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise UserError(f"{path}: adapters with {key}={short(config[key])} are not supported, only LoRA and DoRA")
    try:
        entries = _Entries.model_validate(config)
    except ValidationError as errors:
        first = errors.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where}: {first['msg']}, got {short(first['input'])}") from None
    if entries.bias not in (None, "none"):
        raise UserError(f"{path}: adapters with bias={short(entries.bias)} are not supported, only bias='none'")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_BASE_CHANGING_STARTS):
        raise UserError(f"{path}: init_lora_weights={start!r} changes the base model; convert it to plain LoRA first")
    # PEFT lists both usual names of a head in every SEQ_CLS adapter.
    extra = set(entries.modules_to_save or []) - {HEAD, "classifier"}
    if extra:
        raise UserError(f"{path}: modules_to_save={short(sorted(extra))} is not supported, only {HEAD!r}")
    for pattern in entries.alpha_pattern or {}:
        if (reason := _slow(pattern)) is not None:
            raise UserError(f"{path}: alpha_pattern {short(pattern)}: {reason}")
    return config


def own_file(folder: Path, name: str) -> Path:
    """The file of that name in the folder. UserError for a link to somewhere else, except into the hub's cache, whose
    snapshots are links to blobs beside them."""
    path, home = folder / name, Path(os.path.realpath(folder))
    target = Path(os.path.realpath(path))  # which a ring of links does not stop
    blobs = home.parent.parent / "blobs"
    if not target.is_relative_to(home) and not (home.parent.name == "snapshots" and target.is_relative_to(blobs)):
        raise UserError(f"{path} is a link to {target}, which is not in that folder: copy it there")
    return path


def alpha_of(config: dict[str, Any], module: str) -> float:
    """The alpha of the first pattern that the module's name ends with, as PEFT matches them."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return alpha
    return config.get("lora_alpha", DEFAULT_ALPHA)


def _slow(pattern: str) -> str | None:
    """Why a regular expression is not matched; None for one whose time is a small power of a name's length.

    Without repeated groups there is no repetition inside of another, and two repetitions, with the one that PEFT puts
    before every pattern, are tried at no more than the cube of the length.
    """
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"it is no regular expression: {error}"
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", pattern)
    if len(pattern) > 500 or "(?" in bare or re.search(r"\\\d", pattern):
        return "only short regular expressions without (?...) and back references are matched"
    if sum(bare.count(sign) for sign in _QUANTIFIERS) > 2 or re.search(r"\)[*+?{]", bare):
        return "only regular expressions with at most two repetitions, and none of a group, are matched"
    return None
