"""OpenRLHF's losses, KL estimates and advantages beside ours: values, gradients, types and edges; patch and unpatch.

OpenRLHF's packages import what needs a GPU or a cluster: stand-ins take the place of those imports.
"""

from __future__ import annotations

import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_fast.integrations import openrlhf as ours
from rlhf_fast.integrations import patched
from rlhf_fast.testing.stand_ins import stand_ins
from tests.integrations.parity import DTYPES, assert_parity, draw, evaluate, ragged

pytest.importorskip("openrlhf", reason="needs openrlhf (make peers)")

with stand_ins():
    import openrlhf.models
    import openrlhf.trainer.ppo_utils.experience_maker as maker
    from openrlhf.models import loss as their_losses
    from openrlhf.models import utils as theirs

B, T, V = 5, 9, 23
MASKS = {"bool": ragged(B, T), "int": ragged(B, T).long(), "float": ragged(B, T).float()}
BATCHES = [{}, {"dp_size": 2, "batch_num_tokens": 61.0, "global_batch_size": 12.0}]


def tokens(count: int, dtype: torch.dtype, scale: float = 1.0):
    return [draw(B, T, seed=k, scale=scale).to(dtype) for k in range(count)]


def logprobs(count: int, dtype: torch.dtype, spread: float = 0.4):
    """Log-probabilities of some policies that are close to one another."""
    base = -draw(B, T, seed=9).abs() - 0.05
    return [(base - spread * draw(B, T, seed=k).abs()).to(dtype) for k in range(count)]


def both(name: str, *arguments, **options):
    return [getattr(module, name)(*arguments, **options) for module in (ours, their_losses)]


# --- Losses over tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("batch", BATCHES, ids=["local", "global"])
def test_aggregate_loss_and_sft_loss_are_those_of_openrlhf(dtype, mask, token_level, batch):
    for_each = [lambda f, x: f.aggregate_loss(x, mask, token_level, **batch)]
    for_each.append(lambda f, x: f.SFTLoss(token_level)(x, mask, **batch))
    for call in for_each:
        assert_parity(
            lambda x, call=call: call(ours, x), lambda x, call=call: call(their_losses, x), tokens(1, dtype), 1
        )


def assert_policy_parity(options, inputs, mask, batch=None, rollout=False):
    mine, peer = both("PolicyLoss", **options)

    def call(loss):
        if rollout:
            return lambda new, old, advantages, sampler: loss(new, old, advantages, mask, sampler, **(batch or {}))
        return lambda new, old, advantages: loss(new, old, advantages, mask, **(batch or {}))

    assert_parity(call(mine), call(peer), inputs, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES, ids=["local", "global"])
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_policy_loss_is_that_of_openrlhf(dtype, batch, token_level, dual_clip, kind):
    options = {"policy_loss_type": kind, "dual_clip": dual_clip, "token_level_loss": token_level, "clip_eps_high": 0.28}
    new, old = logprobs(2, dtype, spread=1.0)
    for advantages in (draw(B, T, seed=5).to(dtype), draw(B, 1, seed=6).to(dtype)):
        for mask in (MASKS["bool"], MASKS["float"]):
            assert_policy_parity(options, [new, old, advantages], mask, batch)


CORRECTIONS = [
    ("token", "mask", "ratio", (0.7, 1.4)),
    ("token", "clip", "ratio", (0.7, 1.4)),
    ("seq", "mask", "ratio", (0.9, 1.2)),
    ("token", "mask", "binary_kl", (0.0, 0.01)),
    ("seq", "mask", "binary_kl", (0.0, 0.02)),
    ("token", "mask", "tv", (0.0, 0.05)),
    ("seq", "mask", "tv", (0.0, 0.06)),
]


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: "-".join(c[:3]))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_the_correction_for_another_engine_is_that_of_openrlhf(correction, dtype, token_level, dual_clip):
    level, mode, gating, threshold = correction
    options = {
        "token_level_loss": token_level, "dual_clip": dual_clip, "is_correction_level": level,
        "is_correction_mode": mode, "is_correction_gating": gating, "is_correction_threshold": threshold,
    }  # fmt: skip
    new, old, rollout = logprobs(3, dtype)
    inputs = [new, old, draw(B, T, seed=5).to(dtype), rollout]
    for batch in BATCHES:
        assert_policy_parity(options, inputs, MASKS["bool"], batch, rollout=True)
    dropped = ours.PolicyLoss(**options)(new, old, inputs[2], MASKS["bool"], rollout)[4]
    assert 0 < dropped < 1, f"the threshold must divide the tokens, {dropped} are outside"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gspo_with_a_correction_takes_the_ratio_to_the_rollout(dtype):
    new, old, rollout = logprobs(3, dtype)
    options = {"policy_loss_type": "gspo", "is_correction_level": "token"}
    assert_policy_parity(options, [new, old, draw(B, T).to(dtype), rollout], MASKS["bool"], rollout=True)


