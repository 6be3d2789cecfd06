"""torchtune's RLHF functions beside ours: values, gradients, types and edges; patch and unpatch."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

from rlhf_fast.integrations import patched
from rlhf_fast.integrations import torchtune as ours
from tests.integrations.parity import DTYPES, assert_parity, draw, evaluate, ragged

pytest.importorskip("torchtune", reason="needs torchtune (make peers)")

import torchtune.rlhf.loss
from torchtune import rlhf

B, T, V = 5, 9, 23
MASK = ragged(B, T)
OTHER_MASK = ragged(B, T + 1)[:, 1:]


def tokens(count: int, dtype: torch.dtype, scale: float = 1.0):
    return [draw(B, T, seed=k, scale=scale).to(dtype) for k in range(count)]


# --- Losses ----------------------------------------------------------------------------------------------------------


def ppo_losses(masks=(None, None), **options):
    """torchtune's arguments with the two that have a gradient first; ours, then torchtune's."""

    def call(loss):
        return lambda new, values, old, advantages, old_values, returns: loss(
            old, new, advantages, old_values, values, returns, *masks
        )

    return [call(module.PPOLoss(**options)) for module in (ours, torchtune.rlhf.loss)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masks", [(None, None), (MASK, None), (None, MASK), (MASK, OTHER_MASK)])
@pytest.mark.parametrize(
    "options", [{}, {"epsilon": 0.3, "value_clip_range": 0.4, "value_coeff": 0.7}, {"epsilon": 2.0}]
)
def test_ppo_loss_is_that_of_torchtune(dtype, masks, options):
    assert_parity(*ppo_losses(masks, **options), tokens(6, dtype, 0.4), 2)


@pytest.mark.parametrize("view", [lambda x: x.T, lambda x: x[:1, :1]], ids=["strided", "one token"])
def test_ppo_loss_of_other_layouts_is_that_of_torchtune(view):
    assert_parity(*ppo_losses((view(MASK), view(MASK))), [view(x) for x in tokens(6, torch.float32, 0.4)], 2)


def test_ppo_loss_without_a_token_is_zero_and_connected():
    nothing = torch.zeros(B, T, dtype=torch.bool)
    losses = ppo_losses((nothing, nothing))
    assert_parity(*losses, tokens(6, torch.float32), 2)
    assert evaluate(losses[0], tokens(6, torch.float32), 2)[0] == 0


def test_what_is_behind_the_mask_is_not_looked_at():
    inputs = tokens(6, torch.float32)
    poisoned = [x.masked_fill(~MASK, math.nan) for x in inputs]
    loss = ppo_losses((MASK, MASK))[0]
    got, expected = (evaluate(lambda *x: loss(*x)[:3], x, 2) for x in (poisoned, inputs))
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [("DPOLoss", {}), ("DPOLoss", {"beta": 0.5, "label_smoothing": 0.2}), ("RSOLoss", {}), ("RSOLoss", {"gamma": 0.3})],
)
def test_preference_losses_are_those_of_torchtune(dtype, name, options):
    calls = [getattr(module, name)(**options) for module in (ours, torchtune.rlhf.loss)]
    assert_parity(*calls, [draw(6, seed=k, scale=9.0).to(dtype) - 40 for k in range(4)], 2)


# --- Advantages and rewards ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 1.0), (0.9, 0.0)])
def test_estimate_advantages_is_that_of_torchtune(dtype, mask, gamma, lam):
    calls = [
        lambda v, r, module=module: module.estimate_advantages(v, r, gamma, lam, mask) for module in (ours, rlhf)
    ]  # fmt: skip
    assert_parity(*calls, tokens(2, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("places", [None, torch.tensor([0, 8, 3, 5, 1])], ids=["last", "given"])
def test_get_rewards_ppo_is_that_of_torchtune(dtype, places):
    calls = [lambda *x, module=module: module.get_rewards_ppo(*x, 0.3, places) for module in (ours, rlhf)]
    assert_parity(*calls, [draw(B).to(dtype), *tokens(2, dtype)], 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_is_that_of_torchtune_also_behind_the_mask(dtype, mask, shift_mean):
    calls = [lambda x, module=module: module.whiten(x, mask, shift_mean) for module in (ours, rlhf)]
    assert_parity(*calls, [3 + x for x in tokens(1, dtype)])


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
def test_integers_have_the_advantages_that_torchtune_gives_them(mask):
    generator = torch.Generator().manual_seed(3)
    values, rewards = (torch.randint(-4, 5, (B, T), generator=generator) for _ in range(2))
    for given in ((values, rewards), (values.float(), rewards), (values, rewards.float())):
        found, expected = (module.estimate_advantages(*given, 0.9, 0.8, mask) for module in (ours, rlhf))
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_nan_behind_the_mask_changes_no_advantage_that_counts():
    x = tokens(1, torch.float32)[0]
    poisoned = torch.where(MASK, x, torch.nan)
    assert torch.equal(ours.whiten(poisoned, MASK)[MASK], ours.whiten(x, MASK)[MASK])


def test_one_number_is_whitened_to_its_mean_where_torchtune_gives_nan():
    assert ours.whiten(torch.tensor([[2.0]])) == 2
    assert ours.whiten(torch.tensor([[2.0]]), shift_mean=False) == 0
    assert rlhf.whiten(torch.tensor([[2.0]])).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_masked_mean_is_that_of_torchtune_also_of_nothing(dtype, dim):
    mask = MASK.clone()
    mask[1], mask[:, 2] = False, False
    calls = [lambda x, module=module: module.masked_mean(x, mask, dim) for module in (ours, rlhf)]
    assert_parity(*calls, tokens(1, dtype), 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unbiased", [True, False])
def test_masked_var_is_that_of_torchtune(dtype, unbiased):
    calls = [lambda x, module=module: module.masked_var(x, MASK, unbiased) for module in (ours, rlhf)]
    assert_parity(*calls, tokens(1, dtype), 1)


# --- From logits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_to_logprobs_is_that_of_torchtune(dtype, temperature):
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))
    calls = [lambda x, module=module: module.logits_to_logprobs(x, ids, temperature) for module in (ours, rlhf)]
    assert_parity(*calls, [draw(B, T, V, scale=4.0).to(dtype)], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("pad", [-100, 3])
def test_get_batch_log_probs_is_that_of_torchtune_also_of_a_row_of_padding(dtype, average, pad):
    labels = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2)).masked_fill(~MASK, pad)
    labels[2] = pad
    before = labels.clone()
    calls = [lambda x, module=module: module.get_batch_log_probs(x, labels, pad, average) for module in (ours, rlhf)]
    assert_parity(*calls, [draw(B, T, V, scale=4.0).to(dtype)], 1)
    assert torch.equal(labels, before)


def test_get_batch_log_probs_needs_a_label_for_every_position():
    with pytest.raises(ValueError, match=r"logits.shape\[:-1\] = \(2, 3\), got \(2, 2\)"):
        ours.get_batch_log_probs(draw(2, 3, V), torch.zeros(2, 2, dtype=torch.int64))


# --- patch -----------------------------------------------------------------------------------------------------------


def test_patch_replaces_every_name_and_unpatch_restores_it():
    def current(name):
        path, _, key = name.rpartition(".")
        return vars(sys.modules[path])[key]

    originals = {name: current(name) for name in ours.replacements()}
    with patched("torchtune") as names:
        assert {*originals, "torchtune.rlhf.loss.PPOLoss", "torchtune.rlhf.whiten"} <= set(names)
        assert all(current(name) is ours.replacements()[name] for name in originals)
        assert torchtune.rlhf.loss.PPOLoss is ours.PPOLoss
    assert {name: current(name) for name in originals} == originals
    assert torchtune.rlhf.loss.PPOLoss is not ours.PPOLoss


def test_the_example_shows_no_difference_beyond_rounding(capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "dropin" / "torchtune_losses.py"), run_name="__main__")
    rows = capsys.readouterr().out.splitlines()[3:]
    assert len(rows) == 4
    assert all(float(row.split()[-1]) < 1e-5 for row in rows)
