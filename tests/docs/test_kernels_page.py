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


def test_what_is_faster_elsewhere_is_named(monkeypatch):
    def case(ours: float, other: float) -> dict:
        times = {"eager": 9.0, "cpu": ours, "trl": other}
        rows = {who: {"min_ms": ms, "max_error": 0.0} for who, ms in times.items()} | {
            "memcpy": {"min_ms": 0.1, "max_error": None}
        }
        return {"case": f"op {other}", "shape": "N=1", "bytes": 0, "flops": 0, "contenders": rows}

    results = {
        "machine": {"cpu": "a cpu", "threads": 1, "torch": "2", "commit": "abc", "command": "c"},
        "peers": {}, "limits": {"copy_bytes_per_second": 1.0, "x_flops_per_second": 1.0},
        "cases": [case(2.0, 1.5), case(2.0, 3.0)],
    }  # fmt: skip
    monkeypatch.setattr(catalogue, "read", lambda name: results)
    text = catalogue.summary("cpu.json")
    assert "| op 3.0, N=1 | 2 | 9 | trl 3 |  |" in text
    assert text.endswith("Where another implementation is faster:\n\n- op 1.5, N=1: trl takes 1.5 ms, ours 2\n")
