"""verl's policy losses on our kernel: value, gradient and metrics beside verl's own."""

import pytest
import torch

from rlhf_fast.integrations import patched
from rlhf_fast.integrations import verl as ours
from rlhf_fast.testing.numerics import TOLERANCE, assert_contract

core = pytest.importorskip("verl.trainer.ppo.core_algos", reason="needs verl (make peers)")
import verl.workers.utils.losses as worker  # noqa: E402
from tensordict import NonTensorData, TensorDict  # noqa: E402
from verl.utils.metric import Metric  # noqa: E402
from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402

LOSSES = ours.policy.LOSSES
MODES = ours.losses.MODES
GLOBAL = {"dp_size": 2, "batch_num_tokens": 37, "global_batch_size": 9, "loss_scale_factor": 11}


def config(policy=None, info=None, **numbers):
    policy_loss = PolicyLossConfig(**{"dro_beta": 0.3, "clip_cov_ratio": 0.2, "kl_cov_ratio": 0.2, **(policy or {})})
    return ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy_loss,
        global_batch_info=info or {}, **numbers,
    )  # fmt: skip


def batch(dtype=torch.float32, spread=0.5, shape=(5, 13), seed=0):
    """(old, new, advantages) and a mask with holes and an empty row."""
    g = torch.Generator().manual_seed(seed)
    new = -3 * torch.rand(*shape, generator=g)
    old = new + spread * torch.randn(*shape, generator=g)
    mask = (torch.rand(*shape, generator=g) < 0.7).long()
    mask[0, 0] = 1
    if shape[0] > 2:
        mask[2] = 0
    return [x.to(dtype) for x in (old, new, 2 * torch.randn(*shape, generator=g))], mask


def run(function, tensors, mask, **options):
    old, new, advantages = tensors
    new = new.detach().requires_grad_()
    torch.manual_seed(7)
    loss, metrics = function(old, new, advantages, mask, **options)
    loss.backward()
    return loss.detach(), new.grad, metrics


def assert_same(name, tensors, mask, options, reference_name=None):
    """Ours beside verl's in the same dtype and in fp64, with the same metrics."""
    theirs = core.get_policy_loss_fn(reference_name or name)
    got, plain = run(LOSSES[name], tensors, mask, **options), run(theirs, tensors, mask, **options)
    exact_options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    exact = run(theirs, [x.double() for x in tensors], mask, **exact_options)
    assert got[0].dtype == plain[0].dtype
    assert got[0].shape == plain[0].shape
    assert got[1].dtype == plain[1].dtype
    assert_contract("loss", got[0], plain[0], exact[0])
    assert_contract("gradient", got[1], plain[1], exact[1])
    assert list(got[2]) == list(plain[2])
    for key, value in got[2].items():
        assert type(value) is float
        error = abs(plain[2][key] - exact[2][key])
        assert abs(value - exact[2][key]) <= 1.5 * error + TOLERANCE[tensors[0].dtype] * max(1, abs(exact[2][key])), key


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradient_and_metrics_are_verls(name, weighted):
    tensors, mask = batch()
    options = {"config": config()}
    if weighted:
        options["rollout_is_weights"] = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) * 2
    assert_same(name, tensors, mask, options)


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in ("clip_cov", "kl_cov")])
def test_bfloat16_losses_keep_the_contract_beside_verls(name):
    # The covariance losses choose tokens by numbers that bfloat16 rounds to ties.
    tensors, mask = batch(torch.bfloat16)
    theirs = core.get_policy_loss_fn(name)
    got = run(LOSSES[name], tensors, mask, config=config())
    plain = run(theirs, tensors, mask, config=config())
    exact = run(theirs, [x.double() for x in tensors], mask, config=config())
    assert got[0].dtype == plain[0].dtype
    assert_contract("loss", got[0], plain[0], exact[0])
    assert_contract("gradient", got[1], plain[1], exact[1])


