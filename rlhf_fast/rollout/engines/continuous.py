"""Continuous batching of transformers, from the weights that train: a paged cache, in which rows come and go."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.utils import logger

from rlhf_fast import signals
from rlhf_fast.errors import UserError, first_line
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.rollout.drawing import Drawing
from rlhf_fast.rollout.engines.protocol import Ask, Coming, Rule, Sampled
from rlhf_fast.rollout.generation import without_settings_of_the_checkpoint

PAGE = 32  # tokens of a page of the cache
PREFILL = 2048  # tokens of a batch, where prompts are no longer


class ContinuousBatching:
    """The manager's loop runs in a thread of its own, which is given the route of the adapters; what fails there is an
    error here. It draws as our own loop does: the seed and the number of a row decide, not what else is sampled.
    """

    name = "engine transformers (continuous batching)"

    def sample(self, backbone: Backbone, role: str | None, asked: Sequence[Ask], rule: Rule) -> Coming:
        if backbone.shards is not None:
            raise UserError(f"{self.name} cannot sample from a model whose weights are split over processes (shards)")
        model = backbone.model
        settings = GenerationConfig(max_new_tokens=rule.max_new_tokens, do_sample=False, eos_token_id=list(rule.stops))
        longest = max(len(ask.ids) for ask in asked)
        pages = -(-(longest + rule.max_new_tokens) // PAGE) + 1
        config = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=pages * len(asked), max_batch_tokens=max(longest, PREFILL, len(asked)),
            max_requests_per_batch=len(asked), use_cuda_graph=False, use_async_batching=False,
            auto_switch_to_flash=False,
        )  # fmt: skip
        draw = _Draw({str(place): ask.row for place, ask in enumerate(asked)}, rule)
        with backbone.using(role), without_settings_of_the_checkpoint(model), _silent():
            manager = model.init_continuous_batching(generation_config=settings, continuous_batching_config=config)
            draw.put_into(manager.logit_processor)
            # A new thread has none of this context: without the route it would sample from the base model.
            context, loop = copy_context(), manager._run_generation_loop
            manager._run_generation_loop = lambda **options: context.run(loop, **options)  # type: ignore[method-assign]
            manager.start()
            try:
                for place, ask in enumerate(asked):
                    manager.add_request(list(ask.ids), request_id=str(place), eos_token_id=list(rule.stops))
                for _ in asked:
                    output = _next(manager)
                    if output is None or output.error is not None:
                        why = manager.background_thread_status.fatal_error if output is None else output.error
                        raise UserError(f"{self.name} failed: {first_line(Exception(why or 'its thread ended'))}")
                    yield int(output.request_id), draw.sampled(output.request_id, output.generated_tokens)
            finally:
                manager.stop(hard_stop=True)


@contextmanager
def _silent() -> Iterator[None]:
    """Without its log: it tells what fails with a traceback, and what fails is raised here."""
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _next(manager: Any) -> Any:
    """The next request that is over; None where the thread ended without one."""
    while True:
        signals.heed()
        alive = manager.is_running()
        output = manager.get_result(timeout=0.1)
        if output is not None and output.is_finished():
            return output
        if output is None and not alive:
            return None


class _Draw(ContinuousBatchingLogitsProcessor):
    """Draws the next token of each request by its row and its place, and leaves it as the only one."""

    def __init__(self, rows: dict[str, int], rule: Rule) -> None:
        self.supported_kwargs, self.ignored_kwargs = {}, ()
        self.rows, self.logprobs = rows, rule.logprobs
        self.drawing = Drawing([None], rule.temperature, rule.top_k, rule.top_p)
        self.drawing.begin(rule.seed)
        self.drawn: dict[str, list[list[float]]] = {name: [] for name in rows}
        self._names: list[str] = []

    def put_into(self, processors: Any) -> None:
        """Behind what the model's class has, with room for the argument that it does not need."""
        processors.logits_processor.append(self)
        processors.tensors_required += 1
        processors.do_processing = True

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        self._names = [request.state.request_id for request in requests_with_new_token]
        return torch.zeros(len(self._names), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        if not scores.isfinite().any(1).all() or scores.isnan().any():
            raise UserError("the policy's logits are not finite: a lower learning_rate, or a model without NaN")
        of_rows = [[self.rows[name], len(self.drawn[name])] for name in self._names]
        numbers, steps = torch.tensor(of_rows, device=scores.device).unbind(1)
        samples = self.drawing.draw(scores, numbers, steps)
        values = torch.stack([x.double() for x in (samples.ids, samples.full_logprobs, samples.logprobs)], 1)
        for name, of_token in zip(self._names, values.tolist(), strict=True):
            self.drawn[name].append(of_token)
        return torch.full_like(scores, -torch.inf).scatter_(1, samples.ids[:, None], 0.0)

    def sampled(self, name: str, tokens: list[int]) -> Sampled:
        """The completion of a request, whose tokens its manager says to be these."""
        ids, *values = (list(column)[: len(tokens)] for column in zip(*self.drawn[name], strict=True))
        if ids != tokens:
            raise UserError(f"{ContinuousBatching.name}: request {name} has other tokens than were drawn for it")
        return Sampled(tokens, *values) if self.logprobs else Sampled(tokens, [], [])
