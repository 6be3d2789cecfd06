"""The one exception that the command line prints as a single line."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in what the user gave us (file, key, value). Its message is one line that says what to change.

    The command line prints it without a traceback and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """What an exception of another library says, in one line: its first, or its type where it says nothing."""
    return next((line.strip() for line in str(error).split("\n") if line.strip()), type(error).__name__)


def short(value: object) -> str:
    """A value as a message shows it: the start of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """For reading what somebody else wrote by somebody else's code, which may raise anything: that is a UserError."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # A panic of a library in Rust is no Exception; what else is none, a signal, is no fault of what is read.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in text:
            text = "it has code of its own, which is run with trust_remote_code: true only"
        raise UserError(f"{what}: {text[:300]}") from error
