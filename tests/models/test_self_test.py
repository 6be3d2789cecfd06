"""What is found out about a model on a few tokens, before it is trained."""

import types

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from rlhf_fast.errors import UserError
from rlhf_fast.models import peft_io
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.peft_io import save_adapter
from tests.models.causal_models import make_causal
from tests.models.tiny_models import SIZES, make_batch, make_model, scramble


def test_a_model_that_changes_its_logits_in_a_way_of_its_own_is_refused_with_the_difference():
    model = make_causal("llama")
    forward = model.forward

    def doubled(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
        output = forward(input_ids, attention_mask, position_ids, use_cache=use_cache)
        output.logits = output.logits * 2
        return output

    model.forward = types.MethodType(doubled, model)
    with pytest.raises(UserError, match=r"LlamaForCausalLM: its log-probabilities .* head by \d+\.?\d* nats"):
        Backbone(model)


@pytest.mark.parametrize("model_type", ["granite", "hyperclovax", "minicpm3"])
def test_a_scale_of_the_logits_means_what_the_model_does_with_it(model_type):
    model = make_causal(model_type)
    scaling = model.config.logits_scaling
    assert scaling != 1
    expected = {"granite": 1 / scaling, "hyperclovax": scaling, "minicpm3": 1}[model_type]
    assert Backbone(model).logit_transform["logit_scale"] == expected


def test_a_model_that_looks_ahead_is_refused():
    with pytest.raises(UserError, match="XLNetLMHeadModel: what follows a token changes its log-probability by"):
        Backbone(make_causal("xlnet"))


def test_a_model_without_gradients_is_refused():
    with pytest.raises(UserError, match="ReformerModelWithLMHead: no gradient reaches its layers"):
        Backbone(make_causal("reformer"))


def test_a_model_that_takes_more_than_text_is_refused():
    with pytest.raises(UserError, match="it fails on text alone: inputs_embeds and shared_kv_states cannot be None"):
        Backbone(make_causal("gemma4_assistant"))


def test_a_model_of_weights_that_are_not_finite_is_refused():
    model = make_model("llama")
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] = torch.nan
    with pytest.raises(UserError, match="log-probabilities that are not finite"):
        Backbone(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "minicpm3", "gemma3n_text"])
def test_half_precision_is_no_fault(model_type, dtype, tmp_path):
    backbone = Backbone(make_causal(model_type).to(dtype))
    backbone.add_adapter("policy")
    scramble(backbone, "policy")
    save_adapter(backbone, "policy", tmp_path)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 0.9), (torch.float16, 0.99), (torch.float32, 0.9999)])
def test_a_fault_that_is_larger_than_rounding_shows_in_each_type(dtype, factor):
    model = make_causal("llama").to(dtype)
    forward = model.forward

    def scaled(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
        output = forward(input_ids, attention_mask, position_ids, use_cache=use_cache)
        output.logits = output.logits * factor
        return output

    model.forward = types.MethodType(scaled, model)
    with pytest.raises(UserError, match=r"its log-probabilities differ from those of its head by \d+\.?\d* nats"):
        Backbone(model)


def test_a_model_on_the_meta_device_is_not_run():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES))
    assert len(Backbone(model).linear_shapes) == 4 * 7


def test_linears_that_cannot_have_an_adapter_are_left_out_and_refused_by_name():
    backbone = Backbone(make_causal("mamba"))
    with pytest.raises(
        UserError, match=r"'out_proj' cannot be adapted: backbone.layers.0.mixer.out_proj: PEFT refuses"
    ):
        backbone.add_adapter("policy", targets=["in_proj", "out_proj"])
    with pytest.warns(UserWarning, match=r"all-linear leaves out 8 linear layers: .*out_proj \(PEFT refuses"):
        backbone.add_adapter("policy")
    assert {module.rsplit(".", 1)[-1] for module in backbone.adapters["policy"]} == {"in_proj", "x_proj"}


def test_linears_that_no_gradient_reaches_are_left_out():
    backbone = Backbone(make_causal("deepseek_v32"))
    unreached = {name for name, reason in backbone.left_out.items() if reason.startswith("no gradient reaches it")}
    indexers = {name for name, module in backbone.model.named_modules()
                if ".indexer." in name and isinstance(module, torch.nn.Linear)}  # fmt: skip
    assert unreached == indexers != set()


def test_a_linear_whose_gradient_is_zero_can_have_an_adapter():
    model = make_model("llama")
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data.zero_()
    assert "model.layers.1.mlp.up_proj" in Backbone(model).linear_shapes


def test_a_linear_that_several_layers_share_is_adapted_once():
    backbone = Backbone(make_causal("zamba2"))
    modules = [backbone.model.get_submodule(name) for name in backbone.linear_shapes]
    assert len(modules) == len(set(modules))


def test_a_padded_vocabulary_has_no_probability():
    backbone = Backbone(make_causal("inkling_text"))
    assert backbone.model.get_output_embeddings().out_features == 61
    assert backbone.lm_head_weight.shape[0] == 59


def test_a_saved_adapter_that_peft_gives_to_other_linears_is_refused(monkeypatch, tmp_path):
    backbone = Backbone(make_model("llama"))
    backbone.add_adapter("policy", targets=["q_proj", "v_proj"])
    scramble(backbone, "policy")
    monkeypatch.setattr(peft_io, "_targets", lambda *_: {"target_modules": ["q_proj"]})
    with pytest.raises(UserError, match=r"PEFT does not give the adapter .* such as 'model.layers.0.self_attn.v_proj'"):
        save_adapter(backbone, "policy", tmp_path)


def test_a_saved_adapter_that_peft_scales_otherwise_is_refused(monkeypatch, tmp_path):
    backbone = Backbone(make_model("llama"))
    backbone.add_adapter("policy")
    scramble(backbone, "policy")
    made = peft_io._config
    monkeypatch.setattr(peft_io, "_config", lambda *args: {**made(*args), "lora_alpha": 64})
    with pytest.raises(UserError, match=r"as PEFT loads it differs by \d.* nats from what was trained"):
        save_adapter(backbone, "policy", tmp_path)


def test_peft_leaves_the_model_as_it_was(tmp_path):
    backbone = Backbone(make_model("llama"))
    backbone.add_adapter("policy")
    backbone.add_head("policy")
    modules, attributes = dict(backbone.model.named_modules()), set(vars(backbone.model))
    before = backbone.hidden(*make_batch(), ["policy"])["policy"]
    save_adapter(backbone, "policy", tmp_path)
    assert dict(backbone.model.named_modules()) == modules
    assert set(vars(backbone.model)) == attributes
    assert torch.equal(backbone.hidden(*make_batch(), ["policy"])["policy"], before)
