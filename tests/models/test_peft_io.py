"""Adapter files, judged by PEFT itself."""

import json
import math
import time

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rlhf_fast.errors import UserError
from rlhf_fast.models.adapter_config import alpha_of
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.loading import load_model
from rlhf_fast.models.peft_io import base_of, load_adapter, save_adapter
from tests.models.tiny_models import CONFIGS, four_roles, make_batch, make_model, scramble

families = pytest.mark.parametrize("family", list(CONFIGS))
close = {"rtol": 1e-5, "atol": 1e-5}


def logits_of(backbone: Backbone, role: str) -> torch.Tensor:
    """Of the real tokens."""
    input_ids, attention_mask = make_batch()
    hidden = backbone.hidden(input_ids, attention_mask, [role])[role][attention_mask.bool()]
    return torch.nn.functional.linear(hidden, backbone.lm_head_weight, backbone.lm_head_bias)


def peft_logits(model: torch.nn.Module) -> torch.Tensor:
    input_ids, attention_mask = make_batch()
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
    return logits[attention_mask.bool()]


@families
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_layers": 2},
        {"targets": "up", "top_layers": 1, "alpha": 5},
        {"top_layers": 2, "alpha": 5, "use_rslora": True, "use_dora": True, "dropout": 0.1},
    ],
    ids=["all layers", "top layers", "one name", "rslora and dora"],
)
def test_peft_loads_our_policy_and_gives_the_same_logits(family, options, tmp_path):
    if "targets" in options:
        options = options | {"targets": ["mlp.c_fc" if family.startswith("gpt") else "mlp.up_proj"]}
    backbone = Backbone(make_model(family))
    backbone.add_adapter("policy", rank=4, **options)
    scramble(backbone, "policy")
    save_adapter(backbone, "policy", tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model(family), tmp_path).eval()
    torch.testing.assert_close(peft_logits(loaded), logits_of(backbone, "policy"), **close)
    assert (logits_of(backbone, "policy") - logits_of(backbone, "reference")).abs().max() > 1e-3


@families
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_we_load_a_peft_adapter_and_give_the_same_logits(family, use_rslora, use_dora, tmp_path):
    names = {"gpt2": ["c_attn", "c_fc"], "gpt_neo": ["q_proj", "c_fc"]}.get(family, ["q_proj", "down_proj"])
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=names, layers_to_transform=[1, 3], use_rslora=use_rslora,
        use_dora=use_dora, lora_dropout=0.2,
        rank_pattern={names[0]: 2}, alpha_pattern={f"3.*{names[1]}": 11}, task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(make_model(family), config).eval()
    model.save_pretrained(tmp_path)
    backbone = Backbone(make_model(family))
    load_adapter(backbone, "policy", tmp_path, trainable=True)
    torch.testing.assert_close(logits_of(backbone, "policy"), peft_logits(model), **close)

    peft_logits(model).square().sum().backward()
    logits_of(backbone, "policy").square().sum().backward()
    theirs = {
        name.replace(".default", "").replace("vector.weight", "vector"): p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    ours = backbone.named_parameters_of("policy")
    assert {f"base_model.model.{key}" for key in ours} == theirs.keys()
    for key, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[f"base_model.model.{key}"], rtol=1e-3, atol=1e-4)


