"""The frozen weights in pieces, one on each of several ranks, by torch's FSDP2 (`fully_shard`).

A decoder layer is whole only while it runs: its pieces are gathered before its forward, dropped behind it, and gathered
again for its backward. Nothing is reduced: frozen weights have no gradients. Embeddings and the head of the language
model are split by rows of the vocabulary and gathered where they are used; a frozen head needs no weight in its
backward (see linear_logprobs), so it travels once. Norms and what else is small stay whole on every rank.

Adapters and heads of roles are no parameters of the model: FSDP never sees them, they stay plain and whole.

Every rank of the group must run the same layers in the same order, forward and backward, whatever its rows are: a
gather waits for all. A rank without rows computes idle ones.

Source: Zhao et al. 2023, PyTorch FSDP (arXiv 2304.11277), of ZeRO stage 3, Rajbhandari et al. 2020 (arXiv 1910.02054).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_fast.errors import UserError
from rlhf_fast.models.pieces import whole_weight, with_whole_weight
from rlhf_fast.models.quantized import is_quantized, make_plain
from rlhf_fast.models.routing import HeadInput, RoutedLayer

SHARE_OF_FREE = 0.5  # of the free memory, what a whole copy to sample from may take; the cache of keys takes the rest


class Unit(nn.Module):
    """Modules whose weights are gathered together, around a function that uses them.

    It stands beside the model, not in it, so that nothing is gathered for a layer that a traversal skips.
    """

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


class Shards:
    """How a model is split over each `count` neighbouring ranks of the process group."""

    def __init__(self, count: int, device: torch.device, *, whole_rollouts: bool | None = None) -> None:
        """whole_rollouts: whether completions are sampled from a whole copy, gathered for each rollout; None: where it
        takes at most SHARE_OF_FREE of the memory.

        Raises UserError where the ranks are not a multiple of `count`.
        """
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks % count:
            raise UserError(f"shards must divide the number of processes, {ranks}, got {count}")
        self.count, self.device, self.whole_rollouts = count, device, whole_rollouts
        self.mesh = init_device_mesh(device.type, (ranks // count, count), mesh_dim_names=("copies", "shards"))[
            "shards"
        ]
        self.layers: list[Any] = []  # the units, in order
        self.by_rows: list[nn.Module] = []  # embeddings and the head
        self._from_first = False
        self._is_whole = False

    # Making the pieces

    def load(self, load: Callable[[torch.device], PreTrainedModel]) -> PreTrainedModel:
        """The model that `load` gives on the first rank, which holds it in the memory of the CPU; on the others it has
        no weights until `split` sends them, a layer at a time. One that is quantised is loaded by each rank, whole.

        The UserError of the first rank is raised on all.
        """
        told: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                model = load(torch.device("cpu"))
                if not any(map(is_quantized, model.modules())):
                    told = [(model.config, model.generation_config, getattr(model, "base_commit", None))]
            except UserError as error:
                told = [str(error)]
        dist.broadcast_object_list(told)
        if isinstance(told[0], str):
            raise UserError(told[0])
        if told[0] is None:
            return load(self.device)
        self._from_first = True
        if dist.get_rank() > 0:
            config, generation_config, commit = told[0]
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation).eval()
            model.generation_config, model.base_commit = generation_config, commit
        return model

    def split(self, model: PreTrainedModel, layers: Sequence[RoutedLayer], head: HeadInput) -> None:
        """Leaves on this rank its piece of every layer, of the embeddings and of the head of a frozen model.

        Raises UserError for layers that share weights, or have some that cannot be split.
        """
        inside = {module for layer in layers for module in layer.layer.modules()}
        for layer in layers:
            self._send(layer.layer.modules())
            for module in layer.layer.modules():
                if is_quantized(module):
                    make_plain(module)
            unit = Unit(layer.layer)
            try:
                fully_shard(unit, mesh=self.mesh, ignored_params={p for p in unit.parameters() if p.dim() == 0})
            except (NotImplementedError, AssertionError, ValueError) as error:
                raise UserError(f"{type(model).__name__} cannot be sharded: {error}") from error
            self.layers.append(unit)
            layer.layer_forward = functools.partial(unit, layer.layer_forward)
        self._send(module for module in model.modules() if module not in inside)
        self._split_rows(model, inside, head)
        root = Unit(*self.layers)
        fully_shard(root, mesh=self.mesh)
        # What the layers gather is ordered by the pass of the whole model that they are in.
        forward = model.forward
        model.forward = functools.wraps(forward)(functools.partial(root, forward))
        self.first = 0

    @property
    def first(self) -> int:
        """The lowest layer that a backward reaches."""
        return self._first

    @first.setter
    def first(self, index: int) -> None:
        """Each layer's backward gathers the one below; the last has none, and names itself, which is a no-op."""
        self._first = index
        for place, unit in enumerate(self.layers):
            unit.set_modules_to_backward_prefetch([self.layers[place - 1 if place > index else place]])

    def _send(self, modules: Iterable[nn.Module]) -> None:
        """The tensors of the modules from the first rank to all, on their device, where it alone has loaded them."""
        if not self._from_first:
            return
        places = [(held, name) for module in modules for held, name in _tensors_of(module)]
        sent: dict[Tensor, Tensor] = {}  # what several modules share stays shared
        described = [[(held[name].shape, held[name].dtype) for held, name in places]]
        dist.broadcast_object_list(described)
        for (held, name), (shape, dtype) in zip(places, described[0], strict=True):
            old = held[name]
            if old not in sent:
                with torch.no_grad():
                    new = torch.empty(shape, dtype=dtype, device=self.device)
                    if dist.get_rank() == 0:
                        new.copy_(old)
                    dist.broadcast(new.reshape(-1).view(torch.uint8), 0)
                sent[old] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
            held[name] = sent[old]

    def _split_rows(self, model: PreTrainedModel, inside: set[nn.Module], head: HeadInput) -> None:
        """The embeddings outside of the layers, and the head, which may share its weight with one."""
        output, pieces = model.get_output_embeddings(), {}
        for module in model.modules():
            if module in inside or not (isinstance(module, nn.Embedding) or module is output):
                continue
            weight = module.get_parameter("weight")
            if weight not in pieces:
                piece = distribute_tensor(weight.to(self.device), self.mesh, [Shard(0)], src_data_rank=None)
                pieces[weight] = nn.Parameter(piece, requires_grad=False)
            module.weight = pieces[weight]
            self.by_rows.append(module)
            if module is output:
                head.head_forward = with_whole_weight(module, head.head_forward)
            else:
                module.forward = with_whole_weight(module, module.forward)  # type: ignore[method-assign]

    # Sampling

    @contextmanager
    def sampling(self) -> Iterator[bool]:
        """Whether what is sampled inside gathers each layer for each token, so that all ranks must go on to the end of
        the longest completion. Otherwise the weights are whole inside, gathered once."""
        if self._is_whole or not self.may_be_whole():
            yield not self._is_whole
            return
        with self.whole():
            yield False

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Every rank of the group holds all weights inside."""
        self._is_whole = True
        try:
            with ExitStack() as gathered:
                for unit in self.layers:
                    unit.set_reshard_after_forward(False)
                    unit.unshard()
                for module in self.by_rows:
                    gathered.enter_context(whole_weight(module))
                yield
        finally:
            for unit in self.layers:
                unit.set_reshard_after_forward(True)
                unit.reshard()
            self._is_whole = False

    def may_be_whole(self) -> bool:
        """Whether completions are sampled from a whole copy; the same on all ranks."""
        if self.whole_rollouts is not None:
            return self.whole_rollouts
        fits = torch.tensor(float(self.missing_bytes() <= SHARE_OF_FREE * free_bytes(self.device)), device=self.device)
        dist.all_reduce(fits, dist.ReduceOp.MIN, group=self.mesh.get_group())
        return bool(fits)

    def missing_bytes(self) -> int:
        """What a whole copy takes beside this rank's pieces."""
        pieces = {p for part in (*self.layers, *self.by_rows) for p in part.parameters() if isinstance(p, DTensor)}
        return sum((p.numel() - p.to_local().numel()) * p.element_size() for p in pieces)

    def idle_passes(self, own: int) -> int:
        """How many passes a rank of the group makes more than the `own` of this one."""
        most = torch.tensor(own, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.mesh.get_group())
        return int(most) - own


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take: of a GPU, or its share of the machine's."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _tensors_of(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where the module itself holds tensors: parameters, buffers and plain attributes."""
    held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
    return [(place, name) for place in held for name, value in place.items() if isinstance(value, Tensor)]
