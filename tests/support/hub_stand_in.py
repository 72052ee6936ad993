"""A stand-in of the Hugging Face hub on loopback: the routes that `datasets` asks for and the files of models, served
from memory.

In: data sets or models as `{name: {revision: {path: content}}}`. Out: an address for `HF_ENDPOINT`, and what was asked.
It can break a file off in the middle and answer with 503 then, as a hub does that goes down.
"""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

Files = dict[str, bytes]

_API = re.compile(r"/api/datasets/(?P<name>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info)/(?P<rest>.*))?")
_RESOLVE = re.compile(r"(?:/datasets)?/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.*)")


def commit_of(name: str, revision: str) -> str:
    """The commit that a revision of the stand-in points to."""
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


class Hub(http.server.ThreadingHTTPServer):
    """See the module."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, Files]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.asked: list[str] = []
        self.breaking: dict[str, int] = {}  # path -> how many answers are broken off in the middle
        self.down: set[str] = set()  # paths that are answered with 503 after that

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, name: str, revision: str) -> tuple[str, Files] | None:
        """Commit and files of a branch or commit."""
        for branch, files in self.repositories[name].items():
            if revision in (branch, commit_of(name, branch)):
                return commit_of(name, branch), files
        return None


@contextmanager
def running(repositories: dict[str, dict[str, Files]]) -> Iterator[Hub]:
    """A hub that serves until the end of the block."""
    with Hub(repositories) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        self.server.asked.append(f"{self.command} {path}")
        api, resolve = _API.fullmatch(path), _RESOLVE.fullmatch(path)
        match = api or resolve
        if match is None:
            self._send(404, {"error": "not here"})
        elif match["name"] not in self.server.repositories:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif api:
            self._answer_api(api)
        elif resolve:
            self._answer_file(resolve)

    def _answer_api(self, match: re.Match[str]) -> None:
        name, what = match["name"], match["what"]
        revision, _, folder = (match["rest"] or "main").partition("/")
        found = self.server.files(name, revision)
        if found is None:
            self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return
        commit, files = found
        if what in (None, "revision"):
            siblings = [{"rfilename": path} for path in files]
            self._send(200, {"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False})
        elif what == "tree":
            inside = [_entry(path, files[path]) for path in files if not folder or path.startswith(f"{folder}/")]
            folders = sorted({path.rsplit("/", 1)[0] for path in files if "/" in path})
            entries = [] if folder else [{"type": "directory", "path": path, "oid": "0", "size": 0} for path in folders]
            self._send(200, [*entries, *inside])
        else:
            asked = json.loads(self._body)["paths"] if self.headers["Content-Type"] == "application/json" else None
            asked = asked or urllib.parse.parse_qs(self._body.decode())["paths"]
            self._send(200, [_entry(path, files[path]) for path in asked if path in files])

    def _answer_file(self, match: re.Match[str]) -> None:
        found = self.server.files(match["name"], match["revision"])
        if found is None:
            self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif match["path"] not in found[1]:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found[0]}
            self._send(404, {"error": "Entry not found"}, headers)
        elif match["path"] in self.server.down and not self.server.breaking.get(match["path"]):
            self._send(503, {"error": "down"}, {"Retry-After": "0"})
        else:
            self._send_content(found[0], match["path"], found[1][match["path"]])

    def _send_content(self, commit: str, path: str, content: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        status = 200
        if asked:
            start, end = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            status, content = 206, content[start:end]
        self._head(status, len(content), headers)
        if self.command == "HEAD":
            return
        if self.server.breaking.get(path, 0):
            self.server.breaking[path] -= 1
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content)

    def _send(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(answer).encode()
        self._head(status, len(content), {"Content-Type": "application/json", **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, status: int, n_bytes: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(n_bytes))
        self.end_headers()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
