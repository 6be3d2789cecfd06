import contextlib

import pytest
import torch
from transformers import (
    CompileConfig,
    GenerationConfig,
    WatermarkingConfig,
)

from rlhf_fast.data.encoding import Prompt
from rlhf_fast.data.templates import TurnEnd
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.tiny import tiny
from rlhf_fast.rollout import agreement, check_sampler, roll_out, stop_ids
from rlhf_fast.rollout.completions import text_of
from tests.data.chat import tokenizer_of
from tests.models.tiny_models import CONFIGS, make_model
from tests.rollout.script import Script

EOS, PAD = 258, 256


@pytest.fixture
def backbone() -> Backbone:
    backbone = Backbone(tiny(0, hidden_size=32, layers=2, heads=2)[0])
    backbone.add_adapter("policy", rank=2, seed=0)
    return backbone


@pytest.fixture
def tokenizer():
    return tiny(0, hidden_size=32, layers=1, heads=2)[1]


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt("", [257, *text.encode()], text, {"prompt": text, "n": i}) for i, text in enumerate(texts)]


def test_a_completion_ends_with_its_first_eos_and_the_mask_marks_just_it(backbone, tokenizer):
    rollout = roll_out(
        backbone,
        tokenizer,
        prompts("a", "bcd"),
        max_new_tokens=4,
        drawing=Script([97, EOS, 98, 99], [100, 101, 102, 103]),
    )
    assert rollout.completions == ["a", "defg"]
    assert rollout.finished.tolist() == [True, False]
    batch = rollout.batch
    assert batch.input_ids.tolist() == [[257, 97, 97, EOS, *[PAD] * 4], [257, 98, 99, 100, 100, 101, 102, 103]]
    assert batch.mask.tolist() == [[0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert batch.attention_mask.sum(1).tolist() == [4, 8]


def test_a_policy_without_finite_hidden_states_is_one_line(backbone, tokenizer):
    with torch.no_grad():
        for parameter in backbone.parameters_of("policy"):
            parameter.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are not finite: a lower learning_rate"):
        roll_out(backbone, tokenizer, prompts("a"), max_new_tokens=2)


def test_an_immediate_eos_is_an_empty_completion_of_one_token(backbone, tokenizer):
    rollout = roll_out(backbone, tokenizer, prompts("a", "b"), max_new_tokens=4, drawing=Script([EOS], [EOS]))
    assert rollout.completions == ["", ""]
    assert rollout.batch.mask.sum(1).tolist() == [1, 1]


def test_a_tokenizer_whose_pad_is_eos_still_ends_completions_at_the_eos(backbone, tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    rollout = roll_out(backbone, tokenizer, prompts("a", "b"), max_new_tokens=2, drawing=Script([97, EOS], [98, 99]))
    assert rollout.batch.mask.sum(1).tolist() == [2, 2]
    assert rollout.finished.tolist() == [True, False]


def test_the_models_own_stop_tokens_stop_too(backbone, tokenizer):
    backbone.model.generation_config.eos_token_id = [10, 11]
    assert stop_ids(backbone, tokenizer) == [10, 11, EOS]


def test_left_padding_for_generation_changes_no_token(backbone, tokenizer):
    """A cold temperature makes the choice deterministic: alone and beside a longer prompt it must be the same."""
    alone = roll_out(backbone, tokenizer, prompts("ab"), max_new_tokens=5, temperature=1e-4)
    beside = roll_out(backbone, tokenizer, prompts("ab", "a much longer prompt"), max_new_tokens=5, temperature=1e-4)
    assert beside.completions[0] == alone.completions[0]


def test_it_is_the_policy_that_writes(backbone, tokenizer):
    def sample():
        torch.manual_seed(1)
        return roll_out(backbone, tokenizer, prompts("a") * 4, max_new_tokens=8).completions

    before = sample()
    with torch.no_grad():
        for parameter in backbone.parameters_of("policy"):
            parameter.add_(torch.randn(parameter.shape))
    assert sample() != before


@pytest.mark.parametrize("rule", [{}, {"top_k": 5}, {"top_p": 0.9, "temperature": 2.0}], ids=str)
def test_a_row_is_sampled_alike_alone_and_among_others(rule, backbone, tokenizer):
    texts = ("a", "longer", "bc", "d")

    def sample(*rows, **options):
        torch.manual_seed(5)
        asked = prompts(*(texts[row] for row in rows))
        return roll_out(backbone, tokenizer, asked, max_new_tokens=6, row_ids=rows, **rule, **options).completion_ids()

    whole = sample(0, 1, 2, 3)
    assert len({tuple(ids) for ids in whole}) == 4
    assert sample(3, 1) == [whole[3], whole[1]]
    assert sample(0, 1, 2, 3, rows_per_pass=1) == whole


def test_chunks_are_the_rollout_and_a_kept_one_is_not_sampled_again(backbone, tokenizer):
    """Rows end at different places, and leave; a reader of what was kept needs no model."""
    asked, made = prompts("a", "longer", "bc", "d", "ef", "ghi"), []

    def sample(**options):
        torch.manual_seed(5)
        return roll_out(backbone, tokenizer, asked, max_new_tokens=40, keep_logprobs=True, temperature=1.5, **options)

    def keep(what, make, **of_rows):
        made.append(make())
        return made[-1]

    whole, chunks = sample(), sample(chunk=3, keep=keep)
    assert len(set(whole.batch.counts.tolist())) > 1
    assert chunks.completion_ids() == whole.completion_ids()
    assert chunks.finished.tolist() == whole.finished.tolist()
    torch.testing.assert_close(chunks.sampler.logprobs, whole.sampler.logprobs, rtol=1e-4, atol=1e-5)
    assert len(made) > 1
    assert all(part["tokens"].shape[1] <= 3 for part in made)
    kept, backbone.model.forward = iter(made), None
    again = sample(chunk=3, keep=lambda what, make, **of_rows: next(kept))
    assert again.completion_ids() == chunks.completion_ids()
    assert torch.equal(again.sampler.logprobs, chunks.sampler.logprobs)


def test_passes_of_few_rows_keep_the_order(backbone, tokenizer):
    texts = ["a", "bb", "ccc", "d", "e"]
    whole = roll_out(backbone, tokenizer, prompts(*texts), max_new_tokens=3, temperature=1e-4)
    parts = roll_out(backbone, tokenizer, prompts(*texts), max_new_tokens=3, temperature=1e-4, rows_per_pass=2)
    assert parts.completions == whole.completions
    assert parts.columns() == {"n": [0, 1, 2, 3, 4]}


def test_columns_of_a_batch_are_those_of_any_of_its_rows(backbone, tokenizer):
    asked = prompts("a", "b")
    asked[0].columns.pop("n")
    asked[1].columns["tag"] = "x"
    assert roll_out(backbone, tokenizer, asked, max_new_tokens=1).columns() == {"n": [None, 1], "tag": [None, "x"]}


# A value of every field of transformers' GenerationConfig that changes what `generate` samples, or fails.
NASTY = {
    "max_length": 3, "max_new_tokens": 1, "min_length": 40, "min_new_tokens": 6, "early_stopping": True,
    "max_time": 0.0,
    "stop_strings": ["a", "e"], "do_sample": False, "num_beams": 3, "use_mtp": True, "use_cache": False,
    "cache_implementation": "static", "max_cache_len": 1, "cache_config": {"backend": "none"},
    "temperature": 0.2, "top_k": 1,
    "top_p": 0.1, "min_p": 0.9, "top_h": 0.1, "typical_p": 0.1, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5,
    "repetition_penalty": 5.0, "encoder_repetition_penalty": 5.0, "length_penalty": -3.0, "no_repeat_ngram_size": 1,
    "bad_words_ids": [[i] for i in range(200)], "renormalize_logits": True, "forced_bos_token_id": 5,
    "forced_eos_token_id": 5, "remove_invalid_values": True, "exponential_decay_length_penalty": (0, 9.0),
    "suppress_tokens": list(range(200)), "begin_suppress_tokens": list(range(200)),
    "sequence_bias": {(7,): 50.0}, "token_healing": True, "guidance_scale": 4.0,
    "watermarking_config": WatermarkingConfig(bias=50.0), "num_return_sequences": 3, "output_attentions": True,
    "output_hidden_states": True, "output_scores": True, "output_logits": True, "return_dict_in_generate": True,
    "pad_token_id": 5, "bos_token_id": 5, "encoder_no_repeat_ngram_size": 1, "decoder_start_token_id": 5,
    "is_assistant": True, "num_assistant_tokens": 4, "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.9, "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1,
    "assistant_early_exit": 1, "assistant_lookbehind": 3, "target_lookbehind": 3, "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash", "compile_config": CompileConfig(backend="nonesuch"), "disable_compile": False,
    "continuous_batching_config": {"max_batch_tokens": 1}, "low_memory": True, "penalty_alpha": 0.9,
    "dola_layers": "low",
    "diversity_penalty": 3.0, "num_beam_groups": 3, "constraints": ["x"], "force_words_ids": [[7]],
    "prefill_chunk_size": 1, "trust_remote_code": True, "custom_generate": "somebody/code",
}  # fmt: skip
STOPS_ALONE = {"eos_token_id"}


def test_every_field_of_the_installed_generation_config_has_a_nasty_value_here():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    assert fields - STOPS_ALONE <= NASTY.keys()


@pytest.mark.parametrize("name", NASTY)
def test_no_field_of_the_checkpoint_but_its_stop_ids_changes_a_sample(name, backbone, tokenizer):
    def sample():
        torch.manual_seed(1)
        return roll_out(backbone, tokenizer, prompts("a", "bcd"), max_new_tokens=5).batch.input_ids.tolist()

    plain, own = sample(), backbone.model.generation_config
    setattr(own, name, NASTY[name])
    with contextlib.suppress(ValueError, AttributeError, TypeError):  # where a config refuses it, nothing can leak
        setattr(backbone.model.config, name, NASTY[name])
    assert sample() == plain
    assert backbone.model.generation_config is own
    assert getattr(own, name) is NASTY[name]


def test_the_frequencies_of_sampled_tokens_are_the_probabilities_of_the_models_logits(backbone, tokenizer):
    """Everything nasty at once, against transformers' own logits; chi-squared over the tokens that are expected."""
    with torch.no_grad():
        backbone.model.get_input_embeddings().weight.mul_(3)
    for name, value in NASTY.items():
        setattr(backbone.model.generation_config, name, value)
    count, temperature = 6000, 0.7
    torch.manual_seed(0)
    rollout = roll_out(
        backbone, tokenizer, prompts("a") * count, max_new_tokens=1, temperature=temperature, keep_logprobs=True
    )
    logits = backbone.model(input_ids=torch.tensor([[257, 97]])).logits[0, -1] / temperature
    probabilities = logits.detach().double().softmax(0)
    frequent = probabilities * count >= 5
    seen = rollout.batch.input_ids[:, -1].bincount(minlength=len(logits)).double()
    bins = torch.cat([probabilities[frequent], probabilities[~frequent].sum()[None]]) * count
    found = torch.cat([seen[frequent], seen[~frequent].sum()[None]])
    statistic, degrees = float(((found - bins) ** 2 / bins).sum()), len(bins) - 1
    assert degrees > 10
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5
    expected = probabilities.log()[rollout.batch.input_ids[:, -1]].float()
    torch.testing.assert_close(rollout.sampler.logprobs[:, -1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3, "temperature": 0.5}, {"top_p": 0.4}, {"rows_per_pass": 2}], ids=str
)
def test_the_samplers_logprobs_are_those_of_the_models_logits_before_any_truncation(options, backbone, tokenizer):
    rollout = roll_out(backbone, tokenizer, prompts("a", "bcd", "ef"), max_new_tokens=6, keep_logprobs=True, **options)
    batch = rollout.batch
    with backbone.using("policy"):
        logits = backbone.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logprobs = (logits / options.get("temperature", 1.0)).log_softmax(-1)[:, :-1]
    expected = torch.nn.functional.pad(logprobs.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1), (1, 0))
    torch.testing.assert_close(rollout.sampler.logprobs, (expected * batch.mask).detach(), rtol=1e-4, atol=1e-5)
    assert agreement(backbone, batch, rollout.sampler, options.get("temperature", 1.0)).holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_honest_models_sample_what_they_are_scored_by(family, dtype):
    honest = Backbone(make_model(family).to(dtype))
    torch.manual_seed(0)
    found = check_sampler(honest, [[5, 6, 7], [*range(3, 20)]], pad=0, temperature=0.8)
    assert found.holds, found
    assert found.sampled == pytest.approx(found.scored, abs=found.bar)


def unsafe_under_padding(model):
    """A model that reads its padding, as recurrent ones do."""
    forward = model.forward
    model.forward = lambda *args, attention_mask=None, **rest: forward(*args, **rest)


def bends_its_logits(model):
    """A model that scales its logits in a way that scoring does not know."""
    forward = model.forward

    def scaled(*args, **rest):
        output = forward(*args, **rest)
        output.logits = output.logits * 1.1
        return output

    model.forward = scaled


@pytest.mark.parametrize("fault", [unsafe_under_padding, bends_its_logits])
def test_a_model_that_samples_from_another_distribution_is_found(fault):
    model = make_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
        model.get_input_embeddings().weight.mul_(20)
    backbone = Backbone(model)  # which tries the model, and is right about it
    fault(model)
    torch.manual_seed(0)
    found = check_sampler(backbone, [[5, 6, 7], [*range(3, 20)]], pad=0, temperature=0.8, new_tokens=8)
    assert not found.holds, found
    assert str(found).startswith("mean log-probability of the sampled tokens: -")


def test_what_a_closed_turn_has_besides_is_read_and_never_learnt(backbone, tokenizer):
    """<|im_end|>\\n: a model stops at the token, and a reward model reads its score at the line break."""
    end = TurnEnd("*\n", "*", (42, 10), 42)
    asked = [Prompt("", [257, 97], "a", {"prompt": "a"}, end)] * 3
    backbone.add_head("reward")
    rollout = roll_out(
        backbone, tokenizer, asked, max_new_tokens=3, drawing=Script([98, 42, 99], [98, 99, 100], [98, EOS, 99])
    )
    assert rollout.finished.tolist() == [True, False, True]
    assert rollout.completions == ["b", "bcd", "b"]
    rows = [[257, 97, 98, 42, 10], [257, 97, 98, 99, 100, 42, 10], [257, 97, 98, EOS, 42, 10]]
    assert [r[: len(row)] for r, row in zip(rollout.batch.input_ids.tolist(), rows, strict=True)] == rows
    assert rollout.batch.attention_mask.sum(1).tolist() == [5, 7, 6]
    assert rollout.batch.mask.sum(1).tolist() == [2, 3, 2]
    assert rollout.batch.mask[:, :2].sum() == 0
    assert stop_ids(backbone, tokenizer, asked) == [42, EOS]


def test_a_completion_keeps_the_space_that_it_begins_with():
    """A SentencePiece tokenizer drops the first space of a text, which this one is not the start of."""
    tokenizer = tokenizer_of("llama")
    ids = tokenizer("hello world")["input_ids"]
    start = len(tokenizer("hello")["input_ids"])
    assert text_of(tokenizer, Prompt("", ids[:start], "hello", {}), ids[start:], stops=()) == " world"


def test_padding_is_an_id_of_the_model(backbone, tokenizer):
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert tokenizer.pad_token_id >= backbone.model.get_input_embeddings().num_embeddings
    roll_out(backbone, tokenizer, prompts("a", "bcd"), max_new_tokens=2)
