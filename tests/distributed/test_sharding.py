"""A model whose frozen weights are split over processes computes what a whole one does, on rows that differ."""

import weakref
from unittest.mock import patch

import pytest
import torch
from torch.distributed.tensor import DTensor

from rlhf_fast import rollout
from rlhf_fast.data.encoding import Prompt
from rlhf_fast.errors import UserError
from rlhf_fast.models import sharding
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.loading import load_model
from rlhf_fast.models.sharding import Shards
from rlhf_fast.models.tiny import tiny
from rlhf_fast.rewards.speakers import LocalSpeaker
from rlhf_fast.training import ranks
from tests.distributed.cases import STEADY
from tests.distributed.runs import assert_same_run, run
from tests.models.causal_models import make_causal
from tests.models.tiny_models import add_roles, make_batch, make_model, scramble
from tests.training.tiny_runs import values_of

CPU = torch.device("cpu")


def pieces(model, count=2, **options):
    return Backbone(model, Shards(count, CPU, **options))


def rows_of_this_process():
    """(3, 7) or (2, 5): neither as many nor as long in both."""
    input_ids, mask = make_batch()
    return (input_ids, mask) if ranks.is_first() else (input_ids[:2, 2:], mask[:2, 2:])


def results(backbone, *, recompute=False):
    """Scores without gradients; losses of two roles from a pass each, whose backwards come in the order of the
    forwards, behind a pass without gradients; and all gradients."""
    backbone.enable_checkpointing(recompute)
    input_ids, mask = rows_of_this_process()
    scores = backbone.score(input_ids, mask, mask, ranks=True)
    states = {role: backbone.hidden(input_ids, mask, [role])[role] for role in ("policy", "critic")}
    logprobs, entropy = backbone.logprobs(states["policy"], input_ids, mask, return_entropy=True)
    loss = (logprobs * torch.linspace(-1, 1, logprobs.numel()).view(logprobs.shape)).sum() + entropy.square().sum()
    value_loss = backbone.values("critic", states["critic"]).square().sum()
    with torch.no_grad():
        reward = backbone.scores("reward", backbone.hidden(input_ids, mask, ["reward"])["reward"], mask)
    loss.backward()
    value_loss.backward()
    found = {"loss": loss.detach(), "value loss": value_loss.detach(), "reward": reward, "ranks": scores.ref_ranks}
    found |= {"logprobs": scores.logprobs, "ref_logprobs": scores.ref_logprobs, "values": scores.values}
    found |= {f"hidden states of {role}": hidden.detach() for role, hidden in states.items()}
    for role in states:
        found |= {f"gradient of {role} {name}": p.grad for name, p in backbone.named_parameters_of(role).items()}
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def compare(family, top_layers, recompute, count=2):
    with ranks.processes():
        whole, split = Backbone(make_model(family)), pieces(make_model(family), count)
        for backbone in (whole, split):
            add_roles(backbone, top_layers)
        expected = results(whole, recompute=recompute)
        assert_same(results(split, recompute=recompute), expected)
        return whole.bytes()["base"], split.bytes()["base"]


@pytest.mark.parametrize(
    ("family", "top_layers", "recompute"),
    [("llama", None, False), ("llama", 2, True), ("qwen2", None, True), ("gemma", 2, False), ("gpt2", None, True)],
)
def test_scores_losses_and_gradients_are_those_of_the_whole_model(two, family, top_layers, recompute):
    sizes = two.run(compare, family, top_layers, recompute)
    assert all(0.49 * whole < own < 0.51 * whole for whole, own in sizes)


def test_each_node_may_hold_a_copy_of_its_own(four):
    """Two copies of two pieces: processes 0 and 1, 2 and 3."""
    sizes = four.run(compare, "llama", None, False)
    assert all(0.49 * whole < own < 0.51 * whole for whole, own in sizes)


