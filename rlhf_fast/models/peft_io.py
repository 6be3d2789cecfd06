"""Adapters as files in PEFT's format: adapter_config.json and adapter_model.safetensors.

Keys are `base_model.model.<module>.lora_A.weight` (R, in) and `...lora_B.weight` (out, R), for DoRA with
`...lora_magnitude_vector` (out,); a head is
`base_model.model.score.weight` (1, D) of a SEQ_CLS adapter, which is where transformers' sequence classifiers have it.
Source: PEFT 0.21, `LoraConfig` and `get_peft_model_state_dict`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.lora import LoRAShape

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HEAD = "score"
# Entries that change what the adapter computes, or the base under it, in ways that a plain LoRA cannot follow.
_UNSUPPORTED = (
    "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "layer_replication",
    "target_parameters", "trainable_token_indices", "arrow_config", "monteclora_config", "kasa_config",
)  # fmt: skip
_BASE_CHANGING_STARTS = ("pissa", "olora", "loftq", "corda", "lora_ga")


def save_adapter(backbone: Backbone, name: str, folder: str | Path) -> None:
    """Write the role's adapter and head into `folder`, so that PEFT, TRL and vLLM load them."""
    if name not in backbone.adapters:
        raise UserError(f"there is no adapter named {name!r} to save; there are: {sorted(backbone.adapters)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_PREFIX + key: p.detach().cpu().contiguous() for key, p in backbone.named_parameters_of(name).items()}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(_config(backbone, name), indent=2, sort_keys=True) + "\n")


def load_adapter(
    backbone: Backbone, name: str, folder: str | Path, *, trainable: bool, dtype: torch.dtype = torch.float32
) -> None:
    """Add the adapter (and head) in `folder` to the backbone as the role `name`.

    Raises UserError for a folder that is not a LoRA or DoRA adapter of this model; nothing is added then.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = _read_weights(folder)
    head = tensors.pop(f"{_HEAD}.weight", None)
    shapes = _shapes(config, tensors, folder)
    _check_fits(backbone, tensors, head, folder)
    backbone.create_adapter(name, shapes, trainable=trainable, dtype=dtype)
    if head is not None:
        backbone.add_head(name, trainable=trainable)
        tensors[f"{_HEAD}.weight"] = head
    backbone.restore(name, backbone.snapshot(name) | tensors)


def base_of(folder: str | Path) -> str:
    """Path, or hub id with its revision (`org/name@revision`), of the model that the adapter was trained on.

    Raises UserError where the file does not say it, or names a folder that is not there.
    """
    path = Path(folder) / CONFIG_NAME
    config = read_config(Path(folder))
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{path} does not say base_model_name_or_path: give the base model")
    if Path(base).is_absolute() and not Path(base).exists():
        raise UserError(f"{path}: the base model {base} is not there any more; write where it is")
    revision = config.get("revision")
    return base if revision is None or Path(base).exists() else f"{base}@{revision}"


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, checked to be a LoRA or DoRA. Raises UserError."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} is not an adapter: it has no {CONFIG_NAME}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{path}: peft_type must be LORA, got {kind}")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise UserError(f"{path}: adapters with {key}={config[key]!r} are not supported, only LoRA and DoRA")
    if config.get("bias", "none") != "none":
        raise UserError(f"{path}: adapters with bias={config['bias']!r} are not supported, only bias='none'")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_BASE_CHANGING_STARTS):
        raise UserError(f"{path}: init_lora_weights={start!r} changes the base model; convert it to plain LoRA first")
    # PEFT lists both usual names of a head in every SEQ_CLS adapter.
    extra = set(config.get("modules_to_save") or []) - {_HEAD, "classifier"}
    if extra:
        raise UserError(f"{path}: modules_to_save={sorted(extra)} is not supported, only {_HEAD!r}")
    return config


def _config(backbone: Backbone, name: str) -> dict[str, Any]:
    pairs = backbone.adapters[name]
    shape = next(iter(pairs.values())).shape
    ranks = {module: pair.shape.rank for module, pair in pairs.items()}
    alphas = {module: _whole(pair.shape.alpha) for module, pair in pairs.items()}
    rank, alpha = max(ranks.values()), max(alphas.values())
    has_head = name in backbone.heads
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if has_head else "CAUSAL_LM",
        **_base(backbone),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "lora_dropout": shape.dropout,
        "bias": "none",
        "use_rslora": shape.use_rslora,
        "use_dora": shape.use_dora,
        "fan_in_fan_out": any(isinstance(backbone.model.get_submodule(module), Conv1D) for module in pairs),
        "inference_mode": True,
        "modules_to_save": [_HEAD] if has_head else None,
        **_targets(backbone, list(pairs)),
    }


def _base(backbone: Backbone) -> dict[str, str | None]:
    """Where the base model is: a folder from wherever it is looked for, a hub id with its revision."""
    name = backbone.model.config._name_or_path or None
    if name is not None and Path(name).exists():
        name = str(Path(name).absolute())
    return {"base_model_name_or_path": name, "revision": getattr(backbone.model, "base_commit", None)}


def _targets(backbone: Backbone, modules: list[str]) -> dict[str, Any]:
    """Which modules, in PEFT's words: names x layers where the adapter is that regular, else every module by name."""
    layer_names = backbone.layer_names
    stack = layer_names[0].rsplit(".", 1)[0]
    place = re.compile(rf"{re.escape(stack)}\.(\d+)\.(.+)")
    found = [match.groups() for match in map(place.fullmatch, modules) if match]
    layers = sorted({int(layer) for layer, _ in found})
    names = sorted({name.rsplit(".", 1)[-1] for _, name in found})
    regular = {module for module in backbone.linear_shapes if (match := place.fullmatch(module))
               and int(match[1]) in layers and match[2].rsplit(".", 1)[-1] in names}  # fmt: skip
    if regular != set(modules):
        return {"target_modules": modules}
    if len(layers) == len(layer_names):
        return {"target_modules": names}
    return {"target_modules": names, "layers_to_transform": layers, "layers_pattern": stack.rsplit(".", 1)[-1]}


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors under their names without the prefix."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise UserError(f"{folder} has no {WEIGHTS_NAME}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    strange = [key for key in tensors if not key.startswith(_PREFIX)]
    if strange:
        raise UserError(f"{path}: {strange[0]!r} is not a key of PEFT's format ({_PREFIX}...)")
    bad = next((key for key, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise UserError(f"{path}: {bad} has numbers that are not finite")
    return {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}


_PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


def _parted(key: str) -> tuple[str, str]:
    """(module, part) of a key of an adapter's tensor."""
    module, _, part = key.rpartition(".lora_")
    return module, f"lora_{part}"


def _shapes(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> dict[str, LoRAShape]:
    """Module name -> its shape, from the tensors and the config's alphas."""
    use_rslora, use_dora = bool(config.get("use_rslora")), bool(config.get("use_dora"))
    wanted, shapes = set(_PARTS if use_dora else _PARTS[:2]), {}
    for key in tensors:
        module, part = _parted(key)
        if part not in wanted or any(f"{module}.{other}" not in tensors for other in wanted):
            kind = "DoRA triple" if use_dora else "plain LoRA pair"
            raise UserError(f"{folder / WEIGHTS_NAME}: {key!r} is not part of a {kind}")
        if part == "lora_A.weight":
            rank = tensors[key].shape[0]
            alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
            scale = alpha / (rank**0.5 if use_rslora else rank)
            shapes[module] = LoRAShape(rank, scale, use_rslora, use_dora, config.get("lora_dropout") or 0.0)
    if not shapes:
        raise UserError(f"{folder / WEIGHTS_NAME} has no LoRA weights")
    return shapes


def _check_fits(backbone: Backbone, tensors: dict[str, Tensor], head: Tensor | None, folder: Path) -> None:
    for key, tensor in tensors.items():
        module, part = _parted(key)
        if module not in backbone.linear_shapes:
            raise UserError(f"{folder}: the adapter is for {module!r}, which is no linear decoder layer of this model")
        out_features, in_features = backbone.linear_shapes[module]
        size, wanted = (tensor.shape[1], in_features) if "A" in part else (tensor.shape[0], out_features)
        if size != wanted:
            raise UserError(f"{folder}: {key} is {tuple(tensor.shape)}, this model has {wanted} there: another base?")
    wanted_head = (1, backbone.lm_head_weight.shape[1])
    if head is not None and head.shape != wanted_head:
        raise UserError(f"{folder}: {_HEAD}.weight must be {wanted_head}, got {tuple(head.shape)}")


def _by_pattern(patterns: dict[str, Any], module: str, default: float) -> float:
    """The value of the first pattern that the module's name ends with, as PEFT matches them."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _whole(value: float) -> float:
    """The int a float stands for, where it stands for one up to rounding."""
    return round(value) if abs(value - round(value)) < 1e-6 else value
