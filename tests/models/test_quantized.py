"""A backbone whose linear layers bitsandbytes holds in 4 bits or int8 (its CPU build is enough)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.loading import load_model
from rlhf_fast.models.lora import LoRALinear, LoRAShape, Route, routed
from rlhf_fast.models.peft_io import load_adapter, save_adapter
from rlhf_fast.models.quantized import QuantizedForward, dequantized, is_quantized
from tests.models.test_memory import add_ppo_roles, qwen_7b, stepped_optimizers, trained_bytes
from tests.models.tiny_models import make_batch, make_model, scramble

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install rlhf_fast[quant]")
KINDS = ("nf4", "int8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> folder of its tiny model."""
    paths = {family: tmp_path_factory.mktemp(family) for family in ("llama", "gpt2")}
    for family, path in paths.items():
        make_model(family).save_pretrained(path)
    return paths


@pytest.fixture(params=KINDS)
def model(request, folders):
    return load_model(folders["llama"], dtype=torch.float32, quantization=request.param)


def make_layer(kind, bias=True):
    """(a quantised layer, the plain one of the weights it stands for), 40 -> 24."""
    torch.manual_seed(1)
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(40, 24, bias=bias, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(40, 24, bias=bias, has_fp16_weights=False, threshold=6.0)
    layer = layer.to("cpu").eval().requires_grad_(False)
    plain = nn.Linear(40, 24, bias=bias).requires_grad_(False)
    plain.weight.copy_(dequantized(layer))
    if bias:
        plain.bias.copy_(layer.bias)
    QuantizedForward(layer, kind)
    return layer, plain


def adapted(layer):
    """Two adapters on the layer, away from their start."""
    lora, generator = LoRALinear(layer, 0), torch.Generator().manual_seed(2)
    for name, rank in (("a", 3), ("b", 5)):
        shape = LoRAShape(rank, 0.5, dropout=0.25)
        pair = lora.add(name, shape, trainable=True, dtype=torch.float32, generator=generator)
        with torch.no_grad():
            pair.b.copy_(torch.randn(pair.b.shape, generator=generator))
    return lora


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_a_quantised_layer_are_those_on_its_dequantised_weight(kind, bias):
    results = []
    for layer in make_layer(kind, bias):
        lora = adapted(layer)
        x = torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with routed(Route(("a", None, "b"), tokens=4, dropout_seed=7)):
            y = layer(x)
        parameters = [p for pair in lora.bank.values() for p in (pair.a, pair.b)]
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *parameters])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dequantised_weight_is_near_the_one_it_was_made_of(kind):
    torch.manual_seed(1)
    original = nn.Linear(40, 24).weight
    layer, _ = make_layer(kind)
    assert dequantized(layer).shape == (24, 40)
    error = (dequantized(layer) - original).abs().max() / original.abs().max()
    # Half of the widest gap between two levels of NF4 (-1 to -0.696), and of int8, which rounds to 1 / 127.
    assert error < {"nf4": 0.16, "int8": 0.005}[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pass_without_gradients_gives_the_same_bits_and_leaves_the_input_its_gradient(kind, dtype):
    layer, _ = make_layer(kind)
    x = torch.randn(5, 40).to(dtype).requires_grad_()
    before = layer(x)
    with torch.no_grad():
        without = layer(x)
    after = layer(x)
    assert torch.equal(before, without)
    assert torch.equal(before, after)
    (gradient,) = torch.autograd.grad(after.float().sum(), x)
    expected = dequantized(layer).sum(0).expand(5, 40).to(dtype)
    torch.testing.assert_close(gradient, expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_batch(kind):
    layer, plain = make_layer(kind)
    x = torch.randn(6, 40)
    outlier = x.clone()
    outlier[5] *= 100
    torch.testing.assert_close(layer(outlier)[:5], layer(x)[:5], rtol=0, atol=0)
    torch.testing.assert_close(layer(outlier), F.linear(outlier, plain.weight, plain.bias), rtol=1e-5, atol=1e-4)


def test_no_dense_weight_is_kept_for_the_backward():
    layer, _ = make_layer("nf4")
    adapted(layer)
    kept = []
    x = torch.randn(2, 40, requires_grad=True)

    def pack(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), routed(Route(("a",))):
        layer(x)
    assert kept
    assert (24, 40) not in kept


def as_plain(backbone: Backbone) -> Backbone:
    """The same roles on a model of plain layers that holds the dequantised weights."""
    model = make_model("llama")
    with torch.no_grad():
        for name, layer in backbone.quantized.items():
            model.get_submodule(name).weight.copy_(dequantized(layer))
    plain = Backbone(model)
    for name in ("policy", "critic"):
        plain.add_adapter(name, rank=4)
        plain.restore(name, {k: v for k, v in backbone.snapshot(name).items() if "score" not in k})
    plain.add_head("critic")
    plain.restore("critic", backbone.snapshot("critic"))
    return plain


def roles_on(model) -> Backbone:
    backbone = Backbone(model)
    for seed, name in enumerate(("policy", "critic")):
        backbone.add_adapter(name, rank=4)
        if name == "critic":
            backbone.add_head(name)
        scramble(backbone, name, seed)
    return backbone


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "checkpointing"])
def test_roles_on_a_quantised_model_are_those_on_its_dequantised_weights(model, recompute):
    backbone = roles_on(model)
    plain = as_plain(backbone)
    input_ids, attention_mask = make_batch()
    found = []
    for either in (backbone, plain):
        either.enable_checkpointing(recompute)
        scores = either.score(input_ids, attention_mask, attention_mask)  # first without gradients, as a run does
        hidden = either.hidden(input_ids, attention_mask, ["policy", "critic"])
        logprobs = either.logprobs(hidden["policy"], input_ids, attention_mask)
        values = either.values("critic", hidden["critic"])
        torch.testing.assert_close(scores.logprobs, logprobs.detach(), rtol=1e-5, atol=1e-5)
        parameters = [*either.parameters_of("policy"), *either.parameters_of("critic")]
        gradients = torch.autograd.grad(logprobs.sum() + values.square().sum(), parameters)
        found.append([scores.logprobs, scores.ref_logprobs, scores.values, *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_head_embeddings_and_norms_stay_as_they_are(model, folders):
    plain = load_model(folders["llama"], dtype=torch.float32)
    quantized = {name for name, module in model.named_modules() if is_quantized(module)}
    linears = {name for name, module in plain.named_modules() if type(module) is nn.Linear}
    assert quantized == linears - {"lm_head"}
    for name, parameter in plain.named_parameters():
        if name.removesuffix(".weight") not in quantized:
            assert torch.equal(model.get_parameter(name), parameter), name


def test_byte_report_counts_what_is_stored(folders):
    sizes = {}
    for kind in (None, *KINDS):
        backbone = Backbone(load_model(folders["llama"], dtype=torch.float32, quantization=kind))
        sizes[kind] = backbone.bytes()["base"]
    shapes = backbone.linear_shapes.values()
    numbers, rows = sum(out * inner for out, inner in shapes), sum(out for out, _ in shapes)
    assert sizes[None] - sizes["int8"] == 3 * numbers - 4 * rows  # a scale per row
    assert sizes[None] - sizes["nf4"] == 4 * numbers - nf4_bytes(shapes)


def nf4_bytes(shapes) -> int:
    """Half a byte for each number, for 64 of them a scale of one byte, for 256 scales one in float32; in each layer
    tables of 16 and of 256 numbers and an offset."""
    total = 0
    for out, inner in shapes:
        blocks = out * inner // 64
        total += 32 * blocks + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)
    return total


def test_four_roles_with_both_optimizers_on_nf4_cost_under_six_gib_at_7b():
    # The figures of README.md and docs/how_it_works.md.
    backbone = qwen_7b()
    add_ppo_roles(backbone)
    dense = trained_bytes(backbone, stepped_optimizers(backbone))
    shapes = backbone.linear_shapes.values()
    saved = 2 * sum(out * inner for out, inner in shapes) - nf4_bytes(shapes)
    assert round(saved / 2**30, 2) == 9.02
    assert dense - saved < 6 * 2**30
    assert (dense - saved) / 7_615_616_512 < 0.83


def test_conv1d_models_can_be_quantised(folders):
    backbone = Backbone(load_model(folders["gpt2"], dtype=torch.float32, quantization="nf4"))
    assert backbone.linear_shapes == Backbone(make_model("gpt2")).linear_shapes
    backbone.add_adapter("policy", rank=2)
    scramble(backbone, "policy")
    hidden = backbone.hidden(*make_batch(), ["policy", "reference"])
    assert (hidden["policy"] - hidden["reference"]).abs().max() > 1e-3


def test_adapter_survives_its_files(model, folders, tmp_path):
    backbone = roles_on(copy.deepcopy(model))
    save_adapter(backbone, "policy", tmp_path)
    again = Backbone(model)
    load_adapter(again, "policy", tmp_path, trainable=False)
    batch = make_batch()
    assert torch.equal(again.hidden(*batch, ["policy"])["policy"], backbone.hidden(*batch, ["policy"])["policy"])


def test_peft_on_the_same_quantised_model_gives_the_same_logits(folders, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    backbone = roles_on(load_model(folders["llama"], dtype=torch.float32, quantization="nf4"))
    save_adapter(backbone, "policy", tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        load_model(folders["llama"], dtype=torch.float32, quantization="nf4"), tmp_path
    )
    input_ids, attention_mask = make_batch()
    with backbone.using("policy"):
        ours = backbone.model(input_ids, attention_mask=attention_mask).logits
    # In training mode the layer of bitsandbytes takes its product in the type of x on every CPU.
    expected = theirs.train()(input_ids, attention_mask=attention_mask).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_folder_that_was_saved_quantised_is_a_backbone(model, tmp_path):
    expected = Backbone(copy.deepcopy(model)).hidden(*make_batch(), ["reference"])["reference"]
    model.save_pretrained(tmp_path)
    found = Backbone(load_model(tmp_path, dtype=torch.float32)).hidden(*make_batch(), ["reference"])["reference"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="was saved quantised: leave out quantization nf4"):
        load_model(tmp_path, dtype=torch.float32, quantization="nf4")


def test_dora_on_a_quantised_layer_is_refused(model):
    backbone = Backbone(model)
    with pytest.raises(UserError, match=r"DoRA magnitudes, which 'model\.layers\.0\..*' cannot have: it is quantised"):
        backbone.add_adapter("policy", use_dora=True)
    assert not backbone.adapters


def test_layer_that_was_packed_for_inference_is_refused():
    layer = bnb.nn.Linear4bit(40, 24, quant_type="nf4").to("cpu")
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match=r"q_proj was packed for inference .*: load it again"):
        QuantizedForward(layer, "q_proj")


def test_quantised_head_is_refused(folders):
    model = load_model(folders["llama"], dtype=torch.float32)
    model.lm_head = bnb.nn.Linear8bitLt(32, 64, has_fp16_weights=False).to("cpu")
    with pytest.raises(UserError, match=r"its output head is Linear8bitLt, not nn\.Linear"):
        Backbone(model)