def whole_layers_at_a_time():
    """How many layers are whole inside of each layer's forward, and of its backward."""
    with ranks.processes():
        backbone = pieces(make_model("llama"))
        backbone.add_adapter("policy", rank=2)
        layers, found = backbone.model.model.layers, {"forward": [], "backward": []}

        def whole():
            return sum(not isinstance(layer.mlp.up_proj.weight, DTensor) for layer in layers)

        def watch(module, inputs, output):
            found["forward"].append(whole())
            output.register_hook(lambda gradient: found["backward"].append(whole()))

        for layer in layers:
            layer.mlp.register_forward_hook(watch)
        input_ids, mask = rows_of_this_process()
        backbone.hidden(input_ids, mask, ["policy"])["policy"].sum().backward()
        return found, whole()


def test_the_layer_that_runs_is_the_only_whole_one(two):
    assert two.run(whole_layers_at_a_time) == [({"forward": [1, 1, 1, 1], "backward": [1, 1, 1, 1]}, 0)] * 2


def compare_dora():
    with ranks.processes():
        found = []
        for backbone in (Backbone(make_model("llama")), pieces(make_model("llama"))):
            backbone.add_adapter("policy", use_dora=True, seed=1)
            scramble(backbone, "policy")
            input_ids, mask = rows_of_this_process()
            backbone.hidden(input_ids, mask, ["policy"])["policy"].square().sum().backward()
            found.append({name: p.grad for name, p in backbone.named_parameters_of("policy").items()})
        assert_same(found[1], found[0])


def test_dora_magnitudes_start_from_the_rows_of_whole_weights(two):
    two.run(compare_dora)


def sample(whole_rollouts, rows_per_pass):
    """In each process other prompts, other lengths, and another number of passes."""
    with ranks.processes():
        found = []
        for split in (False, True):
            model, tokenizer = tiny(0, hidden_size=32, layers=2, heads=2)
            backbone = pieces(model, whole_rollouts=whole_rollouts) if split else Backbone(model)
            backbone.add_adapter("policy", seed=0)
            scramble(backbone, "policy")
            torch.manual_seed(ranks.rank())
            prompts = [Prompt("a", [257, 65, 66 + i][: 2 + i % 2], {}, "a row") for i in range(2 + ranks.rank())]
            sampled = rollout.roll_out(
                backbone, tokenizer, prompts, max_new_tokens=4 + 5 * ranks.rank(), rows_per_pass=rows_per_pass,
                keep_logprobs=True,
            )  # fmt: skip
            found.append((sampled.completion_ids(), sampled.sampler.logprobs))
        assert found[0][0] == found[1][0]
        torch.testing.assert_close(found[0][1], found[1][1])
        return backbone.bytes()["base"]


@pytest.mark.parametrize("whole_rollouts", [True, False])
def test_completions_are_those_of_the_whole_model(two, whole_rollouts):
    sizes = two.run(sample, whole_rollouts, 2)
    assert sizes == two.run(sample, not whole_rollouts, None)  # nothing whole is left behind


def load(folder, dtype, quantization):
    """(calls of the loader, bytes of the base) here, and whether the results are those of the whole model."""
    with ranks.processes():
        calls = []

        def load_here(device):
            calls.append(device)
            return load_model(folder, dtype=dtype, device=device, quantization=quantization)

        shards = Shards(2, CPU)
        split = Backbone(shards.load(load_here), shards)
        called, whole = len(calls), Backbone(load_here(CPU))
        found = []
        for backbone in (split, whole):
            backbone.add_adapter("policy", rank=2, seed=0)
            scramble(backbone, "policy")
            input_ids, mask = rows_of_this_process()
            hidden = backbone.hidden(input_ids, mask, ["policy"])["policy"]
            hidden.float().square().sum().backward()
            gradients = {name: p.grad for name, p in backbone.named_parameters_of("policy").items()}
            found.append({"hidden": hidden.detach(), **gradients})
        assert_same(found[0], found[1])
        return called, split.bytes()["base"] / whole.bytes()["base"]


