import pytest

from rlhf_fast import AdaptiveKLController, FixedKLController


def test_a_kl_above_the_target_raises_the_coefficient_as_in_ziegler_2019():
    # Section 2.2: e = clip(2.2 / 2 - 1, +-0.2) = 0.1; beta = 0.1 (1 + 0.1 * 64 / 640)
    controller = AdaptiveKLController(0.1, target=2.0, horizon=640)
    assert controller.update(2.2, samples=64) == pytest.approx(0.101)
    assert controller.coefficient == pytest.approx(0.101)


@pytest.mark.parametrize(("kl", "factor"), [(50.0, 1.02), (float("inf"), 1.02), (0.1, 0.98), (-3.0, 0.98), (2.0, 1.0)])
def test_the_error_is_clipped_at_a_fifth(kl, factor):
    controller = AdaptiveKLController(0.5, target=2.0, horizon=100)
    assert controller.update(kl, samples=10) == pytest.approx(0.5 * factor)


def test_a_fixed_coefficient_stays():
    controller = FixedKLController(0.3)
    assert controller.update(50.0, samples=10) == 0.3
    assert controller.coefficient == 0.3


@pytest.mark.parametrize("make", [lambda: FixedKLController(0.1), lambda: AdaptiveKLController(0.1, target=1.0)])
def test_a_restored_controller_goes_on_with_the_same_bits(make):
    whole, first, second = make(), make(), make()
    for kl in (0.3, 1.7):
        whole.update(kl, samples=3)
        first.update(kl, samples=3)
    second.load_state_dict(first.state_dict())
    assert [second.update(k, samples=5) for k in (0.9, 4.0)] == [whole.update(k, samples=5) for k in (0.9, 4.0)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedKLController(-0.1), "coefficient must be >= 0, got -0.1"),
        (lambda: AdaptiveKLController(0.1, target=0.0), "target must be > 0, got 0.0"),
        (lambda: AdaptiveKLController(0.1, target=1.0, horizon=0), "horizon must be > 0, got 0"),
        (lambda: FixedKLController(0.1).load_state_dict({"coefficient": float("nan")}), "coefficient .* got nan"),
        (lambda: AdaptiveKLController(0.1, target=1.0).update(float("nan"), 4), "kl must be a number, got nan"),
    ],
)
def test_bad_values_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
