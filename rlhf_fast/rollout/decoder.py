"""A loop of our own around the model's forward: continuous batching over the slots of one cache.

A prompt goes through the model once, whatever the number of its answers, and its keys and values are copied to each of
them. A row that ends leaves its slot to the next one that waits. What is drawn depends on the row and the place of the
token (see `Drawing.draw`), so neither the order nor the number of slots decides what is sampled, but for rounding.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast import signals
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.ops.tokens.sample_tokens import Samples
from rlhf_fast.rollout.attention import UnknownArgument, is_usable, reading, slot_attention
from rlhf_fast.rollout.cache import SlotCache, sliding_layers
from rlhf_fast.rollout.drawing import Drawing
from rlhf_fast.rollout.program import Program
from rlhf_fast.rollout.rows import Row, give

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
        # Of each slot its last token, the place of that in its row, the row's number, and that of its next token.
        self.ids, self.places, self.numbers, self.steps = torch.zeros(4, count, dtype=torch.int64, device=self.device)
        self.attends = is_usable(self.backbone.model)
        self.program: Program | None = None  # of the cache's memory, where it may make the steps
        self.may_list = True
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
        # The last token of a row is not in the cache yet.
        longest = max(len(row.ids) + len(row.tokens) - 1 for row in self.rows if row is not None)
        cache.first = cache.column - longest
        if cache.column == cache.width:
            cache.shift(-cache.first)
        logits = self._listed()
        samples = self.drawing.draw(logits, self.numbers, self.steps)
        self.ids = samples.ids
        self.places += 1
        self.steps += 1
        self._give(samples, list(range(len(self.rows))))

    def _listed(self) -> Tensor:
        """The next logits, by the native list of stages where there is one and it was found to be right."""
        if self.program is None and self.may_list:
            self.program = Program.of(self.backbone, self.cache, self.copies * len(self.rows))
            self.may_list = self.program is not None
        if self.program is None:
            return self._passed()
        theirs = None if self.program.is_tried else self._passed()
        if theirs is not None:
            self.cache.column -= 1
        signals.heed()
        logits = self.program(self.ids.repeat(self.copies), self.places.repeat(self.copies), self.cache.column)
        self.cache.column += 1
        if theirs is not None and not self.program.agrees(logits, theirs):
            self.program, self.may_list = None, False
            return theirs
        return logits

    def _passed(self) -> Tensor:
        """The next logits, by the model's own pass."""
        cache = self.cache
        starts = cache.column - cache.first - self.places
        columns = torch.arange(cache.column - cache.first + 1, device=self.device)
        given = cache, self.ids[:, None], (columns >= starts[:, None]).long(), self.places[:, None]
        if self.attends:
            try:
                with reading(starts.repeat(self.copies)):
                    return self._forward(*given)
            except UnknownArgument:
                self.attends = False
        return self._forward(*given)

    def _forward(self, cache: SlotCache, ids: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        """(roles x B, V), the logits behind the last of the ids (B, T), which the cache then has too."""
        signals.heed()
        given = {
            "input_ids": ids.repeat(self.copies, 1), "attention_mask": mask.repeat(self.copies, 1),
            "position_ids": places.repeat(self.copies, 1), self.cache_name: cache, "use_cache": True,
            "logits_to_keep": 1,
        }  # fmt: skip
        accepted = self.backbone.accepted
        logits = self.backbone.model(**{name: value for name, value in given.items() if name in accepted}).logits
        cache.column += ids.shape[1]
        return logits[:, -1]

    def _give(self, samples: Samples, slots: Sequence[int]) -> None:
        """The tokens to the rows in the slots, of which those that end leave."""
        rows = [self.rows[slot] for slot in slots]
        ended = [slots[place] for place in give(rows, samples, self.stops)]
        for slot in ended:
            row, self.rows[slot] = self.rows[slot], None
            assert row is not None
            self.ended(row)
        if ended:  # a free slot stays within the positions that the model has
            self.places[ended] = 0

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
        self.numbers[at], self.steps[at], self.places[at] = numbers.unbind(1)
        logits = torch.stack([self.read[row.prompt].last_logits for row in coming], 1)
        samples = self.drawing.draw(logits.flatten(0, 1), self.numbers[at], self.steps[at])
        self.ids[at] = samples.ids
        self.steps[at] += 1
        self._give(samples, slots)
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
        live = [slot for slot, row in enumerate(self.rows) if row is not None]
        if not live or 4 * len(live) > 3 * len(self.rows):
            return
        self.cache.take(self._of_roles(live, len(self.rows)))
        self.program = None
        self.rows = [self.rows[slot] for slot in live]
        at = torch.tensor(live, device=self.device)
        self.ids, self.places, self.numbers, self.steps = (
            values[at] for values in (self.ids, self.places, self.numbers, self.steps)
        )


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