def test_the_first_process_reads_a_model_and_sends_the_others_their_pieces(two, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    (first, own), (second, other) = two.run(load, str(tmp_path), torch.bfloat16, None)
    assert (first, second) == (1, 0)
    assert own + other == pytest.approx(1, abs=0.01)


def whole_layers_while_split(folder):
    """How many weights of earlier layers are still whole when one is split."""
    split, alive, whole = sharding.fully_shard, [], []

    def watch(unit, **options):
        alive.append(sum(weight() is not None for weight in whole))
        whole.extend(weakref.ref(weight) for weight in unit.parameters() if not isinstance(weight, DTensor))
        return split(unit, **options)

    with ranks.processes(), patch.object(sharding, "fully_shard", watch):
        shards = Shards(2, CPU)
        Backbone(shards.load(lambda device: load_model(folder, dtype=torch.float32, device=device)), shards)
    return alive, len(whole)


def test_one_layer_is_whole_at_a_time_while_pieces_are_sent(two, tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    weights = len(list(model.model.layers.parameters()))
    assert two.run(whole_layers_while_split, str(tmp_path)) == [([0] * 5, weights)] * 2  # layers, and the model


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_weights_are_split_as_they_are_packed(two, tmp_path, quantization):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install rlhf_fast[quant]")
    make_model("llama").save_pretrained(tmp_path)
    found = two.run(load, str(tmp_path), torch.float32, quantization)
    assert all(called >= 1 for called, _ in found)
    assert all(share < 0.8 for _, share in found)  # the scales stay whole, and weigh much in so small a model


def why_not(count, path):
    with ranks.processes(), pytest.raises(UserError) as error:
        Shards(count, CPU).load(lambda device: load_model(path, dtype=torch.float32, device=device))
    return str(error.value)


def test_what_cannot_be_split_is_said_in_every_process(two):
    with pytest.raises(UserError, match="shards must divide the number of processes, 1, got 2"):
        Shards(2, CPU)
    assert two.run(why_not, 3, "") == ["shards must divide the number of processes, 2, got 3"] * 2
    assert two.run(why_not, 2, "/nowhere") == ["model /nowhere cannot be loaded: there is no such folder"] * 2


def why_no_backbone(kind):
    with ranks.processes(), pytest.raises(UserError) as error:
        Backbone(make_causal(kind), Shards(ranks.world(), CPU))
    return str(error.value)


def test_a_model_that_reads_a_part_of_a_weight_as_if_it_were_whole_is_refused_with_why(two):
    why = "it reads the weight of an embedding itself, of which each process holds but a part: shards must be 1"
    assert two.run(why_no_backbone, "gemma4") == [f"unsupported architecture Gemma4ForConditionalGeneration: {why}"] * 2


RUNS = {
    "sft": {"gradient_checkpointing": True},
    "grpo": {},
    "ppo": {"whole_rollouts": False, "micro_batch_size": 1, "top_layers": 1, "best_by": "reward", "eval_every": 1},
    "dpo": {},
}


@pytest.mark.parametrize("algorithm", RUNS)
def test_a_run_with_split_weights_is_that_of_one_process(two, tmp_path, algorithm):
    values = values_of(algorithm, **STEADY, **RUNS[algorithm])
    run({**values, "output_dir": str(tmp_path / "one")})
    two.run(run, {**values, "shards": 2, "output_dir": str(tmp_path / "two")})
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_a_run_goes_on_with_its_weights_in_other_pieces(two, four, tmp_path):
    values = values_of("ppo", **STEADY, lora_dropout=0.0)
    run({**values, "output_dir": str(tmp_path / "one")})
    changing = {**values, "output_dir": str(tmp_path / "changing")}
    two.run(run, {**changing, "steps": 1, "shards": 2})
    run({**changing, "steps": 2}, "auto")
    four.run(run, {**changing, "shards": 2, "whole_rollouts": True}, "auto")
    assert_same_run(tmp_path / "changing", tmp_path / "one")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"lora_rank": 0}, "lora_rank 0 trains every weight; shards 2 splits a frozen model"),
        ({"trust_remote_code": True}, "trust_remote_code: shards 2 splits models of transformers' own code"),
    ],
)
def test_what_shards_do_not_go_with_is_said(tmp_path, changes, error):
    with pytest.raises(UserError, match=error):
        run(values_of("sft", shards=2, output_dir=str(tmp_path), **changes))


def ask():
    with ranks.processes(), pytest.raises(UserError, match=r"split over processes \(shards\) cannot judge"):
        LocalSpeaker(pieces(make_model("llama")), None)


def test_a_model_in_pieces_does_not_judge(two):
    two.run(ask)
