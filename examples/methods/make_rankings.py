"""Write rankings.jsonl: `python examples/methods/make_rankings.py` (always the same bytes).

Each prompt of examples/tiny/sft.jsonl with its endings, scored by the words in them.
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "tiny"))

from word_reward import word_score  # noqa: E402


def main() -> None:
    endings: dict[str, list[str]] = {}
    for line in (FOLDER.parent / "tiny" / "sft.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        endings.setdefault(row["prompt"], []).append(row["completion"])
    with (FOLDER / "rankings.jsonl").open("w", encoding="utf-8") as file:
        for prompt, completions in endings.items():
            scores = word_score([prompt] * len(completions), completions)
            if len(set(scores)) > 1:
                file.write(json.dumps({"prompt": prompt, "completions": completions, "scores": scores}) + "\n")


if __name__ == "__main__":
    main()
