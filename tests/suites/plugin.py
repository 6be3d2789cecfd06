"""A pytest plugin that puts our functions in the place of a peer's before its tests are collected, and records them.

run.py says by environment variables which peer, whether to patch, and where the record goes.
"""

from __future__ import annotations

import json
import os
import sys
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

PEER, PATCHED, REPORT = (os.environ[f"SUITE_{name}"] for name in ("PEER", "PATCHED", "REPORT"))
SUITE: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "suites.yaml").read_text())[PEER]
record: dict[str, Any] = {"version": "", "replaced": 0, "tests": {}}


def pytest_configure(config: pytest.Config) -> None:
    import rlhf_fast

    prepare = PREPARATIONS.get(PEER)
    if prepare is not None:
        prepare()
    for module in SUITE.get("imports", []):
        import_module(module)
    if PATCHED == "1":
        record["replaced"] = len(rlhf_fast.patch(PEER))
        assert record["replaced"] > 0
    (this,) = (peer for peer in rlhf_fast.integrations.peers() if peer.name == PEER)
    record["version"] = this.installed or this.tested


def openrlhf() -> None:
    """What it imports of a cluster and never calls in these tests has stand-ins."""
    from rlhf_fast.testing.stand_ins import stand_ins

    with stand_ins():
        for module in ("openrlhf.models.loss", "openrlhf.models.utils", "openrlhf.trainer.ppo_utils.experience_maker"):
            import_module(module)


def flash_attn() -> None:
    """Its Python files alone, from the copy of the checkout: the package itself imports what only a GPU's build has."""
    from rlhf_fast.integrations import _patch

    package = ModuleType("flash_attn")
    package.__path__ = [str(Path.cwd() / "flash_attn")]
    sys.modules["flash_attn"] = package
    _patch._check_version = lambda module: None  # nothing is installed that metadata would know


PREPARATIONS = {"openrlhf": openrlhf, "flash_attn": flash_attn}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for row in SUITE.get("not_applicable", []):
            if any(fnmatch(item.nodeid, pattern) for pattern in row["tests"]):
                item.add_marker(pytest.mark.skip(reason=row["reason"]))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome != "passed":  # a module that is skipped, or that cannot be imported
        record["tests"][report.nodeid] = {"outcome": report.outcome, "reason": _reason(report)}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        known = record["tests"].get(report.nodeid)
        if known is None or known["outcome"] != "failed":
            reason = "" if report.passed else _reason(report)
            record["tests"][report.nodeid] = {"outcome": report.outcome, "reason": reason}


def _reason(report: Any) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:  # a module that cannot be imported: the last line of what is shown
        return str(report.longrepr).strip().split("\n")[-1].removeprefix("E").strip()
    return getattr(report, "wasxfail", "") or crash.message.split("\n")[0]


def pytest_sessionfinish() -> None:
    Path(REPORT).write_text(json.dumps(record))
