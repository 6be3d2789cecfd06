"""Pretraining in the mix (PPO-ptx): each update's gradient is the policy loss's plus that of a language-model loss.

    gradient = g_policy + ptx_coef g_ptx,    g_ptx of the mean negative log-probability of the learnt tokens

Both are accumulated before the one optimizer step: two steps would let Adam divide ptx_coef out again. ptx_coef
multiplies a mean over tokens, as the policy loss is one. Ouyang et al. 2022 (2203.02155), eq. 2, writes the expectation
of log p(x) over whole sequences, and its code is not public: their 27.8 may belong to sums over tokens.
"""

from collections.abc import Iterable

from pydantic import Field
from torch import Tensor

from rlhf_fast.data.batches import shuffled_indices
from rlhf_fast.data.encoded import encode_rows
from rlhf_fast.data.layouts import require_columns, with_known_columns
from rlhf_fast.data.reading import Row
from rlhf_fast.data.rows import Prepared, View
from rlhf_fast.data.sources import read_rows
from rlhf_fast.errors import UserError
from rlhf_fast.training import supervised
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.job import Job
from rlhf_fast.training.optim import Loss
from rlhf_fast.training.setup import known_of
from rlhf_fast.training.supervised import Rows, logprobs_of


class PtxConfig(RolloutConfig):
    """The keys of pretraining in the mix."""

    ptx_data: str | None = Field(None, description="texts, completions or conversations that are learnt beside")
    ptx_coef: float | None = Field(None, gt=0, description="weight of their mean loss per token; default 27.8")
    ptx_batch_size: int | None = Field(None, ge=1, description="of them per update; default: the rows of a minibatch")


def add_ptx(job: Job, config: PtxConfig) -> None:
    """job.pretraining: the examples of ptx_data."""
    if config.ptx_data is None:
        if config.ptx_coef is not None:
            raise UserError(f"ptx_coef {config.ptx_coef} is the weight of ptx_data, which is missing")
        return
    skip = config.bad_rows == "skip"
    name = config.ptx_data

    def change(rows: list[Row]) -> list[Row]:
        rows = with_known_columns(rows, "sft", name, family="sft", skip=skip)
        return require_columns(rows, supervised.LAYOUTS, "sft", skip=skip)[1]

    rows = read_rows(name)
    rows = Prepared(rows, change, name, known_of(config), "ptx") if isinstance(rows, View) else change(list(rows))
    job.pretraining = encode_rows(job.encoder, rows, supervised.encode, "ptx_data")


def ptx_term(job: Job, config: PtxConfig, rows: int) -> tuple[Loss[Rows], Iterable[Rows]]:
    """The loss, and the next examples, that are learnt beside a minibatch of `rows` completions.

    How many were taken is among the counters, so that a resumed run goes on where it was.
    """
    count, taken = config.ptx_batch_size or rows, int(job.counters.get("ptx_examples", 0))
    indices = shuffled_indices(len(job.pretraining), config.order_seed, taken, count)
    job.counters["ptx_examples"] = taken + count
    parts = supervised.micro_batches(job, job.pretraining, indices, config.micro_batch_size, kept=job.kept)
    return loss_of(job, config), parts


def loss_of(job: Job, config: PtxConfig) -> Loss[Rows]:
    def loss(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        mean = -logprobs_of(job, config, "policy", rows.batch).sum() / rows.tokens
        return (27.8 if config.ptx_coef is None else config.ptx_coef) * mean, {"ptx_loss": mean}

    return loss
