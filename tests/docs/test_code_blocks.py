"""The code of the pages is run, what their commands name exists, and so does what they link to."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from fnmatch import fnmatch
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

import rlhf_fast
from rlhf_fast.algorithms import ALGORITHMS, load_algorithm
from rlhf_fast.cli import app
from rlhf_fast.ops import table
from rlhf_fast.ops.advantages.group_advantages import VARIANTS as GROUP_VARIANTS
from rlhf_fast.ops.policy import objective as _policy
from rlhf_fast.ops.preference import objective as _preference
from rlhf_fast.training.config import keys_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
RUN_AS_SHOWN = "docs/start.md"  # its commands are run, and so it writes the files that they need
NEEDS = {"docs/drop_in.md": "trl", "docs/start.md": "peft", "docs/adding_a_loss.md": "triton"}


class Block(NamedTuple):
    """A fenced block; `file` is the line of code right above it, the file that it is, or the folder that it lists."""

    file: str
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    fence = r"(?:^`([\w./]+)`:\n\n)?^```(\w+)\n(.*?)^```$"
    return [Block(*parts) for parts in re.findall(fence, TEXTS[page], re.DOTALL | re.MULTILINE)]


def commands(page: str) -> Iterator[list[str]]:
    """Words of the commands in bash blocks and in the text, without variables that are set for them."""
    lines = [line for block in blocks(page) if block.language == "bash" for line in block.text.splitlines()]
    lines += re.findall(r"`((?:make|pip|python|rlhf_fast) [^`]+)`", prose(page))
    for line in lines:
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            yield [word for word in words if not re.match(r"[A-Z_]+=", word)]


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory, and tables of variants, patches and random numbers that are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    tables = [_policy.VARIANTS, _policy.FUNCTIONS, _preference.VARIANTS]
    if find_spec("triton") is not None:
        tables.append(import_module("rlhf_fast.kernels.policy_losses").FUNCTIONS)
    with ExitStack() as stack:
        for changed in tables:
            stack.enter_context(patch.dict(changed))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(0)
        yield
    for peer in rlhf_fast.integrations.peers():
        rlhf_fast.unpatch(peer.name)


@pytest.mark.parametrize("page", [name for name in TEXTS if "```python" in TEXTS[name]])
def test_the_code_of_a_page_runs_from_top_to_bottom(page, place):
    if page in NEEDS:
        pytest.importorskip(NEEDS[page], reason=f"{page} uses {NEEDS[page]}")
    names: dict[str, object] = {"__name__": "__page__"}
    for block in blocks(page):
        if block.file and block.language == "text":
            assert {line.split()[0] for line in block.text.splitlines()} <= {p.name for p in Path(block.file).iterdir()}
        elif block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, page, "exec"), names)
        elif block.language == "bash" and page == RUN_AS_SHOWN:
            run(block)


def run(block: Block) -> None:
    """Runs our commands; a comment `# error: ...` after one says how it must fail."""
    for command, error in re.findall(r"^(rlhf_fast .*)(?:\n# (error: .*))?", block.text, re.MULTILINE):
        result = CliRunner().invoke(app, shlex.split(command, comments=True)[1:])
        if error:
            assert result.exit_code == 2, result.output
            assert result.stderr.strip() == error
        else:
            assert result.exit_code == 0, f"{command}\n{result.output}{result.exception!r}"


def test_the_calls_that_the_readme_says_to_write_run(place):
    table = TEXTS["README.md"].partition("| you have | write, `from rlhf_fast import` |")[2].partition("\n\n")[0]
    calls = [call for row in table.splitlines() for call in re.findall(r"`(\w+\([^`]*\))`", row)]
    pairs = {name: torch.randn(4) for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")}
    planes = {name: torch.rand(4, 6) for name in ("rewards", "values", "logprobs", "old_logprobs", "advantages")}
    tensors = {
        "logits": torch.randn(4, 6, 50), "hidden": torch.randn(4, 6, 8), "head": torch.randn(50, 8),
        "ids": torch.randint(50, (4, 6)), "mask": torch.ones(4, 6), "scores": torch.randn(4),
    }  # fmt: skip
    assert len(calls) == 7
    for call in calls[:-1]:
        eval(call, vars(rlhf_fast) | pairs | planes | tensors)
    assert calls[-1] in [f'patch("{peer.name}")' for peer in rlhf_fast.integrations.peers()]


@pytest.mark.parametrize("page", [name for name in TEXTS if name != RUN_AS_SHOWN])
def test_the_commands_of_a_page_exist(page):
    for words in filter(None, commands(page)):
        check_command(words)


def check_command(words: list[str]) -> None:
    """Fails for a program, target, module, file, option or key that does not exist."""
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "make":
        targets = re.findall(r"^([\w%-][\w% -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        patterns = [target.replace("%", "*") for line in targets for target in line.split()]
        assert all(any(fnmatch(word, pattern) for pattern in patterns) for word in rest if word != "-B"), words
    elif program == "python":
        source = rest[1].replace(".", "/") if rest[0] == "-m" else rest[0].removesuffix(".py")
        exists = (ROOT / f"{source}.py").is_file() or (ROOT / source / "__main__.py").is_file()
        assert exists or rest[:2] == ["-m", "pytest"], words
    elif program == "pip":
        extras = re.findall(r"\[(.*)\]", " ".join(rest))
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras), words
    elif program in ("torchrun", "accelerate"):
        check_command(rest[rest.index("-m") + 1 :])
    elif program == "rlhf_fast":
        check_ours(rest)
    else:
        raise AssertionError(f"unknown command: {words}")


def check_ours(words: list[str]) -> None:
    command = get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts}
    keys = {key for name in ALGORITHMS for key in keys_of(load_algorithm(name).AlgorithmConfig)}
    for word in words[1:]:
        if word.startswith("--"):
            assert word in options or word.removeprefix("--").replace("-", "_") in keys, words
        elif "=" in word:
            key = word.split("=")[0]
            assert key in keys or key.partition(".")[2] in keys, words


@pytest.mark.parametrize("page", TEXTS)
def test_what_a_page_links_to_exists(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if target.startswith("https://"):
            continue
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page}: {target}"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_is_on_the_page_of_methods(name):
    assert f"`{name}`" in TEXTS["docs/methods.md"]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_readme_lists_every_page():
    linked = set(re.findall(r"\]\((docs/[^)#]*\.md)", TEXTS["README.md"]))
    assert linked == {name for name in TEXTS if name.startswith("docs/")}


def test_the_page_of_drop_ins_lists_every_library_with_its_tested_version():
    listed = re.findall(r'^\| `"(\w+)"` \| (\S+) (\S+) \|', TEXTS["docs/drop_in.md"], re.MULTILINE)
    assert sorted(listed) == sorted((p.name, p.distribution, p.tested) for p in rlhf_fast.integrations.peers())


@pytest.mark.parametrize("name", sorted(set(rlhf_fast.__all__) | set(table())))
def test_every_public_name_is_on_the_page_of_functions(name):
    assert re.search(rf"`{name}`|rf\.{name}\b", TEXTS["docs/ops.md"])


@pytest.mark.parametrize("variant", [*_policy.VARIANTS, *_preference.VARIANTS, *GROUP_VARIANTS])
def test_every_variant_is_on_the_page_of_functions(variant):
    assert f"`{variant}`" in TEXTS["docs/ops.md"]
