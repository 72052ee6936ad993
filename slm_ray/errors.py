"""A user's mistake: raised anywhere as `UserError`, shown by every command as one line with exit code 2."""


class UserError(Exception):
    """Something the user can mend: a path, an option, a file. The message says expected, got, and what to do."""


def one_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
