"""Chat templates are programs of somebody else: those that could take forever, or all memory, run in a process of their
own, within limits.

Templates of usual models only walk through the messages and join text, which `is_tame` sees in their syntax; they are
rendered in this process, in tens of microseconds. Jinja's sandbox keeps all of them from files and from Python.
"""

import contextlib
import multiprocessing
import os
import re
import resource
import signal
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from transformers import PreTrainedTokenizerBase

SECONDS = 5  # of the processor, and ten times as long by the clock
MEMORY = 256 << 20  # bytes that one rendering may need
TEXT = 1 << 26  # characters of what is rendered
_SIZE = 1 << 16  # characters of a template that is looked at
_NODES = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign, nodes.Const, nodes.Name,
    nodes.NSRef, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.List, nodes.Dict, nodes.Pair, nodes.Tuple,
    nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.CondExpr, nodes.Concat, nodes.Add, nodes.Sub,
    nodes.Mod, nodes.Neg, nodes.Test, nodes.Filter, nodes.Call, nodes.Keyword, nodes.Break, nodes.Continue,
)  # fmt: skip
_FILTERS = {
    "trim", "tojson", "length", "count", "string", "upper", "lower", "capitalize", "title", "first", "last", "list",
    "items", "select", "reject", "selectattr", "rejectattr", "map", "int", "default", "safe", "reverse", "join",
}  # fmt: skip
_METHODS = {
    "strip",
    "lstrip",
    "rstrip",
    "split",
    "startswith",
    "endswith",
    "items",
    "keys",
    "values",
    "get",
    "upper",
    "lower",
}
_FUNCTIONS = {"raise_exception", "namespace", "strftime_now", "dict"}
_MARKS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


class TooMuch(Exception):
    """A rendering that was ended."""


class Renderer:
    """apply_chat_template of a tokenizer, within limits. Raises whatever the template raises, and TooMuch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        template = tokenizer.chat_template
        self.tame = all(map(is_tame, template.values() if isinstance(template, dict) else [template]))
        self._worker: _Worker | None = None
        self._ended: str | None = None

    def __call__(self, messages: Any, **options: Any) -> Any:
        if self.tame:
            return self.tokenizer.apply_chat_template(messages, **options)
        if self._ended is not None:  # what it did once it would do for every row
            raise TooMuch(self._ended)
        self._worker = self._worker or _Worker(self.tokenizer)
        try:
            return self._worker.ask(messages, options)
        except TooMuch as error:
            self._ended, self._worker = str(error), None
            raise


class _Worker:
    """A fork of this process, which nothing has to be sent to but the messages."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(tokenizer, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, messages: Any, options: dict[str, Any]) -> Any:
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send((messages, options))
        try:
            if not self.pipe.poll(10 * SECONDS):
                self.process.kill()
            fine, value = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise TooMuch(f"it takes more than {SECONDS} s, or ends the process that it runs in") from None
        if fine:
            return value
        raise value


def _serve(tokenizer: PreTrainedTokenizerBase, pipe: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number, handler in (
        (signal.SIGPROF, signal.SIG_DFL), (signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.SIG_IGN),
    ):  # fmt: skip
        signal.signal(number, handler)
    _limit_memory()
    parent = os.getppid()
    while True:
        while not pipe.poll(1):
            if os.getppid() != parent:  # it was killed
                os._exit(0)
        messages, options = pipe.recv()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        reply = _reply(tokenizer, messages, options)
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(reply)


def _limit_memory() -> None:
    pages = Path("/proc/self/statm")
    if pages.is_file():
        limit = int(pages.read_text().split()[0]) * resource.getpagesize() + MEMORY
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        lowest = min(limit, *(x for x in (soft, hard) if x != resource.RLIM_INFINITY), limit)
        resource.setrlimit(resource.RLIMIT_AS, (lowest, hard))


def _reply(tokenizer: PreTrainedTokenizerBase, messages: Any, options: dict[str, Any]) -> tuple[bool, Any]:
    """(whether it was rendered, what came of it or why not)."""
    try:
        value: Any = tokenizer.apply_chat_template(messages, **options)
        value = {key: list(item) for key, item in value.items()} if hasattr(value, "items") else value
        if isinstance(value, str) and len(value) > TEXT:
            return False, TooMuch(f"it makes {len(value):,} characters")
        return True, value
    except MemoryError:
        return False, TooMuch(f"it needs more than {MEMORY >> 20} MiB")
    except Exception as error:  # noqa: BLE001 - a template is code of its own and may raise anything
        return False, ValueError(" ".join(str(error).split())[:300] or type(error).__name__)


def is_tame(template: Any) -> bool:
    """Whether a template can only walk through what it is given, in loops at most two deep, and join text of it.

    What is kept over the rounds of a loop grows by what it is given in each, never by itself: what is set may be made
    of one thing that was set before, and not be walked through while something is kept.
    """
    if not isinstance(template, str) or len(template) > _SIZE:
        return False
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_MARKS.sub("", template))
    except (TemplateSyntaxError, RecursionError):
        return False
    try:
        return _tame(tree, frozenset(_set(tree)), 0)
    except RecursionError:
        return False


def _set(tree: nodes.Node) -> set[str]:
    targets = [
        target
        for assign in tree.find_all(nodes.Assign)
        for target in [assign.target, *assign.target.find_all(nodes.Name)]
    ]
    return {target.name for target in targets if isinstance(target, nodes.Name | nodes.NSRef)}


def _refers(node: nodes.Node, names: frozenset[str]) -> int:
    own = isinstance(node, nodes.Name) and node.name in names
    return own + sum(name.name in names for name in node.find_all(nodes.Name))


def _tame(node: nodes.Node, kept: frozenset[str], depth: int) -> bool:
    if not isinstance(node, _NODES):
        return False
    if isinstance(node, nodes.Const) and isinstance(node.value, int) and abs(node.value) > 1000:
        return False
    if isinstance(node, nodes.Mod) and not (
        isinstance(node.left, nodes.Getattr) and node.left.attr.startswith("index")
    ):
        return False  # of text it is formatting, with a width
    if isinstance(node, nodes.Filter) and node.name not in _FILTERS:
        return False
    if (
        isinstance(node, nodes.Filter)
        and node.name == "join"
        and not all(isinstance(x, nodes.Const) for x in node.args)
    ):
        return False
    if isinstance(node, nodes.Call):
        known = isinstance(node.node, nodes.Name) and node.node.name in _FUNCTIONS
        if not known and not (isinstance(node.node, nodes.Getattr) and node.node.attr in _METHODS):
            return False
    if isinstance(node, nodes.Assign) and _refers(node.node, kept) > 1:
        return False
    if isinstance(node, nodes.For):
        depth += 1
        walked = _refers(node.iter, kept) > 0
        if (
            depth > 2
            or node.recursive
            or (
                walked
                and any(_refers(a.node, kept) for a in node.find_all(nodes.Assign) if isinstance(a.target, nodes.NSRef))
            )
        ):
            return False
    return all(_tame(child, kept, depth) for child in node.iter_child_nodes())
