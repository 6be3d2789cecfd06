"""One frozen causal language model that plays every role of an RLHF run.

A role is an adapter (or none: the base model) and, for the critic and the reward, a linear head of the same name. The
base weights exist once; a role adds its LoRA pairs and its head and nothing else.

Roles by convention: "policy", "reference" (the base model unless an adapter of that name exists), "critic", "reward",
and "reward_1", "reward_2" ... for the further members of an ensemble of reward models.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_fast import signals
from rlhf_fast.errors import UserError
from rlhf_fast.models.architecture import (
    adaptable_linears,
    decoder_layers,
    linear_shape,
    logit_transforms,
    peft_conflicts,
    select_linears,
    text_config,
)
from rlhf_fast.models.lora import LoRA, LoRALinear, LoRAShape, Route, routed
from rlhf_fast.models.packing import Layout, layout_of, packed
from rlhf_fast.models.pieces import local_tensor, whole_tensor, whole_weight
from rlhf_fast.models.quantized import QuantizedForward, is_quantized, quantization_state
from rlhf_fast.models.routing import HeadInput, RoutedLayer, Traversal, traversing
from rlhf_fast.models.self_test import (
    TRIAL_ROWS,
    check_gradients,
    check_logits,
    observing,
    runs_lower_layers_once,
    unsupported,
    why_not_packed,
)
from rlhf_fast.models.sharding import Shards
from rlhf_fast.ops.head.linear_kl import LinearKl, linear_kl
from rlhf_fast.ops.head.linear_logprobs import linear_logprobs
from rlhf_fast.ops.head.tiles import default_chunk_tokens


@dataclass(frozen=True)
class Scores:
    """What one scoring traversal gives; all fp32, without gradients.

    logprobs, ref_logprobs: (B, T), nats, 0 where the mask is 0. values: (B, T), the value before each token,
    or (B, T, M) of a head with M outputs.
    scores: (B,), the reward head at the last real token; (B, M) where the reward roles have M outputs in all.
    ref_hidden: (B, T, D), the reference's last hidden states, in their own type.
    features: (B, D), what the head of the role "reward" is given. costs: (B,), the cost head at the last real token.
    collisions: (B, T), the policy's sums of squared probabilities over the vocabulary. kl: (B, T), KL(policy ||
    reference) of the prediction of each token, over the vocabulary, nats. ref_ranks: (B, T), see `ranks`, of the
    reference. None for a role that does not exist or was not asked for.
    """

    logprobs: Tensor | None
    ref_logprobs: Tensor
    values: Tensor | None
    scores: Tensor | None
    features: Tensor | None = None
    costs: Tensor | None = None
    collisions: Tensor | None = None
    kl: Tensor | None = None
    ref_ranks: Tensor | None = None
    ref_hidden: Tensor | None = None


class Backbone:
    """The roles on one model. Freezes every parameter of `model` and puts it in eval mode: the base has no dropout.

    model: a decoder-only language model of transformers, on its device and in its dtype. It is run on a few tokens, and
    docs/architectures.md says what came of that for each architecture.
    left_out: name -> why, of the linear layers inside the decoder layers that cannot have an adapter.
    Raises UserError, with the reason, for an architecture that cannot be one.
    """

    def __init__(self, model: PreTrainedModel, shards: Shards | None = None, *, padding_free: bool = True) -> None:
        """shards: splits the weights over ranks; every method that runs the model is then a call of all of them.
        padding_free: pack rows where `why_not_packed` says nothing."""
        layers = decoder_layers(model)
        self._available = adaptable_linears(model, layers)
        self.model = model.eval().requires_grad_(False)
        self.layer_names = list(layers)
        self.quantized = {name: module for name, module in model.named_modules() if is_quantized(module)}
        for name, module in self.quantized.items():
            QuantizedForward(module, name)
        routed_layers = [RoutedLayer(layer, index, text_config(model)) for index, layer in enumerate(layers.values())]
        LoRALinear(model.get_output_embeddings(), stream=len(self._available))
        head = HeadInput(model.get_output_embeddings())
        self.shards = shards
        if shards is not None:
            shards.split(model, routed_layers, head)
        self._linears: dict[str, LoRALinear] = {}
        self.adapters: dict[str, dict[str, LoRA]] = {}
        self.heads: dict[str, nn.Linear] = {}
        self._read_by: dict[str, str] = {}  # head -> the role whose hidden states it is given, where it is not its own
        self._recompute = False
        self.head_chunk: int | None = None  # rows of logits at a time; None: what is fast
        self.accepted = _accepted(model)
        self._lower_runs_once: dict[int, bool] = {}  # by the first adapted layer
        self.padding_free = padding_free
        # Why rows cannot be packed, "" where they can, and how long they may then be.
        self._not_packed: tuple[str, int | None] = ("there are no values to try it on", None)
        # Rows of the head that give logits; further ones only round its size up.
        self.vocabulary = self.model.get_output_embeddings().out_features
        self.logit_transform = logit_transforms(model)[0]
        self.left_out = peft_conflicts(model, self._available)
        if model.device.type != "meta":
            self._try()
        self._available = {name: module for name, module in self._available.items() if name not in self.left_out}
        self._layer_of = {
            module: index
            for index, layer in enumerate(self.layer_names)
            for module in self._available
            if module.startswith(f"{layer}.")
        }

    @torch.no_grad()
    def _try(self) -> None:
        with observing(self._available, TRIAL_ROWS) as unadaptable:
            check_logits(self)
        self.left_out = {**check_gradients(self, self._available), **unadaptable, **self.left_out}
        self._not_packed = why_not_packed(self)

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of every linear decoder layer that can be adapted."""
        return {name: linear_shape(module) for name, module in self._available.items()}

    # Adapters and heads

    def add_adapter(
        self,
        name: str,
        *,
        rank: int = 8,
        alpha: float = 16,
        targets: str | Iterable[str] = "all-linear",
        top_layers: int | None = None,
        trainable: bool = True,
        copy_of: str | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        """Give the role `name` an adapter whose delta is zero, or, with `copy_of`, that adapter's pairs and values.

        targets: "all-linear" or last parts of module names. top_layers: adapt only that many layers, from the top.
        `copy_of` decides all that shapes an adapter itself. `trainable` holds for the adapter's whole life.
        use_rslora: scale alpha / sqrt(rank), not alpha / rank. use_dora: a magnitude per output. dropout: of the
        adapter's input, in the passes of `hidden` that have a dropout seed.
        dtype: fp32 for anything that is trained or averaged; a frozen copy may take the dtype of the model.
        """
        if copy_of is not None:
            source = self._adapter(copy_of)
            shapes = {module: pair.shape for module, pair in source.items()}
        else:
            if rank < 1:
                raise UserError(f"the rank of adapter {name!r} must be at least 1, got {rank}")
            modules = select_linears(self._names_in_top(top_layers), targets, self.left_out)
            if targets == "all-linear" and self.left_out:
                _warn_of(self.left_out)
            if not 0 <= dropout < 1:
                raise UserError(f"the dropout of adapter {name!r} must be in [0, 1), got {dropout}")
            shape = LoRAShape(rank, alpha / (rank**0.5 if use_rslora else rank), use_rslora, use_dora, dropout)
            shapes = dict.fromkeys(modules, shape)
        self.create_adapter(name, shapes, trainable=trainable, dtype=dtype, seed=seed)
        if copy_of is not None:
            self.copy_adapter(copy_of, name)

    def create_adapter(
        self,
        name: str,
        shapes: Mapping[str, LoRAShape],
        *,
        trainable: bool = True,
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
    ) -> None:
        """The general form of `add_adapter`: module name -> its shape. The delta is zero."""
        if name in self.adapters:
            raise UserError(f"there is already an adapter named {name!r}")
        unknown = [module for module in shapes if module not in self._available]
        if unknown:
            raise UserError(f"adapter {name!r} is for {unknown[0]!r}, which is no linear decoder layer of this model")
        packed = [module for module, shape in shapes.items() if shape.use_dora and module in self.quantized]
        if packed:
            raise UserError(f"adapter {name!r} has DoRA magnitudes, which {packed[0]!r} cannot have: it is quantised")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        pairs = {}
        streams = {module: stream for stream, module in enumerate(self._available)}
        for module, shape in shapes.items():
            if module not in self._linears:
                self._linears[module] = LoRALinear(self._available[module], streams[module])
            pairs[module] = self._linears[module].add(
                name, shape, trainable=trainable, dtype=dtype, generator=generator
            )
        self.adapters[name] = pairs
        self._tell_shards()

    def set_dropout(self, name: str, dropout: float) -> None:
        """Another dropout for the adapter, from the next pass on that has a dropout seed."""
        for pair in self._adapter(name).values():
            pair.shape = replace(pair.shape, dropout=dropout)

    def remove_adapter(self, name: str) -> None:
        """Forget the adapter and the head of this role."""
        for module in self._adapter(name):
            del self._linears[module].bank[name]
        del self.adapters[name]
        self.heads.pop(name, None)
        self._read_by.pop(name, None)
        self._tell_shards()

    def _tell_shards(self) -> None:
        if self.shards is not None:
            self.shards.first = self.first_adapted_layer

    def add_head(
        self,
        name: str,
        *,
        outputs: int = 1,
        trainable: bool = True,
        copy_of: str | None = None,
        seed: int | None = None,
        on: str | None = None,
    ) -> None:
        """Give the role `name` a head (D -> outputs, fp32, no bias as in transformers' `score`).

        on: the role whose hidden states `score` gives it; default: its own.

        It is zero, or with `copy_of` a copy, of which one output is the mean of several; or, with a seed, normal of
        variance 1 / (D + 1), which makes the members of an ensemble differ (Stiennon et al. 2020, 2009.01325).
        """
        if name in self.heads:
            raise UserError(f"there is already a head named {name!r}")
        dim, device = self.hidden_size, self.model.get_output_embeddings().weight.device
        head = nn.Linear(dim, outputs, bias=False, dtype=torch.float32, device=device)
        with torch.no_grad():
            head.weight.zero_()
            if copy_of is not None:
                rows = self.head(copy_of).weight
                head.weight.copy_(rows if len(rows) == outputs else rows.mean(0, keepdim=True))
            elif seed is not None:
                generator = torch.Generator().manual_seed(seed)
                head.weight.copy_(torch.randn(outputs, dim, generator=generator) / (dim + 1) ** 0.5)
        self.heads[name] = head.requires_grad_(trainable)
        self._read_by[name] = on or name

    @property
    def reward_roles(self) -> list[str]:
        """The role "reward" and the further members of its ensemble, in order, as far as there are any."""
        return [name for name in self.heads if name == "reward" or name.startswith("reward_")]

    def head(self, name: str) -> nn.Linear:
        if name not in self.heads:
            raise UserError(f"there is no head named {name!r}; there are: {sorted(self.heads)}")
        return self.heads[name]

    def named_parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter and the head of a role, under the names of PEFT's files without their prefix."""
        if name not in self.adapters and name not in self.heads:
            raise UserError(f"there is no role named {name!r}; there are: {sorted({*self.adapters, *self.heads})}")
        named: dict[str, nn.Parameter] = {}
        for module, pair in self.adapters.get(name, {}).items():
            named |= {f"{module}.{part}": parameter for part, parameter in pair.parameters.items()}
        if name in self.heads:
            named["score.weight"] = self.heads[name].get_parameter("weight")
        return named

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        return list(self.named_parameters_of(name).values())

    # Values of adapters, by name, while training runs. A role keeps its Parameter objects: optimizers stay valid.

    @torch.no_grad()
    def snapshot(self, name: str) -> dict[str, Tensor]:
        """A copy of the role's adapter and head, for `restore`."""
        return {key: parameter.clone() for key, parameter in self.named_parameters_of(name).items()}

    @torch.no_grad()
    def restore(self, name: str, snapshot: Mapping[str, Tensor]) -> None:
        """Put values back; the snapshot must have the role's names and shapes."""
        own = self.named_parameters_of(name)
        _check_same(own, snapshot, f"adapter {name!r} and the snapshot")
        for key, parameter in own.items():
            parameter.copy_(snapshot[key])

    @torch.no_grad()
    def copy_adapter(self, src: str, dst: str) -> None:
        """dst = src, for the adapter alone."""
        for ours, theirs in self._paired(dst, src):
            ours.copy_(theirs)

    @torch.no_grad()
    def lerp_adapter(self, dst: str, src: str, weight: float) -> None:
        """dst = dst + weight (src - dst), for the adapter alone: a moving average when repeated."""
        for ours, theirs in self._paired(dst, src):
            if ours.dtype != torch.float32:
                raise UserError(f"adapter {dst!r} is {ours.dtype}: small steps would be lost, an average needs fp32")
            ours.lerp_(theirs.to(ours.dtype), weight)

    @torch.no_grad()
    def swap_adapters(self, a: str, b: str) -> None:
        """Exchange the values of two adapters."""
        for first, second in self._paired(a, b):
            values = first.clone()
            first.copy_(second)
            second.copy_(values)

    # Forward

    def enable_checkpointing(self, enabled: bool = True) -> None:
        """Keep only the input of each layer that has a gradient; the backward then computes the layer again."""
        self._recompute = enabled

    @property
    def first_adapted_layer(self) -> int:
        """Index of the lowest layer with an adapter; the last layer when there is none."""
        adapted = (self._layer_of[module] for pairs in self.adapters.values() for module in pairs)
        return min(adapted, default=len(self.layer_names) - 1)

    @contextmanager
    def using(self, *roles: str | None, one_pass: bool = False) -> Iterator[None]:
        """`model` itself plays this role, or an equal share of its rows each of several: for `model.generate` and plain
        forwards. one_pass: of `Route`; weights that are split over ranks have none."""
        adapters = tuple(self._adapter_name(role) for role in roles)
        with routed(Route(adapters, one_pass=one_pass and self.shards is None)):
            yield

    @torch.no_grad()
    def lower(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
        """(B, T) -> (B, T, D), the input of the first adapted layer, which is the same for every role at all times.

        Compute it once per rollout and give its rows to `hidden`. None when the first layer is adapted. It stays
        valid until an adapter is added or removed.
        """
        first = self._first_shared_layer()
        if first == 0:
            return None
        layout = self._layout(input_ids, attention_mask)
        lower = self.reach(first, *_packed(layout, input_ids, attention_mask), layout)
        return lower if layout is None else layout.unpack(lower)

    def reach(self, first: int, input_ids: Tensor, attention_mask: Tensor, layout: Layout | None = None) -> Tensor:
        """The input of layer `first` of the base model; of packed rows with their layout."""
        traversal = Traversal(Route((None,)), first, stop=True, layout=layout)
        self._traverse(traversal, input_ids, attention_mask)
        assert traversal.reached is not None
        return traversal.reached

    def run(
        self, input_ids: Tensor, attention_mask: Tensor, layout: Layout | None = None, *, first: int = 0,
        lower: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The last hidden states of the base model for rows as they are, (B, T, D), or for packed ones with their
        layout; from the input `lower` of layer `first`, where it is given."""
        return self._traverse(Traversal(Route((None,)), first, start=lower, layout=layout), input_ids, attention_mask)

    def _first_shared_layer(self) -> int:
        """The first adapted layer, or 0 where the layers below it cannot run once for all roles."""
        first = self.first_adapted_layer
        if first == 0 or self.model.device.type == "meta":
            return first
        if first not in self._lower_runs_once:
            self._lower_runs_once[first] = runs_lower_layers_once(self, first)
        return first if self._lower_runs_once[first] else 0

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        roles: Sequence[str | None],
        *,
        lower: Tensor | None = None,
        dropout_seed: int | None = None,
    ) -> dict[str | None, Tensor]:
        """Last hidden states (after the final norm) of every role: role -> (B, T, D), in one traversal.

        Where `why_not_packed` says nothing, it is one of the real tokens alone, and of what rows begin with alike, such
        as a prompt with several answers, once. What padding gets means nothing.

        input_ids, attention_mask: (B, T); padding may be on either side. None is the base model, and so is
        "reference" without an adapter. lower: what `lower` gave for these rows. dropout_seed: a number per pass, from 0
        to 2^47, turns on the dropout of the adapters, which must then be the same for all roles; None leaves it off.
        """
        signals.heed()
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must be {tuple(input_ids.shape)} like input_ids, got {tuple(attention_mask.shape)}"
            )
        if not roles or len(set(roles)) != len(roles):
            raise ValueError(f"roles must be one or more different names, got {list(roles)}")
        first, copies = self.first_adapted_layer, len(roles)
        if lower is not None and (first == 0 or lower.shape[:2] != input_ids.shape):
            given = f"{tuple(lower.shape)} with input_ids {tuple(input_ids.shape)}"
            raise ValueError(f"lower must be (B, T, D) for the input of layer {first} > 0, got {given}")
        adapters = tuple(self._adapter_name(role) for role in roles)
        layout = self._layout(input_ids, attention_mask)
        ids, real = _packed(layout, input_ids, attention_mask)
        if lower is not None:
            lower = lower if layout is None else layout.pack(lower)
        elif copies > 1 and self._first_shared_layer() > 0:
            lower = self.reach(first, ids, real, layout)
        traversal = Traversal(
            Route(adapters, ids.numel(), dropout_seed),
            first,
            start=None if lower is None else lower.repeat(copies, 1, 1),
            recompute=self._recompute and torch.is_grad_enabled(),
            layout=layout,
        )
        states = self._traverse(traversal, ids.repeat(copies, 1), real.repeat(copies, 1)).split(len(ids))
        if layout is not None:
            states = tuple(map(layout.unpack, states))
        return dict(zip(roles, states, strict=True))

    def _layout(self, input_ids: Tensor, attention_mask: Tensor) -> Layout | None:
        """How the rows are packed; None: not at all."""
        if not self.padding_free or input_ids.device.type == "meta" or self.why_not_packed(input_ids.shape[1]):
            return None
        return layout_of(input_ids, attention_mask)

    def why_not_packed(self, longest: int = 1) -> str | None:
        """Why rows of up to `longest` tokens go through the model as they are, with their padding; None where they need
        not."""
        reason, window = self._not_packed
        if reason or window is None or longest <= window:
            return reason or None
        return f"its attention reaches {window} tokens back, and the longest row has {longest}"

    def _traverse(self, traversal: Traversal, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the head is given, (B, T, D)."""
        if self.model.training:
            raise RuntimeError("the model is in training mode, where dropout would make the roles differ: call eval()")
        with traversing(traversal), packed(text_config(self.model), traversal.layout):
            self.model(**self.inputs(input_ids, attention_mask, traversal.layout))
        hidden = traversal.hidden
        if hidden is None or hidden.shape[:2] != input_ids.shape:
            given = "nothing" if hidden is None else f"{tuple(hidden.shape)} hidden states"
            raise unsupported(self.model, f"its head is given {given} for {tuple(input_ids.shape)} tokens")
        return hidden

    def inputs(self, input_ids: Tensor, attention_mask: Tensor, layout: Layout | None = None) -> dict[str, Any]:
        """The arguments of `model` for a batch, (B, T) each: those that it accepts. layout: of packed rows."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.long().cumsum(-1) - 1).clamp(min=0),
            "use_cache": False,
        }
        if layout is not None:
            given["position_ids"] = layout.position_ids.expand(len(input_ids), -1)
        return {name: value for name, value in given.items() if name in self.accepted}

    # Heads on hidden states

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.model.get_output_embeddings().in_features

    @property
    def lm_head_weight(self) -> Tensor:
        """(V, D). Where it is split over ranks, each look gathers it; see `whole_head`."""
        return whole_tensor(self.model.get_output_embeddings().weight)[: self.vocabulary]

    @contextmanager
    def whole_head(self) -> Iterator[None]:
        """Looks at the head inside gather it once, where it is split over ranks."""
        with whole_weight(self.model.get_output_embeddings()):
            yield

    @contextmanager
    def sampling(self) -> Iterator[bool]:
        """For what generates: whether the ranks inside must all go on to the end of the longest completion, because
        they gather layers for each token."""
        if self.shards is None:
            yield False
            return
        with self.shards.sampling() as in_step:
            yield in_step

    def idle_passes(self, own: int) -> int:
        """How many passes the other ranks make more than the `own` of this one, which they need it for."""
        return 0 if self.shards is None else self.shards.idle_passes(own)

    @property
    def lm_head_bias(self) -> Tensor | None:
        """(V,) or None."""
        bias = self.model.get_output_embeddings().bias
        return None if bias is None else bias[: self.vocabulary]

    @overload
    def logprobs(
        self, hidden: Tensor, input_ids: Tensor, mask: Tensor, *, mask_count: int | None = ..., temperature: float = ...
    ) -> Tensor: ...

    @overload
    def logprobs(
        self, hidden: Tensor, input_ids: Tensor, mask: Tensor, *, mask_count: int | None = ...,
        temperature: float = ..., return_entropy: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def logprobs(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        mask: Tensor,
        *,
        mask_count: int | None = None,
        temperature: float = 1.0,
        return_entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """log p(input_ids[:, t] | tokens before t): (B, T, D), (B, T), (B, T) -> (B, T), fp32, nats.

        mask: 1 for the tokens that count; position 0 has no prediction and never counts. The others are 0 and cost
        no product with the head, on a GPU where mask_count bounds how many count. return_entropy: also the entropy of
        each prediction, (B, T).
        """
        flags = {"temperature": temperature, "return_entropy": return_entropy}
        result = self._predictions(hidden, input_ids, mask, mask_count, **flags)
        if isinstance(result, Tensor):
            return _behind(result)
        return _behind(result.logprobs), _behind(result.entropy)

    def logprobs_and_collisions(
        self, hidden: Tensor, input_ids: Tensor, mask: Tensor, *, mask_count: int | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`logprobs`, and for each token the sum over the vocabulary of the squared probabilities: (B, T) each."""
        result = self._predictions(hidden, input_ids, mask, mask_count, temperature=temperature, return_stats=True)
        return _behind(result.logprobs), _behind(result.stats.sum_p_squared)

    def _predictions(
        self, hidden: Tensor, input_ids: Tensor, mask: Tensor, mask_count: int | None, **flags: Any
    ) -> Any:
        """linear_logprobs of the tokens. Row t - 1 predicts token t."""
        return linear_logprobs(
            hidden, self.lm_head_weight, input_ids.roll(-1, 1), bias=self.lm_head_bias,
            mask=F.pad(mask[:, 1:], (0, 1)), mask_count=mask_count, chunk_tokens=self.head_chunk,
            **self.logit_transform, **flags,
        )  # fmt: skip

    def divergence(
        self, hidden: Tensor, ref_hidden: Tensor, input_ids: Tensor, mask: Tensor, *, mask_count: int | None = None,
        temperature: float = 1.0, variant: str = "reverse", return_entropy: bool = False,
    ) -> LinearKl:  # fmt: skip
        """Those of `logprobs` under both hidden states, (B, T, D), and the divergence of each prediction over the whole
        vocabulary, (B, T) each, fp32, nats; variant: of linear_kl, reverse is KL(policy || reference)."""
        result = linear_kl(
            hidden, ref_hidden, self.lm_head_weight, input_ids.roll(-1, 1), bias=self.lm_head_bias,
            mask=F.pad(mask[:, 1:], (0, 1)), mask_count=mask_count, temperature=temperature, variant=variant,
            return_entropy=return_entropy, chunk_tokens=self.head_chunk, **self.logit_transform,
        )  # fmt: skip
        return LinearKl(*(None if values is None else _behind(values) for values in result))  # type: ignore[arg-type]

    @torch.no_grad()
    def ranks(self, hidden: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """The place of input_ids[:, t] among the predictions from the tokens before t: (B, T, D), (B, T), (B, T) ->
        (B, T) int64, 1 for the likeliest token, 0 behind the mask.

        Of all logits one tile exists at a time, in hidden's type: in half precision tokens whose logits are rounded to
        the same number share a place.
        """
        counted = F.pad(mask[:, 1:], (0, 1)).bool()
        states, targets = hidden[counted], input_ids.roll(-1, 1)[counted]
        places = []
        weight = self.lm_head_weight
        size = self.head_chunk or default_chunk_tokens(weight)
        for rows, ids in zip(states.split(size), targets.split(size), strict=True):
            logits = F.linear(rows, weight, self.lm_head_bias)
            places.append((logits > logits.gather(1, ids[:, None])).sum(1) + 1)
        ranks = torch.zeros_like(input_ids)
        ranks[counted] = torch.cat(places)
        return _behind(ranks)

    def values(self, role: str, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T), fp32: at t the value before token t, from hidden state t - 1; 0 at t = 0. Of a head of M
        outputs (B, T, M)."""
        return F.pad(self.head(role)(hidden[:, :-1].float()), (0, 0, 1, 0)).squeeze(-1)

    def scores(self, role: str, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T, D) -> (B,), fp32: the head at the last real token of each row; (B, M) for a head of M outputs."""
        return self.head(role)(last_states(hidden, attention_mask)).squeeze(-1)

    @torch.no_grad()
    def score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        mask: Tensor,
        *,
        mask_count: int | None = None,
        temperature: float = 1.0,
        lower: Tensor | None = None,
        policy: bool = True,
        exact_kl: bool = False,
        ranks: bool = False,
        ref_hidden: bool = False,
    ) -> Scores:
        """Policy and reference log-probabilities, values and scores of the roles that exist, in one traversal.

        policy: False leaves the policy out, whose old log-probabilities an update without a step before it makes too.
        exact_kl: also the KL of each prediction; it takes the policy. ranks: also those of the reference, for a
        further product with the head. ref_hidden: also the reference's hidden states.
        """
        rewards, critic = self.reward_roles, self._read_by.get("critic")
        roles = ["policy"] if policy else []
        roles += ["reference", *filter(None, [critic]), *(["cost"] if "cost" in self.heads else []), *rewards]
        hidden = self.hidden(input_ids, attention_mask, list(dict.fromkeys(roles)), lower=lower)
        of_tokens: dict[str, Any] = {
            "input_ids": input_ids, "mask": mask, "mask_count": mask_count, "temperature": temperature,
        }  # fmt: skip
        logprobs: Tensor | None = None
        collisions: Tensor | None = None
        kl: Tensor | None = None
        with self.whole_head():
            if exact_kl:
                found = self.divergence(hidden["policy"], hidden["reference"], **of_tokens)
                assert found.ref_logprobs is not None
                kl, logprobs, ref_logprobs = found.kl, found.logprobs, found.ref_logprobs
            else:
                ref_logprobs, _ = self.logprobs_and_collisions(hidden["reference"], **of_tokens)
                if policy:
                    logprobs, collisions = self.logprobs_and_collisions(hidden["policy"], **of_tokens)
            ref_ranks = self.ranks(hidden["reference"], input_ids, mask) if ranks else None
        scores = [self.scores(role, hidden[role], attention_mask) for role in rewards]
        return Scores(
            logprobs,
            ref_logprobs,
            self.values("critic", hidden[critic]) if critic else None,
            None if not scores else scores[0] if len(scores) == 1 else torch.column_stack(scores),
            last_states(hidden["reward"], attention_mask) if "reward" in rewards else None,
            self.scores("cost", hidden["cost"], attention_mask) if "cost" in hidden else None,
            collisions,
            kl,
            ref_ranks,
            hidden["reference"].clone() if ref_hidden else None,  # alone, without the other roles' states
        )

    # Bytes

    def bytes(self) -> dict[str, int]:
        """Bytes of unique storages on this rank: "base", and "adapter:<name>" and "head:<name>" of each role."""
        seen: set[int] = set()
        states = [tensor for layer in self.quantized.values() for tensor in quantization_state(layer)]
        sizes = {"base": _new_bytes([*self.model.parameters(), *self.model.buffers(), *states], seen)}
        for name, pairs in self.adapters.items():
            sizes[f"adapter:{name}"] = _new_bytes(
                [p for pair in pairs.values() for p in pair.parameters.values()], seen
            )
        for name, head in self.heads.items():
            sizes[f"head:{name}"] = _new_bytes(head.parameters(), seen)
        return sizes

    # Names

    def _adapter(self, name: str) -> dict[str, LoRA]:
        if name not in self.adapters:
            raise UserError(f"there is no adapter named {name!r}; there are: {sorted(self.adapters)}")
        return self.adapters[name]

    def _adapter_name(self, role: str | None) -> str | None:
        """The adapter a role uses; None is the base model."""
        if role is None or (role == "reference" and role not in self.adapters):
            return None
        self._adapter(role)
        return role

    def _names_in_top(self, top_layers: int | None) -> list[str]:
        count = len(self.layer_names)
        top = count if top_layers is None else top_layers
        if not 1 <= top <= count:
            raise UserError(f"top_layers must be from 1 to {count}, the layers of this model, got {top_layers}")
        return [module for module, layer in self._layer_of.items() if layer >= count - top]

    def _paired(self, dst: str, src: str) -> list[tuple[Tensor, Tensor]]:
        tensors = []
        for name in (dst, src):
            pairs = self._adapter(name)
            tensors.append({(m, part): p for m, pair in pairs.items() for part, p in pair.parameters.items()})
        _check_same(tensors[0], tensors[1], f"adapters {dst!r} and {src!r}")
        return [(tensors[0][key], tensors[1][key]) for key in tensors[0]]


def _packed(layout: Layout | None, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask as the model takes them."""
    return (input_ids, attention_mask) if layout is None else (layout.pack(input_ids), layout.pack(attention_mask))


def last_states(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T, D) -> (B, D), fp32: the state of the last real token of each row."""
    last = attention_mask.shape[1] - 1 - attention_mask.flip(1).long().argmax(1)
    return hidden[torch.arange(len(last), device=last.device), last].float()


def _accepted(model: PreTrainedModel) -> set[str]:
    """Names of the arguments of the model's forward, with those of its decoder where it hands on what it gets."""
    parameters = inspect.signature(model.forward).parameters
    names = set(parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        names |= set(inspect.signature(model.get_decoder().forward).parameters)
    return names


def _behind(predictions: Tensor) -> Tensor:
    """(B, T), of the tokens behind each place -> of the tokens themselves; 0 for the first, which nothing predicts."""
    return F.pad(predictions[:, :-1], (1, 0))


def _warn_of(left_out: Mapping[str, str]) -> None:
    reasons: dict[str, set[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, set()).add(name.rsplit(".", 1)[-1])
    listed = "; ".join(f"{', '.join(sorted(names))} ({reason})" for reason, names in reasons.items())
    warnings.warn(f"all-linear leaves out {len(left_out)} linear layers: {listed}", stacklevel=3)


def _check_same(ours: Mapping, theirs: Mapping, what: str) -> None:
    if ours.keys() != theirs.keys():
        raise UserError(f"{what} have different layers: {len(ours)} and {len(theirs)} tensors")
    for key in ours:
        if ours[key].shape != theirs[key].shape:
            raise UserError(
                f"{what} differ in the shape of {key}: {tuple(ours[key].shape)} and {tuple(theirs[key].shape)}"
            )


def _new_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the storages not in `seen`, which gets them. Counts on the meta device too."""
    total = 0
    for tensor in tensors:
        storage = local_tensor(tensor).untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total
