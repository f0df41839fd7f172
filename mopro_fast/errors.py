"""The one exception whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """A mistake in the input: one line that names the thing and says what to do.

    The command line prints it without a traceback and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """What a library's exception says, short enough for the middle of a UserError."""
    said = getattr(error, "strerror", None) or str(error).partition("\n")[0].rstrip(":. ")
    return said[:200] or type(error).__name__