@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_every_aggregation_counts_as_verls(name, mode, info):
    tensors, mask = batch(seed=3)
    assert_same(name, tensors, mask, {"config": config(info=info), "loss_agg_mode": mode})


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("vanilla", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.28, "clip_ratio_c": 1.5}),
        ("vanilla", {"clip_ratio_low": None, "clip_ratio_high": None, "clip_ratio": 0.05, "clip_ratio_c": 1.01}),
        ("dppo_tv", {"clip_ratio_low": 0.05, "clip_ratio_high": 0.02, "clip_ratio_c": 1.2}),
        ("dppo_kl", {"clip_ratio_low": 0.001, "clip_ratio_high": 0.05, "clip_ratio_c": 0.9}),
        ("cispo", {"clip_ratio_low": 10.0, "clip_ratio_high": 0.2}),
        ("cispo", {"clip_ratio_low": 0.4, "clip_ratio_high": 4.0}),
        ("sapo", {"tau_pos": 0.7, "tau_neg": 2.0}),
        ("gspo", {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}),
        ("geo_mean", {"clip_ratio_low": 0.4, "clip_ratio_high": 0.3}),
        ("dro", {"policy": {"dro_beta": 2.0}}),
        ("kl_cov", {"policy": {"kl_cov_ratio": 0.5, "ppo_kl_coef": 3.0}}),
        ("clip_cov", {"policy": {"clip_cov_ratio": 0.05, "clip_cov_lb": -1.0, "clip_cov_ub": 2.0}}),
    ],
)
def test_the_numbers_of_the_config_are_used_as_verl_uses_them(name, numbers):
    tensors, mask = batch(spread=1.0, seed=5)
    assert_same(name, tensors, mask, {"config": config(**numbers)})


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in ("clip_cov", "kl_cov", "geo_mean")])
def test_log_ratios_beyond_every_bound_count_as_in_verl(name):
    (old, new, advantages), mask = batch()
    old[0], new[0] = -torch.linspace(0, 40, 13), -torch.linspace(0, 40, 13).flip(0)
    old[1], new[1] = -30.0, -0.5
    if name == "dro":  # verl squares them as they are; so do we
        advantages = advantages / 10
    assert_same(name, (old, new, advantages), mask, {"config": config()})


@pytest.mark.parametrize("name", LOSSES)
def test_what_stands_behind_the_mask_changes_nothing(name):
    tensors, mask = batch()
    weights = torch.ones(mask.shape)
    clean = run(LOSSES[name], tensors, mask, config=config(), rollout_is_weights=weights)
    poisoned = [torch.where(mask.bool(), x, torch.nan) for x in (*tensors, weights)]
    dirty = run(LOSSES[name], poisoned[:3], mask, config=config(), rollout_is_weights=poisoned[3])
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])
    assert clean[2] == dirty[2]


@pytest.mark.parametrize("mask_type", [torch.bool, torch.float32, torch.int32])
def test_masks_of_any_type_and_strided_tensors_count_the_same(mask_type):
    tensors, mask = batch()
    strided = [torch.stack([x, x], -1)[..., 0] for x in tensors]
    plain = run(LOSSES["vanilla"], tensors, mask, config=config())
    got = run(LOSSES["vanilla"], strided, mask.to(mask_type), config=config())
    assert torch.equal(plain[0], got[0])
    assert torch.equal(plain[1], got[1])


def test_one_token_gives_verls_loss():
    tensors, _ = batch(shape=(1, 1), seed=2)
    assert_same("vanilla", tensors, torch.ones(1, 1, dtype=torch.long), {"config": config()})


@pytest.mark.parametrize("name", LOSSES)
def test_a_mask_that_counts_nothing_gives_zero_and_no_gradient(name):
    # verl's token mean is 0 / 0 there.
    tensors, mask = batch()
    loss, gradient, metrics = run(LOSSES[name], tensors, mask * 0, config=config())
    assert loss.item() == 0
    assert gradient.eq(0).all()
    assert all(value == 0 for value in metrics.values())


def test_a_token_without_advantage_has_no_part_in_the_geometric_mean():
    (old, new, advantages), mask = batch()
    advantages[:, ::3] = 0
    assert_same("geo_mean", (old, new, advantages), mask, {"config": config()})


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", MODES)
def test_the_loss_kept_for_old_callers_is_verls(mode):
    (old, new, advantages), mask = batch(seed=4)
    options = {"cliprange": 0.2, "cliprange_high": 0.3, "clip_ratio_c": 2.0, "loss_agg_mode": mode}
    results = []
    for function in (ours.policy.compute_policy_loss, core.compute_policy_loss):
        leaf = new.clone().requires_grad_()
        values = function(old, leaf, advantages, mask, **options)
        values[0].backward()
        results.append([*values, leaf.grad])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6)


