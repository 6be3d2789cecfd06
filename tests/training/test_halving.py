"""A pass that memory does not hold is taken in halves, with the same gradients; what was done before is kept."""

import json
from contextlib import contextmanager

import pytest
import torch

from rlhf_fast.algorithms import load_algorithm
from rlhf_fast.algorithms.launch import launch
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.training import halving, on_policy, ranks, supervised
from rlhf_fast.training.experience import collect, prompts_of_step
from rlhf_fast.training.halving import is_out_of_memory
from rlhf_fast.training.optim import accumulate
from tests.training.tiny_runs import assert_close, config_of, gradients, job_of, values_of

CPU = "[enforce fail at alloc_cpu.cpp:131] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
ERRORS = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU), MemoryError()]


@contextmanager
def memory_for(rows: int, monkeypatch, error=ERRORS[0], *, backward: bool = False):
    """Passes of the model with more rows fail: on their way forward, or, on their way back, at the lowest adapter, when
    all others have got their gradients."""
    own, seen = Backbone.hidden, []

    def hidden(self, input_ids, *others, **options):
        seen.append(len(input_ids))
        fails = len(input_ids) > rows
        if fails and not (backward and torch.is_grad_enabled()):
            raise error
        states = own(self, input_ids, *others, **options)
        if fails:
            lowest = next(p for name in self.adapters for p in self.parameters_of(name) if p.requires_grad)

            def fail(gradient):
                handle.remove()
                raise error

            handle = lowest.register_hook(fail)
        return states

    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "hidden", hidden)
        yield seen


def minibatch(algorithm: str, rows: int | None = None, **changes):
    """(job, a function that accumulates one minibatch of four examples)."""
    config = config_of(algorithm, micro_batch_size=rows, **changes)
    job = job_of(config)
    module = load_algorithm(algorithm)
    if algorithm == "sft":
        loss = module.loss_of(job, config)
        return job, lambda: accumulate(loss, supervised.micro_batches(job, job.train, range(4), rows))
    experience = collect(job, config, prompts_of_step(job, config, 0))
    if algorithm == "ppo":
        loss = module.loss_of(job, config, module.estimate(job, config, experience))
    else:
        loss = module.loss_of(config, module.advantages_of(job, config, experience))
    parts = torch.tensor([2, 0, 3, 1]).split(rows or 4)
    return job, lambda: accumulate(loss, on_policy.micro_batches(job, config, experience, parts))


@pytest.mark.parametrize(
    ("algorithm", "backward", "error"),
    [("sft", False, ERRORS[0]), ("sft", True, ERRORS[1]), ("ppo", True, ERRORS[2]), ("grpo", False, ERRORS[1])],
)
def test_gradients_and_metrics_are_those_of_whole_passes(algorithm, backward, error, monkeypatch, capsys):
    job, learn = minibatch(algorithm, 3)  # three rows, and one
    expected, whole = learn(), gradients(job)
    with memory_for(1, monkeypatch, error, backward=backward) as seen:
        found = learn()
    assert [rows for rows in seen if rows > 1] == [3, 2]
    assert job.most_rows == {"update": 1}
    assert_close(gradients(job), whole)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    told = capsys.readouterr().err.splitlines()
    assert told[-2:] == [
        "warning: out of memory in a pass of 3 rows (update); from here on they are 2",
        "warning: out of memory in a pass of 2 rows (update); from here on they are 1",
    ]


def test_gradients_before_a_pass_that_fails_on_its_way_back_are_kept_to_the_bit(monkeypatch):
    job, learn = minibatch("grpo", 2)
    job.most_rows["update"] = 1
    learn()
    expected = gradients(job)
    job.most_rows.clear()
    with memory_for(1, monkeypatch, backward=True):
        learn()
    found = gradients(job)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_where_all_weights_train_a_minibatch_begins_again(monkeypatch):
    config = config_of("sft", lora_rank=0)
    job = job_of(config)
    loss = load_algorithm("sft").loss_of(job, config)

    def learn(rows):
        metrics = accumulate(loss, supervised.micro_batches(job, job.train, range(4), rows))
        found = [p.grad.clone() for p in job.trained_parameters]
        job.optimizers["model"].zero_grad()
        return metrics["loss"], found

    expected, whole = learn(4)
    calls = []

    def fail(gradient):
        calls.append(1)
        if len(calls) == 2:  # of the second micro-batch, when those above have added theirs
            raise ERRORS[0]

    handle = job.backbone.model.model.layers[0].mlp.up_proj.weight.register_hook(fail)
    found, each = learn(2)
    handle.remove()
    assert job.most_rows == {"update": 1}
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(each, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_a_row_alone_ends_the_run_with_what_to_set(monkeypatch):
    _, learn = minibatch("grpo")
    with memory_for(0, monkeypatch), pytest.raises(UserError) as said:
        learn()
    assert str(said.value) == (
        "out of memory in a pass of one row (update): set memory, or micro_batch_size, gradient_checkpointing, "
        "top_layers or max_tokens; CUDA out of memory."
    )


def test_several_processes_do_not_halve(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 2)
    assert halving.why_not_halved(4) == "of 4 rows, which several processes would have to halve together"


def test_rows_that_the_loss_compares_stay_together(monkeypatch):
    config = config_of("dpo", objective="aot")
    job = job_of(config)
    loss = load_algorithm("sft").loss_of(job, config)
    parts = supervised.micro_batches(job, job.train, range(4), None, whole=config.compares_rows)
    with memory_for(2, monkeypatch), pytest.raises(UserError, match="a pass of 4 rows that the loss compares"):
        accumulate(loss, parts)


def test_other_errors_are_no_lack_of_memory():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_a_run_scores_and_learns_in_halves_and_says_so(algorithm, tmp_path, monkeypatch, capsys):
    """The same numbers as with memory for all rows."""
    metrics = []
    for name in ("whole", "halves"):
        values = values_of(
            algorithm, steps=2, batch_size=8, output_dir=str(tmp_path / name), num_minibatches=1, ppo_epochs=1
        )
        values = {k: v for k, v in values.items() if algorithm == "grpo" or k not in ("num_minibatches", "ppo_epochs")}
        with memory_for(4 if name == "halves" else 99, monkeypatch):
            launch(None, values, dry_run=False, resume=None, overwrite=False)
        metrics.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    told = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert any("(update)" in line for line in told)
    assert any("(scoring)" in line or "(reference)" in line for line in told)
    for whole, halves in zip(*metrics, strict=True):
        for key in whole.keys() & {"loss", "reward", "kl", "grad_norm_policy"}:
            assert halves[key] == pytest.approx(whole[key], rel=1e-3, abs=1e-5)
