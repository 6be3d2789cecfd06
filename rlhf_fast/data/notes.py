"""What a run tells about its data that is no error: each line once."""

_said: set[str] = set()


def say(line: str) -> None:
    """Print `line` on standard output, unless this launch has said it before: stages read the same data twice."""
    if line not in _said:
        _said.add(line)
        print(line, flush=True)


def forget() -> None:
    """A new launch starts: what was said before may be said again."""
    _said.clear()
