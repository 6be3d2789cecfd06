"""A step of decoding on a GPU as one captured CUDA graph: layers, head, sampling, and what the next step begins with.

A step's some thousand launches take longer than its kernels. What changes from step to step, the column of the cache
among it, lies in tensors that the graph itself advances; how many columns attention reads is a shape, so there is a
graph for each 256 columns. Nothing inside waits for the host, which reads a step's tokens while the next one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.data.notes import say
from rlhf_fast.errors import first_line
from rlhf_fast.models.architecture import text_config
from rlhf_fast.rollout.cache import SlotCache
from rlhf_fast.rollout.state import State
from rlhf_fast.rollout.trials import Trials

COLUMNS = 256
TRIALS = Trials("a step for a CUDA graph")
LAYER_TYPES = {"full_attention", "sliding_attention"}


def is_usable(model: PreTrainedModel) -> bool:
    """Whether steps may be captured: on a GPU, with attention that PyTorch can make of a mask of columns."""
    kinds = getattr(text_config(model), "layer_types", None) or []
    return model.device.type == "cuda" and model._supports_sdpa and LAYER_TYPES.issuperset(kinds)


@dataclass
class Graphs:
    """The graphs of one cache's memory, by the columns that are read.

    make: a step, which reads so many columns with these masks: (logits, what is told of the samples), and advances the
    state.
    """

    model: PreTrainedModel
    cache: SlotCache
    state: State
    sliding: Sequence[bool]
    make: Callable[[Any], tuple[Tensor, Tensor]]
    trials: ClassVar[Trials] = TRIALS
    _replays: dict[int, Callable[[], tuple[Tensor, Tensor]]] = field(default_factory=dict)
    _warm: set[int] = field(default_factory=set)
    _may_capture: bool = True

    def step(self) -> tuple[Tensor, Tensor]:
        """What `make` gives, until the next step."""
        reach = min(-(-(self.cache.column + 1) // COLUMNS) * COLUMNS, self.cache.width)
        self.state.column.fill_(self.cache.column)
        if reach not in self._replays:
            if reach not in self._warm or not self._may_capture:  # kernels are compiled, tables are copied
                self._warm.add(reach)
                made = self._made(reach)
                self.cache.column += 1
                return made
            try:
                self._replays[reach] = captured(lambda: self._made(reach))
            except RuntimeError as error:
                self._may_capture = False
                say(f"sampling without CUDA graphs: {first_line(error)}")
                return self.step()
        made = self._replays[reach]()
        self.cache.column += 1
        return made

    def _made(self, reach: int) -> tuple[Tensor, Tensor]:
        with self.cache.at(self.state.column, reach), _attention(self.model):
            return self.make(self._masks(reach))

    def _masks(self, reach: int) -> Any:
        """(B, 1, 1, reach) bool, whether a row reads a column; for models with layers of two kinds one of each."""
        columns, column = torch.arange(reach, device=self.state.column.device), self.state.column
        read = (columns >= (column - self.state.places)[:, None]) & (columns <= column)
        if not any(self.sliding):
            return read[:, None, None]
        window = read & (columns > column - text_config(self.model).sliding_window)
        if all(self.sliding):
            return window[:, None, None]
        return {"full_attention": read[:, None, None], "sliding_attention": window[:, None, None]}


@contextmanager
def _attention(model: PreTrainedModel) -> Iterator[None]:
    """By PyTorch: what takes flash-attn's place of the mask has lengths on the host."""
    config = text_config(model)
    before = config._attn_implementation
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before


def captured(make: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that runs it again as one graph. Raises RuntimeError where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = make()

    def replay() -> tuple[Tensor, Tensor]:
        graph.replay()
        return made

    return replay
