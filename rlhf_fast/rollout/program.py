"""A step of decoding on the CPU as one native call, for the architectures that it is written for.

Between the products of a step lie some two thousand small operations, which take as long as these. Here the stages of
all layers, with the addresses of what they read and write, are listed once per shape, and a step runs the list in one
parallel region (csrc/cpu/program.h). The model's own pass makes the first step too, and decides whether the list may
make the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.backends import DTYPE_CODES, native, packed, strided, threads
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.lora import LoRALinear, current_route
from rlhf_fast.models.routing import HeadInput
from rlhf_fast.ops.lora.lora_linear import FewRowsProduct, prepare_few_rows
from rlhf_fast.rollout.cache import SlotCache
from rlhf_fast.rollout.state import State
from rlhf_fast.rollout.trials import Trials

# Layers that are x + attention(norm(x)), then x + down(act(gate(norm(x))) * up(norm(x))), with rotated heads; and what
# comes before them.
LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "Embedding"}
ACTIVATIONS = {"SiLUActivation": False, "SiLU": False, "GELUTanh": True}  # class -> whether it is gelu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRIALS = Trials("a native step")


class Unknown(Exception):
    """Something of the model that the list has no stage for."""


class Program:
    """The list for the slots of one cache, whose memory must stay where it is, for each role of the current route."""

    trials = TRIALS

    def __init__(self, backbone: Backbone, cache: SlotCache, state: State, copies: int) -> None:
        """Raises Unknown for a model or a number of rows that it is not written for."""
        self.cache, self.state, self.copies, model = cache, state, copies, backbone.model
        rows = copies * len(state.ids)
        self.decoder, self.embeddings = model.get_decoder(), model.get_input_embeddings()
        weight = self.embeddings.weight
        if weight.device.type != "cpu" or weight.dtype not in DTYPES or backbone.shards is not None:
            raise Unknown("weights in this place or type")
        layers = [model.get_submodule(name) for name in backbone.layer_names]
        if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
            raise Unknown("hooks")
        for module in (self.embeddings, *layers):
            name = type(module).__name__
            if name not in LAYERS or not type(module).__module__.startswith(("torch.", "transformers.models.")):
                raise Unknown(name)
        self.rows = rows
        self.held: list[object] = []  # what the list knows by its address
        self.native = native().Program(DTYPE_CODES[weight.dtype], rows)
        self.x = self._room(weight, weight.shape[1])
        self.rotated = self._angles(torch.zeros(rows, dtype=torch.int64))[0].shape[1]
        added = None
        for layer, (keys, values) in zip(layers, cache.held, strict=True):
            added = self._layer(layer, keys, values, added)
        normed = self._norm(self.decoder.norm, self.x, self._room(self.x, self.x.shape[1]), added)
        self.logits = self._product(model.get_output_embeddings(), normed)

    @classmethod
    def of(cls, backbone: Backbone, cache: SlotCache, state: State, copies: int) -> Program | None:
        """None where there is none, or where it was found to differ from the model."""
        if TRIALS.has_failed(backbone):
            return None
        try:
            return cls(backbone, cache, state, copies)
        except Unknown:
            return None

    def step(self) -> tuple[Tensor, None]:
        """The last tokens go into the cache's column: logits of the next ones, (rows, V), until the next step. The
        state is as it was."""
        ids, places = self.state.ids.repeat(self.copies), self.state.places.repeat(self.copies)
        torch.index_select(self.embeddings.weight, 0, ids, out=self.x)
        cos, sin = self._angles(places)
        self.native(packed(cos), packed(sin), packed(places), self.cache.column, threads())
        self.cache.column += 1
        return self.logits, None

    def _angles(self, places: Tensor) -> tuple[Tensor, ...]:
        """Cosine and sine of each row's position, (rows, what is rotated of a head) each."""
        return tuple(part[:, 0].contiguous() for part in self.decoder.rotary_emb(self.x[:, None], places[:, None]))

    def _layer(self, layer: Any, keys: Tensor, values: Tensor, added: Tensor | None) -> Tensor:
        """What is to be added to x behind the layer; `added` is that of the layer before."""
        attention, mlp = layer.self_attn, layer.mlp
        normed = self._room(self.x, self.x.shape[1])
        self._norm(layer.input_layernorm, self.x, normed, added)
        query, key = (
            self._product(attention.q_proj, normed, waits=False),
            self._product(attention.k_proj, normed, waits=False),
        )
        value = self._product(attention.v_proj, normed)
        width, value_width = keys.shape[3], values.shape[3]
        if self.rotated != width:
            raise Unknown(f"rotation of {self.rotated} of {width} places of a head")
        for states, name in ((query, "q_norm"), (key, "k_norm")):
            if hasattr(attention, name):
                heads = states.view(-1, width)
                self._norm(getattr(attention, name), heads, heads)
        out = self._room(self.x, query.shape[1] // width * value_width)
        self.native.attend(
            tuple(strided(states)[0] for states in (query, key, value, keys, values, out)),
            (query.shape[1], key.shape[1], value.shape[1]),
            (query.shape[1] // width, keys.shape[1], width, value_width, self._window(attention), width),
            (*keys.stride()[:3], *values.stride()[:3]), attention.scaling, 0.0,
        )  # fmt: skip
        added = self._product(attention.o_proj, out)
        self._norm(layer.post_attention_layernorm, self.x, normed, added)
        gate, up = self._product(mlp.gate_proj, normed, waits=False), self._product(mlp.up_proj, normed, waits=False)
        name = type(mlp.act_fn).__name__
        if name not in ACTIVATIONS:
            raise Unknown(name)
        self.native.gate(packed(gate), packed(up), gate.shape[1], ACTIVATIONS[name])
        return self._product(mlp.down_proj, gate)

    def _window(self, attention: Any) -> int:
        """How many columns a row reads at most; 0: all."""
        if "Mistral" in type(attention).__name__:
            return getattr(attention.config, "sliding_window", None) or 0
        return getattr(attention, "sliding_window", None) or 0

    def _norm(self, module: Any, x: Tensor, out: Tensor, added: Tensor | None = None) -> Tensor:
        """x += added, then out = the norm of it."""
        if not type(module).__name__.endswith("RMSNorm"):
            raise Unknown(type(module).__name__)
        self.held.append(module.weight)
        addresses = packed(x), packed(added), packed(module.weight), packed(out)
        self.native.norm(
            addresses, (len(x), x.shape[1], x.shape[1], x.shape[1]), module.variance_epsilon, 0.0, True, True
        )
        return out

    def _product(self, module: nn.Module, x: Tensor, *, waits: bool = True) -> Tensor:
        """The linear layer of x, with the adapters of the route. waits: see the native `product`."""
        product = _product_of(module, x)
        if product is None:
            raise Unknown(f"{type(module).__name__} of {len(x)} rows")
        y = self._room(x, product.shape[-1])
        self.native.product(product.product, (packed(x), product.weight_at, product.bias_at, packed(y)), waits)
        self.held.append(product)
        return y

    def _room(self, like: Tensor, width: int) -> Tensor:
        room = like.new_empty(self.rows, width)
        self.held.append(room)
        return room


def _product_of(module: nn.Module, x: Tensor) -> FewRowsProduct | None:
    forward, route = module.__dict__.get("forward"), current_route()
    if isinstance(forward, HeadInput):
        forward = forward.head_forward
    if isinstance(forward, LoRALinear) and route is not None:
        return forward.product(x, route)
    if forward is not None or type(module) is not nn.Linear:
        return None
    return prepare_few_rows(x, module.weight, [], [(-1, len(x))], bias=module.bias)
