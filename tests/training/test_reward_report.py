"""What the report on a reward model says, against numbers worked out by hand."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

from rlhf_fast.data.encoding import Example
from rlhf_fast.training import reward_report
from rlhf_fast.training.reward_data import Judgement
from rlhf_fast.training.reward_report import (
    Comparisons,
    best_of_four,
    by_value,
    calibration,
    comparisons_of,
    fitted_temperature,
    measures,
    reliability,
    spearman,
)


def judged(form, targets, lengths, annotator=None) -> Judgement:
    rows = tuple(Example([0] * (n + 1), 1) for n in lengths)
    places = [(0, i) for i in range(len(targets))] if form == "steps" else enumerate(lengths)
    return Judgement(form, rows, tuple(places), tuple(targets), tuple(lengths), annotator)


def pair(longer: int = 0, margin: float = 0.0, chance: float = 1.0, annotator=None) -> Judgement:
    return judged("pairs", (margin, chance), (10 + longer, 10), annotator)


def doubles(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_temperature_has_the_least_cross_entropy():
    # Right at a lead of log 9 in three of four cases: the probability must be 3/4, so T = log 9 / log 3 = 2.
    assert fitted_temperature(doubles(*[math.log(9)] * 3, -math.log(9)), torch.ones(4).double()) == pytest.approx(2.0)
    assert fitted_temperature(doubles(1.0, 2.0), torch.ones(2).double()) == pytest.approx(1e-3), "never wrong: no bound"
    assert fitted_temperature(doubles(-1.0), torch.ones(1).double()) == pytest.approx(1e3), "always wrong: a coin"
    assert fitted_temperature(doubles(0.0, 0.0), torch.ones(2).double()) == 1.0


def test_the_bins_of_ece_are_fifteen_from_a_half_to_one():
    # Confidences 0.6, 0.6 and 0.9: bins [0.6, 0.6333) and [0.9, 0.9333), of which 0.6 is right once in two.
    leads = doubles(math.log(1.5), -math.log(1.5), math.log(9.0))
    right = (leads > 0).double()
    bins = reliability(leads * (1 + 1e-9), right, 1.0)
    assert [(round(b.low, 4), b.size, round(b.confidence, 6), b.accuracy) for b in bins] == [
        (0.6, 2, 0.6, 0.5), (0.9, 1, 0.9, 1.0)
    ]  # fmt: skip


def test_ece_and_brier_are_those_of_the_fitted_probability():
    # As above T = 2 and every probability is 3/4: confidence 3/4, right 3/4, so ece 0; brier (3 / 16 + 9 / 16) / 4.
    leads, zero = doubles(*[math.log(9)] * 3, -math.log(9)), torch.zeros(4).double()
    numbers, _ = calibration(Comparisons(leads, torch.ones(4).double(), zero, zero, [None] * 4))
    assert numbers["temperature"] == pytest.approx(2.0)
    assert numbers["ece"] == pytest.approx(0.0, abs=1e-9)
    assert numbers["brier"] == pytest.approx(3 * (1 / 16) / 4 + (9 / 16) / 4)
    # Right in one of two at lead 1, in two of two at lead 3, at whatever temperature that gives.
    leads = doubles(1.0, -1.0, 3.0, 3.0)
    numbers, _ = calibration(Comparisons(leads, torch.ones(4).double(), zero, zero, [None] * 4))
    p, q = (1 / (1 + math.exp(-x / numbers["temperature"])) for x in (1.0, 3.0))
    assert numbers["ece"] == pytest.approx(0.5 * abs(p - 0.5) + 0.5 * abs(q - 1.0))
    assert numbers["brier"] == pytest.approx(((1 - p) ** 2 + p**2 + 2 * (1 - q) ** 2) / 4)


def test_spearman_shares_ranks_among_equals():
    assert spearman(doubles(1, 2, 3, 4), doubles(1, 4, 9, 16)) == pytest.approx(1.0)
    # Ranks (1.5, 1.5, 3) and (1, 2, 3): covariance 0.75 of standard deviations sqrt(0.75) and 1.
    assert spearman(doubles(5, 5, 7), doubles(1, 2, 3)) == pytest.approx(math.sqrt(0.75))
    assert spearman(doubles(5, 5, 5), doubles(1, 2, 3)) is None


def test_best_of_four_counts_the_sets_of_four_that_ranks_tell_apart():
    one = judged("rankings", (1, 2, 3, 4, 5), (1, 1, 1, 1, 1))
    # Of the five sets of four, the greatest score (answer 2) is the best of {2345} alone.
    assert best_of_four(torch.tensor([0.0, 9.0, 1.0, 2.0, 3.0]), [one]) == pytest.approx(1 / 5)
    assert best_of_four(torch.tensor([9.0, 5.0, 4.0, 3.0, 2.0]), [one]) == 1.0
    assert best_of_four(torch.tensor([0.0, 1.0, 2.0]), [judged("rankings", (1, 2, 3), (1, 1, 1))]) is None


def test_accuracy_by_value_is_in_groups_of_equal_size():
    values, right = doubles(*range(10)), doubles(*[0] * 5, *[1] * 5)
    groups = by_value(values, right)
    assert [(b.low, b.high, b.size, b.accuracy) for b in groups] == [
        (0, 1, 2, 0.0), (2, 3, 2, 0.0), (4, 5, 2, 0.5), (6, 7, 2, 1.0), (8, 9, 2, 1.0)
    ]  # fmt: skip
    assert [(b.low, b.high, b.size) for b in by_value(doubles(0, 0, 0, 1), doubles(1, 1, 1, 1))] == [
        (0, 0, 3), (1, 1, 1)
    ]  # fmt: skip


def test_pairs_are_measured_by_length_margin_and_annotator():
    data = [pair(longer=3, margin=1, annotator="ann"), pair(longer=-3, margin=3, annotator="bob"),
            pair(longer=-1, margin=3, annotator="ann"), pair(margin=0, annotator=None)]  # fmt: skip
    scores = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [1.0, 1.0]]).view(-1, 1)
    numbers, report = measures(scores, data)
    assert numbers["accuracy"] == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert numbers["margin"] == pytest.approx((1 - 1 + 2 + 0) / 4)
    assert numbers["accuracy_shorter_chosen"] == pytest.approx(0.5)
    assert "best_of_4" not in numbers
    assert report["by_annotator"] == {"ann": {"size": 2, "accuracy": 1.0}, "bob": {"size": 1, "accuracy": 0.0}}
    assert [(b.low, b.accuracy) for b in report["by_margin"]][-1] == (3.0, 0.5)


def test_soft_labels_are_right_by_their_chance():
    compared = comparisons_of(torch.tensor([2.0, 1.0, 1.0, 2.0, 1.0, 1.0]), [pair(chance=0.75)] * 3)
    assert compared.right.tolist() == [0.75, 0.25, 0.5]


def test_likes_and_steps_are_told_by_the_sign_of_their_score():
    for form in ("likes", "steps"):
        data = [judged(form, (label,), (3,)) for label in (1.0, 0.0, 0.0, 1.0)]
        numbers, report = measures(torch.tensor([[1.0], [-1.0], [2.0], [3.0]]), data)
        assert numbers["accuracy"] == 0.75
        assert ("spearman_length" in numbers) is False  # one length, or steps
        assert report["by_annotator"] == {}


def test_the_report_is_tables_and_a_plot(tmp_path):
    data = [pair(longer=i - 3, margin=i, annotator="ann") for i in range(8)]
    scores = torch.randn(16, 1, generator=torch.Generator().manual_seed(0))
    reward_report.write_report(tmp_path, measures(scores, data)[1])
    stored = json.loads((tmp_path / "reward_report.json").read_text())
    assert sum(b["size"] for b in stored["by_confidence"]) == 8
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")
    console = Console(record=True, width=100, file=io.StringIO())
    for table in reward_report.tables(tmp_path):
        console.print(table)
    text = console.export_text()
    for title in ("by margin", "by lead", "by confidence", "by annotator"):
        assert f"held-out accuracy {title}" in text
    assert reward_report.tables(tmp_path / "nowhere") == []
