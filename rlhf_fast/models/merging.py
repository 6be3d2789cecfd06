"""An adapter put into the weights under it, in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from rlhf_fast.errors import UserError, refusing
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.loading import hub_id
from rlhf_fast.models.lora import LoRA
from rlhf_fast.models.self_test import trial


def stored_dtype(path: str, *, trust_remote_code: bool = False) -> torch.dtype:
    """The type of the weights in the folder `path`, or of the hub id."""
    place, revision = hub_id(path)
    with refusing(f"model {path} cannot be loaded"):
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **revision)
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


@torch.no_grad()
def merge(backbone: Backbone, role: str) -> Tensor:
    """Put the role's adapter into the weights of a float32 model, and take the adapter away.

    Returns log-probabilities of the adapter on a few tokens. Raises UserError where the merged weights give others, and
    for weights that cannot be merged: quantised ones, and those that another module uses too.
    """
    if backbone.quantized:
        raise UserError(f"{next(iter(backbone.quantized))} is quantised: merge into the model that it was made from")
    users: dict[int, set[str]] = {}
    for name, parameter in backbone.model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), set()).add(name)
    expected = logprobs_of_trial(backbone, role)
    for name, pair in backbone.adapters[role].items():
        module = backbone.model.get_submodule(name)
        weight = module.get_parameter("weight")
        shared = users[id(weight)] - {f"{name}.weight"}
        if shared:
            raise UserError(f"{name}.weight is {min(shared)} too, which has no adapter: it cannot be merged")
        ours = weight.t() if isinstance(module, Conv1D) else weight
        ours.copy_(merged_weight(ours, pair))
    backbone.remove_adapter(role)
    difference = float((logprobs_of_trial(backbone, None) - expected).abs().max())
    if not difference <= 2e-3:  # nats; float32 against float32, as when an adapter is saved
        raise UserError(f"the merged weights differ from the adapter by {difference:.3g} nats")
    return expected


def logprobs_of_trial(backbone: Backbone, role: str | None) -> Tensor:
    input_ids, mask = trial(backbone.model)
    return backbone.logprobs(backbone.hidden(input_ids, mask, [role])[role], input_ids, mask)


def merged_weight(weight: Tensor, pair: LoRA) -> Tensor:
    """(out, in), float32: W + scale B A; with magnitudes (DoRA, arXiv 2402.09353, eq. 5) each row then of that norm."""
    whole = weight.float() + pair.shape.scale * (pair.b.float() @ pair.a.float())
    if pair.magnitude is None:
        return whole
    return whole * (pair.magnitude.float() / torch.linalg.vector_norm(whole, dim=1))[:, None]
