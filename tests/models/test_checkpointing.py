"""Gradients under activation checkpointing, in the orders in which a training loop may run the roles."""

import threading

import pytest
import torch

from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.routing import adapted_linears
from tests.models.tiny_models import CONFIGS, make_batch, make_model, scramble

TRAINED = ("policy", "critic", "reward")


def three_trained_roles(family: str, *, checkpointing: bool) -> Backbone:
    backbone = Backbone(make_model(family))
    for seed, name in enumerate(TRAINED):
        backbone.add_adapter(name, rank=4, top_layers=3)
        backbone.add_head(name)
        scramble(backbone, name, seed)
    backbone.enable_checkpointing(checkpointing)
    return backbone


def loss_of(backbone: Backbone, role: str, hidden: torch.Tensor | None = None) -> torch.Tensor:
    input_ids, attention_mask = make_batch()
    if hidden is None:
        hidden = backbone.hidden(input_ids, attention_mask, [role])[role]
    if role == "policy":
        return backbone.logprobs(hidden, input_ids, attention_mask).sum()
    return (backbone.values(role, hidden) * attention_mask).square().sum()


def gradients(backbone: Backbone) -> dict[tuple[str, str], torch.Tensor]:
    found = {}
    for name in TRAINED:
        for key, parameter in backbone.named_parameters_of(name).items():
            if parameter.grad is not None:
                found[name, key] = parameter.grad
    return found


def separate_passes(backbone: Backbone, backward_order: str) -> None:
    """Forward policy, critic, reward; then backward in the order given, or of the sum."""
    losses = {role: loss_of(backbone, role) for role in TRAINED}
    if backward_order == "sum":
        sum(losses.values()).backward()
    else:
        for role in backward_order.split():
            losses[role].backward()


def interleaved(backbone: Backbone) -> None:
    """Each role's backward after another role's forward: the adapter 'in use' is never its own."""
    policy = loss_of(backbone, "policy")
    critic = loss_of(backbone, "critic")
    policy.backward()
    reward = loss_of(backbone, "reward")
    critic.backward()
    with backbone.using("policy"):
        reward.backward()


def on_another_thread(backbone: Backbone) -> None:
    """As on a GPU, where autograd recomputes on threads of its own: nothing may hang on the caller's context."""
    losses = [loss_of(backbone, role) for role in TRAINED]
    thread = threading.Thread(target=lambda: sum(losses).backward())
    thread.start()
    thread.join()


def joint(backbone: Backbone) -> None:
    input_ids, attention_mask = make_batch()
    hidden = backbone.hidden(
        input_ids, attention_mask, ["critic", "policy", "reference", "reward"],
        lower=backbone.lower(input_ids, attention_mask),
    )  # fmt: skip
    sum(loss_of(backbone, role, hidden[role]) for role in TRAINED).backward()


SCENARIOS = {
    "backward of the sum": lambda b: separate_passes(b, "sum"),
    "same order": lambda b: separate_passes(b, "policy critic reward"),
    "reverse order": lambda b: separate_passes(b, "reward critic policy"),
    "critic first": lambda b: separate_passes(b, "critic reward policy"),
    "interleaved": interleaved,
    "on another thread": on_another_thread,
    "one joint traversal": joint,
}


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_every_role_has_the_same_gradients_with_checkpointing_as_without(family, scenario):
    plain = three_trained_roles(family, checkpointing=False)
    for role in TRAINED:
        loss_of(plain, role).backward()
    expected = gradients(plain)
    assert len(expected) == sum(len(plain.named_parameters_of(role)) for role in TRAINED) - 1  # policy has no head loss
    checkpointed = three_trained_roles(family, checkpointing=True)
    SCENARIOS[scenario](checkpointed)
    found = gradients(checkpointed)
    assert found.keys() == expected.keys()
    exact = scenario != "one joint traversal"  # there the products have other shapes, so other rounding
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 2e-5}
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], **tolerance, msg=lambda text, key=key: f"{key}: {text}")
        assert gradient.abs().max() > 0, f"{key} has no gradient to compare"


