"""Critique and revision: a model rewrites its own answers by written principles.

Bai et al. 2022, Constitutional AI (2212.08073), section 3: for each round one principle is drawn, the model says where
its answer falls short of it, and writes another; a base model is shown examples of that first. The principles and the
examples here are our own. Small models tend to repeat themselves when they revise (2504.04918): such rewritings are
dropped, and it is said how many.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_fast.data.encoding import Prompt
from rlhf_fast.rewards.judge import transcript
from rlhf_fast.rewards.speakers import LocalSpeaker
from rlhf_fast.training.folder import DROPPED, step_file, write_rows, written_rows
from rlhf_fast.training.labels import kept_columns
from rlhf_fast.training.run import Run

PRINCIPLES = (
    "The answer says only what is true, and says so where something is not known.",
    "The answer does what was asked, and leaves out what was not asked for.",
    "The answer helps nobody to hurt people, animals or property.",
    "The answer respects everyone whom it speaks of, whoever they are.",
    "The answer gives no advice that only a doctor, a lawyer or another expert who knows the case could give.",
    "The answer neither flatters nor talks down to the person who asks.",
    "The answer keeps private what people would want to be kept private.",
    "The answer says why where it declines, without a sermon, and offers what help it can.",
)
EXAMPLES = (
    ("How do I get my neighbour's dog to stop barking?",
     "Put something in its food that makes it sleep.",
     PRINCIPLES[2],
     "Drugging an animal can kill it, so the answer helps to do harm.",
     "Talk to your neighbour first; a dog that barks is often alone for too long. If that does not help, the town has "
     "an office for noise."),
    ("When was the bridge in our village built?",
     "It was built in 1871 by a famous engineer.",
     PRINCIPLES[0],
     "Nobody said which village it is, so the year and the engineer are made up.",
     "I do not know which village yours is. A plate on the bridge, or the archive of the village, will have the year."),
)  # fmt: skip
CHOICE = "Question:\n{prompt}\n\nAnswer:\n{answer}\n\nPrinciple: {principle}\n\n"
CRITICISE = "Say in a sentence or two where the answer falls short of the principle."
REVISE = "Critique: {critique}\n\nRewrite the answer so that it follows the principle. Write the new answer alone."
WINDOW = 12  # characters


@dataclass
class Draft:
    """An answer with its rounds: answers[0] is the first one, answers[i] the revision of round i, all without white
    space around them. lead: the white space that parts the first one from its prompt, where that is plain text."""

    prompt: Prompt
    answers: list[str]
    principles: list[str] = field(default_factory=list)
    critiques: list[str] = field(default_factory=list)
    lead: str = ""

    def row(self) -> dict[str, Any]:
        """What supervised fine-tuning reads, with how it came about."""
        return {
            **kept_columns(self.prompt.columns), "completion": self.lead + self.answers[-1],
            "original": self.lead + self.answers[0], "revisions": self.answers[1:], "principles": self.principles,
            "critiques": self.critiques,
        }  # fmt: skip


def revised(
    speaker: LocalSpeaker, prompts: Sequence[Prompt], answers: Sequence[str], principles: Sequence[str], *,
    rounds: int, critique_tokens: int, answer_tokens: int, seed: int,
) -> list[Draft]:  # fmt: skip
    """The answers after `rounds` critiques and revisions, each by a principle that the seed and the prompt draw."""
    drafts = [
        Draft(prompt, [answer.strip()], lead=_lead(answer) if isinstance(prompt.columns["prompt"], str) else "")
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    chat = speaker.chat
    for number in range(rounds):
        for draft in drafts:
            draft.principles.append(_drawn(principles, seed, number, transcript(draft.prompt.columns["prompt"])))
        heads = [_examples(chat) + _shown(draft) for draft in drafts]
        asked = [head + (CRITICISE if chat else "Critique:") for head in heads]
        for draft, text in zip(drafts, speaker.write(asked, critique_tokens), strict=True):
            draft.critiques.append(text if chat else _first_part(text))
        template = REVISE if chat else "Critique: {critique}\n\nRevision:"
        asked = [
            head + template.format(critique=draft.critiques[-1]) for head, draft in zip(heads, drafts, strict=True)
        ]
        for draft, text in zip(drafts, speaker.write(asked, answer_tokens), strict=True):
            draft.answers.append(text if chat else _first_part(text))
    return drafts


def _lead(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _shown(draft: Draft) -> str:
    asked = transcript(draft.prompt.columns["prompt"])
    return CHOICE.format(prompt=asked, answer=draft.answers[-1], principle=draft.principles[-1])


def _examples(chat: bool) -> str:
    """What a base model is shown first."""
    if chat:
        return ""
    return "".join(
        CHOICE.format(prompt=prompt, answer=answer, principle=principle)
        + f"Critique: {critique}\n\nRevision: {revision}\n\n"
        for prompt, answer, principle, critique, revision in EXAMPLES
    )


def _first_part(text: str) -> str:
    """A base model goes on with further examples behind its answer."""
    return text.partition("\n\n")[0].strip()


def _drawn(principles: Sequence[str], *content: Any) -> str:
    digest = hashlib.sha256("\0".join(map(str, content)).encode()).digest()
    return principles[int.from_bytes(digest[:8], "big") % len(principles)]


def repetition(text: str) -> float:
    """The share of the text's windows of WINDOW characters that an earlier place of it has too, in [0, 1)."""
    windows = [text[i : i + WINDOW] for i in range(len(text) - WINDOW + 1)]
    return 1.0 - len(set(windows)) / len(windows) if windows else 0.0


def sifted(drafts: Sequence[Draft], limit: float, seen: set[str]) -> tuple[list[Draft], list[tuple[str, Draft]]]:
    """(those to keep, those to drop with the reason): empty ones, those whose repetition is above `limit`, and those
    that say what an earlier one says word for word. seen: the answers so far, which grows."""
    kept, dropped = [], []
    for draft in drafts:
        text = draft.answers[-1]
        reason = (
            "empty" if not text else "repeats itself" if repetition(text) > limit
            else "same as another" if text in seen else ""
        )  # fmt: skip
        if reason:
            dropped.append((reason, draft))
        else:
            seen.add(text)
            kept.append(draft)
    return kept, dropped


def write_sifted(
    run: Run, prompts: Sequence[Prompt], size: int, limit: float, make: Callable[[Sequence[Prompt], int], list[Draft]]
) -> None:
    """The rows of `make(prompts, part)` for every `size` prompts, kept and dropped ones in a file each.

    A run that is resumed goes on behind its last part: parts do not depend on each other, but for `seen`.
    """
    seen: set[str] = set()
    for part in run.track("revisions", range(-(-len(prompts) // size))):
        if not step_file(run.folder, part).is_file():
            kept, dropped = sifted(make(prompts[part * size : (part + 1) * size], part), limit, seen)
            rows = [{"dropped": reason, **draft.row()} for reason, draft in dropped]
            write_rows(run.folder, part, rows, DROPPED)
            write_rows(run.folder, part, [draft.row() for draft in kept])
        seen |= {row["revisions"][-1] for row in written_rows(run.folder)}


def told(reasons: Sequence[str], total: int) -> str:
    """One line: how many of all revisions were dropped, and why."""
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(Counter(reasons).items()))
    return f"{len(reasons)} of {total} revisions are dropped" + (f": {listed}" if reasons else "")
