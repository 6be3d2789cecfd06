"""The native step against the model's own logits of each row alone, without a cache."""

from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from rlhf_fast.data import notes
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.ops.lora import _cpu
from rlhf_fast.rollout import program, roll_out, trials
from rlhf_fast.rollout.cache import SlotCache, sliding_layers
from rlhf_fast.rollout.program import Program
from rlhf_fast.rollout.state import State
from tests.models.tiny_models import make_model, scramble
from tests.rollout.test_decoder import prompts_of, tokenizer  # noqa: F401

SIZES = {
    "vocab_size": 101, "hidden_size": 42, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama3 rope": lambda: LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    ),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=5, hidden_act="gelu_pytorch_tanh"),
    "qwen2": lambda: Qwen2Config(
        **{**SIZES, "head_dim": 8, "hidden_size": 48},
        use_sliding_window=True, sliding_window=4, max_window_layers=1,
    ),
    "qwen3": lambda: Qwen3Config(**SIZES),
}  # fmt: skip
LENGTHS = (7, 3, 9, 1)


@pytest.fixture(autouse=True)
def _wherever_it_runs(monkeypatch):
    monkeypatch.setattr(_cpu, "few_rows_are_fast", lambda: True)


def backbone_of(family, dtype):
    torch.manual_seed(3)
    backbone = Backbone(AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype))
    for seed, name in enumerate(("policy", "critic")):
        backbone.add_adapter(name, rank=3)
        scramble(backbone, name, seed)
    with torch.no_grad():
        for name, parameter in backbone.model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.copy_(torch.rand(parameter.shape) + 0.5)
    return backbone


def rows_of(backbone):
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(3, 101, (length + 4,), generator=draw) for length in LENGTHS]


def stepped(backbone, rows, roles, *, threads=2, kept=(0, 1, 2, 3)):
    """(roles, rows, steps, V): logits behind the last tokens but some, which go through the program one by one."""
    width, copies, lengths = max(LENGTHS), len(roles), torch.tensor(LENGTHS)
    ids = torch.stack([torch.cat([row.new_zeros(width - n), row[:n]]) for row, n in zip(rows, LENGTHS, strict=True)])
    places = torch.arange(width) - (width - lengths[:, None])
    with torch.no_grad(), backbone.using(*roles, one_pass=True), running_on(threads):
        cache = SlotCache(sliding_layers(backbone.model), width + 4)
        backbone.model(
            input_ids=ids.repeat(copies, 1), attention_mask=(places >= 0).long().repeat(copies, 1),
            position_ids=places.clamp_min(0).repeat(copies, 1), cache=cache, use_cache=True,
        )  # fmt: skip
        cache.column = width
        cache.take(torch.tensor([role * len(rows) + row for role in range(copies) for row in kept]))
        state = State.empty(len(kept), ids.device)
        made = Program.of(backbone, cache, state, copies)
        assert made is not None
        found = []
        for step in range(4):
            state.ids.copy_(torch.stack([rows[row][LENGTHS[row] + step] for row in kept]))
            state.places.copy_(lengths[list(kept)] + step)
            found.append(made.step()[0].clone().unflatten(0, (copies, -1)))
    return torch.stack(found, 2)


@contextmanager
def running_on(threads):
    """Only the program: PyTorch's products may have other bits on other numbers of threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "threads", lambda: threads)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_as_near_to_those_of_each_row_alone_as_the_models_own(family, dtype):
    backbone = backbone_of(family, dtype)
    rows = rows_of(backbone)
    ours = stepped(backbone, rows, ["policy", "critic"]).double()

    def alone():
        with torch.no_grad():
            for role in ("policy", "critic"):
                with backbone.using(role):
                    for row, length in zip(rows, LENGTHS, strict=True):
                        yield backbone.model(input_ids=row[None]).logits[0, length:].double()

    theirs = torch.stack(list(alone())).view_as(ours)
    backbone.model.double()
    exact = torch.stack(list(alone())).view_as(ours)
    error, their_error = ((found - exact).abs().max() for found in (ours, theirs))
    assert error <= 1.5 * their_error
    assert their_error <= {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype] * exact.abs().max()


def test_a_row_has_the_same_bits_on_any_number_of_threads_and_beside_any_others():
    backbone = backbone_of("qwen3", torch.float32)
    rows = rows_of(backbone)
    found = [stepped(backbone, rows, ["policy", "critic"], threads=threads) for threads in (1, 2, 3, 2)]
    assert all(torch.equal(found[0], other) for other in found[1:])
    for kept in ([2], [3, 1], [0, 3, 2]):
        assert torch.equal(stepped(backbone, rows, ["policy", "critic"], kept=kept), found[0][:, kept])


def test_the_loop_takes_it_where_the_model_agrees_and_only_there(monkeypatch, tokenizer, capsys):  # noqa: F811
    calls = []
    monkeypatch.setattr(Program, "step", counted(Program.step, calls))
    asked, rules = prompts_of(60), {"max_new_tokens": 6, "rows_per_pass": 3}

    def tokens(backbone, engine="local"):
        calls.clear()
        torch.manual_seed(0)
        return roll_out(backbone, tokenizer, asked, engine=engine, **rules).completion_ids()

    backbone = Backbone(make_model("llama"))
    backbone.add_adapter("policy")
    whole = tokens(backbone, "transformers")
    assert tokens(backbone) == whole
    assert len(calls) > 12
    notes.forget()
    monkeypatch.setattr(trials, "CLOSE", dict.fromkeys(trials.CLOSE, 0.0))
    other = Backbone(make_model("llama"))
    other.add_adapter("policy")
    assert tokens(other) == whole
    assert len(calls) == 1
    assert "sampling by the model's own passes" in capsys.readouterr().out
    backbone = Backbone(make_model("gpt2"))
    backbone.add_adapter("policy")
    tokens(backbone)
    assert not calls


def counted(function, calls):
    def call(*args):
        calls.append(args)
        return function(*args)

    return call


def test_a_head_that_is_rotated_in_part_is_left_to_the_model():
    """Its angles are fewer than the native step would read."""
    backbone = backbone_of("llama", torch.float32)
    rotary = backbone.model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq[:3]
    with torch.no_grad(), backbone.using("policy", one_pass=True):
        cache = SlotCache(sliding_layers(backbone.model), 4)
        for block in cache.layers:
            block.begin(2, torch.zeros(1, 2, 1, 12), torch.zeros(1, 2, 1, 12))
        assert Program.of(backbone, cache, State.empty(2, torch.device("cpu")), 1) is None
