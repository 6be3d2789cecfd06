"""What the backbone needs to know about a Hugging Face model, or why that model cannot be one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TypedDict

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN, get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from rlhf_fast.errors import UserError
from rlhf_fast.models.quantized import is_quantized

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_LAYER_COUNTS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers", "num_layers")


class LogitTransform(TypedDict):
    """How an architecture changes its logits after the head, as arguments of the log-probability ops."""

    logit_scale: float
    softcap: float | None


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The config of the language model, which is a part of that of a multimodal model."""
    return model.config.get_text_config(decoder=True)


def config_number(config: PretrainedConfig, name: str) -> float | None:
    """The entry of that name, None where there is none; UserError for one that is no finite number."""
    value = getattr(config, name, None)
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)):
        return value
    raise UserError(f"config.json of the model: {name} must be a finite number, got {repr(value)[:60]}")


def context_length(model: PreTrainedModel) -> int:
    """Positions that the model has; very many where its config names no number."""
    return int(config_number(model.config, "max_position_embeddings") or 1 << 20)


def logit_transforms(model: PreTrainedModel) -> list[LogitTransform]:
    """What the entries of the config that name it (Gemma, Cohere, Granite, Falcon-H1, RecurrentGemma, xLSTM) may mean.

    By `logits_scaling` Granite divides its logits, HyperCLOVA X multiplies them, and MiniCPM3 divides the hidden states
    before the head: `self_test.check_logits` finds out which, and refuses a model that does something else.
    """
    config = text_config(model)

    entry = partial(config_number, config)

    softcap = next((float(cap) for cap in map(entry, _CAPS) if cap), None)
    scale = (entry("logit_scale") or 1.0) * (entry("lm_head_multiplier") or 1.0)
    scaling = entry("logits_scaling") or 1.0
    meanings = dict.fromkeys((scale / scaling, scale * scaling, scale))
    return [{"logit_scale": float(meaning), "softcap": softcap} for meaning in meanings]


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Module name -> decoder layer, in order. Raises UserError for a model that is not a plain causal LM."""
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"unsupported architecture {kind}: it has an encoder; a causal language model is needed")
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise UserError(f"unsupported architecture {kind}: its output head is {type(head).__name__}, not nn.Linear")
    config = text_config(model)
    counts = {getattr(config, name, None) for name in _LAYER_COUNTS}
    found = [
        (depth, stack)
        # What some models call their decoder is their head.
        for depth, stack in [*_outer_lists(model.get_decoder())] or _outer_lists(model.base_model)
        if len(stack) in counts
    ]
    # An image or audio tower lies deeper than the decoder.
    stacks = [stack for depth, stack in found if depth == min(depth for depth, _ in found)]
    if len(stacks) != 1:
        known = " or ".join(sorted(str(count) for count in counts if count is not None)) or "?"
        raise UserError(f"unsupported architecture {kind}: found {len(stacks)} stacks of {known} decoder layers, not 1")
    names = {module: name for name, module in model.named_modules()}
    return {names[layer]: layer for layer in stacks[0]}


def _outer_lists(module: nn.Module, depth: int = 0) -> Iterator[tuple[int, nn.ModuleList]]:
    """The module lists inside that are not themselves inside a module list, with how deep they lie."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield depth, child
        else:
            yield from _outer_lists(child, depth + 1)


def adaptable_linears(model: PreTrainedModel, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Module name -> linear layer, for all inside the decoder layers; a module that several layers share, once.

    `self_test.unadaptable` says which of them cannot have an adapter.
    """
    inside = {module for layer in layers.values() for module in layer.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if module in inside and (isinstance(module, (nn.Linear, Conv1D)) or is_quantized(module))
    }


# PEFT gives an adapter on these names of a model with fused experts to the experts, wherever the linear stands ...
_MOVED = {"mixtral": {"gate", "w1", "w2", "w3"}, "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"}}
# ... and refuses this one, because Mamba's kernels read the weight without calling the linear.
_REFUSED_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


def peft_conflicts(model: PreTrainedModel, linears: Iterable[str]) -> dict[str, str]:
    """Name -> why PEFT could not load an adapter on it. Source: PEFT 0.21, `_convert_peft_config_moe`,
    `convert_peft_adapter_state_dict_for_transformers` and `_check_lora_target_modules_mamba`."""
    kind = text_config(model).model_type
    layout = _MODEL_TO_CONVERSION_PATTERN.get(kind, kind if kind == "mixtral" else None)
    moved, refused = _MOVED.get(layout or "", set()), {"out_proj"} if kind in _REFUSED_TYPES else set()
    renamings = [entry for entry in get_model_conversion_mapping(model) or [] if isinstance(entry, WeightRenaming)]
    reasons = {}
    for name in linears:
        last, key = name.rsplit(".", 1)[-1], f"{name}.weight"
        if last in moved:
            reasons[name] = f"PEFT takes {last!r} of a {kind} model for its fused experts"
        elif last in refused:
            reasons[name] = f"PEFT refuses {last!r} of a {kind} model"
        elif rename_source_key(key, renamings, [])[0] != key:
            reasons[name] = f"its name is changed when an adapter of a {kind} model is loaded"
    return reasons


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of an nn.Linear, whose weight may be packed, or a Conv1D, which stores it transposed."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    in_features, out_features = module.get_parameter("weight").shape
    return out_features, in_features


def select_linears(available: Iterable[str], targets: str | Iterable[str], left_out: Mapping[str, str]) -> list[str]:
    """The names that `targets` means: "all-linear", or last parts of names ("q_proj", "mlp.up_proj").

    left_out: name -> why it cannot be adapted. Raises UserError for a target that matches nothing, or one of those.
    """
    available = list(available)
    if targets == "all-linear":
        chosen = available
    else:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        for target in wanted:
            unfit = next((name for name in left_out if _ends_with(name, target)), None)
            if unfit is not None:
                raise UserError(f"{target!r} cannot be adapted: {unfit}: {left_out[unfit]}")
            if not any(_ends_with(name, target) for name in available):
                known = sorted({name.rsplit(".", 1)[-1] for name in available})
                raise UserError(f"no linear layer is named {target!r}; there are: {', '.join(known)}")
        chosen = [name for name in available if any(_ends_with(name, target) for target in wanted)]
    if not chosen:
        reasons = "; ".join(sorted(set(left_out.values())))
        raise UserError(
            "the decoder has no linear layer to adapt: nn.Linear, Conv1D, or one quantised by bitsandbytes"
            + (f" ({reasons})" if reasons else "")
        )
    return chosen


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
