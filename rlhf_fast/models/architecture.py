"""What the backbone needs to know about a Hugging Face model, or why that model cannot be one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_fast.errors import UserError
from rlhf_fast.models.quantized import is_quantized


class LogitTransform(TypedDict):
    """How an architecture changes its logits after the head, as arguments of the log-probability ops."""

    logit_scale: float
    softcap: float | None


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """From the entries of the config that name it (Gemma, Cohere, Granite, Falcon-H1, RecurrentGemma, xLSTM)."""

    def entry(name: str) -> float | None:
        return getattr(config, name, None)

    caps = (entry(name) for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"))
    scale = (entry("logit_scale") or 1.0) * (entry("lm_head_multiplier") or 1.0) / (entry("logits_scaling") or 1.0)
    return {"logit_scale": float(scale), "softcap": next((float(cap) for cap in caps if cap), None)}


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Module name -> decoder layer, in order. Raises UserError for a model that is not a plain causal LM."""
    kind = type(model).__name__
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"unsupported architecture {kind}: it has an encoder; a causal language model is needed")
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise UserError(f"unsupported architecture {kind}: its output head is {type(head).__name__}, not nn.Linear")
    decoder = model.get_decoder()
    count = getattr(config, "num_hidden_layers", None)
    stacks = [stack for stack in decoder.children() if isinstance(stack, nn.ModuleList) and len(stack) == count]
    if len(stacks) != 1:
        raise UserError(f"unsupported architecture {kind}: found {len(stacks)} stacks of {count} decoder layers, not 1")
    names = {module: name for name, module in model.named_modules()}
    return {names[layer]: layer for layer in stacks[0]}


def adaptable_linears(layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Module name -> linear layer, for all inside the decoder layers that are plain or quantised by bitsandbytes."""
    return {
        f"{prefix}.{name}": module
        for prefix, layer in layers.items()
        for name, module in layer.named_modules()
        if type(module) in (nn.Linear, Conv1D) or is_quantized(module)
    }


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of an nn.Linear, whose weight may be packed, or a Conv1D, which stores it transposed."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    in_features, out_features = module.get_parameter("weight").shape
    return out_features, in_features


def select_linears(available: Iterable[str], targets: str | Iterable[str]) -> list[str]:
    """The names that `targets` means: "all-linear", or last parts of names ("q_proj", "mlp.up_proj").

    Raises UserError for a target that matches nothing.
    """
    available = list(available)
    if targets == "all-linear":
        chosen = available
    else:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        for target in wanted:
            if not any(_ends_with(name, target) for name in available):
                known = sorted({name.rsplit(".", 1)[-1] for name in available})
                raise UserError(f"no linear layer is named {target!r}; there are: {', '.join(known)}")
        chosen = [name for name in available if any(_ends_with(name, target) for target in wanted)]
    if not chosen:
        raise UserError(
            "the decoder has no linear layer to adapt: nn.Linear, Conv1D, or one quantised by bitsandbytes; "
            "other subclasses cannot be"
        )
    return chosen


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
