"""Rows without their padding, and what they begin with alike once: what each gives alone, for less work; and who
cannot."""

import itertools
import re
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.packing import groups_of, layout_of
from rlhf_fast.models.tiny import tiny
from tests.models.causal_models import make_causal

ROLES = ["policy", "critic"]
# (prompt, tokens behind it): three answers to one prompt, one of them a beginning of another; two to another prompt,
# one of which is empty; a row that begins with three tokens of the first prompt, and one like no other.
ROWS = [(0, 3), (0, 12), (1, 7), (0, 5), (1, 0), (2, 6), (3, 17)]


def adapted(model, **options) -> Backbone:
    backbone = Backbone(model, padding_free=options.pop("padding_free", True))
    for seed, name in enumerate(ROLES):
        backbone.add_adapter(name, rank=4, seed=seed, **options)
        with torch.no_grad():
            for parameter in backbone.parameters_of(name):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                parameter.add_(0.1 * noise)
    return backbone


def batch() -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """The rows, and (input_ids, attention_mask) with padding on the left, on the right, and on both sides."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 55, (40,), generator=generator).tolist()
    prompts = [ids[:9], ids[9:14], [*ids[:3], 60], [59]]
    rows = []
    for number, (prompt, count) in enumerate(ROWS):
        start = 20 if number in (0, 3) else 3 * number
        rows.append(prompts[prompt] + ids[start : start + count])
    width = max(map(len, rows)) + 2
    left = [i % 3 for i in range(len(rows))]
    padded = [[7] * n + row + [8] * (width - n - len(row)) for n, row in zip(left, rows, strict=True)]
    real = [[0] * n + [1] * len(row) + [0] * (width - n - len(row)) for n, row in zip(left, rows, strict=True)]
    return rows, torch.tensor(padded), torch.tensor(real)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "mistral", "opt"])
def test_log_probabilities_are_those_of_transformers_logits_of_each_row_alone(name):
    """Those that have one have a window of attention of 4 tokens."""
    rows, input_ids, real = batch()
    backbone = Backbone(make_causal(name))
    assert backbone.why_not_packed(100) is None
    hidden = backbone.hidden(input_ids, real, [None])[None]
    ours = backbone.logprobs(hidden, input_ids, real)
    model = make_causal(name)
    for row, made, own in zip(rows, ours, real.bool(), strict=True):
        logits = model(input_ids=torch.tensor([row])).logits[0, :-1]
        theirs = logits.log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        torch.testing.assert_close(made[own][1:], theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"top_layers": 2}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize(("name", "dtype"), [("gpt2", torch.float64), ("llama", torch.float32)], ids=str)
def test_states_and_gradients_are_those_of_padded_rows(name, dtype, options):
    """With and without activation checkpointing, and from the input of the first adapted layer."""
    _, input_ids, real = batch()
    weights = torch.randn(*input_ids.shape, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4

    def made(*, padding_free: bool, recompute: bool = False, lower: bool = False):
        backbone = adapted(make_causal(name).to(dtype), padding_free=padding_free, dtype=dtype, **options)
        backbone.enable_checkpointing(recompute)
        below = backbone.lower(input_ids, real) if lower else None
        hidden = backbone.hidden(input_ids, real, ROLES, lower=below)
        loss = sum(number * (hidden[role] * weights * real[..., None]).sum() for number, role in enumerate(ROLES, 1))
        parameters = [p for role in ROLES for p in backbone.parameters_of(role)]
        gradients = torch.autograd.grad(loss, parameters)
        return [*(hidden[role][real.bool()] for role in ROLES), *gradients]

    expected = made(padding_free=False)
    for how in ({}, {"recompute": True}, *([{"lower": True}] if options.get("top_layers") else [])):
        for ours, theirs in zip(made(padding_free=True, **how), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.detach().abs().max()))


def test_padding_and_repeated_beginnings_do_not_reach_the_model():
    rows, input_ids, real = batch()
    backbone = adapted(make_causal("llama"))
    seen, embeddings = [], backbone.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    backbone.hidden(input_ids, real, ["policy"])
    backbone.padding_free = False
    backbone.hidden(input_ids, real, ["policy"])
    assert seen == [sum(map(len, rows)) - 2 * 9 - 5, input_ids.numel()]


def test_rows_with_little_to_leave_out_are_not_changed():
    ids = torch.randint(5, 55, (3, 8), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids)
    real[2, 7] = 0
    assert layout_of(ids, real) is None
    real[1] = 0
    assert layout_of(ids, real) is None  # an empty row has no state


def test_no_other_groups_of_rows_leave_fewer_tokens():
    random = np.random.default_rng(0)
    for _ in range(30):
        rows = [random.integers(0, 2, random.integers(1, 12)) for _ in range(4)]
        groups = groups_of(rows)
        assert sorted(row for members, _ in groups for row in members) == list(range(4))
        for members, shared in groups:
            assert len({tuple(rows[row][:shared]) for row in members}) == 1
        left = sum(map(len, rows)) - sum(shared * (len(members) - 1) for members, shared in groups)
        assert left == min(tokens_left(rows, labels) for labels in itertools.product(range(4), repeat=4))


def tokens_left(rows, labels) -> int:
    """With the rows of equal labels in a group."""
    total = sum(map(len, rows))
    for label in set(labels):
        members = [row for row, own in zip(rows, labels, strict=True) if own == label]
        shared = next((n for n in range(min(map(len, members)), 3, -1) if len({tuple(r[:n]) for r in members}) == 1), 0)
        total -= shared * (len(members) - 1)
    return total


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale, causal, window_size, softcap
):
    """flash-attn's, as its documentation (2.8.3) has it: a query and the last key of its sequence end together."""
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    ends = [ends.tolist() for ends in (cu_seqlens_q, cu_seqlens_k)]
    assert [max(j - i for i, j in itertools.pairwise(e)) for e in ends] == [max_seqlen_q, max_seqlen_k]
    parts = []
    for (a, b), (c, d) in zip(*map(itertools.pairwise, ends), strict=True):
        query, key, value = q[a:b].transpose(0, 1), k[c:d].transpose(0, 1), v[c:d].transpose(0, 1)
        groups = len(query) // len(key)
        scores = query @ key.repeat_interleave(groups, 0).mT * (softmax_scale or q.shape[-1] ** -0.5)
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        distance = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        read = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else True)
        scores = scores.masked_fill(~read, float("-inf")).softmax(-1)
        parts.append((scores @ value.repeat_interleave(groups, 0)).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, 2.0)])
