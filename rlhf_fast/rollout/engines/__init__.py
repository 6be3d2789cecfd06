"""Who samples."""

from collections.abc import Callable, Sequence

from rlhf_fast.models.backbone import Backbone
from rlhf_fast.rollout.cache import why_no_slots
from rlhf_fast.rollout.decoder import CACHE_NAMES, Decoder
from rlhf_fast.rollout.drawing import Drawing
from rlhf_fast.rollout.generation import generate
from rlhf_fast.rollout.rows import Row


def why_not_local(backbone: Backbone, in_step: bool) -> str | None:
    """Why our own loop cannot sample from the model; None where it can."""
    if in_step:
        return "its weights are gathered for each token, for which all processes go on to the longest completion"
    if backbone.accepted.isdisjoint(CACHE_NAMES):
        return "it keeps nothing of the tokens before"
    return why_no_slots(backbone.model)


def sample_rows(
    backbone: Backbone,
    drawing: Drawing,
    rows: Sequence[Row],
    tokens: int,
    *,
    stops: Sequence[int],
    pad: int,
    slots: int | None = None,
    ended: Callable[[Row], None] = lambda row: None,
    engine: str = "local",
    in_step: bool = False,
) -> None:
    """Give the rows tokens, until all have ended or one has got `tokens` (of transformers: until all have).

    slots: rows at a time, where our own loop samples; default: all. ended: is told of each row that has ended, while
    others go on. engine: `local` or `transformers`. in_step: of `Backbone.sampling`, in which this is called.
    """
    if engine == "local" and why_not_local(backbone, in_step) is None:
        Decoder(backbone, drawing, slots=slots or len(rows), stops=stops, pad=pad, ended=ended).run(rows, tokens)
    else:
        generate(backbone, drawing, rows, tokens, stops=stops, pad=pad, ended=ended, in_step=in_step)