def test_no_lower_clip_is_a_clip_eps_low_above_one():
    assert_policy_parity({"clip_eps_low": 3.0}, [*logprobs(2, torch.float32, 2.0), draw(B, T)], MASKS["bool"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy_loss_type": "reinforce"}, "policy_loss_type must be one of ppo, gspo, got 'reinforce'"),
        ({"is_correction_level": "row"}, "is_correction_level must be one of off, token, seq, got 'row'"),
        ({"dual_clip": 0.5}, "dual_clip must be > 1 or None, got 0.5"),
        ({"is_correction_level": "seq", "is_correction_mode": "clip"}, "'clip' is of level 'token'.* got 'seq'"),
        (
            {"is_correction_level": "token", "is_correction_gating": "tv"},
            r"upper bound only, \(0, bound\) .* got \(0.5, 5.0\)",
        ),
    ],
)
def test_options_that_openrlhf_does_not_have_raise(options, message):
    with pytest.raises(ValueError, match=message):
        ours.PolicyLoss(**options)


def test_a_correction_without_rollout_log_probs_raises():
    inputs = [*logprobs(2, torch.float32), draw(B, T), MASKS["bool"]]
    with pytest.raises(ValueError, match=r"rollout_log_probs must be given for level .token., got None"):
        ours.PolicyLoss(is_correction_level="token")(*inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [*MASKS.values()], ids=MASKS)
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("clip_eps", [None, 0.3])
@pytest.mark.parametrize("batch", BATCHES, ids=["local", "global"])
def test_value_loss_is_that_of_openrlhf(dtype, mask, token_level, clip_eps, batch):
    mine, peer = both("ValueLoss", clip_eps, token_level)
    calls = [lambda *x, loss=loss: loss(*x, mask, **batch) for loss in (mine, peer)]
    assert_parity(*calls, tokens(3, dtype), 1)


def test_without_a_token_the_losses_are_zero_and_connected():
    nothing, inputs = torch.zeros(B, T), tokens(3, torch.float32)
    for loss in (ours.PolicyLoss(), ours.PolicyLoss(policy_loss_type="gspo"), ours.ValueLoss(0.2), ours.ValueLoss()):
        value, gradient = evaluate(lambda *x, loss=loss: first(loss(*x, nothing)), inputs, 1)
        assert value == 0
        assert torch.equal(gradient, torch.zeros(B, T))


def first(found):
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("level", ["off", "token", "seq"])
def test_what_is_behind_the_mask_is_not_looked_at(level):
    mask = MASKS["bool"]
    inputs = [*logprobs(2, torch.float32), draw(B, T), *logprobs(1, torch.float32)]
    poisoned = [x.masked_fill(~mask, math.nan) for x in inputs]
    loss = ours.PolicyLoss(is_correction_level=level, dual_clip=2.0)

    def call(new, old, advantages, rollout):
        return loss(new, old, advantages, mask, rollout)

    for got, expected in zip(evaluate(call, poisoned, 1), evaluate(call, inputs, 1), strict=True):
        assert torch.equal(got, expected) if got is not None else expected is None


def test_strided_inputs_and_one_token_are_taken():
    assert_policy_parity({}, [x.T for x in (*logprobs(2, torch.float32), draw(B, T))], MASKS["bool"].T)
    assert_policy_parity({}, [x[:1, :1] for x in (*logprobs(2, torch.float32), draw(B, T))], torch.ones(1, 1))


# --- Losses over pairs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"ipo": True}, {"ipo": True, "label_smoothing": 0.2}]
)
def test_dpo_loss_is_that_of_openrlhf(dtype, options):
    assert_parity(*both("DPOLoss", 0.3, **options), [draw(6, seed=k, scale=9.0).to(dtype) - 40 for k in range(4)], 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["PairWiseLoss", "LogExpLoss"])
@pytest.mark.parametrize("margin", [None, draw(6, seed=3).abs(), torch.arange(6)], ids=["none", "float", "int"])
def test_reward_losses_are_those_of_openrlhf(dtype, name, margin):
    calls = [lambda *x, loss=loss: loss(*x, margin) for loss in both(name)]
    assert_parity(*calls, [draw(6, seed=k, scale=3.0).to(dtype) for k in range(2)], 2)


