"""The one error that a benchmark's user is meant to read."""


class BenchmarkError(Exception):
    """Something the user can put right: a wrong option, a missing file, no network. Shown without a traceback."""


def first_line(error: BaseException) -> str:
    """The error's class and the first line of its message, for a table cell or a one-line complaint."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
