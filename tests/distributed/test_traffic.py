"""The formulas of docs/scale.md are what collectives are seen to carry."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.scale import (
    MODELS,
    Model,
    backward_bytes,
    forward_bytes,
    gradient_bytes,
    held_bytes,
    layered_rollout_bytes,
    scale_bytes,
    whole_rollout_bytes,
)
from rlhf_fast.data.batches import pad_batch
from rlhf_fast.data.encoding import Example
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.loading import load_model
from rlhf_fast.models.sharding import Shards
from rlhf_fast.rollout.drawing import Drawing
from rlhf_fast.rollout.engines import sample_rows
from rlhf_fast.rollout.rows import Row
from rlhf_fast.training import ranks
from tests.models.tiny_models import VOCAB, add_roles, make_batch, make_model

LLAMA = Model("tiny", 4, 32, 48, 4, 2, 8, VOCAB, bytes=4)
GATHERS = {"c10d._allgather_base_.default": 0, "_c10d_functional.all_gather_into_tensor.default": None}
WITHOUT_BYTES = ("wait_tensor", "_wrap_tensor_autograd")


class Traffic(TorchDispatchMode):
    """Bytes of the results of collectives, by kind. AssertionError for a kind that it does not know."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and not any(name in str(func) for name in WITHOUT_BYTES):
            if str(func) == "c10d.allgather_.default":
                self.bytes["gather"] += sum(tensor.nbytes for tensors in args[0] for tensor in tensors)
            elif str(func) in GATHERS:
                place = GATHERS[str(func)]
                self.bytes["gather"] += (result if place is None else args[place]).nbytes
            else:
                assert str(func) == "c10d.allreduce_.default", func
                self.bytes["reduce"] += sum(tensor.nbytes for tensor in args[0])
        return result

    def of(self, work):
        """(bytes gathered, bytes reduced) of what `work` does, and what that gives."""
        self.bytes.clear()
        with self:
            result = work()
        return (self.bytes["gather"], self.bytes["reduce"]), result


def count(top_layers, recompute):
    with ranks.processes():
        backbone = Backbone(make_model("llama"), Shards(ranks.world(), torch.device("cpu")))
        add_roles(backbone, top_layers).enable_checkpointing(recompute)
        input_ids, mask = make_batch()
        traffic, found = Traffic(), {}
        backbone.lower(input_ids, mask)  # tries once whether the layers below the adapters may run alone

        def forward():
            hidden = backbone.hidden(input_ids, mask, ["policy", "critic"], lower=lower)
            logprobs = backbone.logprobs(hidden["policy"], input_ids, mask)
            return logprobs.sum() + backbone.values("critic", hidden["critic"]).sum()

        found["lower"], lower = traffic.of(lambda: backbone.lower(input_ids, mask))
        found["score"], _ = traffic.of(lambda: backbone.score(input_ids, mask, mask, lower=lower, ranks=True))
        found["forward"], loss = traffic.of(forward)
        found["backward"], _ = traffic.of(loss.backward)
        found["gradients"], _ = traffic.of(lambda: ranks.sum_gradients(backbone.parameters_of("policy")))
        return found


@pytest.mark.parametrize(
    ("processes", "top_layers", "recompute"), [("two", 4, False), ("two", 2, True), ("four", 4, True)]
)
def test_a_step_carries_what_the_formulas_say(request, processes, top_layers, recompute):
    running = request.getfixturevalue(processes)
    n, embedding = running.count, forward_bytes(LLAMA, running.count) - backward_bytes(LLAMA, running.count)
    lower = 0 if top_layers == 4 else backward_bytes(LLAMA, n, 4 - top_layers) + embedding // 2
    upper = backward_bytes(LLAMA, n, top_layers) + embedding
    expected = {
        "lower": (lower, 0),
        "score": (upper, 0),
        "forward": (upper, 0),
        "backward": (backward_bytes(LLAMA, n, top_layers), 0),
        "gradients": (0, gradient_bytes(LLAMA, 4, top_layers)),
    }
    if top_layers == 4:
        assert upper == forward_bytes(LLAMA, n)
    assert running.run(count, top_layers, recompute) == [expected] * n


def count_rollout(whole_rollouts, tokens):
    """Bytes of a rollout in which the processes have completions of other lengths."""
    with ranks.processes():
        shards = Shards(ranks.world(), torch.device("cpu"), whole_rollouts=whole_rollouts)
        backbone = Backbone(make_model("llama"), shards)
        own = tokens - 2 * ranks.rank()

        def sample():
            with backbone.sampling() as in_step:
                rows = [Row(0, [3, 4, 5], 0, own)]
                sample_rows(backbone, Drawing([None], 1.0, 0, 1.0), rows, own, stops=(), pad=0, in_step=in_step)

        return Traffic().of(sample)[0]


def test_a_rollout_carries_a_copy_of_the_weights_or_one_for_each_token_of_the_longest_completion(two):
    whole = two.run(count_rollout, True, 7)
    assert whole == [(whole_rollout_bytes(LLAMA, 2), 0)] * 2
    layered = two.run(count_rollout, False, 7)
    flags = (7 + 1) * 4  # whether a process still samples, asked before each token and behind the last
    assert layered == [(layered_rollout_bytes(LLAMA, 2, 7), flags)] * 2


def count_completions(count, tokens):
    """Of an experience of rows that have so many tokens, with what its scores are."""
    with ranks.processes():
        example = Example([1] * tokens, 1)
        batch = pad_batch([example] * count, 0)
        numbers = [torch.zeros(count, tokens) for _ in range(2)]
        return Traffic().of(lambda: ranks.all_gather_objects((batch.packed(), numbers)))[0][0]


def test_a_token_of_a_completion_travels_in_6_bytes_and_4_for_each_number_of_it(two):
    short, long = (two.run(count_completions, 3, tokens)[0] for tokens in (300, 800))
    assert 0 <= (long - short) - 2 * 3 * 500 * (6 + 2 * 4) < 100  # the numbers of the shapes are pickled too


def count_packed(folder):
    with ranks.processes():
        shards = Shards(ranks.world(), torch.device("cpu"))
        backbone = Backbone(
            shards.load(lambda device: load_model(folder, dtype=torch.float32, device=device, quantization="nf4")),
            shards,
        )
        input_ids, mask = make_batch()
        return Traffic().of(lambda: backbone.logprobs(backbone.hidden(input_ids, mask, [None])[None], input_ids, mask))[
            0
        ]


def test_packed_weights_travel_packed(two, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install rlhf_fast[quant]")
    make_model("llama").save_pretrained(tmp_path)
    assert two.run(count_packed, str(tmp_path)) == [(forward_bytes(LLAMA._replace(nf4=True), 2), 0)] * 2


def test_models_of_the_page_have_the_sizes_of_their_names():
    for model in MODELS:
        assert round(model.parameters / 1e9) in (8, 71, 406)
        assert held_bytes(model, 1) >= forward_bytes(model, 1) + scale_bytes(model)
    assert LLAMA.parameters == sum(p.numel() for p in make_model("llama").parameters())
    backbone = Backbone(make_model("llama"))
    backbone.add_adapter("policy", rank=4)
    assert LLAMA.adapter(4) == sum(p.numel() for p in backbone.parameters_of("policy"))
