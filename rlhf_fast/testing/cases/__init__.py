"""Small inputs for every op and variant: what the contract tests, the GPU tests and the ahead-of-time report run.

A new op or variant needs an entry in one of these modules; tests/ops/test_contract.py and tests/benchmarks/test_aot.py
name what is missing.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from rlhf_fast.testing.cases.case import Case

CASES: list[Case] = [
    case
    for module in iter_modules(__path__)
    if module.name != "case"
    for case in import_module(f"{__name__}.{module.name}").CASES
]
