"""Whether what samples and what is trained are the same model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.data.batches import Batch, pad_batch
from rlhf_fast.data.encoding import Example
from rlhf_fast.errors import UserError, first_line
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.ops.tokens.transform import transformed
from rlhf_fast.rollout.completions import SamplerView, placed, policy_of
from rlhf_fast.rollout.drawing import Drawing, spread_of
from rlhf_fast.rollout.engines import sample_rows
from rlhf_fast.rollout.rows import Row

ROUNDING = 1e-4  # nats per token, of the worst row: ten times what float32 makes of a small model


@dataclass(frozen=True)
class Agreement:
    """How the sampler's log-probabilities of its own tokens compare with the scored ones.

    sampled, scored: their means, nats per token. gap: the mean absolute difference, of the worst row. bar: what
    rounding may make of it.
    """

    sampled: float
    scored: float
    gap: float
    bar: float

    @property
    def holds(self) -> bool:
        return self.gap <= self.bar  # False for NaN

    @property
    def is_rounding(self) -> bool:
        """Whether the sampler's may stand for the scored ones."""
        return self.holds and self.gap <= ROUNDING

    def __str__(self) -> str:
        return (
            f"mean log-probability of the sampled tokens: {self.sampled:.4f} nats by the sampler, {self.scored:.4f} "
            f"scored; they differ by {self.gap:.2g} in the worst row, rounding explains {self.bar:.2g}"
        )


@torch.no_grad()
def check_sampler(
    backbone: Backbone, prompts: Sequence[Sequence[int]], *, pad: int, temperature: float = 1.0, new_tokens: int = 8,
    engine: str = "local",
) -> Agreement:  # fmt: skip
    """Samples `new_tokens` from prompts of different lengths, padded on the left and with a cache, as rollouts do, and
    scores them padded on the right and without one.

    prompts: token ids; the first half of each is a row as well, so that there is padding. The role is 'policy'.
    Uses torch's global random state.
    """
    asked = [list(ids) for prompt in prompts for ids in (prompt, prompt[: (len(prompt) + 1) // 2])]
    rows = [Row(number, ids, 0, new_tokens) for number, ids in enumerate(asked)]
    drawing = Drawing([policy_of(backbone)], temperature, 0, 1.0)
    drawing.begin(int(torch.randint(1 << 62, ())))
    try:
        with backbone.sampling() as in_step:
            sample_rows(backbone, drawing, rows, new_tokens, stops=(), pad=pad, engine=engine, in_step=in_step)
    except UserError:
        raise
    except Exception as error:  # whatever the code of an architecture may raise
        raise UserError(f"{type(backbone.model).__name__} cannot generate: {first_line(error)}") from error
    batch = pad_batch([Example(row.ids + row.tokens, len(row.ids)) for row in rows], pad).to(backbone.model.device)
    assert drawing.spread is not None
    logprobs, drawn = placed([row.logprobs for row in rows], batch), placed([row.drawn for row in rows], batch)
    return agreement(backbone, batch, SamplerView(logprobs, drawn, drawing.spread), temperature)


# Honest models were measured at up to 1.1 of what `_rounding` says (fp32 and bfloat16, 2 to 30 layers).
MARGIN = 3.0


def _rounding(backbone: Backbone, hidden: Tensor) -> float:
    """Relative error of the logits, to a factor: each layer rounds its sum once more, at random. fp32 sums of D
    products round at each of them; half precision sums in fp32 and rounds the result."""
    eps, width = torch.finfo(hidden.dtype).eps, hidden.shape[-1]
    return eps * len(backbone.layer_names) ** 0.5 * (width**0.5 if hidden.dtype == torch.float32 else 1.0)


@torch.no_grad()
def agreement(backbone: Backbone, batch: Batch, sampler: SamplerView, temperature: float) -> Agreement:
    """The sampler's log-probabilities beside those of a scoring pass over `batch`, by the role 'policy'."""
    role = policy_of(backbone)
    hidden = backbone.hidden(batch.input_ids, batch.attention_mask, [role])[role]
    scored = backbone.logprobs(hidden, batch.input_ids, batch.mask, mask_count=batch.count, temperature=temperature)
    count = batch.mask.sum(1)
    gaps = (sampler.logprobs - scored).abs().sum(1) / count
    mean = float(sampler.logprobs.sum() / count.sum())
    spread = _spread(backbone, hidden, batch, temperature) if sampler.spread is None else sampler.spread
    return Agreement(
        sampled=mean,
        scored=float(scored.sum() / count.sum()),
        gap=float(gaps.max()),
        bar=MARGIN * _rounding(backbone, hidden) * max(spread, -mean),
    )


def _spread(backbone: Backbone, hidden: Tensor, batch: Batch, temperature: float, tokens: int = 64) -> float:
    """What a Drawing measures, of the first sampled tokens' logits, from the hidden states of a scoring pass."""
    states = hidden[:, :-1][batch.mask[:, 1:].bool()][:tokens]
    logits = F.linear(states, backbone.lm_head_weight, backbone.lm_head_bias)
    return float(spread_of(transformed(logits.float(), temperature=temperature, **backbone.logit_transform)))
