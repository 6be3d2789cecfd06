"""Steps for CUDA graphs: what they sample, and that nothing in them asks the host, which a capture would refuse."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Qwen2Config

from rlhf_fast.data import notes
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.rollout import decoder, graphs, trials
from tests.models.tiny_models import CONFIGS, make_model
from tests.rollout.test_decoder import check_against_generate, prompts_of, roles, sampled, tokenizer  # noqa: F401
from tests.rollout.test_program import SIZES

TWO_KINDS = {
    "qwen2, two kinds of layers": lambda: Qwen2Config(
        **{**SIZES, "head_dim": 8, "hidden_size": 48},
        use_sliding_window=True, sliding_window=4, max_window_layers=1,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, sliding_window=4, layer_types=["sliding_attention"] * 2 + ["full_attention"]
    ),
}  # fmt: skip


class NoHost(TorchDispatchMode):
    """Refuses what needs a number of the device on the host, or gives a tensor whose shape depends on one, or one that
    comes from the host."""

    REFUSED = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "lift_fresh")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in self.REFUSED or any(index is not None and index.dtype == torch.bool for index in masks):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def captured(monkeypatch):
    """Graphs on the CPU: capturing is a look at all that is called, replaying is to call it again. Gives one each."""
    made = []

    def stand_in(make):
        made.append(1)
        first = [True]

        def replay():
            if not first[0]:
                return make()
            first[0] = False
            with NoHost():
                return make()

        return replay

    monkeypatch.setattr(graphs, "is_usable", lambda model: model._supports_sdpa)
    monkeypatch.setattr(graphs, "captured", stand_in)
    monkeypatch.setattr(graphs, "COLUMNS", 8)
    monkeypatch.setattr(decoder, "lag", lambda device: 1)
    return made


@pytest.mark.parametrize("family", [*CONFIGS, *TWO_KINDS])
def test_every_family_gets_the_tokens_of_transformers_generate(family, tokenizer, captured, capsys):  # noqa: F811
    torch.manual_seed(0)
    notes.forget()
    model = AutoModelForCausalLM.from_config(TWO_KINDS[family]()) if family in TWO_KINDS else make_model(family)
    backbone = Backbone(model)
    backbone.add_adapter("policy")
    check_against_generate(backbone, tokenizer, max_new_tokens=12)
    assert "sampling" not in capsys.readouterr().out
    assert (len(captured) > 2) == model._supports_sdpa


@pytest.mark.parametrize("slots", [1, 2, 5, 64])
@pytest.mark.parametrize("mixture", [0.0, 0.4])
def test_no_number_of_slots_changes_what_is_sampled(mixture, slots, roles, captured):  # noqa: F811
    backbone, tokenizer = roles  # noqa: F811
    rules = {"max_new_tokens": 24, "temperature": 1.3, "mixture": mixture}
    asked = prompts_of(250, repeated=3)
    whole = sampled(backbone, tokenizer, asked, engine="transformers", **rules)
    parts = sampled(backbone, tokenizer, asked, rows_per_pass=slots, **rules)
    assert parts.completion_ids() == whole.completion_ids()
    assert parts.finished.tolist() == whole.finished.tolist()
    torch.testing.assert_close(parts.sampler.logprobs, whole.sampler.logprobs, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_captured_or_differs_is_said_and_samples_the_same(roles, captured, monkeypatch, capsys):  # noqa: F811
    backbone, tokenizer = roles  # noqa: F811
    asked, rules = prompts_of(250), {"max_new_tokens": 9, "temperature": 1.3}
    whole = sampled(backbone, tokenizer, asked, engine="transformers", **rules).completion_ids()

    def refused(make):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(graphs, "captured", refused)
        assert sampled(backbone, tokenizer, asked, **rules).completion_ids() == whole
    assert "sampling without CUDA graphs: operation not permitted when stream is capturing\n" in capsys.readouterr().out
    monkeypatch.setattr(graphs.Graphs, "trials", trials.Trials("a step"))
    monkeypatch.setattr(trials, "CLOSE", dict.fromkeys(trials.CLOSE, 0.0))
    assert sampled(backbone, tokenizer, asked, **rules).completion_ids() == whole
    assert "sampling by the model's own passes: a step gave logits that differ" in capsys.readouterr().out
