"""What reading somebody else's files may raise becomes one line; a signal in the midst of it does not."""

import signal

import pytest

from rlhf_fast.errors import UserError, refusing
from rlhf_fast.signals import Interrupted


class PanicException(BaseException):
    """As libraries in Rust raise it, by its name."""


@pytest.mark.parametrize("error", [ValueError("a\n b"), PanicException("a b"), RecursionError("a b")])
def test_whatever_a_library_raises_is_one_line(error):
    with pytest.raises(UserError, match=r"^model m: a b$"), refusing("model m"):
        raise error


@pytest.mark.parametrize("error", [
    Interrupted(signal.SIGTERM), KeyboardInterrupt(), SystemExit(3), UserError("as it is"),
])  # fmt: skip
def test_what_is_no_fault_of_the_file_passes(error):
    with pytest.raises(type(error)) as raised, refusing("model m"):
        raise error
    assert raised.value is error
