"""Files of a web server, whose word about sizes and parts is not believed."""

import http.server
import threading
from collections.abc import Iterator

import pytest

from slm_ray import storage
from slm_ray.errors import UserError
from slm_ray.tokenization.tokenizer import Tokenizer

CONTENT = b'{"a": 1}\n'
PART = b"x" * 2**20


class Server(http.server.ThreadingHTTPServer):
    """Answers by the name that is asked for, and counts what it could send of an endless file."""

    sent = 0


class Answers(http.server.BaseHTTPRequestHandler):
    """`/nothing-said` and `/small-said` have a HEAD that is wrong; what has no name here is absent."""

    server: Server

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        sizes = {"/plain": len(CONTENT), "/nothing-said": 0, "/small-said": 1, "/endless": len(CONTENT)}
        self._begin(sizes.get(self.path, 0))

    def do_GET(self) -> None:
        if self.path == "/endless":
            self._begin(2**30)
            try:
                for _ in range(1024):
                    self.wfile.write(PART)
                    self.server.sent += len(PART)
            except OSError:  # the client has hung up
                pass
        elif self._begin(len(CONTENT)):
            self.wfile.write(CONTENT)

    def _begin(self, size: int) -> bool:
        known = self.path in ("/plain", "/nothing-said", "/small-said", "/endless")
        self.send_response(200 if known else 503 if self.path == "/broken" else 404)
        self.send_header("Content-Length", str(size if known else 0))
        self.end_headers()
        return known


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def place(server: Server, name: str) -> storage.StoragePath:
    return storage.storage_path(f"http://127.0.0.1:{server.server_port}/{name}")


@pytest.mark.parametrize("name", ["plain", "nothing-said", "small-said"])
def test_all_that_comes_is_read_whatever_size_the_server_says(server: Server, name: str) -> None:
    where = place(server, name)
    assert storage.read(where) == storage.read_if_there(where) == CONTENT
    assert storage.read_at_most(where, len(CONTENT)) == CONTENT
    with pytest.raises(storage.TooLargeError):
        storage.read_at_most(where, len(CONTENT) - 1)


def test_a_file_that_does_not_end_is_refused_after_what_was_allowed(server: Server) -> None:
    with pytest.raises(storage.TooLargeError):
        storage.read_at_most(place(server, "endless"), 1000)
    assert server.sent < 64 * len(PART)  # what lies in the sockets' buffers


def test_a_server_that_fails_has_no_absent_file(server: Server) -> None:
    assert storage.read_if_there(place(server, "absent")) == b""
    with pytest.raises(Exception, match="503"):
        storage.read_if_there(place(server, "broken"))
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*503"):
        Tokenizer.load(str(place(server, "broken")))
