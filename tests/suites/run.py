"""A peer's own tests with our functions in the place of the peer's: what passes, fails, and does not apply.

    python tests/suites/run.py verl=verl-0.9.1 liger=liger_kernel-0.8.5 [--write]

Each argument is a peer of suites.yaml and the folder of its source distribution or checkout. Nothing is fetched, and
nothing is written there: the tests are copied, and run against the peer that this environment has installed. A test
that fails is run once more without us; one that fails so too says nothing of us and does not apply. --write puts the
counts into results.json, from which docs/drop_in.md is made.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"


def suites() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((HERE / "suites.yaml").read_text())


def stage(suite: dict[str, Any], source: Path, target: Path) -> None:
    """Copy the folders that the tests need, with the replacements of text that `suite` names."""
    for folder in suite["copy"]:
        if not (source / folder).is_dir():
            raise SystemExit(f"{source} has no folder {folder!r}: is it a checkout or a source distribution?")
        shutil.copytree(source / folder, target / folder)
    for edit in suite.get("edits", []):
        path = target / edit["file"]
        text = path.read_text()
        if edit["old"] not in text:
            raise SystemExit(f"{edit['file']} of {source} has no {edit['old']!r}: suites.yaml is of another version")
        path.write_text(text.replace(edit["old"], edit["new"]))


def run(peer: str, suite: dict[str, Any], folder: Path, arguments: list[str], *, patched: bool) -> dict[str, Any]:
    """What plugin.py recorded of one run of pytest."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    environment = {
        **os.environ, "PYTHONPATH": str(HERE), "SUITE_PEER": peer,
        "SUITE_PATCHED": str(int(patched)), "SUITE_REPORT": str(report),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "pytest", "-p", "plugin", "-c", os.devnull, f"--rootdir={folder}", "-q", "--tb=short",
        "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning",
        "--continue-on-collection-errors", *suite.get("options", []), *arguments,
    ]  # fmt: skip
    log = folder / f"{'patched' if patched else 'plain'}.log"
    with log.open("w") as out:
        status = subprocess.run(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT).returncode
    if status not in (0, 1) or not report.exists():
        raise SystemExit(f"{peer}: pytest ended with status {status}\n{log.read_text()[-4000:]}")
    return json.loads(report.read_text())


def outcome(peer: str, suite: dict[str, Any], source: Path, folder: Path) -> dict[str, Any]:
    stage(suite, source, folder)
    found = run(peer, suite, folder, suite["tests"], patched=True)
    failed = {test: why for test, why in found["tests"].items() if why["outcome"] == "failed"}
    inapplicable = Counter(why["reason"] for why in found["tests"].values() if why["outcome"] == "skipped")
    if failed and suite.get("runs_without_us", True):
        plain = run(peer, suite, folder, sorted(failed), patched=False)["tests"]
        for test in [test for test in failed if plain.get(test, {}).get("outcome") == "failed"]:
            del failed[test]
            inapplicable[f"fails without our functions as well: {plain[test]['reason']}"] += 1
    passed = sum(why["outcome"] == "passed" for why in found["tests"].values())
    return {
        "source": source.name, "installed": found["version"], "replaced": found["replaced"], "passed": passed,
        "failed": len(failed), "not applicable": sum(inapplicable.values()),
        "reasons": dict(sorted(inapplicable.items())), "failures": {k: v["reason"] for k, v in sorted(failed.items())},
    }  # fmt: skip


def show(peer: str, result: dict[str, Any]) -> None:
    print(f"\n{peer} {result['installed']}, tests of {result['source']}; {result['replaced']} names replaced")
    print("  " + ", ".join(f"{result[key]} {key}" for key in ("passed", "failed", "not applicable")))
    for reason, count in result["reasons"].items():
        print(f"  not applicable, {count}: {reason}")
    for test, reason in result["failures"].items():
        print(f"  FAILED {test}\n    {reason}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("suites", nargs="+", metavar="PEER=FOLDER")
    parser.add_argument("--write", action="store_true", help="put the counts into results.json")
    parser.add_argument("--keep", type=Path, help="a folder for the copies of the tests and pytest's output")
    arguments = parser.parse_args()
    known, failures = suites(), 0
    for given in arguments.suites:
        peer, _, folder = given.partition("=")
        source = Path(folder).expanduser().resolve()
        if peer not in known or not folder or not source.is_dir():
            raise SystemExit(f"expected PEER=FOLDER with a peer of {', '.join(known)} and a folder, got {given!r}")
        with tempfile.TemporaryDirectory() as temporary:
            target = Path(temporary) if arguments.keep is None else arguments.keep / peer
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            result = outcome(peer, known[peer], source, target)
        show(peer, result)
        failures += result["failed"]
        if arguments.write:
            recorded = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            kept = {key: value for key, value in result.items() if key != "failures"}
            RESULTS.write_text(json.dumps(dict(sorted({**recorded, peer: kept}.items())), indent=1) + "\n")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