def test_log_exp_loss_does_not_overflow():
    chosen, rejected = torch.tensor([-60.0]), torch.tensor([60.0])
    assert ours.LogExpLoss()(chosen, rejected) == 120
    assert their_losses.LogExpLoss()(chosen, rejected) == math.inf


# --- KL, rewards, advantages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale", [0.5, 15.0, 200.0])
def test_compute_approx_kl_is_that_of_openrlhf(dtype, estimator, unbiased, weighted, scale):
    def call(module):
        def kl(new, base, old):
            return module.compute_approx_kl(new, base, old if weighted else None, estimator, unbiased)

        return kl

    assert_parity(call(ours), call(theirs), tokens(3, dtype, scale), 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("clip", [None, (-0.5, 0.25)])
@pytest.mark.parametrize("coef", [0.3, -1.0])
def test_compute_reward_is_that_of_openrlhf(dtype, mask, clip, coef):
    calls = [
        lambda r, kl, module=module: module.compute_reward(r, coef, kl, mask, clip) for module in (ours, theirs)
    ]  # fmt: skip
    assert_parity(*calls, [draw(B).to(dtype), draw(B, T, seed=1).to(dtype)])


def test_a_sequence_without_a_token_has_no_score():
    nothing = torch.zeros(B, T)
    assert torch.equal(ours.compute_reward(draw(B), 0.1, draw(B, T), nothing), -0.1 * draw(B, T))


def test_compute_reward_needs_a_mask():
    with pytest.raises(ValueError, match="action_mask must be given, got None"):
        ours.compute_reward(draw(B), 0.1, draw(B, T))


HOLES = MASKS["bool"] & (torch.arange(T) % 4 != 2)[None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [None, MASKS["bool"], HOLES, MASKS["float"]], ids=["none", "bool", "holes", "float"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
def test_advantages_and_returns_are_those_of_openrlhf(dtype, mask, gamma, lam):
    class_of = maker.RemoteExperienceMaker
    assert_parity(
        lambda v, r: ours.get_advantages_and_returns(None, v, r, mask, gamma, lam),
        lambda v, r: class_of.get_advantages_and_returns(None, v, r, mask, gamma, lam), tokens(2, dtype),
    )  # fmt: skip
    assert_parity(
        lambda r: ours.get_cumulative_returns(None, r, mask, gamma),
        lambda r: class_of.get_cumulative_returns(None, r, mask, gamma), tokens(1, dtype),
    )  # fmt: skip


# --- From logits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_from_logits_are_those_of_openrlhf(dtype, temperature):
    labels = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))
    calls = [
        lambda x, module=module: module.log_probs_from_logits(x * 1, labels, temperature) for module in (ours, theirs)
    ]  # fmt: skip
    assert_parity(*calls, [draw(B, T, V, scale=4.0).to(dtype)], 1)


def test_logits_of_a_part_of_a_sequence_are_taken_as_they_are():
    labels = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))
    calls = [
        lambda x, module=module: module.log_probs_from_logits(x[:, :-1], labels[:, 1:]) for module in (ours, theirs)
    ]
    assert_parity(*calls, [draw(B, T, V)], 1)


def test_logits_are_divided_by_the_temperature_in_place():
    logits = draw(B, T, V)
    expected = logits / 0.5
    ours.log_probs_from_logits(logits, torch.zeros(B, T, dtype=torch.int64), 0.5)
    assert torch.equal(logits, expected)


def test_ignored_labels_give_zero():
    labels = torch.zeros(B, T, dtype=torch.int64).masked_fill(~MASKS["bool"], -100)
    value, gradient = evaluate(lambda x: ours.log_probs_from_logits(x, labels), [draw(B, T, V)], 1)
    assert value[~MASKS["bool"]].eq(0).all()
    assert gradient[~MASKS["bool"]].eq(0).all()
    assert value[MASKS["bool"]].lt(0).all()


def test_the_log_probability_of_a_confident_token_is_not_lost():
    logits = torch.zeros(1, 1, 2)
    logits[..., 0] = 18.0
    label = torch.zeros(1, 1, dtype=torch.int64)
    exact = -math.log1p(math.exp(-18.0))
    assert ours.log_probs_from_logits(logits, label).item() == pytest.approx(exact, rel=1e-6)
    assert theirs.log_probs_from_logits(logits, label).item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compute_entropy_is_that_of_openrlhf(dtype):
    eager = theirs.compute_entropy._torchdynamo_orig_callable
    assert_parity(ours.compute_entropy, eager, [draw(B, T, V, scale=3.0).to(dtype)], 1)


