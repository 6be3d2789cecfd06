"""The `rlhf_fast` command, and `python -m rlhf_fast`."""

import sys
from importlib.util import find_spec

# What the extra `train` installs: `import rlhf_fast` does without.
NEEDED = (
    "httpx2", "matplotlib", "pyarrow", "pydantic", "rich", "safetensors", "tensorboard", "transformers", "typer",
    "yaml",
)  # fmt: skip


def main() -> None:
    """Run the command line; one line, and exit status 2, where what it needs is not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"error: the command needs {', '.join(missing)}: pip install 'rlhf_fast[train]'", file=sys.stderr)
        raise SystemExit(2)
    from rlhf_fast.cli import app

    app()


if __name__ == "__main__":
    main()
