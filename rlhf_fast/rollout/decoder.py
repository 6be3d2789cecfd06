"""A loop of our own around the model's forward: continuous batching over the slots of one cache.

A prompt goes through the model once, whatever the number of its answers, and its keys and values are copied to each of
them. A row that ends leaves its slot to the next one that waits. What is drawn depends on the row and the place of the
token (see `Drawing.draw`), so neither the order nor the number of slots decides what is sampled, but for rounding.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import signals
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.packing import UnknownArgument
from rlhf_fast.rollout import graphs
from rlhf_fast.rollout.attention import is_usable, reading, slot_attention
from rlhf_fast.rollout.cache import SlotCache, sliding_layers
from rlhf_fast.rollout.drawing import Drawing
from rlhf_fast.rollout.graphs import Graphs
from rlhf_fast.rollout.program import Program
from rlhf_fast.rollout.rows import Row, give, told
from rlhf_fast.rollout.state import State

# Tokens of prompts, padding included, that go through the model together: enough for products to be at their best.
PROMPT_TOKENS = 4096
# What models call their cache, the newer name first.
CACHE_NAMES = ("cache", "past_key_values")


@dataclass
class _Prompt:
    """A prompt that has gone through the model: row `row` of a cache and of the logits, (roles, prompts, V), of it and
    others."""

    cache: SlotCache
    logits: Tensor
    row: int

    @property
    def last_logits(self) -> Tensor:
        """(roles, V)"""
        return self.logits[:, self.row]


@dataclass
class _Flight:
    """A step whose tokens the rows have not got: the rows by their slots, and what waits for the tokens."""

    rows: list[Row | None]
    fetch: Callable[[], Tensor]


class Decoder:
    """Samples rows until they end, by the roles of what draws."""

    def __init__(
        self,
        backbone: Backbone,
        drawing: Drawing,
        *,
        slots: int,
        stops: Sequence[int],
        pad: int,
        ended: Callable[[Row], None] = lambda row: None,
    ) -> None:
        """slots: rows that are sampled at a time. ended: is told of each row that has ended, while others go on."""
        self.backbone, self.drawing, self.slots = backbone, drawing, slots
        self.sliding = sliding_layers(backbone.model)
        self.stops, self.pad, self.ended = frozenset(stops), pad, ended
        self.device, self.copies = backbone.model.device, len(drawing.roles)
        self.cache_name = next(name for name in CACHE_NAMES if name in backbone.accepted)

    @torch.no_grad()
    def run(self, rows: Sequence[Row], tokens: int) -> None:
        """Sample until all rows have ended or one has got `tokens`."""
        if not rows:
            return
        self.waiting = deque(rows)
        self.asked = Counter(row.prompt for row in rows)  # of the rows that wait
        self.read: dict[tuple[int, ...], _Prompt] = {}
        count = min(self.slots, len(rows))
        longest = max(len(row.ids) + row.left for row in rows)
        # Where rows come at any time, columns are moved to the left now and then; the more there are, the less often.
        self.cache = SlotCache(self.sliding, longest if count == len(rows) else longest + longest // 2)
        self.rows: list[Row | None] = [None] * count
        self.state = State.empty(count, self.device)
        self.flights: deque[_Flight] = deque()
        self.attends = is_usable(self.backbone.model)
        self.quick: Program | Graphs | None = None  # of the cache's memory, where there is one
        self.may_be_quick = True
        with ExitStack() as entered:
            entered.enter_context(self.backbone.using(*self.drawing.roles, one_pass=True))
            if self.attends:
                entered.enter_context(slot_attention(self.backbone.model))
            while self.waiting or any(self.rows):
                self._admit()
                if any(row is not None and len(row.tokens) >= tokens for row in self.rows):
                    return
                if any(self.rows):
                    self._step()

    def _step(self) -> None:
        """One more token for each slot; those of free slots are nobody's."""
        cache = self.cache
        # The last token of a row is not in the cache yet, but those that have not landed are.
        longest = max(len(row.ids) + len(row.tokens) - 1 for row in self.rows if row is not None) + len(self.flights)
        cache.first = max(0, cache.column - longest)
        if cache.column == cache.width:
            cache.shift(-cache.first)
        self.flights.append(_Flight([*self.rows], _fetched(self._taken())))
        if len(self.flights) > lag(self.device):
            self._land()

    def _taken(self) -> Tensor:
        """What is told of the samples of a step (see `told`), by the quickest way that was found to be right."""
        if self.quick is None and self.may_be_quick:
            self.quick = self._quickest()
            self.may_be_quick = self.quick is not None
        if self.quick is None:
            return self._advanced(self._passed())
        theirs, backbone = None, self.backbone
        if self.quick.trials.is_due(backbone):
            theirs, before = self._passed(), self.state.copy()
            self.cache.column -= 1
        signals.heed()
        logits, samples = self.quick.step()
        if theirs is not None and not self.quick.trials.agree(backbone, logits, theirs):
            self.quick, self.may_be_quick = None, False
            self.state.become(before)
            return self._advanced(theirs)
        return self._advanced(logits) if samples is None else samples

    def _quickest(self) -> Program | Graphs | None:
        """For the cache's memory as it is."""
        backbone = self.backbone
        if graphs.is_usable(backbone.model) and not Graphs.trials.has_failed(backbone):
            return Graphs(backbone.model, self.cache, self.state, self.sliding, self._made)
        return Program.of(backbone, self.cache, self.state, self.copies)

    def _made(self, masks: Any) -> tuple[Tensor, Tensor]:
        """A step of the graphs: logits, and what is told of the samples."""
        logits = self._forward(self.cache, self.state.ids[:, None], masks, self.state.places[:, None])
        return logits, self._advanced(logits)

    def _advanced(self, logits: Tensor) -> Tensor:
        """Draw the next tokens, which the next step begins with."""
        samples = self.drawing.draw(logits, self.state.numbers, self.state.steps)
        self.state.advance(samples.ids)
        return told(samples)

    def _passed(self) -> Tensor:
        """The next logits, by the model's own pass."""
        cache, state = self.cache, self.state
        starts = cache.column - cache.first - state.places
        columns = torch.arange(cache.column - cache.first + 1, device=self.device)
        given = cache, state.ids[:, None], (columns >= starts[:, None]).long(), state.places[:, None]
        logits = None
        if self.attends:
            try:
                with reading(starts.repeat(self.copies)):
                    logits = self._forward(*given)
            except UnknownArgument:
                self.attends = False
        logits = self._forward(*given) if logits is None else logits
        cache.column += 1
        return logits

    def _forward(self, cache: SlotCache, ids: Tensor, mask: Any, places: Tensor) -> Tensor:
        """(roles x B, V), the logits behind the last of the ids (B, T), which go into the cache's next columns."""
        signals.heed()
        given = {
            "input_ids": self._of_all(ids), "attention_mask": self._of_all(mask), "position_ids": self._of_all(places),
            self.cache_name: cache, "use_cache": True, "logits_to_keep": 1,
        }  # fmt: skip
        accepted = self.backbone.accepted
        logits = self.backbone.model(**{name: value for name, value in given.items() if name in accepted}).logits
        return logits[:, -1]

    def _of_all(self, given: Any) -> Any:
        """For each role the same: of a tensor whose rows are the slots', or of several by name."""
        if isinstance(given, dict):
            return {name: self._of_all(one) for name, one in given.items()}
        return given.repeat(self.copies, *[1] * (given.dim() - 1))

    def _land(self) -> None:
        """The oldest step's tokens to the rows that are still in their slots."""
        flight = self.flights.popleft()
        rows = [row if row is self.rows[slot] else None for slot, row in enumerate(flight.rows)]
        self._give(rows, flight.fetch(), range(len(rows)))

    def _give(self, rows: Sequence[Row | None], samples: Tensor, slots: Sequence[int]) -> None:
        """The tokens to the rows in the slots, of which those that end leave."""
        ended = [slots[place] for place in give(rows, samples, self.stops)]
        for slot in ended:
            row, self.rows[slot] = self.rows[slot], None
            assert row is not None
            self.ended(row)
        if ended:  # a free slot stays within the positions that the model has
            self.state.places[ended] = 0

    def _admit(self) -> None:
        """Give free slots to rows that wait, and these rows their first tokens."""
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        if not self.waiting:
            self._shrink()
            return
        few = len(free) < max(1, len(self.rows) // 8)  # all others wait for the pass of a new prompt
        if not free or (few and self.waiting[0].prompt not in self.read):
            return
        coming = [self.waiting.popleft() for _ in range(min(len(free), len(self.waiting)))]
        slots = free[: len(coming)]
        self._read([prompt for prompt in dict.fromkeys(row.prompt for row in coming) if prompt not in self.read])
        self._place(slots, coming)
        at = torch.tensor(slots, device=self.device)
        numbers = torch.tensor([[row.number, row.first, len(row.ids)] for row in coming], device=self.device)
        of_rows, first, places = numbers.unbind(1)
        logits = torch.stack([self.read[row.prompt].last_logits for row in coming], 1)
        samples = self.drawing.draw(logits.flatten(0, 1), of_rows, first)
        self.state.put(at, ids=samples.ids, numbers=of_rows, steps=first + 1, places=places)
        self._give(coming, told(samples), slots)
        self.asked.subtract(row.prompt for row in coming)
        self.read = {prompt: found for prompt, found in self.read.items() if self.asked[prompt] > 0}

    def _read(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Prompts go through the model, for their keys, values and last logits."""
        for batch in _batches(prompts, PROMPT_TOKENS // self.copies):
            width = max(map(len, batch))
            lengths = torch.tensor([len(prompt) for prompt in batch], device=self.device)
            ids = torch.tensor([[self.pad] * (width - len(prompt)) + [*prompt] for prompt in batch], device=self.device)
            places = torch.arange(width, device=self.device) - (width - lengths[:, None])
            cache = SlotCache(self.sliding, width)
            logits = self._forward(cache, ids, (places >= 0).long(), places.clamp_min(0)).unflatten(
                0, (self.copies, -1)
            )
            cache.column = width
            self.read |= {prompt: _Prompt(cache, logits, row) for row, prompt in enumerate(batch)}

    def _place(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        """Keys and values of the rows' prompts into the slots, so that they end where the others' do."""
        cache, longest = self.cache, max(len(row.ids) for row in rows)
        if not any(self.rows):
            cache.column = longest
        elif cache.column < longest:
            cache.first = 0
            cache.shift(longest - cache.column)
        sources: dict[int, tuple[SlotCache, list[int], list[int]]] = {}
        for slot, row in zip(slots, rows, strict=True):
            self.rows[slot] = row
            prompt = self.read[row.prompt]
            source = sources.setdefault(id(prompt.cache), (prompt.cache, [], []))
            source[1].append(slot)
            source[2].append(prompt.row)
        for other, ours, theirs in sources.values():
            if not cache.begun:
                cache.begin(self.copies * len(self.rows), other)
            of_other = next(read.logits.shape[1] for read in self.read.values() if read.cache is other)
            cache.put(self._of_roles(ours, len(self.rows)), other, self._of_roles(theirs, of_other))

    def _of_roles(self, rows: Sequence[int], count: int) -> Tensor:
        """Where the rows are for each role, in blocks of `count` rows."""
        return torch.tensor([role * count + row for role in range(self.copies) for row in rows], device=self.device)

    def _shrink(self) -> None:
        """Without rows that wait, free slots cost time and bring nothing."""
        if 4 * sum(row is not None for row in self.rows) > 3 * len(self.rows):
            return
        while self.flights:  # they know their rows by the slots
            self._land()
        live = [slot for slot, row in enumerate(self.rows) if row is not None]
        if not live:
            return
        self.cache.take(self._of_roles(live, len(self.rows)))
        self.quick = None
        self.rows = [self.rows[slot] for slot in live]
        self.state = self.state.take(torch.tensor(live, device=self.device))


def lag(device: torch.device) -> int:
    """How many steps run ahead of the host, which then reads the tokens of one while the next one runs."""
    return int(device.type == "cuda")


def _fetched(samples: Tensor) -> Callable[[], Tensor]:
    """A call that waits for what is on its way to the host."""
    if samples.device.type != "cuda":
        return lambda: samples
    here = torch.empty(samples.shape, dtype=samples.dtype, pin_memory=True)
    here.copy_(samples, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def fetch() -> Tensor:
        event.synchronize()
        return here

    return fetch


def _batches(prompts: Sequence[tuple[int, ...]], tokens: int) -> list[list[tuple[int, ...]]]:
    """In their order, and as many together as have, padded, so many tokens."""
    batches: list[list[tuple[int, ...]]] = []
    width = 0
    for prompt in prompts:
        width = max(width, len(prompt))
        if not batches or (len(batches[-1]) + 1) * width > tokens:
            batches.append([])
            width = len(prompt)
        batches[-1].append(prompt)
    return batches
