import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from tests.models.tiny_models import CONFIGS, SIZES, four_roles, make_batch, make_model, scramble

ROLES = ("policy", "reference", "critic", "reward")
families = pytest.mark.parametrize("family", list(CONFIGS))


def untouched_hidden(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    output = model.get_decoder()(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    )
    return output.last_hidden_state


@families
def test_reference_alone_is_the_untouched_model_bit_for_bit_where_there_is_no_padding(family):
    input_ids, _ = make_batch()
    attention_mask = torch.ones_like(input_ids)
    untouched = untouched_hidden(make_model(family), input_ids, attention_mask)
    backbone = four_roles(family)
    for role in ("reference", None):
        assert torch.equal(backbone.hidden(input_ids, attention_mask, [role])[role], untouched)
    assert torch.equal(untouched_hidden(backbone.model, input_ids, attention_mask), untouched)


@families
def test_reference_in_a_joint_traversal_is_the_untouched_model_to_rounding(family):
    input_ids, attention_mask = make_batch()
    untouched = untouched_hidden(make_model(family), input_ids, attention_mask)
    joint = four_roles(family).hidden(input_ids, attention_mask, ROLES)["reference"]
    real = attention_mask.bool()
    torch.testing.assert_close(joint[real], untouched[real], rtol=0, atol=2e-6)


@families
@pytest.mark.parametrize("top_layers", [None, 2])
@pytest.mark.parametrize("attention", [None, "eager"])
def test_joint_traversal_equals_separate_traversals(family, top_layers, attention):
    backbone = four_roles(family, top_layers, attention)
    batch = make_batch()
    joint = backbone.hidden(*batch, ROLES)
    separate = {role: backbone.hidden(*batch, [role])[role] for role in ROLES}
    for role in ROLES:
        torch.testing.assert_close(joint[role], separate[role], rtol=0, atol=2e-6)
    distance = min((separate[a] - separate[b]).abs().max() for a in ROLES for b in ROLES if a < b)
    assert distance > 1e-2, "the roles must differ for this test to say anything"


@families
def test_lower_layers_computed_once_give_the_full_traversal(family):
    backbone = four_roles(family)
    input_ids, attention_mask = make_batch()
    lower = backbone.lower(input_ids, attention_mask)
    assert lower.shape == (3, 7, 32)
    assert not lower.requires_grad
    full = backbone.hidden(input_ids, attention_mask, ROLES)
    upper = backbone.hidden(input_ids, attention_mask, ROLES, lower=lower)
    for role in ROLES:
        torch.testing.assert_close(upper[role], full[role], rtol=0, atol=1e-6)


@families
def test_lower_may_be_used_by_a_backbone_that_has_not_run_yet(family):
    batch = make_batch()
    lower = four_roles(family).lower(*batch)
    fresh = four_roles(family).hidden(*batch, ["policy"], lower=lower)["policy"]
    expected = four_roles(family).hidden(*batch, ["policy"])["policy"]
    torch.testing.assert_close(fresh, expected, rtol=0, atol=1e-6)


def test_layers_below_the_adapters_run_once_per_lower_and_not_with_it():
    backbone = four_roles(top_layers=2)
    batch = make_batch()
    backbone.lower(*batch)  # finds out, once, that the layers below may run once
    calls = []
    for index, layer in enumerate(backbone.model.model.layers):
        layer.mlp.register_forward_hook(lambda module, args, out, index=index: calls.append((index, out.numel() // 32)))
    tokens = int(batch[1].sum())
    lower = backbone.lower(*batch)
    assert calls == [(0, tokens), (1, tokens)]
    calls.clear()
    backbone.hidden(*batch, ROLES, lower=lower)
    assert calls == [(2, 4 * tokens), (3, 4 * tokens)]
    calls.clear()
    backbone.hidden(*batch, ROLES)
    assert calls == [(0, tokens), (1, tokens), (2, 4 * tokens), (3, 4 * tokens)]


def test_there_is_no_lower_when_the_first_layer_is_adapted():
    assert four_roles(top_layers=None).lower(*make_batch()) is None


def test_adapters_of_different_depth_share_one_traversal():
    backbone = Backbone(make_model("llama"))
    backbone.add_adapter("policy", top_layers=3)
    backbone.add_adapter("critic", top_layers=1)
    for name in ("policy", "critic"):
        scramble(backbone, name)
    batch = make_batch()
    assert backbone.first_adapted_layer == 1
    joint = backbone.hidden(*batch, ["policy", "critic"], lower=backbone.lower(*batch))
    for role in ("policy", "critic"):
        torch.testing.assert_close(joint[role], backbone.hidden(*batch, [role])[role], rtol=0, atol=2e-6)


def test_model_keeps_its_modules_parameters_and_state_dict():
    model = make_model("gpt2")
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    values = {name: value.clone() for name, value in model.state_dict().items()}
    backbone = Backbone(model)
    backbone.add_adapter("policy")
    scramble(backbone, "policy")
    assert dict(model.named_modules()) == modules
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert model.state_dict().keys() == values.keys()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_using_a_role_generates_with_its_adapter():
    backbone = four_roles()
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    attention_mask = torch.ones_like(prompt)
    with backbone.using("policy"):
        tokens = backbone.model.generate(
            prompt, attention_mask=attention_mask, max_new_tokens=5, do_sample=False, eos_token_id=None
        )
    greedy = prompt
    for _ in range(5):
        hidden = backbone.hidden(greedy, torch.ones_like(greedy), ["policy"])["policy"]
        logits = F.linear(hidden[:, -1], backbone.lm_head_weight)
        greedy = torch.cat([greedy, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(tokens, greedy)
    base = backbone.model.generate(
        prompt, attention_mask=attention_mask, max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    assert not torch.equal(tokens, base), "the adapter must change the text for this test to say anything"


@families
def test_logprobs_are_those_of_the_logits_at_the_counted_tokens_only(family):
    backbone = four_roles(family)
    input_ids, attention_mask = make_batch()
    mask = attention_mask.clone()
    mask[:, :3] = 0
    hidden = backbone.hidden(input_ids, attention_mask, ["policy"])["policy"]
    logits = F.linear(hidden, backbone.lm_head_weight, backbone.lm_head_bias) / 0.7
    log_p = logits.log_softmax(-1)[:, :-1]
    expected = F.pad(log_p.gather(-1, input_ids[:, 1:, None]).squeeze(-1), (1, 0)) * mask
    expected_entropy = F.pad(-(log_p.exp() * log_p).sum(-1), (1, 0)) * mask
    logprobs, entropy = backbone.logprobs(hidden, input_ids, mask, temperature=0.7, return_entropy=True)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    mask[:, 0] = 1
    assert torch.equal(backbone.logprobs(hidden, input_ids, mask, temperature=0.7)[:, 0], torch.zeros(3))


def test_logprobs_of_a_batch_without_counted_tokens_are_a_connected_zero():
    backbone = four_roles()
    input_ids, attention_mask = make_batch()
    hidden = backbone.hidden(input_ids, attention_mask, ["policy"])["policy"]
    logprobs = backbone.logprobs(hidden, input_ids, torch.zeros_like(attention_mask))
    assert torch.equal(logprobs, torch.zeros(3, 7))
    logprobs.sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in backbone.parameters_of("policy"))


def test_value_of_a_token_comes_from_the_hidden_state_before_it():
    backbone = four_roles()
    hidden = torch.arange(24.0).view(1, 3, 8).repeat(1, 1, 4)
    with torch.no_grad():
        backbone.head("critic").weight.zero_()[0, 0] = 1.0
    assert backbone.values("critic", hidden).tolist() == [[0.0, 0.0, 8.0]]


def test_score_is_read_at_the_last_real_token():
    backbone = four_roles()
    _, attention_mask = make_batch()
    hidden = torch.arange(7.0).view(1, 7, 1).expand(3, 7, 32)
    with torch.no_grad():
        backbone.head("reward").weight.zero_()[0, 0] = 1.0
    assert backbone.scores("reward", hidden, attention_mask).tolist() == [6.0, 4.0, 6.0]


def test_score_gives_every_role_in_one_traversal():
    backbone = four_roles()
    input_ids, attention_mask = make_batch()
    mask = attention_mask.clone()
    mask[:, :3] = 0
    backbone.lower(input_ids, attention_mask)  # whether the lower layers may run once is tried once
    calls = []
    for index, layer in enumerate(backbone.model.model.layers):
        layer.self_attn.register_forward_hook(lambda *args, index=index: calls.append(index))
    scores = backbone.score(input_ids, attention_mask, mask, temperature=0.5)
    assert calls == [0, 1, 2, 3]
    alone = {role: backbone.hidden(input_ids, attention_mask, [role])[role] for role in ROLES}
    close = {"rtol": 1e-5, "atol": 1e-5}
    for ours, role in ((scores.logprobs, "policy"), (scores.ref_logprobs, "reference")):
        torch.testing.assert_close(ours, backbone.logprobs(alone[role], input_ids, mask, temperature=0.5), **close)
    torch.testing.assert_close(scores.values, backbone.values("critic", alone["critic"]), **close)
    torch.testing.assert_close(scores.scores, backbone.scores("reward", alone["reward"], attention_mask), **close)
    assert not any(x.requires_grad for x in (scores.logprobs, scores.ref_logprobs, scores.values, scores.scores))


def test_score_leaves_out_the_roles_that_do_not_exist():
    backbone = Backbone(make_model("llama"))
    backbone.add_adapter("policy")
    input_ids, attention_mask = make_batch()
    scores = backbone.score(input_ids, attention_mask, attention_mask)
    assert (scores.values, scores.scores) == (None, None)
    torch.testing.assert_close(scores.logprobs, scores.ref_logprobs, rtol=0, atol=2e-6)


def test_padding_never_changes_a_role():
    backbone = four_roles()
    tokens = torch.tensor([[11, 12, 13, 14]])
    alone = backbone.hidden(tokens, torch.ones_like(tokens), ROLES)
    for left, right in ((3, 0), (0, 3), (2, 1)):
        padded = F.pad(tokens, (left, right), value=9)
        attention_mask = F.pad(torch.ones_like(tokens), (left, right))
        hidden = backbone.hidden(padded, attention_mask, ROLES)
        for role in ROLES:
            torch.testing.assert_close(hidden[role][:, left : left + 4], alone[role], rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.05),
        GraniteConfig(**SIZES, logits_scaling=0.25),
        CohereConfig(**SIZES, logit_scale=8.0),
    ],
    ids=lambda config: config.model_type,
)
def test_logits_that_the_architecture_caps_or_scales_keep_their_log_probabilities(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    input_ids = make_batch()[0]
    mask = torch.ones_like(input_ids)
    with torch.no_grad():
        logits = model(input_ids, attention_mask=mask).logits[:, :-1]
        plain = model.get_output_embeddings()(model.get_decoder()(input_ids).last_hidden_state)[:, :-1]
    assert (logits - plain).abs().max() > 1e-2, "the change must be seen for this test to say anything"
    backbone = Backbone(model)
    found = backbone.logprobs(backbone.hidden(input_ids, mask, ["reference"])["reference"], input_ids, mask)
    expected = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found[:, 1:], expected, rtol=0, atol=5e-6)


def test_encoder_decoder_is_refused():
    model = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=1, vocab_size=61))
    with pytest.raises(UserError, match="it has an encoder"):
        Backbone(model)


def test_training_mode_is_refused():
    backbone = four_roles()
    backbone.model.train()
    with pytest.raises(RuntimeError, match="call eval"):
        backbone.hidden(*make_batch(), ["policy"])


def test_unknown_role_is_named_with_those_that_exist():
    with pytest.raises(UserError, match=r"no adapter named 'polcy'; there are: \['critic', 'policy', 'reward'\]"):
        four_roles().hidden(*make_batch(), ["polcy"])


def test_rows_in_an_order_of_a_layers_own_are_refused():
    backbone = four_roles()
    backbone.lower(*make_batch())  # finds out, once, that the layers below may run once
    linear = backbone.model.model.layers[3].mlp.up_proj
    gate = backbone.model.model.layers[3].mlp.gate_proj
    linear.register_forward_pre_hook(lambda module, args: (args[0][:, :5],))
    gate.register_forward_hook(lambda module, args, output: output[:, :5])
    with pytest.raises(ValueError, match="the route has 2 segments of 17"):
        backbone.hidden(*make_batch(), ["policy", "critic"])


def test_bf16_base_keeps_adapters_heads_and_their_gradients_in_fp32():
    backbone = Backbone(make_model("llama").to(torch.bfloat16))
    for name in ("policy", "critic"):
        backbone.add_adapter(name, top_layers=2)
        backbone.add_head(name)
        scramble(backbone, name)
    input_ids, attention_mask = make_batch()
    hidden = backbone.hidden(input_ids, attention_mask, ["policy", "critic"])
    assert hidden["policy"].dtype == torch.bfloat16
    logprobs = backbone.logprobs(hidden["policy"], input_ids, attention_mask)
    values = backbone.values("critic", hidden["critic"])
    assert logprobs.dtype == values.dtype == torch.float32
    (logprobs.sum() + values.sum()).backward()
    trained = [*backbone.adapters["policy"].values(), *backbone.adapters["critic"].values()]
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for pair in trained for p in (pair.a, pair.b))
    exact = Backbone(make_model("llama"))
    exact.add_adapter("policy", top_layers=2)
    exact.restore("policy", {k: v for k, v in backbone.snapshot("policy").items() if k != "score.weight"})
    expected = exact.logprobs(exact.hidden(input_ids, attention_mask, ["policy"])["policy"], input_ids, attention_mask)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=0.1)