def test_checkpointing_recomputes_the_adapted_layers_and_no_other():
    backbone = three_trained_roles("llama", checkpointing=True)
    calls = []
    for index, layer in enumerate(backbone.model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *args, index=index: calls.append(index))
    loss = loss_of(backbone, "policy")
    assert calls == [0, 1, 2, 3]
    calls.clear()
    loss.backward()
    assert calls == [3, 2, 1]


def test_every_layer_is_recomputed_when_the_base_itself_is_trained():
    backbone = Backbone(make_model("llama"))
    backbone.model.requires_grad_(True)
    backbone.enable_checkpointing()
    calls = []
    for index, layer in enumerate(backbone.model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *args, index=index: calls.append(index))
    hidden = backbone.hidden(*make_batch(), [None])[None]
    calls.clear()
    hidden.sum().backward()
    assert calls == [3, 2, 1, 0]
    assert all(p.grad is not None for name, p in backbone.model.named_parameters() if "lm_head" not in name)


def test_checkpointing_holds_fewer_activations():
    def saved_bytes(checkpointing: bool) -> int:
        backbone = three_trained_roles("llama", checkpointing=checkpointing)
        storages = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = backbone.hidden(*make_batch(), ["policy"])
        assert hidden["policy"].requires_grad
        return sum(storages.values())

    assert saved_bytes(True) < saved_bytes(False) / 2


def test_adapter_changed_between_forward_and_backward_is_an_error():
    backbone = three_trained_roles("llama", checkpointing=True)
    loss = loss_of(backbone, "policy")
    backbone.copy_adapter("critic", "policy")
    with pytest.raises(RuntimeError, match="changed between its forward and its backward"):
        loss.backward()


def test_other_roles_may_step_between_forward_and_backward():
    backbone = three_trained_roles("llama", checkpointing=True)
    policy, critic = loss_of(backbone, "policy"), loss_of(backbone, "critic")
    policy.backward()
    torch.optim.AdamW(backbone.parameters_of("policy"), lr=0.1).step()
    critic.backward()
    expected = three_trained_roles("llama", checkpointing=False)
    loss_of(expected, "critic").backward()
    for ours, theirs in zip(backbone.parameters_of("critic"), expected.parameters_of("critic"), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=2e-5)


def test_dropout_of_the_adapters_is_the_same_when_recomputed():
    def gradients_with(checkpointing: bool, seed: int | None) -> dict[str, torch.Tensor]:
        backbone = Backbone(make_model("llama"))
        backbone.add_adapter("policy", rank=4, top_layers=3, use_dora=True, dropout=0.3)
        scramble(backbone, "policy")
        backbone.enable_checkpointing(checkpointing)
        input_ids, attention_mask = make_batch()
        hidden = backbone.hidden(input_ids, attention_mask, ["policy"], dropout_seed=seed)["policy"]
        loss_of(backbone, "policy", hidden).backward()
        return {key: p.grad for key, p in backbone.named_parameters_of("policy").items() if p.grad is not None}

    plain, recomputed, other, off = (
        gradients_with(c, s) for c, s in ((False, 5), (True, 5), (False, 6), (False, None))
    )
    assert all(torch.equal(plain[key], recomputed[key]) for key in plain)
    assert not any(torch.equal(plain[key], other[key]) for key in plain)
    assert not any(torch.equal(plain[key], off[key]) for key in plain)


def test_every_linear_drops_elements_of_its_own():
    backbone = Backbone(make_model("llama"))
    backbone.add_adapter("policy", rank=4)
    streams = [linear.stream for linear in adapted_linears(backbone.model).values()]
    assert len(set(streams)) == len(streams) == 4 * 7


def test_roles_of_one_pass_must_agree_on_the_dropout():
    backbone = Backbone(make_model("llama"))
    backbone.add_adapter("policy", dropout=0.1)
    backbone.add_adapter("critic")
    with pytest.raises(ValueError, match=r"\['policy', 'critic'\] of one forward must have the same dropout"):
        backbone.hidden(*make_batch(), ["policy", "critic"], dropout_seed=0)
