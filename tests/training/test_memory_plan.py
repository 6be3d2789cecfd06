"""Counted bytes beside measured ones, and the settings that fit a budget."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf_fast.algorithms import load_algorithm
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.testing.memory import peak_bytes
from rlhf_fast.training.byte_sizes import bytes_of, shown
from rlhf_fast.training.config import parse
from rlhf_fast.training.experience import collect, prompts_of_step
from rlhf_fast.training.memory_plan import Counter, Settings, Shape, fitted, plan_of
from rlhf_fast.training.on_policy import improve
from tests.training.tiny_runs import config_of, job_of, values_of, write_jsonl

ROWS, WIDTH, LEARNT = 3, 160, 96


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    config = LlamaConfig(
        vocab_size=3000, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    backbone = Backbone(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    for role in ("policy", "critic"):
        backbone.add_adapter(role, top_layers=None, rank=4)
    backbone.add_head("critic")
    return backbone


def update(backbone: Backbone, roles: list[str], *, padded: bool) -> None:
    """As training makes it of rows as long as they may be, but for a token of padding."""
    ids = torch.randint(3000, (ROWS, WIDTH))
    real = torch.ones_like(ids)
    real[0, -1] = not padded
    mask = torch.zeros_like(ids)
    mask[:, -LEARNT:] = 1
    for role in roles:  # one after the other
        hidden = backbone.hidden(ids, real, [role])[role]
        if role == "policy":
            flags = {"mask_count": ROWS * LEARNT, "return_entropy": True}
            loss = backbone.logprobs(hidden, ids, mask, **flags)[0].sum()
        else:
            loss = backbone.values(role, hidden).sum()
        del hidden
        loss.backward()
        del loss
    for role in roles:
        for parameter in backbone.parameters_of(role):
            parameter.grad = None


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("roles", [["policy"], ["policy", "critic"]])
def test_an_update_takes_what_was_counted(backbone, roles, recompute):
    counter = Counter(backbone, roles, 2, config_of("ppo"), Shape(WIDTH, 64, LEARNT, 1, ROWS, ROWS))
    counted = counter.parts(Settings(ROWS, recompute, None)).update
    backbone.enable_checkpointing(recompute)
    assert peak_bytes(lambda: update(backbone, roles, padded=counter.padded)) == pytest.approx(counted, rel=0.05)


def test_a_smaller_tile_of_logits_takes_less(backbone):
    counter = Counter(backbone, ["policy"], 2, config_of("sft"), Shape(WIDTH, 0, WIDTH, 1, ROWS, ROWS))
    whole, small = (counter.parts(Settings(ROWS, True, chunk)).update for chunk in (None, 32))
    assert whole - small == pytest.approx((ROWS * WIDTH - 32) * 4 * 3000, rel=0.05)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of prompts that are all as long."""
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    write_jsonl(path, [{"prompt": f"{i:40d}"} for i in range(12)])
    return str(path)


def sampled(prompts: str, **changes):
    values = {"model": "tiny", "data": prompts, "batch_size": 6, "max_new_tokens": 48, "steps": 1, **changes}
    values = {"lora_rank": 8, "ppo_epochs": 1, "num_minibatches": 1, "padding_free": False, **values}
    return config_of("grpo", num_generations=2, objective={"kl_coef": 0.1}, reference_refresh_every=None, **values)


@pytest.mark.parametrize("top_layers", [None, 1])
def test_a_step_on_samples_takes_what_was_counted_and_keeps_to_its_budget(prompts, monkeypatch, top_layers):
    monkeypatch.setattr("rlhf_fast.rollout.sampling.stop_ids", lambda *_: [259])  # nothing ends early
    config = sampled(prompts, top_layers=top_layers)
    job = job_of(config)
    parts = plan_of(job, config).parts
    budget = parts.held + int(0.6 * parts.update)
    fit = plan_of(job, config.model_copy(update={"memory": budget}))
    assert fit.settings.micro_batch_size < 6 or fit.settings.gradient_checkpointing
    assert fit.parts.total <= budget
    made = []

    def rollout():
        made[:] = [collect(job, config, prompts_of_step(job, config, 0), score_policy=config.scores_policy)]

    advantages = torch.ones(6)
    loss = load_algorithm("grpo").loss_of(config, advantages)
    assert peak_bytes(rollout) == pytest.approx(parts.kept + max(parts.rollout, parts.scoring), rel=0.05)
    job.optimizers["policy"].step()  # makes the moments, which are not of a step
    assert peak_bytes(lambda: improve(job, config, made[0], loss)) == pytest.approx(parts.update, rel=0.05)


def test_what_is_given_is_kept_and_what_cannot_fit_is_one_line(prompts):
    config = sampled(prompts, micro_batch_size=3, gradient_checkpointing=False)
    job = job_of(config)
    parts = plan_of(job, config).parts
    kept = plan_of(job, config.model_copy(update={"memory": parts.total}))
    assert kept.settings == Settings(3, False, None)
    with pytest.raises(UserError) as refused:
        fitted(job, config.model_copy(update={"memory": parts.weights}))
    assert str(refused.value) == (
        f"memory {shown(parts.weights)} is too little: the least that this run takes is "
        f"{shown(plan_of(job, config.model_copy(update={'head_chunk_tokens': 128})).parts.total)}, of which "
        f"{shown(parts.weights)} are weights, with micro_batch_size 3, gradient_checkpointing false, "
        "head_chunk_tokens 128, rollout_rows 1"
    )


def test_the_run_folder_has_the_keys_as_they_were_given(prompts):
    config = sampled(prompts, memory="30MB")
    assert config.memory == 30_000_000
    changed = fitted(job_of(config), config)
    assert changed.micro_batch_size is not None
    assert changed.values() == config.values()


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 << 30), ("500 MB", 500_000_000), ("1.5g", 1_500_000_000), ("4096", 4096)]
)
def test_bytes_as_people_write_them(text, size):
    assert bytes_of(text) == size


def test_what_is_no_number_of_bytes_is_refused():
    with pytest.raises(UserError, match="memory: must be bytes, such as 8GiB, 500MB or 8589934592, got '8 apples'"):
        parse(load_algorithm("sft").AlgorithmConfig, values_of("sft", memory="8 apples"))
