"""The numbers behind the figures of docs/how_it_works.md, and in its text."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"
FIGURES = runpy.run_path(str(DOCS / "figures.py"))
PAGE = (DOCS / "how_it_works.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "last"), [("z - logsumexp(z)", 14), ("log_softmax(z)", 15)])
def test_eager_log_probabilities_are_off_at_14_nats_and_nothing_soon_after(name, last):
    written = FIGURES["WRITTEN"][name]
    assert all(0.13 < error < 0.16 for error in FIGURES["collapse"](written, 14.0))
    assert max(FIGURES["collapse"](written, float(last))) < 1
    for margin in range(last + 1, 31):
        assert FIGURES["collapse"](written, float(margin)) == (1, 1)


def test_ours_stay_exact_from_0_to_30_nats():
    written = FIGURES["WRITTEN"]["token_logprobs"]
    assert max(max(FIGURES["collapse"](written, margin)) for margin in FIGURES["MARGINS"]) < 3e-6


@pytest.mark.parametrize(
    ("name", "frozen", "trained"),
    [("all logits kept", 2, 3), ("tiles made again in backward", 3, 4), ("linear_logprobs", 2, 3)],
)
def test_the_products_of_a_head_are_those_of_the_page(name, frozen, trained):
    counted = [FIGURES["head_cost"](FIGURES["HEADS"][name], trained=t).products for t in (False, True)]
    assert counted == [frozen, trained]


def test_a_frozen_head_keeps_hidden_states_and_no_logits():
    frozen, trained = (FIGURES["head_cost"](FIGURES["HEADS"]["linear_logprobs"], trained=t) for t in (False, True))
    share = FIGURES["D"] / FIGURES["V"]
    assert share <= frozen.kept < 1.5 * share
    assert trained.kept >= 1


def test_the_bytes_of_four_roles_are_those_of_the_page():
    sizes = FIGURES["role_bytes"]()
    total = sum(sizes.values())
    text = f"take {total / sizes['base']:.3f} times the bytes of the\nfrozen model alone"
    assert text in PAGE
    assert f"{total / 2**30:.2f} GiB beside {sizes['base'] / 2**30:.2f} GiB" in PAGE


def test_every_figure_is_committed_small_and_shown():
    for name in FIGURES["FIGURES"]:
        assert (DOCS / "figures" / f"{name}.png").stat().st_size < 60_000
        assert f"](figures/{name}.png)" in PAGE
    assert {path.stem for path in (DOCS / "figures").iterdir()} == set(FIGURES["FIGURES"])


@pytest.mark.parametrize("name", FIGURES["FIGURES"])
def test_a_figure_can_be_drawn(name, tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    torch.manual_seed(0)
    FIGURES["FIGURES"][name](tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000
