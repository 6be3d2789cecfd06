"""Adapters as files in PEFT's format: adapter_config.json and adapter_model.safetensors.

Keys are `base_model.model.<module>.lora_A.weight` (R, in) and `...lora_B.weight` (out, R), for DoRA with
`...lora_magnitude_vector` (out,); a head is
`base_model.model.score.weight` (M, D) of a SEQ_CLS adapter, which is where transformers' sequence classifiers have it.
Source: PEFT 0.21, `LoraConfig` and `get_peft_model_state_dict`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_fast.errors import UserError, short
from rlhf_fast.models.adapter_config import CONFIG_NAME, HEAD, alpha_of, own_file, read_config
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.lora import LoRAShape
from rlhf_fast.models.pieces import of_whole_shapes
from rlhf_fast.models.self_test import rounding, trial

WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapter(backbone: Backbone, name: str, folder: str | Path, *, checked: bool = True) -> None:
    """Write the role's adapter and head into `folder`, so that PEFT, TRL and vLLM load them.

    checked: where PEFT is installed, it reads the adapter back: UserError where it makes something else of it.
    """
    if name not in backbone.adapters:
        raise UserError(f"there is no adapter named {name!r} to save; there are: {sorted(backbone.adapters)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_PREFIX + key: p.detach().cpu().contiguous() for key, p in backbone.named_parameters_of(name).items()}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(_config(backbone, name), indent=2, sort_keys=True) + "\n")
    if checked and importlib.util.find_spec("peft") is not None and backbone.model.device.type != "meta":
        check_reload(backbone, name, folder)


def check_reload(backbone: Backbone, name: str, folder: Path) -> None:
    """Compare the role with what PEFT makes of its files: which linears it adapts, and log-probabilities of a few
    tokens. PEFT's layers stand in the same model for that one pass, so that no weight is held twice.

    Raises UserError; the files stay.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = LoraConfig.from_pretrained(str(folder))
    config.task_type, config.modules_to_save = "CAUSAL_LM", None  # this model has no place for the head of a role
    input_ids, mask = trial(backbone.model)
    with torch.no_grad(), _modules_restored(backbone.model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT warns of is compared below
        with of_whole_shapes(backbone.model):
            wrapped = get_peft_model(backbone.model, config)
        wrapped.load_adapter(str(folder), "default")
        model = wrapped.eval().get_base_model()
        theirs = model(**backbone.inputs(input_ids, mask)).logits
        targets = {place for place, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    strange = targets.symmetric_difference(backbone.adapters[name])
    if strange:
        raise UserError(f"{folder}: PEFT does not give the adapter to the same linears, such as {min(strange)!r}")
    expected = theirs[:, :-1].float().log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    with torch.no_grad():
        hidden = backbone.hidden(input_ids, mask, [name, None])
        ours, base = (backbone.logprobs(hidden[role], input_ids, mask) for role in (name, None))
    difference = ((ours[:, 1:] - expected) * mask[:, 1:]).abs().max().item()
    # In half precision a large adapter amplifies the rounding of every layer (0.8 nats where it did 11 to SmolLM2-135M
    # in bf16). The faults that are looked for, a wrong scale or order, are about as large as what the adapter does.
    effect = (ours - base).abs().max().item() if theirs.dtype != torch.float32 else 0.0
    if not difference <= max(2 * rounding(theirs), effect / 4):
        raise UserError(
            f"{folder}: the adapter as PEFT loads it differs by {difference:.3g} nats from what was trained"
        )


@contextmanager
def _modules_restored(model: nn.Module) -> Iterator[None]:
    """Whatever modules are put into the model inside are taken out at the end."""
    before = [(module, dict(module._modules), set(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, children, attributes in before:
            module._modules.clear()
            module._modules.update(children)
            for added in set(vars(module)) - attributes:
                delattr(module, added)


def load_adapter(
    backbone: Backbone, name: str, folder: str | Path, *, trainable: bool, dtype: torch.dtype = torch.float32
) -> None:
    """Add the adapter (and head) in `folder` to the backbone as the role `name`.

    Raises UserError for a folder that is not a LoRA or DoRA adapter of this model; nothing is added then.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = _read_weights(folder)
    head = tensors.pop(f"{HEAD}.weight", None)
    shapes = _shapes(config, tensors, folder)
    _check_fits(backbone, tensors, head, folder)
    backbone.create_adapter(name, shapes, trainable=trainable, dtype=dtype)
    if head is not None:
        backbone.add_head(name, outputs=len(head), trainable=trainable)
        tensors[f"{HEAD}.weight"] = head
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
        "modules_to_save": [HEAD] if has_head else None,
        **_targets(backbone, list(pairs)),
    }


def _base(backbone: Backbone) -> dict[str, str | None]:
    """Where the base model is: a folder from wherever it is looked for, a hub id with its revision."""
    name = backbone.model.config._name_or_path or None
    if name is not None and Path(name).exists():
        name = str(Path(name).absolute())
    return {"base_model_name_or_path": name, "revision": getattr(backbone.model, "base_commit", None)}


def _targets(backbone: Backbone, modules: list[str]) -> dict[str, Any]:
    """Which modules, in PEFT's words: names x layers where those mean no other module of the model, else every module
    by its whole name."""
    layer_names = backbone.layer_names
    stack = layer_names[0].rsplit(".", 1)[0]
    place = re.compile(rf"{re.escape(stack)}\.(\d+)\.(.+)")
    found = [match.groups() for match in map(place.fullmatch, modules) if match]
    layers = sorted({int(layer) for layer, _ in found})
    names = sorted({name.rsplit(".", 1)[-1] for _, name in found})
    meant = {name for name, _ in backbone.model.named_modules() if name.rsplit(".", 1)[-1] in names}
    if meant == set(modules):
        return {"target_modules": names}
    pattern = re.compile(rf".*\.{re.escape(stack.rsplit('.', 1)[-1])}\.(\d+)\..+")
    regular = {name for name in meant if (match := pattern.fullmatch(name)) and int(match[1]) in layers}
    if regular != set(modules):
        return {"target_modules": modules}
    return {"target_modules": names, "layers_to_transform": layers, "layers_pattern": stack.rsplit(".", 1)[-1]}


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors under their names without the prefix."""
    path = own_file(folder, WEIGHTS_NAME)
    if not path.is_file():
        raise UserError(f"{folder} has no {WEIGHTS_NAME}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    strange = [key for key in tensors if not key.startswith(_PREFIX)]
    if strange:
        raise UserError(f"{path}: {strange[0]!r} is not a key of PEFT's format ({_PREFIX}...)")
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path}: {short(key)} is {kind}; adapters are float32, bfloat16, float16 or float64")
        if tensor.numel() == 0:
            raise UserError(f"{path}: {short(key)} is empty, {tuple(tensor.shape)}: an adapter has a rank from 1")
    bad = next((key for key, tensor in tensors.items() if not tensor.float().isfinite().all()), None)
    if bad is not None:
        raise UserError(f"{path}: {bad} has numbers that are not finite")
    return {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
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
            if tensors[key].dim() != 2:
                raise UserError(f"{folder / WEIGHTS_NAME}: {key} is {tuple(tensors[key].shape)}, not a matrix")
            rank = tensors[key].shape[0]
            scale = alpha_of(config, module) / (rank**0.5 if use_rslora else rank)
            shapes[module] = LoRAShape(rank, scale, use_rslora, use_dora, config.get("lora_dropout") or 0.0)
    if not shapes:
        raise UserError(f"{folder / WEIGHTS_NAME} has no LoRA weights")
    return shapes


def _check_fits(backbone: Backbone, tensors: dict[str, Tensor], head: Tensor | None, folder: Path) -> None:
    for key, tensor in tensors.items():
        module, part = _parted(key)
        if module not in backbone.linear_shapes:
            reason = backbone.left_out.get(module, "it is no linear decoder layer of this model")
            raise UserError(f"{folder}: the adapter is for {module!r}: {reason}")
        out_features, in_features = backbone.linear_shapes[module]
        rank = tensors[f"{module}.lora_A.weight"].shape[0]
        wanted = dict(zip(_PARTS, ((rank, in_features), (out_features, rank), (out_features,)), strict=True))[part]
        if tensor.shape != wanted:
            raise UserError(f"{folder}: {key} is {tuple(tensor.shape)}, this model has {wanted} there: another base?")
    dim = backbone.hidden_size
    if head is not None and (head.dim() != 2 or len(head) < 1 or head.shape[1] != dim):
        raise UserError(f"{folder}: {HEAD}.weight must be (outputs, {dim}), got {tuple(head.shape)}")


def _whole(value: float) -> float:
    """The int a float stands for, where it stands for one up to rounding."""
    return round(value) if abs(value - round(value)) < 1e-6 else value
