"""The command line. `rlhf_fast train` runs one algorithm, or a list of stages, from a YAML file and flags."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_fast.algorithms import ALGORITHMS, load_algorithm
from rlhf_fast.backends import BackendError
from rlhf_fast.errors import UserError, short
from rlhf_fast.training.config import RolloutConfig, flat, parse_overrides
from rlhf_fast.training.keys import described

# One line per mistake is ours to print; Python's own tracebacks stay plain.
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

TRAIN_HELP = """Train from a YAML file and flags.

    rlhf_fast train config.yaml learning_rate=1e-4 --steps 200

    rlhf_fast train --algorithm grpo --model M --data prompts.jsonl --reward rewards.py:score

Every key of the YAML file is also a flag, as key=value or --key value. `rlhf_fast keys` lists the algorithms,
`rlhf_fast keys ppo` the keys of one.
"""
LONGEST = 2000  # characters of an error
KEYS = {key.name: key for key in described(RolloutConfig)}


def _flag(name: str) -> Any:
    """A key of the configuration as a flag, with the type and the description that it has there."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    return typer.Option(*spellings, metavar=KEYS[name].type, help=KEYS[name].description)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """A mistake of the user becomes one line on stderr and exit status 2."""
    try:
        yield
    except (UserError, BackendError) as error:
        said = " ".join(str(error).split())
    except OSError as error:
        if error.filename is None:
            raise
        said = f"{short(str(error.filename))}: {error.strerror}"  # too long a name, no permission, a ring of links
    else:
        return
    typer.echo(f"error: {said if len(said) <= LONGEST else f'{said[:LONGEST]}...'}", err=True)
    raise typer.Exit(2)


class _Lasting:
    """A standard stream that a run outlives: where its reader is gone, or its disk full, nothing more is written."""

    def __init__(self, stream: Any, tell: Callable[[str], None]) -> None:
        self._stream, self._tell, self._broken = stream, tell, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], Any]) -> None:
        if self._broken:
            return
        try:
            action()
        except OSError as error:
            self._broken = True
            # What is still in its buffer goes nowhere, so that the end of the process does not stumble over it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self._tell(f"warning: {self._stream.name} cannot be written ({error.strerror}); the run goes on")


@contextmanager
def _lasting_streams() -> Iterator[None]:
    """A closed pipe (`| head`) or a full disk behind standard output or error does not end what runs inside."""
    streams = sys.stdout, sys.stderr
    sys.stderr = _Lasting(streams[1], lambda line: None)  # type: ignore[assignment]
    sys.stdout = _Lasting(streams[0], lambda line: print(line, file=sys.stderr))  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams


@app.command(help=TRAIN_HELP, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[str | None, typer.Option(help="YAML file; may also be the first word")] = None,
    algorithm: Annotated[str | None, _flag("algorithm")] = None,
    model: Annotated[str | None, _flag("model")] = None,
    data: Annotated[str | None, _flag("data")] = None,
    reward: Annotated[str | None, _flag("reward")] = None,
    output_dir: Annotated[str | None, _flag("output_dir")] = None,
    steps: Annotated[str | None, _flag("steps")] = None,
    batch_size: Annotated[str | None, _flag("batch_size")] = None,
    learning_rate: Annotated[str | None, _flag("learning_rate")] = None,
    objective: Annotated[str | None, _flag("objective")] = None,
    kl_coef: Annotated[str | None, _flag("kl_coef")] = None,
    lora_rank: Annotated[str | None, _flag("lora_rank")] = None,
    seed: Annotated[str | None, _flag("seed")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "--dry_run", help="print the plan; write nothing")] = False,
    resume: Annotated[str | None, typer.Option(help="auto, or a run or checkpoint folder")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier run in output_dir")] = False,
) -> None:
    words = list(context.args)
    if config is None and words and not words[0].startswith("--") and "=" not in words[0]:
        config = words.pop(0)
    words = [f"{name}={x}" for name, x in context.params.items() if name in KEYS and x is not None] + words
    with _lasting_streams(), _one_line_errors():
        from rlhf_fast.algorithms.launch import launch
        from rlhf_fast.signals import Stopped

        try:
            launch(config, parse_overrides(words), dry_run=dry_run, resume=resume, overwrite=overwrite)
        except Stopped as stopped:
            typer.echo(str(stopped))
            raise typer.Exit(stopped.exit_code) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rlhf_fast {version('rlhf_fast')}")
        raise typer.Exit


@app.callback()
def common(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """RLHF on one frozen model: PPO, GRPO, DPO, SFT and reward models."""


@app.command()
def keys(algorithm: Annotated[str | None, typer.Argument(help="a name of the list")] = None) -> None:
    """List the algorithms; with the name of one, its keys with types, defaults and what they are."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    with _one_line_errors():
        if algorithm is None:
            table = Table("algorithm", "module", "what it sets")
            for name, preset in ALGORITHMS.items():
                defaults = ", ".join(f"{key}: {x}" for key, x in flat(preset.defaults).items())
                table.add_row(name, preset.module, Text(defaults))
        else:
            table = Table("key", "type", "default", "what", title=algorithm)
            config_class = load_algorithm(algorithm).AlgorithmConfig
            for key in described(config_class, {**ALGORITHMS[algorithm].defaults, "algorithm": algorithm}):
                table.add_row(*map(Text, key))
        table.columns[0].no_wrap = True
    Console(markup=False, emoji=False).print(table)


