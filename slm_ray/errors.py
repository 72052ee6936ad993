"""A user's mistake: raised anywhere as `UserError`, shown by every command as one line with exit code 2.

What such a line, or the first line of any other error, says of an address holds no user, password or query; what a
command prints out of somebody's data acts on no terminal.
"""

import re

_LOGIN = re.compile(
    r"""\b([A-Za-z][A-Za-z0-9+.-]*://)
    (?: [^\s/@:]*:(?!\d+(?:[/?#\s'"]|$))\S*@   # user:password@, not host:port/any@
      | [^\s/]*@ )+""",
    re.VERBOSE,
)
_QUERY = re.compile(
    r"""\b(?: (https?://[^\s?'"]*)\?[^\s'"<>)\]]*
             | ([A-Za-z][A-Za-z0-9+.-]*://[^\s?'"]*)\?[\w.%~-]+=[^\s'"<>)\]]* )   # not s3://bucket/part-?.txt""",
    re.VERBOSE,
)

_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
"""Characters that act on a terminal or turn the reading direction around, and show nothing."""


def visible(text: str) -> str:
    r"""Text whose hidden characters are written out, as `\x1b` or `\u202e`, and so do nothing."""
    return _HIDDEN.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


def visible_lines(text: str) -> str:
    """As `visible`, but that line breaks stay."""
    return "\n".join(map(visible, text.split("\n")))


def without_secrets(text: str) -> str:
    """An address, or a text with addresses in it, without their users, passwords and queries.

    `http://me:secret@host/x?key=1 is away` -> `http://host/x is away`.
    """
    return _QUERY.sub(lambda found: found[1] or found[2], _LOGIN.sub(r"\1", text))


class UserError(Exception):
    """Something the user can mend: a path, an option, a file. The message says expected, got, and what to do."""

    def __init__(self, message: str = "") -> None:
        super().__init__(without_secrets(str(message)))


def reason(error: BaseException) -> str:
    """What the system calls an error, `No such file or directory`, or else its one line."""
    return str(getattr(error, "strerror", None) or one_line(error))


def one_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return without_secrets((str(error).strip().splitlines() or [type(error).__name__])[0])
