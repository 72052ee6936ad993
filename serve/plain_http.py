"""HTTP/1.1 for who asks for another protocol beside it: the wish is passed over, the request is answered.

In: bytes of a connection to Ray Serve's proxy. Out: requests. Java's HttpClient asks for HTTP/2 in the head of each
request without TLS (`Upgrade: h2c`); httptools then takes what follows for that protocol, so that a body is lost.
"""

from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_OF_THE_WISH = (b"upgrade", b"http2-settings")


class PlainHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol that goes on in HTTP/1.1, as RFC 9110 (7.8) lets a server do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = _PlainParser(self)  # type: ignore[assignment]

    @property
    def is_wishing(self) -> bool:
        """Whether the head at hand asks for another protocol; CONNECT does too, and is refused."""
        return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT"

    def plain_head(self) -> bytes:
        """The head at hand without the wish."""
        start = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        lines = [start]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(token for token in tokens if token.lower() not in _OF_THE_WISH)
            if name not in _OF_THE_WISH:
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        if not self.is_wishing:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if not self.is_wishing:
            super().on_message_complete()


class _PlainParser:
    """httptools' parser that reads a head with a wish for another protocol once more, without it."""

    def __init__(self, protocol: PlainHttpProtocol) -> None:
        self._protocol = protocol
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpRequestParser(self._protocol)
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def feed_data(self, data: bytes) -> None:
        """Raises: httptools.HttpParserError; HttpParserUpgrade for CONNECT."""
        rest = memoryview(data)
        while True:
            try:
                return self._parser.feed_data(rest)
            except httptools.HttpParserUpgrade as wish:
                if not self._protocol.is_wishing:
                    raise
                head, rest = self._protocol.plain_head(), rest[wish.args[0] :]
                self._begin()
                self._parser.feed_data(head)

    def __getattr__(self, name: str) -> Any:
        """What the protocol asks a parser for."""
        return getattr(self._parser, name)
