"""Runs on a backbone that bitsandbytes holds in 4 bits or int8 (its CPU build is enough)."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.errors import UserError
from rlhf_fast.models.quantized import quantization_state
from rlhf_fast.signals import Stopped
from rlhf_fast.training.setup import build_model
from tests.algorithms.test_invariants import one_backward
from tests.training.interruptions import contents, interrupt, run
from tests.training.tiny_runs import assert_close, config_of, gradients, job_of, values_of

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install rlhf_fast[quant]")


def packed(job) -> list[torch.Tensor]:
    layers = job.backbone.quantized.values()
    return [t.detach().clone() for layer in layers for t in (layer.weight.data, *quantization_state(layer))]


@pytest.mark.parametrize(("algorithm", "kind"), [("sft", "nf4"), ("dpo", "int8"), ("grpo", "nf4"), ("ppo", "int8")])
def test_a_run_trains_its_adapters_and_stores_them_like_any_other(algorithm, kind, tmp_path):
    run(values_of(algorithm, quantization=kind, output_dir=str(tmp_path)))
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert len(rows) == 5
    assert all(torch.isfinite(torch.tensor(value)) for row in rows for value in row.values())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    changed = [tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name]
    assert changed
    assert all(changed)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_the_first_minibatch_has_ratio_one_and_the_base_stays_as_it_is(algorithm, kind):
    config = config_of(algorithm, quantization=kind, temperature=0.7)
    job = job_of(config)
    before = packed(job)
    metrics = one_backward(job, config)
    assert float(metrics["ratio_max"]) == pytest.approx(1.0, abs=1e-5)
    assert float(metrics["approx_kl"]) == pytest.approx(0.0, abs=1e-9)
    gradients(job)
    assert all(torch.equal(a, b) for a, b in zip(packed(job), before, strict=True))


def test_micro_batches_and_checkpointing_give_the_gradients_of_the_whole_batch():
    whole = config_of("ppo", quantization="int8")
    split = config_of("ppo", quantization="int8", micro_batch_size=1)
    job = job_of(whole)
    one_backward(job, whole)
    expected = gradients(job)
    job.backbone.enable_checkpointing()
    one_backward(job, split)
    assert_close(gradients(job), expected)


def test_a_stopped_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    values = values_of("grpo", quantization="nf4")
    run({**values, "output_dir": str(tmp_path / "whole")})
    stopped = {**values, "output_dir": str(tmp_path / "stopped")}
    interrupt(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped):
        run(stopped)
    run(stopped, resume="auto")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_an_adapter_is_continued_on_the_quantised_base(tmp_path):
    run(values_of("sft", quantization="nf4", output_dir=str(tmp_path / "first")))
    run(values_of("sft", quantization="nf4", model=str(tmp_path / "first"), output_dir=str(tmp_path / "second")))
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_all_weights_of_a_quantised_model_cannot_train(tmp_path):
    message = "lora_rank 0 trains every weight, but those of .*model are quantised"
    with pytest.raises(UserError, match=message):
        build_model(config_of("sft", quantization="nf4", lora_rank=0))
    backbone, tokenizer, _ = build_model(config_of("sft", quantization="nf4"))
    backbone.model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        build_model(config_of("sft", model=str(tmp_path / "model"), lora_rank=0))


def test_the_tiny_model_is_not_quantised():
    with pytest.raises(UserError, match="quantization nf4 needs a model with weights of its own, not tiny"):
        build_model(config_of("sft", quantization="nf4", model="tiny"))
