import json
import math
import os

import pytest
import torch

from rlhf_fast.data.encoding import load_tokenizer
from rlhf_fast.errors import UserError
from rlhf_fast.models.classifier import load_classifier
from rlhf_fast.models.loading import check_finite, load_model
from rlhf_fast.models.tiny import byte_tokenizer
from tests.models.tiny_models import make_model


@pytest.fixture
def folder(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    return tmp_path


def test_model_is_loaded_in_the_dtype_asked_for(folder):
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(folder, dtype=dtype)
        assert model.dtype == dtype
        assert not model.training
    expected = make_model("llama").state_dict()
    loaded = load_model(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_attention_is_an_option(folder):
    assert load_model(folder, dtype=torch.float32).config._attn_implementation == "sdpa"
    eager = load_model(folder, dtype=torch.float32, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    with pytest.raises(UserError, match="attn_implementation must be one of auto, eager, sdpa, flash_attention_2, got"):
        load_model(folder, dtype=torch.float32, attn_implementation="flash")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_wrong_paths_are_told_apart_in_one_line(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_text("x")
    for path, reason in (
        (tmp_path / "nowhere", "there is no such folder"),
        ("./nowhere", "there is no such folder"),
        (file, "it is a file; the folder that holds config.json is needed"),
        (tmp_path, "the folder has no config.json"),
    ):
        with pytest.raises(UserError) as error:
            load_model(path, dtype=torch.float32)
        assert str(error.value) == f"model {path} cannot be loaded: {reason}"


def test_hub_id_that_cannot_be_reached_says_that_there_is_no_folder_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="models/absent cannot be loaded: there is no such folder, and as a hub id"):
        load_model("models/absent", dtype=torch.float32)


def test_a_hub_id_is_read_at_its_revision_and_a_folder_of_that_name_wins(tmp_path, monkeypatch):
    """The layout of huggingface_hub's own cache stands for the hub."""
    repo = tmp_path / "hub" / "models--org--name"
    for number, (revision, commit) in enumerate({"main": "a" * 40, "v1.0": "b" * 40}.items()):
        model = make_model("llama")
        with torch.no_grad():
            model.model.embed_tokens.weight.fill_(number)
        model.save_pretrained(repo / "snapshots" / commit)
        byte_tokenizer().save_pretrained(repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, number in (("org/name", 0), ("org/name@v1.0", 1), (f"org/name@{'a' * 40}", 0)):
        assert load_model(name, dtype=torch.float32).model.embed_tokens.weight[1, 0] == number
        assert load_tokenizer(name).eos_token_id == byte_tokenizer().eos_token_id
    for load in (lambda name: load_model(name, dtype=torch.float32), load_tokenizer):
        with pytest.raises(UserError, match=r"org/name@v2\.0") as error:
            load("org/name@v2.0")
        assert "\n" not in str(error.value)
    make_model("llama").save_pretrained("org/name@v1.0")
    assert load_model("org/name@v1.0", dtype=torch.float32).model.embed_tokens.weight[1, 0] not in (0, 1)


def test_unknown_architecture_is_named(folder):
    edit_config(folder, model_type="perceptron9000")
    with pytest.raises(UserError, match="perceptron9000") as error:
        load_model(folder, dtype=torch.float32)
    assert "\n" not in str(error.value)


def test_architecture_without_a_causal_lm_is_named(folder):
    edit_config(folder, model_type="vit", architectures=["ViTModel"])
    with pytest.raises(UserError, match=r"cannot be loaded: .*ViTConfig"):
        load_model(folder, dtype=torch.float32)


def test_missing_weights_are_an_error(folder):
    edit_config(folder, num_hidden_layers=5)
    with pytest.raises(UserError, match=r"lacks \d+ of its weights, such as model\.layers\.4"):
        load_model(folder, dtype=torch.float32)


def test_a_damaged_weight_file_is_one_line(folder):
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"cannot be loaded: .*header"):
        load_model(folder, dtype=torch.float32)


@pytest.mark.parametrize("name", ["/dev/zero", "../model.safetensors", "absent.safetensors", "", "."])
def test_an_index_names_files_of_the_folder_alone(folder, name):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "part.safetensors", "lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json names .*, which is no file of the folder"):
        load_model(folder, dtype=torch.float32)


def test_a_device_or_a_pipe_in_the_place_of_weights_is_not_read(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"model\.safetensors is no file"):
        load_model(folder, dtype=torch.float32)


def test_a_pipe_is_no_tokenizer(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"no tokenizer in .*: tokenizer\.json is no file"):
        load_tokenizer(str(tmp_path))


def test_quantization_says_what_it_needs(folder, monkeypatch):
    with pytest.raises(UserError, match="quantization must be one of nf4, int8, got 'int4'"):
        load_model(folder, dtype=torch.float32, quantization="int4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"quantization nf4 needs bitsandbytes: pip install 'rlhf_fast\[quant\]'"):
        load_model(folder, dtype=torch.float32, quantization="nf4")


def test_a_buffer_may_be_infinite_and_is_no_nan():
    model = torch.nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    check_finite(model, "model m")
    model.mask[0] = math.nan
    with pytest.raises(UserError, match="model m has weights that are not finite numbers, the first in mask"):
        check_finite(model, "model m")


def test_weights_of_eight_bits_are_checked():
    model = torch.nn.Linear(2, 2, bias=False)
    model.weight = torch.nn.Parameter(torch.ones(2, 2).to(torch.float8_e4m3fn), requires_grad=False)
    check_finite(model, "model m")
    model.weight = torch.nn.Parameter(torch.full((2, 2), math.nan).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UserError, match="model m has weights that are not finite numbers, the first in weight"):
        check_finite(model, "model m")


@pytest.mark.parametrize(("stop", "shown"), [('"x"', "'x'"), ("null", "None"), ("true", "True"), ("2.0", "2.0")])
def test_a_generation_config_that_stops_at_no_token_is_refused(stop, shown, folder):
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [1, {stop}]}}')
    with pytest.raises(UserError, match=f"eos_token_id of its generation config is {shown}, not the id of a token"):
        load_model(folder, dtype=torch.float32)


def test_more_layers_than_any_model_has_are_not_made(folder):
    edit_config(folder, num_hidden_layers=1 << 31)
    with pytest.raises(
        UserError,
        match="cannot be loaded: its config has num_hidden_layers 2147483648, and more than 4096 are not made",
    ):
        load_model(folder, dtype=torch.float32)


CODE = """
from pathlib import Path
Path({canary!r}).touch()
from transformers import {base} as Base
class Own{kind}(Base):
    {line}
"""
FILES = {
    "Config": ("PretrainedConfig", "model_type = 'own'"),
    "Model": ("LlamaForCausalLM", "pass"),
    "Classifier": ("LlamaForSequenceClassification", "pass"),
    "Tokenizer": ("PreTrainedTokenizerFast", "pass"),
}


@pytest.fixture
def with_code(folder, tmp_path_factory, monkeypatch):
    """A folder whose config, model, classifier, tokenizer and generation are code of its own; and the file that the
    code would make. A `y` waits for whoever asks."""
    canary = tmp_path_factory.mktemp("canary") / "ran"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    for kind, (base, line) in FILES.items():
        (folder / f"own_{kind.lower()}.py").write_text(CODE.format(canary=str(canary), base=base, kind=kind, line=line))
    auto = {
        "AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel",
        "AutoModelForSequenceClassification": "own_classifier.OwnClassifier",
    }  # fmt: skip
    byte_tokenizer().save_pretrained(folder)
    edit_config(folder, auto_map=auto)
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"open({str(canary)!r}, 'w')\ndef generate(*_, **__): pass\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return folder, canary


@pytest.mark.parametrize("known", [True, False], ids=["llama", "own type"])
def test_code_in_a_folder_is_not_run(with_code, known):
    folder, canary = with_code
    if not known:
        edit_config(folder, model_type="own")
    loads = (
        lambda: load_model(folder, dtype=torch.float32),
        lambda: load_classifier(str(folder), device=torch.device("cpu")),
        lambda: load_tokenizer(str(folder)),
    )
    for load in loads:
        try:
            load()
        except UserError as error:
            said = str(error)
            assert "\n" not in said
            assert known or "it has code of its own, which is run with trust_remote_code: true only" in said
        assert not canary.exists()


def test_code_in_a_folder_is_run_where_the_user_says_so(with_code):
    folder, canary = with_code
    edit_config(folder, auto_map={"AutoModelForCausalLM": "own_model.OwnModel"})
    load_model(folder, dtype=torch.float32, trust_remote_code=True)
    assert canary.exists()
    canary.unlink()
    tokenizer = load_tokenizer(str(folder), trust_remote_code=True)
    assert canary.exists()
    assert type(tokenizer).__name__ == "OwnTokenizer"
