"""ILQL: what answers of the data are paid is learnt as values of tokens, which steer the policy as it samples.

With h the last hidden states, W the head and V(s) a linear head on the first Q-adapter, for each of two Q-adapters

    Q(s, a) = W_a (h_q - h_base)         0 at the start, and the advantage of a token in logits
    q       = mean (Q - r - gamma V(s'))^2         r: the standardised reward at the last token, V(s') = 0 behind it
    v       = mean |tau - 1(u < 0)| u^2,  u = min Q_target - V(s)
    cql     = mean -log softmax(Q(s, .))_a
    awac    = mean sg(exp(awac_beta u)) (-log policy(a))

loss = q + v + cql_scale cql + awac_scale awac, the sum over both Q. Q_target are copies of the Q-adapters that follow
them by target_share every target_every steps. Samples are drawn from softmax(log policy + decode_beta min Q): V is the
same for all tokens of a place. Rewards: the column rating, else what `reward` says of the data.
Source: Snell et al. 2022 (2206.11871) as trlx has it (modeling_ilql.py), whose numbers are the defaults; it has Q heads
of the vocabulary's size in the place of adapters, and a learning rate of 5e-5.
"""

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from rlhf_fast.data.encoding import Encoder
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.ops.head.linear_logprobs import linear_logprobs
from rlhf_fast.rollout import Drawing
from rlhf_fast.training import supervised
from rlhf_fast.training.config import SamplingConfig
from rlhf_fast.training.experience import evaluate_policy
from rlhf_fast.training.job import Job, dropout_seed, save_roles
from rlhf_fast.training.offline import OfflineJob, prepare_offline
from rlhf_fast.training.optim import Loss, adamw
from rlhf_fast.training.paid_answers import Paid, encode_paid, paid, standardised
from rlhf_fast.training.run import Run
from rlhf_fast.training.setup import load_rows
from rlhf_fast.training.supervised import Rows

QS, TARGETS = ("q", "q_2"), ("target_q", "target_q_2")
DECODE_BETA = 1.0


class AlgorithmConfig(SamplingConfig):
    """ILQL's keys; batch_size counts answers."""

    family = "reward_model"
    counted = False

    gamma: float = Field(0.99, ge=0, le=1, description="discount per token")
    tau: float = Field(0.7, gt=0, lt=1, description="expectile of the values")
    cql_scale: float = Field(0.1, ge=0)
    awac_scale: float = Field(1.0, ge=0)
    awac_beta: float = Field(0.0, ge=0, description="of the weights of the policy's log-probabilities; 0: all 1")
    target_share: float = Field(0.001, gt=0, le=1, description="how far the targets follow")
    target_every: int = Field(5, ge=1, description="in how many steps")
    decode_beta: float = Field(DECODE_BETA, ge=0, description="weight of Q where the policy is sampled")
    top_k: int = Field(20, ge=0, description="0: off")

    @model_validator(mode="after")
    def _can_steer(self) -> "AlgorithmConfig":
        if self.engine.kind == "vllm" or self.engine.continuous:
            raise ValueError(f"ilql steers what it samples by Q, which engine {self.engine.kind} cannot: engine local")
        return self


def prepare(config: AlgorithmConfig) -> OfflineJob:
    job = prepare_offline(config, load_rows(config, [("prompt", "completion")]), encode_paid, Encoder.prompt)
    job.train, job.held_out = standardised(*(paid(job, config, examples) for examples in (job.train, job.held_out)))
    for i, (q, target) in enumerate(zip(QS, TARGETS, strict=True)):
        job.backbone.add_adapter(
            q, rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets,
            top_layers=config.top_layers, seed=config.seed + 1 + i, use_rslora=config.use_rslora,
            use_dora=config.use_dora, dropout=config.lora_dropout,
        )  # fmt: skip
        job.backbone.add_adapter(target, copy_of=q, trainable=False)
    job.backbone.add_head("value", on="q")
    job.optimizers |= {role: adamw(job.backbone.parameters_of(role), config) for role in (*QS, "value")}
    return job