@families
def test_peft_loads_our_reward_as_a_sequence_classifier(family, tmp_path):
    backbone = four_roles(family)
    save_adapter(backbone, "reward", tmp_path)
    input_ids, attention_mask = make_batch()
    input_ids = input_ids.masked_fill(attention_mask == 0, 0)
    ours = backbone.scores("reward", backbone.hidden(input_ids, attention_mask, ["reward"])["reward"], attention_mask)
    config = CONFIGS[family]()
    config.num_labels, config.pad_token_id = 1, 0
    classifier = AutoModelForSequenceClassification.from_config(config)
    body = {k: v for k, v in make_model(family).state_dict().items() if not k.startswith("lm_head")}
    assert classifier.load_state_dict(body, strict=False).missing_keys == ["score.weight"]
    loaded = peft.PeftModel.from_pretrained(classifier, tmp_path).eval()
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    theirs = loaded(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
    torch.testing.assert_close(ours, theirs.squeeze(-1), **close)


def test_every_role_comes_back_bit_for_bit(tmp_path):
    backbone = four_roles()
    again = Backbone(make_model("llama"))
    for name in ("policy", "critic", "reward"):
        save_adapter(backbone, name, tmp_path / name)
        load_adapter(again, name, tmp_path / name, trainable=name != "reward")
        ours, theirs = backbone.snapshot(name), again.snapshot(name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert all(p.requires_grad == (name != "reward") for p in again.parameters_of(name))
    assert torch.equal(logits_of(again, "policy"), logits_of(backbone, "policy"))


def test_options_of_an_adapter_come_back_and_are_in_its_config(tmp_path):
    backbone = Backbone(make_model("llama"))
    backbone.add_adapter("policy", rank=4, alpha=6, use_rslora=True, use_dora=True, dropout=0.1)
    scramble(backbone, "policy")
    save_adapter(backbone, "policy", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["use_dora"], config["lora_dropout"]) == (True, True, 0.1)
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    again = Backbone(make_model("llama"))
    load_adapter(again, "policy", tmp_path, trainable=True)
    again.add_adapter("reference", copy_of="policy", trainable=False)
    shapes = {pair.shape for role in ("policy", "reference") for pair in again.adapters[role].values()}
    assert shapes == {pair.shape for pair in backbone.adapters["policy"].values()}
    assert torch.equal(logits_of(again, "policy"), logits_of(backbone, "policy"))
    assert torch.equal(logits_of(again, "reference"), logits_of(backbone, "policy"))


def test_policy_from_a_saved_adapter_has_a_frozen_copy_as_its_reference(tmp_path):
    save_adapter(four_roles(), "policy", tmp_path)
    backbone = Backbone(make_model("llama"))
    load_adapter(backbone, "policy", tmp_path, trainable=True)
    backbone.add_adapter("reference", copy_of="policy", trainable=False)
    start = logits_of(backbone, "policy")
    assert torch.equal(logits_of(backbone, "reference"), start)
    logits_of(backbone, "policy").logsumexp(-1).sum().backward()
    torch.optim.AdamW(backbone.parameters_of("policy"), lr=0.1).step()
    assert torch.equal(logits_of(backbone, "reference"), start)
    assert not torch.allclose(logits_of(backbone, "policy"), start)
    assert not any(p.requires_grad or p.grad is not None for p in backbone.parameters_of("reference"))


def test_base_model_is_named_in_the_file(tmp_path):
    backbone = four_roles()
    backbone.model.config._name_or_path = "some/model"
    save_adapter(backbone, "policy", tmp_path)
    assert base_of(tmp_path) == "some/model"
    backbone.model.config._name_or_path = ""
    save_adapter(backbone, "policy", tmp_path)
    with pytest.raises(UserError, match="does not say base_model_name_or_path"):
        base_of(tmp_path)


def test_a_base_from_the_hub_is_named_with_its_commit_and_loaded_at_it(tmp_path, monkeypatch):
    """Two commits in the hub's cache: an adapter of the older one gets that one's weights, offline."""
    cache = tmp_path / "hub"
    for commit, seed in (("a" * 40, 0), ("b" * 40, 1)):
        make_model("llama").save_pretrained(cache / "models--me--small" / "snapshots" / commit)
        if seed:
            weights = cache / "models--me--small" / "snapshots" / commit / "model.safetensors"
            save_file({k: v + 1 for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    refs = cache / "models--me--small" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = {"dtype": torch.float32}
    backbone = Backbone(load_model("me/small", **options))
    backbone.add_adapter("policy", rank=2)
    save_adapter(backbone, "policy", tmp_path / "run")
    assert base_of(tmp_path / "run") == f"me/small@{'a' * 40}"
    (refs / "main").write_text("b" * 40)
    again = load_model(base_of(tmp_path / "run"), **options)
    assert torch.equal(again.lm_head.weight, backbone.lm_head_weight)
    assert not torch.equal(load_model("me/small", **options).lm_head.weight, backbone.lm_head_weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "is not part of a DoRA triple"),
        ({"use_qalora": True}, "use_qalora=True are not supported"),
        ({"bias": "all"}, "bias='all' are not supported"),
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save=\['embed_tokens'\]"),
        ({"r": 0}, "r: Input should be greater than or equal to 1, got 0"),
        ({"lora_alpha": "16"}, "lora_alpha: Input should be a valid number, got '16'"),
        ({"lora_alpha": True}, "lora_alpha: Input should be a valid number, got True"),
        ({"lora_alpha": math.inf}, "lora_alpha: Input should be a finite number, got inf"),
        ({"lora_dropout": 1.5}, "lora_dropout: Input should be less than 1, got 1.5"),
        ({"use_dora": "yes"}, "use_dora: Input should be a valid boolean, got 'yes'"),
        ({"modules_to_save": 5}, "modules_to_save: Input should be a valid list, got 5"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path: Input should be a valid string, got 5"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern.q_proj: Input should be a valid number, got 'x'"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "at most two repetitions, and none of a group, are matched"),
        ({"alpha_pattern": {".*a.*b.*c": 1}}, "at most two repetitions, and none of a group, are matched"),
        ({"alpha_pattern": {"(?=a)": 1}}, r"without \(\?\.\.\.\) and back references"),
        ({"alpha_pattern": {"(a": 1}}, "it is no regular expression"),
    ],
)
def test_adapter_that_is_no_plain_lora_is_refused_in_one_line(change, message, tmp_path):
    save_adapter(four_roles(), "policy", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    backbone = Backbone(make_model("llama"))
    with pytest.raises(UserError, match=message) as error:
        load_adapter(backbone, "policy", tmp_path, trainable=True)
    assert "\n" not in str(error.value)
    assert backbone.adapters == {}


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {key.replace(old, new): value for key, value in tensors.items()}


def one(tensors: dict[str, torch.Tensor], change) -> dict[str, torch.Tensor]:
    """With a change of the first lora_A."""
    key = min(key for key in tensors if "lora_A" in key)
    return tensors | {key: change(tensors[key]).contiguous()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: rename(t, "layers.3", "layers.7"), "it is no linear decoder layer of this model"),
        (lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, "is not part of a plain LoRA pair"),
        (lambda t: rename(t, "base_model.model.", ""), "is not a key of PEFT's format"),
        (lambda t: {k: v[:, :5].contiguous() for k, v in t.items()}, "another base"),
        (lambda t: {}, "has no LoRA weights"),
        (lambda t: one(t, lambda x: x * math.nan), "has numbers that are not finite"),
        (lambda t: one(t, lambda x: x.double() + 1e300), "has numbers that are not finite"),
        (lambda t: one(t, lambda x: x.long()), "is int64; adapters are float32"),
        (lambda t: one(t, lambda x: x.bool()), "is bool; adapters are float32"),
        (lambda t: one(t, lambda x: x.to(torch.float8_e4m3fn)), "is float8_e4m3fn; adapters are float32"),
        (lambda t: one(t, lambda x: x[:0]), "is empty, .*: an adapter has a rank from 1"),
        (lambda t: one(t, lambda x: x[0]), "not a matrix"),
        (lambda t: one(t, lambda x: x[0, 0]), "not a matrix"),
        (lambda t: one(t, lambda x: x[:1]), "another base"),
        (lambda t: one(t, lambda x: x.T), "another base"),
    ],
    ids=[
        "other layers",
        "half a pair",
        "other keys",
        "other sizes",
        "empty",
        "nan",
        "too large",
        "int64",
        "bool",
        "float8",
        "rank 0",
        "a vector",
        "a number",
        "another rank",
        "turned over",
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_added(change, message, tmp_path):
    save_adapter(four_roles(), "policy", tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(weights)), weights)
    backbone = Backbone(make_model("llama"))
    with pytest.raises(UserError, match=message):
        load_adapter(backbone, "policy", tmp_path, trainable=True)
    assert backbone.adapters == {}


def test_a_pattern_that_is_matched_is_matched_quickly():
    """The slowest kind that is let through, on a long name."""
    pattern = ".*a.*b"
    start = time.process_time()
    assert alpha_of({"lora_alpha": 2, "alpha_pattern": {pattern: 1}}, "a" * 200) == 2
    assert (
        alpha_of({"lora_alpha": 2, "alpha_pattern": {r".*\.[0-5]\..*|q_proj": 1}}, "model.layers.3.self_attn.v_proj")
        == 1
    )
    assert time.process_time() - start < 5


def test_links_out_of_the_folder_are_refused_but_those_of_the_hubs_cache(tmp_path):
    save_adapter(four_roles(), "policy", tmp_path / "blobs")
    for place in (tmp_path / "snapshots" / "0123", tmp_path / "elsewhere"):
        place.mkdir(parents=True)
        for path in (tmp_path / "blobs").iterdir():
            (place / path.name).symlink_to(path)
    load_adapter(Backbone(make_model("llama")), "policy", tmp_path / "snapshots" / "0123", trainable=True)
    with pytest.raises(UserError, match=r"adapter_config.json is a link to .*, which is not in that folder"):
        load_adapter(Backbone(make_model("llama")), "policy", tmp_path / "elsewhere", trainable=True)
    (tmp_path / "ring").mkdir()
    (tmp_path / "ring" / "adapter_config.json").symlink_to("adapter_config.json")
    with pytest.raises(UserError, match="ring is not an adapter"):
        load_adapter(Backbone(make_model("llama")), "policy", tmp_path / "ring", trainable=True)
    (tmp_path / "link").symlink_to(tmp_path / "blobs")
    load_adapter(Backbone(make_model("llama")), "policy", tmp_path / "link", trainable=True)


def test_folder_without_an_adapter_is_named(tmp_path):
    backbone = Backbone(make_model("llama"))
    with pytest.raises(UserError, match=r"is not an adapter: it has no adapter_config\.json"):
        load_adapter(backbone, "policy", tmp_path, trainable=True)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_adapter(backbone, "policy", tmp_path, trainable=True)
    for text in ("[" * 100_000, '{"r": ' + "1" * 5000 + "}"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match="is not JSON"):
            load_adapter(backbone, "policy", tmp_path, trainable=True)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        load_adapter(backbone, "policy", tmp_path, trainable=True)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        load_adapter(backbone, "policy", tmp_path, trainable=True)
