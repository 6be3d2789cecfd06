"""A conversation with a run's policy, line by line."""

import io
import sys
from typing import Any

from rlhf_fast.commands.opening import open_run
from rlhf_fast.commands.sample import greedy, plain
from rlhf_fast.data.reading import Row

HELP = "/reset begins again, /quit ends"


def chat(run: str, *, system: str | None = None, before: bool = False, **changes: Any) -> None:
    """Read lines from standard input and answer each, until it ends or says /quit.

    With a chat template each line is a turn of the user behind those before it; without one, each continues the text
    so far. system: the first message, or the beginning of the text. before: talk to what the run started from.
    """
    opened = open_run(run, too_long="truncate", **greedy(changes))
    opened.play(trained=not before)
    encoder = opened.encoder
    turns = encoder.template.exists and encoder.chat is not False
    print(f"{HELP}; {'turns of the chat template' if turns else 'no chat template: each line continues the text'}",
          file=sys.stderr)  # fmt: skip
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is no character becomes one that says so
    messages, text = beginning(system)
    while (line := read_line()) is not None and line.strip() != "/quit":
        if line.strip() == "/reset":
            messages, text = beginning(system)
            continue
        messages, text = [*messages, {"role": "user", "content": line}], text + line
        prompt = encoder.prompt(Row("the conversation", {"prompt": messages if turns else text}))
        (answer,) = plain(opened, [prompt], 1)
        print(answer, flush=True)
        messages, text = [*messages, {"role": "assistant", "content": answer}], text + answer


def beginning(system: str | None) -> tuple[list[dict[str, str]], str]:
    return ([], "") if system is None else ([{"role": "system", "content": system}], system)


def read_line() -> str | None:
    """The next line of standard input; None where there is none."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None