def test_flash_attn_is_given_what_each_sequence_reads(monkeypatch, window, softcap):
    """Beside our own calls: outputs and gradients, of two roles, with fewer heads of keys than of queries."""
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    _, input_ids, real = batch()
    layout, generator = layout_of(input_ids, real), torch.Generator().manual_seed(0)
    states = [
        torch.randn(2, heads, len(layout.sources), 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    how = {"scaling": 0.3, "softcap": softcap}
    made = []
    for attend in (layout.attend, layout.attend_by_flash):
        output = attend(*states, window, **how)
        weights = torch.arange(output.numel(), dtype=torch.float64).view(output.shape).sin()
        made.append([output, *torch.autograd.grad((output * weights).sum(), states)])
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # our softmax behind a cap is in fp32


def test_half_precision_and_eager_attention_are_packed_too():
    model = tiny(0, hidden_size=32, layers=2, heads=2)[0]
    assert Backbone(model.bfloat16()).why_not_packed(100) is None
    eager = tiny(0, hidden_size=32, layers=2, heads=2)[0]
    eager.set_attn_implementation("eager")
    assert Backbone(eager).why_not_packed(100) is None
    softcapped = make_causal("gemma2")
    softcapped.set_attn_implementation("eager")
    _, input_ids, real = batch()
    ours = Backbone(softcapped).hidden(input_ids, real, [None])[None]
    theirs = Backbone(softcapped, padding_free=False).hidden(input_ids, real, [None])[None]
    torch.testing.assert_close(ours[real.bool()], theirs[real.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "counts positions"), ("bloom", "counts positions"), ("lfm2_moe", "differ"), ("jamba", "differ"),
        ("gpt_oss", "its attention takes s_aux"), ("falcon", "do not take packed rows"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_packed_says_why_and_keeps_its_padding(name, reason):
    backbone = Backbone(make_causal(name))
    assert re.search(reason, backbone.why_not_packed())
    _, input_ids, real = batch()
    padded = Backbone(make_causal(name), padding_free=False).hidden(input_ids, real, [None])[None]
    assert torch.equal(backbone.hidden(input_ids, real, [None])[None], padded)


def test_a_window_that_only_a_mask_knows_bounds_the_rows():
    """Llama 4 does not tell its attention of its chunks, which the trial at the start is too short for."""
    backbone = Backbone(make_causal("llama4_text"))
    chunk = backbone.model.config.attention_chunk_size
    assert backbone.why_not_packed(chunk) is None
    reason = f"its attention reaches {chunk} tokens back, and the longest row has {chunk + 1}"
    assert backbone.why_not_packed(chunk + 1) == reason
