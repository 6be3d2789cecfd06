"""The bytes of four roles over those of the base model, counted as unique storages."""

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from rlhf_fast.models.backbone import Backbone
from tests.models.tiny_models import four_roles, make_batch


def storages(tensors) -> dict[int, int]:
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def trained_bytes(backbone: Backbone, optimizers: list[torch.optim.Optimizer]) -> int:
    """Unique storages of everything a step holds besides activations."""
    tensors = [*backbone.model.parameters(), *backbone.model.buffers()]
    for name in {*backbone.adapters, *backbone.heads}:
        for parameter in backbone.parameters_of(name):
            tensors += [parameter] if parameter.grad is None else [parameter, parameter.grad]
    for optimizer in optimizers:
        tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(storages(tensors).values())


def qwen_7b() -> Backbone:
    """Qwen2.5-7B on the meta device, in bf16."""
    config = Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return Backbone(model)


def stepped_optimizers(backbone: Backbone) -> list[torch.optim.Optimizer]:
    """AdamW of policy and critic after a step, so that gradients and both moments exist."""
    optimizers = []
    for name in ("policy", "critic"):
        for parameter in backbone.parameters_of(name):
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.AdamW(backbone.parameters_of(name))
        optimizer.step()
        optimizers.append(optimizer)
    return optimizers


def add_ppo_roles(backbone: Backbone) -> None:
    backbone.add_adapter("policy", rank=8)
    backbone.add_adapter("reward", rank=8, trainable=False)
    backbone.add_adapter("critic", rank=8)
    for name in ("reward", "critic"):
        backbone.add_head(name, trainable=name == "critic")


def test_four_roles_with_both_optimizers_cost_at_most_five_percent_at_7b():
    backbone = qwen_7b()
    base = sum(storages(backbone.model.parameters()).values())
    assert base == 2 * 7_615_616_512
    add_ppo_roles(backbone)
    ratio = trained_bytes(backbone, stepped_optimizers(backbone)) / base
    # 16 bytes for each trained parameter (weight, gradient, two moments, all fp32), 4 for each frozen one
    per_role = 28 * 8 * (4 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))
    expected = 1 + (per_role * (16 + 16 + 4) + 3584 * (16 + 4)) / base
    assert abs(ratio - expected) < 1e-6
    assert ratio <= 1.05


def test_frozen_reference_in_the_models_dtype_stays_within_five_percent_at_7b():
    backbone = qwen_7b()
    base = sum(storages(backbone.model.parameters()).values())
    backbone.add_adapter("policy", rank=8)
    backbone.add_adapter("critic", rank=8)
    backbone.add_head("critic")
    for name in ("reference", "reward"):
        backbone.add_adapter(name, copy_of="policy", trainable=False, dtype=torch.bfloat16)
    assert trained_bytes(backbone, stepped_optimizers(backbone)) / base <= 1.05


def test_byte_report_on_the_meta_device_names_every_part():
    backbone = qwen_7b()
    add_ppo_roles(backbone)
    sizes = backbone.bytes()
    assert list(sizes) == [
        "base", "adapter:policy", "adapter:reward", "adapter:critic", "head:reward", "head:critic",
    ]  # fmt: skip
    assert sizes["adapter:policy"] == 4 * 28 * 8 * 90112
    assert sizes["head:critic"] == 4 * 3584


def test_training_a_real_model_holds_the_base_once_and_nothing_else_of_its_size():
    backbone = four_roles(top_layers=None)
    report = backbone.bytes()
    before = storages([*backbone.model.parameters(), *backbone.model.buffers()])
    optimizers = [torch.optim.AdamW(backbone.parameters_of(name)) for name in ("policy", "critic")]
    input_ids, attention_mask = make_batch()
    for _ in range(2):
        hidden = backbone.hidden(input_ids, attention_mask, ["policy", "critic"])
        loss = backbone.logprobs(hidden["policy"], input_ids, attention_mask).sum()
        (loss + backbone.values("critic", hidden["critic"]).sum()).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert storages([*backbone.model.parameters(), *backbone.model.buffers()]) == before
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    assert report["base"] == sum(before.values())
    trained = sum(p.numel() for name in ("policy", "critic") for p in backbone.parameters_of(name))
    frozen = report["adapter:reward"] + report["head:reward"]
    steps = 4 * sum(len(backbone.parameters_of(name)) for name in ("policy", "critic"))
    assert trained_bytes(backbone, optimizers) == report["base"] + 16 * trained + frozen + steps


def test_tied_embeddings_are_counted_once():
    backbone = Backbone(AutoModelForCausalLM.from_config(Qwen2Config(
        vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )))  # fmt: skip
    assert backbone.lm_head_weight.data_ptr() == backbone.model.get_input_embeddings().weight.data_ptr()
    buffers = sum(buffer.numel() for buffer in backbone.model.buffers())
    assert backbone.bytes()["base"] == 4 * (backbone.model.num_parameters() + buffers)