def train(job: OfflineJob, config: AlgorithmConfig, run: Run) -> None:
    for step, indices in supervised.batches(job, config, run):
        supervised.learn(job, config, run, step, indices, loss_of(job, config, job.train))
        if (step + 1) % config.target_every == 0:
            for q, target in zip(QS, TARGETS, strict=True):
                job.backbone.lerp_adapter(target, q, config.target_share)


def loss_of(job: Job, config: AlgorithmConfig, examples: Sequence[Paid]) -> Loss[Rows]:
    """The mean over a batch's tokens."""
    backbone = job.backbone

    def loss(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        batch, counts = rows.batch, rows.batch.mask.bool()
        tokens, of_batch = batch.input_ids[counts], (batch.input_ids, batch.attention_mask)
        hidden = backbone.hidden(*of_batch, ["policy", *QS], dropout_seed=dropout_seed(job, config))
        with torch.no_grad():
            still = backbone.hidden(*of_batch, [*TARGETS, None])

        def q_and_log_softmax(states: Tensor) -> tuple[Tensor, Tensor]:
            change = (states - still[None])[:, :-1][counts[:, 1:]]
            logprobs, lse = linear_logprobs(change, backbone.lm_head_weight, tokens, return_lse=True)
            return logprobs + lse, logprobs

        values = backbone.values("value", hidden["q"])
        later = F.pad((values * batch.mask)[:, 1:], (0, 1)).detach()
        last = batch.mask * (batch.mask.flip(1).cumsum(1).flip(1) == 1)
        rewards = torch.tensor([examples[i].reward for i in rows.indices], device=job.device)
        goal = (last * rewards[:, None] + config.gamma * later)[counts]
        qs = [q_and_log_softmax(hidden[role]) for role in QS]
        with torch.no_grad():
            least = reduce(torch.minimum, [q_and_log_softmax(still[role])[0] for role in TARGETS])
        above = least - values[counts]
        policy = backbone.logprobs(hidden["policy"], batch.input_ids, batch.mask, mask_count=batch.count)[counts]
        parts = {
            "q_loss": torch.stack([(q - goal).square() for q, _ in qs]).sum(0),
            "v_loss": torch.where(above < 0, 1 - config.tau, config.tau) * above.square(),
            "cql_loss": -torch.stack([log_softmax for _, log_softmax in qs]).sum(0),
            "awac_loss": -(config.awac_beta * above.detach()).exp() * policy,
        }
        means = {name: part.sum() / rows.tokens for name, part in parts.items()}
        weights = {"cql_loss": config.cql_scale, "awac_loss": config.awac_scale}
        total = torch.stack([weights.get(name, 1.0) * mean for name, mean in means.items()]).sum()
        return total, means | {"value": values[counts].sum() / rows.tokens}

    return loss


class Steered(Drawing):
    """log policy + beta min Q."""

    def __init__(self, backbone: Backbone, config: SamplingConfig, beta: float) -> None:
        super().__init__(["policy", None, *QS], config.temperature, config.top_k, config.top_p)
        self.beta, self.logit_scale = beta, backbone.logit_transform.get("logit_scale", 1.0)

    def combined(self, logits: Sequence[Tensor]) -> Tensor:
        policy, base, *qs = logits
        least = reduce(torch.minimum, [(q - base) / self.logit_scale for q in qs])
        return policy.log_softmax(-1) + self.beta * least


@torch.no_grad()
def evaluate(job: OfflineJob, config: AlgorithmConfig) -> dict[str, Any]:
    """The losses on the held-out answers; with a reward, samples that Q steers."""
    metrics = supervised.held_out_metrics(job, config, loss_of(job, config, job.held_out))
    if job.rewards is None:
        return {"metrics": metrics, "samples": []}
    steered = Steered(job.backbone, config, config.decode_beta)
    sampled = evaluate_policy(job, config, job.held_out_prompts, drawing=steered)
    return {"metrics": metrics | sampled["metrics"], "samples": sampled["samples"]}


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The policy at the top of `folder`; the Q-adapters beside it."""
    save_roles(job, folder, "reference", *QS)
