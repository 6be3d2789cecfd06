"""Is a completion right? One function for each kind of answer, and the loop of the process that they run in.

This file is run by its path, without the rest of the package: a process that holds only what a check needs starts at
once. Any check may take forever (a pattern that backtracks, an expression that sympy would expand), in C code that no
exception interrupts; so each has an alarm, which ends the process.
"""

import importlib
import json
import logging
import re
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

Options = Mapping[str, Any]
NEEDS = {"math": "math_verify", "json_schema": "jsonschema"}
MEMORY = 2 << 30  # bytes of the process: 9**9**9 is a short answer


class BadGold(ValueError):
    """The data's own answer cannot be used."""


def extracted(text: str, options: Options) -> str | None:
    """What `extract` finds last in the completion, its first group where it has one; None where it finds nothing."""
    if options["extract"] is None:
        return text
    found = list(re.finditer(options["extract"], text, re.MULTILINE))
    if not found:
        return None
    return found[-1].group(1) if found[-1].re.groups else found[-1].group()


def normal(text: str) -> str:
    """Without case, spaces around and repeated, and a full stop at the end."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def exact(text: str, gold: Any, options: Options) -> bool:
    """The answer itself, or one of a list of answers."""
    form = normal if options["normalize"] else str.strip
    answers = gold if isinstance(gold, list) else [gold]
    if not answers or any(answer is None or isinstance(answer, (list, dict)) for answer in answers):
        raise BadGold("is no text, number or list of them")
    return form(text) in [form(str(answer)) for answer in answers]


def choice(text: str, gold: Any, options: Options) -> bool:
    """The letter of a choice. The last "answer is X" counts; else a letter that opens the completion; else the only
    letter that stands alone."""
    letters = options["choices"]
    right = letters[gold] if isinstance(gold, int) and 0 <= gold < len(letters) else str(gold).strip().upper()
    if len(right) != 1 or right not in letters:
        raise BadGold(f"is neither one of {letters} nor its number, counted from 0")
    letter = rf"\(?\**([{letters}])\b"
    said = re.findall(rf"(?i:answer|choice|option)\W*(?:(?i:is)\W*)?{letter}", text)
    said = said[-1:] or re.findall(rf"\\boxed\{{\W*([{letters}])\W*\}}", text)[-1:]
    said = said or re.findall(rf"\A\s*{letter}(?=\s*(?:[).:,\*]|$))", text, re.MULTILINE)
    said = said or sorted(set(re.findall(rf"\b([{letters}])\b", text)))
    return said == [right]


def regex(text: str, gold: Any, options: Options) -> bool:
    """A match of the pattern, anywhere in the completion."""
    try:
        pattern = re.compile(str(gold))
    except (re.error, OverflowError, RecursionError) as error:
        raise BadGold(f"is no regular expression: {error}") from None
    return pattern.search(text) is not None


def json_schema(text: str, gold: Any, options: Options) -> bool:
    """JSON that the schema allows; a completion with a fenced block is that block."""
    import jsonschema
    import referencing

    try:
        schema = json.loads(gold) if isinstance(gold, str) else gold
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
    except (ValueError, jsonschema.SchemaError) as error:
        raise BadGold(f"is no JSON schema: {str(error).splitlines()[0]}") from None
    blocks = re.findall(r"```(?:json)?\n(.*?)```", text, re.DOTALL)
    try:
        value = json.loads(blocks[-1] if blocks else text)
    except ValueError:
        return False
    return bool(kind(schema, registry=referencing.Registry()).is_valid(value))  # which fetches nothing


def math(text: str, gold: Any, options: Options) -> bool:
    """Equal as mathematics, by math-verify, whose own alarms are off: this process has one."""
    import math_verify

    # math-verify reads LaTeX between its signs only: of 2\sqrt{2} without them it would take the last number. Words are
    # left to it, since as LaTeX they would be products of their letters.
    bare = not re.search(r"\$|\\boxed|\\\(|\\\[|(?<!\\)\b[A-Za-z]{4,}", str(gold))
    forms = [f"${gold}$", str(gold)] if bare else [str(gold)]
    answer = next(filter(None, (math_verify.parse(form, parsing_timeout=None) for form in forms)), None)
    if not answer:
        raise BadGold("is no mathematics that math-verify can read")
    return bool(math_verify.verify(answer, math_verify.parse(text, parsing_timeout=None), timeout_seconds=None))


CHECKS: dict[str, Callable[[str, Any, Options], bool]] = {
    "exact": exact, "choice": choice, "regex": regex, "json_schema": json_schema, "math": math,
}  # fmt: skip


def answered(kind: str, text: str, gold: Any, options: Options) -> dict[str, Any]:
    """{"right": bool}, or {"bad_gold": why}. A check that raises on a completion finds it wrong."""
    try:
        given = extracted(text, options)
        return {"right": CHECKS[kind]("" if given is None else given, gold, options) and given is not None}
    except BadGold as error:
        return {"bad_gold": str(error)}
    except Exception as error:  # noqa: BLE001 - what sympy may raise on what a model wrote has no end
        return {"right": False, "raised": f"{type(error).__name__}: {error}"[:200]}


def serve() -> None:
    """Answer the requests on standard input, one JSON document per line, until it ends. Arguments: modules to import
    before any alarm is set."""
    logging.disable()  # math-verify warns of every call without an alarm of its own
    for module in sys.argv[1:]:
        importlib.import_module(module)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    for line in sys.stdin:
        request = json.loads(line)
        seconds = request.pop("seconds")
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of the processor: a busy machine makes no answer wrong
        signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
        reply = answered(**request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    serve()