def test_reinforce_is_verls():
    tensors, mask = batch()
    options = {"config": config(), "rollout_is_weights": torch.rand(mask.shape)}
    mine = run(ours.policy.compute_policy_loss_reinforce, tensors, mask, **options)
    theirs = run(core.compute_policy_loss_reinforce, tensors, mask, **options)
    torch.testing.assert_close(mine[:2], theirs[:2], rtol=2e-6, atol=2e-6)
    assert mine[2] == pytest.approx(theirs[2], rel=1e-6)


def worker_loss(loss_mode, mode):
    """Loss, gradient and metrics of verl's actor worker, with an entropy bonus and a KL penalty, from packed rows."""
    (old, new, advantages), mask = batch()
    old, new = old[:, :8], new[:, :8]
    rows, columns = old.shape
    data = TensorDict(
        {
            "prompts": torch.ones(rows, 2, dtype=torch.long),
            "responses": torch.ones(rows, columns, dtype=torch.long),
            "attention_mask": torch.ones(rows, columns + 2, dtype=torch.long),
            "response_mask": mask[:, :columns],
            "old_log_probs": old,
            "ref_log_prob": old - 0.3,
            "advantages": advantages[:, :columns],
            **{name: NonTensorData(value) for name, value in GLOBAL.items() if name != "loss_scale_factor"},
        },
        batch_size=[rows],
    )
    packed = torch.nn.functional.pad(new, (1, 1)).flatten().requires_grad_()
    settings = config(
        policy={"loss_mode": loss_mode}, loss_agg_mode=mode, entropy_coeff=0.1, use_kl_loss=True, kl_loss_coef=0.2
    )
    loss, metrics = worker.ppo_loss(settings, {"log_probs": packed, "entropy": packed.detach() ** 2}, data)
    loss.backward()
    values = {name: x.aggregate() if isinstance(x, Metric) else x for name, x in metrics.items()}
    return loss.detach(), packed.grad, {name: float(x) for name, x in values.items()}


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("loss_mode", ["vanilla", "gspo", "dro"])
def test_verls_worker_runs_on_ours_under_the_patch(loss_mode, mode):
    plain = worker_loss(loss_mode, mode)
    with patched("verl") as names:
        assert {"verl.workers.utils.losses.agg_loss", "verl.workers.utils.losses.kl_penalty"} <= set(names)
        got = worker_loss(loss_mode, mode)
    torch.testing.assert_close(got[:2], plain[:2], rtol=2e-6, atol=2e-6)
    assert got[2] == pytest.approx(plain[2], rel=1e-5, abs=1e-6)


def test_bypass_mode_runs_on_ours_under_the_patch():
    tensors, mask = batch()
    settings = config()
    plain = run(core.compute_policy_loss_bypass_mode, tensors, mask, config=settings)
    with patched("verl"):
        assert core.compute_policy_loss_vanilla is LOSSES["vanilla"]
        got = run(core.compute_policy_loss_bypass_mode, tensors, mask, config=settings)
    torch.testing.assert_close(got[:2], plain[:2], rtol=2e-6, atol=2e-6)
    assert got[2] == pytest.approx(plain[2], rel=1e-5, abs=1e-6)


def test_a_missing_config_and_a_bound_that_cannot_be_raise():
    (old, new, advantages), mask = batch()
    with pytest.raises(ValueError, match="compute_policy_loss_gpg needs a config"):
        LOSSES["gpg"](old, new, advantages, mask)
    with pytest.raises(ValueError, match=r"cliprange must be given"):
        ours.policy.compute_policy_loss(old, new, advantages, mask)
    with pytest.raises(ValueError, match=r"dro_beta must be > 0 .* got None"):
        LOSSES["dro"](old, new, advantages, mask, config=config({"dro_beta": None}))
    with pytest.raises(ValueError, match="batch_num_tokens of the whole batch must be given for dp_size 2"):
        LOSSES["gpg"](old, new, advantages, mask, config=config(info={"dp_size": 2}))
