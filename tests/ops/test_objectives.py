"""Objectives are given by name, by a mapping as YAML holds it, or as they are; what is wrong is named."""

from __future__ import annotations

import pytest

from rlhf_fast import PolicyObjective, PreferenceObjective

BOTH = pytest.mark.parametrize("kind", [PolicyObjective, PreferenceObjective])


@BOTH
def test_a_name_a_mapping_and_the_dataclass_say_the_same(kind):
    chosen = kind()
    assert kind.of(chosen.variant) == kind.of({"variant": chosen.variant}) == kind.of(chosen) == chosen


@BOTH
def test_an_objective_is_given_back_as_it_is(kind):
    chosen = kind()
    assert kind.of(chosen) is chosen


def test_a_mapping_sets_every_field():
    chosen = PolicyObjective.of({"variant": "dapo", "clip_eps_high": 0.3, "aggregation": "token_sum"})
    assert (chosen.clip_eps_low, chosen.clip_eps_high, chosen.aggregation) == (0.2, 0.3, "token_sum")
    both = PreferenceObjective.of({"variant": {"sigmoid": 0.8, "sft": 0.2}, "beta": 0.5})
    assert both == PreferenceObjective({"sigmoid": 0.8, "sft": 0.2}, beta=0.5)


def test_a_number_in_a_mapping_may_be_text():
    assert PolicyObjective.of({"clip_eps_low": "3e-4"}) == PolicyObjective(clip_eps_low=3e-4)


def test_defaults_are_of_what_is_not_given():
    assert PolicyObjective.of("dr_grpo", fixed_length=64).fixed_length == 64
    assert PolicyObjective.of({"variant": "dr_grpo", "fixed_length": 8}, fixed_length=64).fixed_length == 8


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (PolicyObjective, "dappo", r"variant must be one of ppo_clip, .*, got 'dappo'; did you mean 'dapo'\?"),
        (PolicyObjective, {"clip_eps": 0.1}, r"objective has no 'clip_eps', got 0.1 for it; did you mean 'clip_eps_l"),
        (PolicyObjective, {"clip_eps_low": 2}, r"clip_eps_low must be in \[0, 1\], got 2"),
        (PolicyObjective, {"kl_coef": None}, "kl_coef must be a number, got None"),
        (PolicyObjective, {"kl_coef": "much"}, "kl_coef must be a number, got 'much'"),
        (PolicyObjective, {"kl_unbiased": "perhaps"}, "kl_unbiased must be bool, got 'perhaps'"),
        (PolicyObjective, {"variant": ["dapo"]}, r"variant must be one of .*, got \['dapo'\]"),
        (PolicyObjective, 3, "objective must be a name, a mapping or a PolicyObjective, got 3"),
        (PreferenceObjective, {"betta": 0.1}, r"objective has no 'betta', got 0.1 for it; did you mean 'beta'\?"),
        (PreferenceObjective, "sigmoidal", r"variant must be one of .*, got 'sigmoidal'; did you mean 'sigmoid'\?"),
    ],
)
def test_what_is_wrong_is_named_with_its_value_and_the_nearest_name(kind, given, message):
    with pytest.raises(ValueError, match=message):
        kind.of(given)