@app.command()
def probe(
    model: Annotated[str, typer.Argument(metavar="RM", help="reward adapter, or reward model folder[:label]")],
    data: Annotated[str | None, typer.Option(help="further rows: prompt, chosen (right), rejected (wrong), and perhaps "
                                                  "opinion; or prompt, completion, paraphrase")] = None,
    out: Annotated[Path, typer.Option(help="the report as JSON")] = Path("probe.json"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    chat: Annotated[bool, typer.Option("--chat", help="plain prompts go through the chat template too")] = False,
) -> None:  # fmt: skip
    """What a reward model pays for besides the answer: agreement with a user who is wrong, and another wording."""
    with _one_line_errors():
        from rich.console import Console

        from rlhf_fast.data.encoding import quiet_libraries
        from rlhf_fast.data.sources import read_rows
        from rlhf_fast.rewards.probe import run_probe
        from rlhf_fast.training.setup import usable_device

        quiet_libraries()
        rows = read_rows(data) if data else []
        Console(markup=False, emoji=False).print(run_probe(model, rows, out, device=usable_device(device), chat=chat))


RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="a run, an adapter or a model")]
OutFolder = Annotated[str, typer.Option(help="folder to write")]
NewTokens = Annotated[int | None, typer.Option(help="default: the run's own, as of the next three")]
Temperature = Annotated[float | None, typer.Option(help="0: always the likeliest token")]
TopK = Annotated[int | None, typer.Option()]
TopP = Annotated[float | None, typer.Option()]
Seed = Annotated[int | None, typer.Option()]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run the code that the model's folder holds")]


