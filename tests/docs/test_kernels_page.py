from benchmarks.catalogue import README, with_tables
from benchmarks.costs import COSTS
from rlhf_fast.ops import table


def test_every_op_is_in_the_catalogue():
    assert set(COSTS) == set(table())


def test_the_tables_are_those_of_the_committed_results():
    text = README.read_text(encoding="utf-8")
    assert text == with_tables(text), "regenerate them: python -m benchmarks.catalogue"
