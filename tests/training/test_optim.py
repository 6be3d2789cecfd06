import math

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.training.optim import check_progress, learning_rate, update
from tests.training.tiny_runs import config_of, job_of


def set_gradients(job, value=1.0):
    for parameter in job.backbone.parameters_of("policy"):
        parameter.grad = torch.full_like(parameter, value)


def weights(job):
    return [p.detach().clone() for p in job.backbone.parameters_of("policy")]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_an_update_steps_reports_the_norm_and_clears_gradients():
    config = config_of("sft")
    job = job_of(config)
    set_gradients(job)
    before, size = weights(job), sum(p.numel() for p in job.backbone.parameters_of("policy"))
    report = update(job, config, torch.tensor(1.0))
    assert report["grad_norm_policy"] == pytest.approx(size**0.5, rel=1e-5)
    assert report["skipped"] == 0
    assert not same(weights(job), before)
    assert all(p.grad is None for p in job.backbone.parameters_of("policy"))


def test_gradients_are_clipped_per_role_before_the_step():
    config = config_of("sft", max_grad_norm=0.5)
    job = job_of(config)
    set_gradients(job)
    seen = []
    optimizer = job.optimizers["policy"]
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.nn.utils.get_total_norm([p.grad for p in job.backbone.parameters_of("policy")]))
    )
    update(job, config, torch.tensor(1.0))
    assert float(seen[0]) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_number_that_is_not_finite_skips_the_update_and_a_good_one_resets_the_count(bad):
    config = config_of("sft", max_bad_steps=2)
    job = job_of(config)
    before = weights(job)
    for _ in range(3):
        set_gradients(job, math.inf if bad == "gradient" else 1.0)
        report = update(job, config, torch.tensor(math.nan if bad == "loss" else 1.0))
        assert report["skipped"] == 1
        assert same(weights(job), before)
        assert all(p.grad is None for p in job.backbone.parameters_of("policy"))
        set_gradients(job)
        assert update(job, config, torch.tensor(1.0))["skipped"] == 0
        before = weights(job)


def test_the_run_ends_after_max_bad_steps_and_names_the_tensor():
    config = config_of("sft", max_bad_steps=2)
    job = job_of(config)
    set_gradients(job)
    update(job, config, torch.tensor(math.nan))
    set_gradients(job)
    with pytest.raises(UserError, match="loss is not finite, 2 updates in a row"):
        update(job, config, torch.tensor(math.nan))
    name, parameter = next(iter(job.backbone.named_parameters_of("policy").items()))
    parameter.grad[0, 0] = math.nan
    with pytest.raises(UserError, match=f"the gradient of policy {name} is not finite"):
        update(job, config, torch.tensor(1.0))


def test_a_run_whose_every_update_was_skipped_is_an_error_however_short_it_was():
    config = config_of("sft", max_bad_steps=5)
    job = job_of(config)
    check_progress(job)  # no update yet: a run that is resumed at its end
    for value in (math.nan, math.inf):
        set_gradients(job)
        update(job, config, torch.tensor(value))
    with pytest.raises(UserError, match="every update was skipped, the last because loss is not finite"):
        check_progress(job)
    set_gradients(job)
    update(job, config, torch.tensor(1.0))
    check_progress(job)


def test_a_run_whose_last_updates_were_skipped_is_an_error_and_one_alone_is_not():
    config = config_of("sft", max_bad_steps=5)
    job = job_of(config)
    for value in (1.0, math.nan):
        set_gradients(job)
        update(job, config, torch.tensor(value))
    check_progress(job)
    set_gradients(job)
    update(job, config, torch.tensor(math.nan))
    with pytest.raises(UserError, match="the last 2 updates were skipped, the last because loss is not finite"):
        check_progress(job)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_after_a_step_ends_the_run_at_once_with_its_name(bad):
    config = config_of("sft")
    job = job_of(config)
    names = list(job.backbone.named_parameters_of("policy"))
    worst = job.backbone.named_parameters_of("policy")[names[3]]

    def spoil(*_):
        with torch.no_grad():
            worst[0, 0] = bad

    job.optimizers["policy"].register_step_post_hook(spoil)
    set_gradients(job)
    with pytest.raises(UserError, match=f"policy {names[3]} is not finite after an update"):
        update(job, config, torch.tensor(1.0))


def test_weights_whose_squares_overflow_are_finite():
    config = config_of("sft")
    job = job_of(config)
    with torch.no_grad():
        job.backbone.parameters_of("policy")[0].fill_(1e30)
    set_gradients(job)
    assert update(job, config, torch.tensor(1.0))["skipped"] == 0


def test_the_rate_warms_up_and_then_follows_its_schedule():
    config = config_of("sft", steps=10, warmup_steps=2, learning_rate=1.0, lr_schedule="linear")
    assert [learning_rate(config, s) for s in (0, 1, 2, 6)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    cosine = config.model_copy(update={"lr_schedule": "cosine"})
    assert [learning_rate(cosine, s) for s in (2, 6)] == pytest.approx([1.0, 0.5])
    ppo = config_of("ppo", steps=10, warmup_steps=2, lr_schedule="cosine", critic_learning_rate=4.0)
    assert learning_rate(ppo, 6, role="critic") == pytest.approx(2.0)
    assert learning_rate(ppo, 6) == pytest.approx(0.01)
    assert learning_rate(config.model_copy(update={"lr_schedule": "constant"}), 9) == 1.0
