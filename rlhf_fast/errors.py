"""The one exception that the command line prints as a single line."""


class UserError(Exception):
    """A mistake in what the user gave us (file, key, value). Its message is one line that says what to change.

    The command line prints it without a traceback and exits with status 2.
    """
