"""Make preference pairs from the model's own samples: `python examples/smollm2/make_preference_pairs.py`.

Every prompt gets a few sampled completions, each cut after its last whole sentence and scored by VADER. The best
is paired with the worst and, for training, the second best with the second worst, if their scores lie apart.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from prepare_model import DEFAULT_FOLDER
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from vader_reward import compound

from rlhf_fast.data.reading import read_jsonl

FOLDER = Path(__file__).parent
# Prompts, where their pairs go, pairs per prompt at most.
SPLITS = (
    ("prompts_train.jsonl", "preferences.jsonl", 2),
    ("prompts_heldout.jsonl", "preferences_heldout.jsonl", 1),
)


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], samples: int, **options: Any
) -> list[list[str]]:
    """`samples` completions of each prompt, as text."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(**batch, do_sample=True, top_k=0, num_return_sequences=samples, **options)
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def whole_sentences(text: str) -> str:
    """`text` up to its last sentence end; empty when no sentence ends."""
    match = re.match(r".*[.!?][\"”’']?(?=\s|$)", text, flags=re.DOTALL)
    return match.group() if match else ""


def pairs_of(prompt: str, completions: list[str], *, limit: int, min_margin: float) -> list[dict[str, str | float]]:
    """Up to `limit` pairs (best, worst), (second, second worst), ... with scores at least `min_margin` apart."""
    texts = list(dict.fromkeys(text for text in map(whole_sentences, completions) if text.strip()))
    scored = sorted(zip(compound(prompts=[prompt] * len(texts), completions=texts), texts, strict=True))
    return [
        {"prompt": prompt, "chosen": best, "rejected": worst, "chosen_score": high, "rejected_score": low}
        for (low, worst), (high, best) in zip(scored[: min(limit, len(scored) // 2)], scored[::-1], strict=False)
        if high - low >= min_margin
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample, score and pair completions of the training prompts.")
    parser.add_argument("--model", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--samples", type=int, default=4, help="completions per prompt")
    parser.add_argument("--max-new-tokens", type=int, default=36)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--min-margin", type=float, default=0.4, help="least difference of the two scores")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts at a time")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        raise SystemExit(f"no model in {arguments.model}: run python examples/smollm2/prepare_model.py first")

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    options = {"max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature}
    for prompt_file, pair_file, limit in SPLITS:
        set_seed(arguments.seed)
        prompts = [row["prompt"] for row in read_jsonl(FOLDER / prompt_file)]
        rows = []
        for start in range(0, len(prompts), arguments.batch_size):
            batch = prompts[start : start + arguments.batch_size]
            completions = sample(model, tokenizer, batch, arguments.samples, **options)
            for prompt, texts in zip(batch, completions, strict=True):
                rows += pairs_of(prompt, texts, limit=limit, min_margin=arguments.min_margin)
            print(f"{start + len(batch)} of {len(prompts)} prompts, {len(rows)} pairs", flush=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (FOLDER / pair_file).write_text(text, encoding="utf-8")
        print(f"wrote {len(rows)} pairs to {FOLDER / pair_file}")


if __name__ == "__main__":
    main()