# --- Masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [None, *MASKS.values()], ids=["none", *MASKS])
@pytest.mark.parametrize("dim", [None, 0, -1])
def test_masked_mean_is_that_of_openrlhf(dtype, mask, dim):
    if mask is not None:
        mask = mask.clone()
        mask[:, 0] = 1
        mask = mask if dim != 0 else torch.ones_like(mask)
    assert_parity(
        lambda x: ours.masked_mean(x, mask, dim), lambda x: theirs.masked_mean(x, mask, dim), tokens(1, dtype), 1
    )


def test_the_masked_mean_of_nothing_is_nan_as_in_openrlhf():
    for module in (ours, theirs):
        assert module.masked_mean(draw(2, 3), torch.zeros(2, 3), dim=-1).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_masked_normalize_is_that_of_openrlhf(dtype, dim):
    mask = MASKS["float"].to(dtype)
    assert_parity(
        lambda x: ours.masked_normalize(x, mask, dim),
        lambda x: theirs.masked_normalize(x, mask, dim),
        tokens(1, dtype),
        1,
    )


# --- patch -----------------------------------------------------------------------------------------------------------


def current(name: str):
    path, _, key = name.rpartition(".")
    return vars(sys.modules.get(path, maker.RemoteExperienceMaker))[key]


def test_patch_replaces_every_name_and_unpatch_restores_it(monkeypatch):
    monkeypatch.setattr(ours, "find_spec", lambda name: name == "vllm")
    defined = ours.replacements()
    originals = {name: current(name) for name in defined}
    with patched("openrlhf") as names:
        assert set(defined) <= set(names)
        assert "openrlhf.models.PolicyLoss" in names
        assert f"{maker.__name__}.compute_reward" in names
        assert all(current(name) is ours.replacements()[name] for name in defined)
        assert openrlhf.models.PolicyLoss is ours.PolicyLoss
    assert {name: current(name) for name in defined} == originals
    assert openrlhf.models.PolicyLoss is their_losses.PolicyLoss is not ours.PolicyLoss


def test_without_vllm_the_experience_maker_is_left_alone(monkeypatch):
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    assert not any("RemoteExperienceMaker" in name for name in ours.replacements())


def test_the_example_learns(capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "dropin" / "openrlhf_losses.py"), run_name="__main__")
    rows = capsys.readouterr().out.splitlines()[1:]
    before, after = (float(rows[k].split()[1]) for k in (0, -1))
    assert before < 0.1
    assert after > 0.7


# --- From logits to the loss of a language model ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_language_model_loss_is_that_of_openrlhf(dtype):
    labels = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(4))
    labels[1, 3:], labels[:, 5] = -100, -100
    calls = [lambda x, module=module: module.GPTLMLoss()(x, labels) for module in (ours, their_losses)]
    assert_parity(*calls, [draw(B, T, V, scale=2.0).to(dtype)], 1)


def test_the_language_model_loss_of_no_label_is_0_where_that_of_openrlhf_is_nan():
    logits, labels = draw(B, T, V).requires_grad_(), torch.full((B, T), -100)
    loss = ours.GPTLMLoss()(logits, labels)
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()
    assert their_losses.GPTLMLoss()(logits, labels).isnan()


def test_patch_says_what_to_do_where_flash_attn_is_absent():
    code = """
import rlhf_fast
from rlhf_fast.testing import stand_ins
stand_ins.ABSENT = ("deepspeed", "ray", "openrlhf.utils")
with stand_ins.stand_ins():
    try:
        rlhf_fast.patch("openrlhf")
    except ModuleNotFoundError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = run.stdout.strip().split("\n")[-1]
    assert said.startswith("openrlhf imports flash_attn"), run.stderr
    assert "pip install flash-attn --no-build-isolation, which needs CUDA" in said


@pytest.mark.parametrize("rank", [0, 1])
def test_the_language_model_loss_of_a_rank_of_a_ring_is_that_of_openrlhf(rank, monkeypatch):
    class Group:
        def size(self):
            return 2

        def rank(self):
            return rank

    monkeypatch.setattr(torch.distributed, "get_rank", Group.rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", Group.size)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, **_: x.data.add_(0.25))  # the other rank's loss
    labels = torch.randint(V, (B, 2 * T), generator=torch.Generator().manual_seed(4))
    labels[:, :3] = -100
    calls = [lambda x, module=module: module.GPTLMLoss(Group())(x, labels) for module in (ours, their_losses)]
    assert_parity(*calls, [draw(B, T, V, scale=2.0)], 1)
