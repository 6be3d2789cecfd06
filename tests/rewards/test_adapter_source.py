"""A reward adapter's members, or its bound, as one score."""

import math

import numpy
import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.peft_io import save_adapter
from rlhf_fast.models.tiny import tiny
from rlhf_fast.rewards import load_rewards, write_stats
from rlhf_fast.rewards.adapter import Combination, Output, read_factor, width, write_covariance

MEMBERS = [(1.0, 2.0), (0.0, 1.0), (-1.0, 4.0)]  # mean and std of each
RAW = torch.tensor([[3.0, 1.0, 3.0], [1.0, 0.0, -1.0]])
NORMAL = numpy.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])


def backbone() -> Backbone:
    return Backbone(tiny(0, hidden_size=32, layers=2, heads=2)[0])


@pytest.fixture
def ensemble(tmp_path):
    """Three adapters; the first two scores of RAW are one and nought of each."""
    trained = backbone()
    for number, (mean, std) in enumerate(MEMBERS):
        name, place = (f"reward_{number}", tmp_path / f"member_{number}") if number else ("reward", tmp_path)
        trained.add_adapter(name, rank=2, seed=number)
        trained.add_head(name, seed=number)
        save_adapter(trained, name, place)
        write_stats(place, mean, std, members=[] if number else ["member_1", "member_2"])
    return tmp_path


def test_an_ensemble_is_loaded_whole_and_scored_in_one_traversal(ensemble):
    ours = backbone()
    rewards = load_rewards({str(ensemble): 1.0}, ours)
    assert ours.reward_roles == ["reward", "reward_1", "reward_2"]
    assert rewards.adapter.outputs == tuple(Output("reward", *stats) for stats in MEMBERS)
    ids, real = torch.tensor([[257, 65, 66, 258], [257, 65, 258, 256]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    scores = ours.score(ids, real, real, policy=False)
    assert scores.scores.shape == (2, 3)
    for number, role in enumerate(ours.reward_roles):
        hidden = ours.hidden(ids, real, [role])[role]
        expected = torch.stack([hidden[0, 3], hidden[1, 2]]) @ ours.head(role).weight[0]
        torch.testing.assert_close(scores.scores[:, number], expected, rtol=1e-5, atol=1e-5)
    hidden = ours.hidden(ids, real, ["reward"])["reward"]
    torch.testing.assert_close(scores.features, torch.stack([hidden[0, 3], hidden[1, 2]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "coef", "formula"),
    [
        ("mean", None, lambda x: x.mean(1)), ("min", None, lambda x: x.min(1)),
        ("uwo", None, lambda x: x.mean(1) - 0.1 * x.var(1, ddof=1)),
        ("uwo", 0.5, lambda x: x.mean(1) - 0.5 * x.var(1, ddof=1)),
        ("pessimistic", None, lambda x: x.mean(1) - x.std(1)), ("optimistic", 2.0, lambda x: x.mean(1) + 2 * x.std(1)),
    ],
)  # fmt: skip
def test_members_are_normalised_and_then_combined(ensemble, variant, coef, formula):
    rewards = load_rewards({str(ensemble): 1.0}, backbone(), combination=Combination(variant, coef))
    assert rewards([""] * 2, [""] * 2, {}, RAW).total.tolist() == pytest.approx(formula(NORMAL).tolist())
    raw = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    means, stds = numpy.array(MEMBERS).T
    total = rewards([""] * 5, [""] * 5, {}, raw).total
    assert total.tolist() == pytest.approx(formula((raw.double().numpy() - means) / stds).tolist(), rel=1e-5, abs=1e-6)


def single(folder, *, outputs: int = 1):
    trained = backbone()
    trained.add_adapter("reward", rank=2, seed=0)
    trained.add_head("reward", outputs=outputs, seed=0)
    save_adapter(trained, "reward", folder)


@pytest.mark.parametrize(("variant", "sign"), [("pessimistic", -1), ("optimistic", 1)])
def test_one_model_is_paid_at_its_bound(tmp_path, variant, sign):
    single(tmp_path)
    write_stats(tmp_path, 1.0, 2.0)
    generator = torch.Generator().manual_seed(0)
    apart = torch.randn(40, 32, generator=generator, dtype=torch.float64)
    sigma = 0.5 * torch.eye(32).double() + apart.T @ apart
    write_covariance(tmp_path, sigma)
    rewards = load_rewards({str(tmp_path): 3.0}, backbone(), combination=Combination(variant, 0.7))
    features, raw = torch.randn(6, 32, generator=generator), torch.randn(6, generator=generator)
    phi = features.double().numpy()
    widths = numpy.sqrt(numpy.einsum("bi,ij,bj->b", phi, numpy.linalg.inv(sigma.numpy()), phi))
    expected = 3 * (raw.numpy() + sign * 0.7 * widths - 1) / 2
    total = rewards([""] * 6, [""] * 6, {}, raw, features).total
    assert total.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert width(read_factor(tmp_path, 32), features).tolist() == pytest.approx(widths.tolist(), rel=1e-5)


def test_the_outputs_of_one_head_are_members_too(tmp_path):
    single(tmp_path, outputs=2)
    write_stats(tmp_path, 0.0, 1.0, [Output("help", 1.0, 2.0), Output("style", 0.0, 0.5)])
    rewards = load_rewards({str(tmp_path): 1.0}, backbone(), combination=Combination("min"))
    assert rewards([""], [""], {}, torch.tensor([[5.0, 0.25]])).total.tolist() == [0.5]


def test_a_critic_starts_from_the_mean_of_several_outputs(tmp_path):
    single(tmp_path, outputs=2)
    write_stats(tmp_path, 0.0, 1.0, [Output("a", 0.0, 1.0), Output("b", 0.0, 1.0)])
    ours = backbone()
    load_rewards({str(tmp_path): 1.0}, ours)
    ours.add_head("critic", copy_of="reward")
    assert torch.equal(ours.head("critic").weight, ours.head("reward").weight.mean(0, keepdim=True))


def test_what_cannot_be_combined_is_one_line(tmp_path):
    single(tmp_path)
    for variant, message in (
        ("uwo", "reward_combine uwo is for several members, .* has one output"),
        ("pessimistic", r"has no reward_covariance\.safetensors: train it with bound: true"),
    ):
        with pytest.raises(UserError, match=message):
            load_rewards({str(tmp_path): 1.0}, backbone(), combination=Combination(variant))
    write_covariance(tmp_path, torch.eye(3))
    with pytest.raises(UserError, match=r"must be \(32, 32\), got \(3, 3\)"):
        load_rewards({str(tmp_path): 1.0}, backbone(), combination=Combination("optimistic"))
    write_covariance(tmp_path, -torch.eye(32))
    with pytest.raises(UserError, match=r"cannot be used: .*positive-definite"):
        load_rewards({str(tmp_path): 1.0}, backbone(), combination=Combination("optimistic"))
    write_stats(tmp_path, 0.0, 1.0, [Output("a", 0.0, 1.0), Output("b", 0.0, 1.0)])
    with pytest.raises(UserError, match="tells of 2 outputs, the score head has 1"):
        load_rewards({str(tmp_path): 1.0}, backbone())
    with pytest.raises(UserError, match="reward_combine min is for a reward adapter, and reward names none"):
        load_rewards({"math:fsum": 1.0}, backbone(), combination=Combination("min"))
    assert math.isclose(Combination("uwo").weight, 0.1)
