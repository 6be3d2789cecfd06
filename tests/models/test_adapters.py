"""Adapters by name: created, copied, averaged, swapped, kept and put back while training runs."""

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from tests.models.tiny_models import four_roles, make_batch, make_model, scramble


def two_adapters() -> Backbone:
    backbone = Backbone(make_model("llama"))
    backbone.add_adapter("policy", rank=4, top_layers=2)
    scramble(backbone, "policy", 1)
    backbone.add_adapter("reference", copy_of="policy", trainable=False)
    scramble(backbone, "policy", 2)
    return backbone


def values(backbone: Backbone, name: str) -> list[torch.Tensor]:
    return [p.detach().clone() for p in backbone.parameters_of(name)]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_new_adapter_changes_nothing_and_is_decided_by_its_seed():
    backbone = Backbone(make_model("llama"))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        backbone.add_adapter(name, seed=seed)
    hidden = backbone.hidden(*make_batch(), ["reference"])["reference"]
    assert torch.equal(backbone.hidden(*make_batch(), ["a"])["a"], hidden)
    assert same(values(backbone, "a"), values(backbone, "b"))
    assert not same(values(backbone, "a"), values(backbone, "c"))


def test_targets_and_top_layers_choose_the_modules():
    backbone = Backbone(make_model("llama"))
    backbone.add_adapter("policy", targets=("q_proj", "mlp.up_proj"), top_layers=1)
    assert list(backbone.adapters["policy"]) == ["model.layers.3.self_attn.q_proj", "model.layers.3.mlp.up_proj"]


def test_requires_grad_is_set_at_creation_and_survives_every_switch():
    backbone = two_adapters()
    batch = make_batch()
    for role in ("policy", "reference"):
        with backbone.using(role):
            backbone.hidden(*batch, [role])
    backbone.swap_adapters("policy", "reference")
    backbone.copy_adapter("policy", "reference")
    assert all(p.requires_grad for p in backbone.parameters_of("policy"))
    assert not any(p.requires_grad for p in backbone.parameters_of("reference"))


def test_reference_refreshed_from_the_policy_equals_it():
    backbone = two_adapters()
    parameters = backbone.parameters_of("reference")
    backbone.copy_adapter("policy", "reference")
    assert same(values(backbone, "reference"), values(backbone, "policy"))
    assert all(a is b for a, b in zip(parameters, backbone.parameters_of("reference"), strict=True))


def test_lerp_is_a_moving_average():
    backbone = two_adapters()
    old, new = values(backbone, "reference"), values(backbone, "policy")
    backbone.lerp_adapter("reference", "policy", 0.25)
    for result, a, b in zip(values(backbone, "reference"), old, new, strict=True):
        torch.testing.assert_close(result, 0.75 * a + 0.25 * b)
    assert same(values(backbone, "policy"), new)


def test_average_in_half_precision_is_refused():
    backbone = two_adapters()
    backbone.add_adapter("average", copy_of="policy", trainable=False, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="an average needs fp32"):
        backbone.lerp_adapter("average", "policy", 0.1)


def test_swap_exchanges_values_and_keeps_the_parameter_objects():
    backbone = two_adapters()
    a, b = values(backbone, "policy"), values(backbone, "reference")
    objects = backbone.parameters_of("policy")
    backbone.swap_adapters("policy", "reference")
    assert same(values(backbone, "policy"), b)
    assert same(values(backbone, "reference"), a)
    assert all(x is y for x, y in zip(objects, backbone.parameters_of("policy"), strict=True))


def test_snapshot_is_a_copy_that_restores_adapter_and_head():
    backbone = four_roles()
    before = values(backbone, "critic")
    snapshot = backbone.snapshot("critic")
    assert "score.weight" in snapshot
    scramble(backbone, "critic", 9)
    assert not same(values(backbone, "critic"), before)
    backbone.restore("critic", snapshot)
    assert same(values(backbone, "critic"), before)


def test_snapshot_of_another_shape_is_refused_and_changes_nothing():
    backbone = four_roles()
    before = values(backbone, "policy")
    with pytest.raises(UserError, match="differ in the shape"):
        backbone.restore("policy", {k: v[:, :1] for k, v in backbone.snapshot("policy").items()})
    with pytest.raises(UserError, match="different layers"):
        backbone.restore("policy", backbone.snapshot("critic"))
    assert same(values(backbone, "policy"), before)


def test_adapters_of_different_rank_cannot_be_copied():
    with pytest.raises(UserError, match="'policy' and 'critic' differ in the shape"):
        four_roles().copy_adapter("critic", "policy")


def test_critic_starts_as_the_reward_model():
    backbone = four_roles()
    backbone.remove_adapter("critic")
    backbone.add_adapter("critic", copy_of="reward")
    backbone.add_head("critic", copy_of="reward")
    batch = make_batch()
    hidden = backbone.hidden(*batch, ["reward", "critic"])
    torch.testing.assert_close(backbone.values("critic", hidden["critic"]), backbone.values("reward", hidden["reward"]))
    assert all(p.requires_grad for p in backbone.parameters_of("critic"))
    assert not any(p.requires_grad for p in backbone.parameters_of("reward"))


def test_removed_role_is_gone():
    backbone = four_roles()
    backbone.remove_adapter("critic")
    with pytest.raises(UserError, match="no adapter named 'critic'"):
        backbone.hidden(*make_batch(), ["critic"])
    with pytest.raises(UserError, match="no head named 'critic'"):
        backbone.head("critic")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank of adapter 'new' must be at least 1, got 0"),
        ({"top_layers": 9}, "top_layers must be from 1 to 4, the layers of this model, got 9"),
        ({"targets": ["q_prj"]}, "no linear layer is named 'q_prj'; there are: down_proj, gate_proj"),
        ({"copy_of": "plicy"}, "no adapter named 'plicy'"),
    ],
)
def test_wrong_adapter_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        four_roles().add_adapter("new", **options)


def test_name_taken_is_an_error():
    with pytest.raises(UserError, match="already an adapter named 'policy'"):
        four_roles().add_adapter("policy")
    with pytest.raises(UserError, match="already a head named 'critic'"):
        four_roles().add_head("critic")
