"""The parts of docs/drop_in.md that are made: the names that are replaced, and what the peers' own tests gave.

.venv-peers/bin/python tests/suites/page.py
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "drop_in.md"
RESULTS = HERE / "results.json"


def names(peer: str) -> str:
    """A line of the list: where the peer defines what `patch(peer)` replaces."""
    places = defaultdict(list)
    for dotted in import_module(f"rlhf_fast.integrations.{peer}").replacements():
        place, _, name = dotted.rpartition(".")
        places[place].append(name)
    entries = [f"`{place}`: {', '.join(f'`{x}`' for x in sorted(found))}" for place, found in sorted(places.items())]
    return f"- **{peer}**\n" + "\n".join(f"  - {entry}" for entry in entries)


def suites() -> str:
    rows = ["| peer | tests of | passed | failed | not applicable, and why |", "|---|---|---|---|---|"]
    for peer, result in json.loads(RESULTS.read_text()).items():
        reasons = "; ".join(f"{count}: {reason}" for reason, count in result["reasons"].items()).replace("|", "\\|")
        counts = f"{result['passed']} | {result['failed']} | {reasons or 'none'}"
        rows.append(f"| {peer} {result['installed']} | `{result['source']}` | {counts} |")
    return "\n".join(rows)


def part(text: str, name: str) -> str:
    """What stands in the page between the marks of a name."""
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end of {name} -->", text, re.DOTALL)
    assert found is not None, f"{PAGE.name} has no part {name!r}"
    return found.group(1)


def main() -> None:
    from rlhf_fast.integrations import peers

    text = PAGE.read_text()
    made = {"suites": suites(), **{f"names of {p.name}": names(p.name) for p in peers()}}
    for name, content in made.items():
        mark = f"<!-- {name} -->\n"
        text = text.replace(mark + part(text, name), mark + content)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
