import pytest

from benchmarks import catalogue
from benchmarks.catalogue import PAGES, ROOT, with_tables
from benchmarks.costs import COSTS
from rlhf_fast.ops import table


def test_every_op_is_in_the_catalogue():
    assert set(COSTS) == set(table())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tables_are_those_of_the_committed_results(page):
    assert page.read_text(encoding="utf-8") == with_tables(page), "regenerate them: python -m benchmarks.catalogue"


def test_the_headline_has_a_row_for_each_op_with_its_fastest_library_and_says_how_often_another_is_faster():
    def case(op: str, ours: float, other: float) -> dict:
        medians = {
            "eager": (9.0, 0.0),
            "cpu": (ours, 0.0),
            "trl": (other, 0.0),
            "verl": (8.0, 0.0),
            "memcpy": (0.1, None),
        }
        rows = {who: {"median_ms": t, "p10_ms": t, "p90_ms": t, "max_error": e} for who, (t, e) in medians.items()}
        return {
            "case": f"{op} {other}", "op": op, "shape": "N=1", "group": "bars", "bytes": 0, "flops": 0,
            "contenders": rows,
        }  # fmt: skip

    results = {
        "machine": {
            "cpu": "a cpu", "threads": 1, "torch": "2", "commit": "abc", "command": "c", "uncommitted_changes": False,
        },
        "peers": {}, "absent": {}, "limits": {"copy_bytes_per_second": 1.0, "x_flops_per_second": 1.0},
        "cases": [case("gae", 2.0, 3.0), case("whiten", 2.0, 1.6), case("whiten", 2.0, 4.0)],
    }  # fmt: skip
    text = catalogue.headline(results)
    assert "| gae 3.0, N=1 | 2 | 9 | trl 3 |  |\n| whiten 1.6, N=1 | 2 | 9 | trl 1.6 |  |\n\na cpu, 1 threads" in text
    assert text.endswith("In 1 of the 3 cases of this run another implementation is faster, beyond the spread.\n")