@app.command()
def sample(
    run: RunFolder,
    prompts: Annotated[str | None, typer.Option(help="a data file with a column prompt")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="a prompt; may be repeated")] = None,
    n: Annotated[int, typer.Option("--n", help="completions of each prompt")] = 1,
    best_of: Annotated[int, typer.Option(help="each the best of so many by the reward")] = 1,
    reward: Annotated[str | None, typer.Option(help="as the key reward")] = None,
    out: Annotated[str | None, typer.Option(help="JSON lines in place of a table")] = None,
    before: Annotated[bool, typer.Option(help="beside what the run started from")] = True,
    batch_size: Annotated[int, typer.Option(help="completions at a time")] = 16,
    max_new_tokens: NewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Completions of a run's policy beside those of what it started from."""
    with _one_line_errors():
        from rlhf_fast.commands.sample import Wanted
        from rlhf_fast.commands.sample import sample as run_sample

        run_sample(
            run, prompts, prompt or [], Wanted(n, best_of, reward, batch_size), before=before, out=out,
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, device=device,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip


@app.command()
def chat(
    run: RunFolder,
    system: Annotated[str | None, typer.Option(help="the system message")] = None,
    before: Annotated[bool, typer.Option("--before", help="talk to what the run started from")] = False,
    max_new_tokens: NewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Talk to a run's policy: a line of standard input is a turn."""
    with _one_line_errors():
        from rlhf_fast.commands.chat import chat as run_chat

        run_chat(
            run, system=system, before=before, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
            top_p=top_p, seed=seed, device=device, trust_remote_code=trust_remote_code,
        )  # fmt: skip


@app.command()
def export(
    run: RunFolder,
    out: OutFolder,
    to: Annotated[str, typer.Option(help="peft, merged or gguf")] = "peft",
    dtype: Annotated[str | None, typer.Option(help="of merged weights; default: the base model's own")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write a run's policy as an adapter of PEFT, as a whole model, or as GGUF."""
    with _one_line_errors():
        from rlhf_fast.commands.export import export as run_export

        typer.echo(run_export(run, to, out, dtype, trust_remote_code=trust_remote_code))


@app.command(context_settings={"ignore_unknown_options": True})  # a weight may be below 0
def soup(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="adapters of one base model")],
    out: OutFolder,
    weights: Annotated[str | None, typer.Option(help="one number each, 0.5 0.5 or 0.5,0.5; default: equal")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """The exact weighted average of adapters, as an adapter whose rank is the sum of theirs."""
    with _one_line_errors():
        from rlhf_fast.commands.soup import parse_weights
        from rlhf_fast.commands.soup import soup as run_soup

        typer.echo(run_soup(*parse_weights(runs, weights), out, trust_remote_code=trust_remote_code))


@app.command()
def frontier(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="runs with evaluations")],
    out: Annotated[str, typer.Option(help="PNG to write")] = "frontier.png",
) -> None:
    """Plot held-out reward against the square root of KL over the evaluations of runs."""
    with _one_line_errors():
        from rlhf_fast.training.report import plot_frontier

        typer.echo(f"{plot_frontier([Path(run) for run in runs], Path(out))}")


BENCH_HELP = """Time our kernels beside plain PyTorch and other libraries; needs the repository, not only the package.

    rlhf_fast bench --out out/cpu.json [--case NAME] [--device cuda] [--quick] [--compare OLD.json]

    rlhf_fast bench report out/cpu.json --out out/report

`rlhf_fast bench --help` is that of `python -m benchmarks`.
"""


@app.command(
    help=BENCH_HELP,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    with _one_line_errors():
        root = Path(__file__).parents[1]
        if not (root / "benchmarks" / "__main__.py").is_file() or not (root / "pyproject.toml").is_file():
            raise UserError("the benchmarks are not part of the package: run this from a clone, with pip install -e .")
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks", *context.args]
    raise typer.Exit(subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode)


@app.command()
def doctor() -> None:
    """Which backend can run each op here, why another cannot, and which libraries can be patched."""
    import torch
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rlhf_fast.integrations import peers
    from rlhf_fast.ops import report

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops = report(device)
    names = list(dict.fromkeys(name for backends in ops.values() for name in backends))
    table = Table("op", *names, title=f"op x backend on {device}")
    reasons: dict[str, None] = {}
    for op, backends in ops.items():
        cells = []
        for name in names:
            reason = backends.get(name, "not written")
            cells.append("yes" if reason is None else "-")
            if reason is not None:
                reasons[f"{name}: {reason}"] = None
        table.add_row(op, *cells)
    console = Console(markup=False, emoji=False)
    versions = f"rlhf_fast {version('rlhf_fast')}, torch {torch.__version__}, Python {platform.python_version()}"
    console.print(Text(versions), soft_wrap=True)
    console.print(table)
    for line in reasons:
        console.print(Text(f"  {line}"), soft_wrap=True)
    table = Table("patch", "library", "installed", "tested with", title="libraries")
    for peer in peers():
        table.add_row(peer.name, peer.distribution, peer.installed or "-", peer.tested)
    console.print(table)
    replaced = [name for peer in peers() for name in peer.replaced]
    console.print("replaced in this process:" if replaced else "nothing is replaced in this process")
    for name in replaced:
        console.print(Text(f"  {name}"), soft_wrap=True)
