"""A checkout whose three commands are small stand-ins, for the real `infra/demo.py`: what starts, waits and ends.

In: an empty folder. Out: the demo as a process, and a log of what its commands were told and which signals they got.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.ports import free_port

SETTINGS = ("slm_ray/presets/demo.yaml", "slm_ray/config/schema.py", "pipelines/config.py", "tune/config.py")

STEP = """
import os, pathlib, signal, sys, time
name, log = pathlib.Path(__file__).stem, pathlib.Path("log")
with log.open("a") as file:
    file.write(f"{os.getpid()} {name} {' '.join(sys.argv[1:])}\\n")
def end(number, _):
    with log.open("a") as file:
        file.write(f"{os.getpid()} {name} got {signal.Signals(number).name}\\n")
    if number == signal.SIGTERM:
        os._exit(0 if name == "app" else 143)
    sys.stderr.write("interrupted\\n")
    os._exit(130)
mood = os.environ.get(f"MOOD_{name}", "")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN if mood == "deaf" else end)
pathlib.Path(f"{name}-began").touch()
if mood.isdigit():
    sys.exit(int(mood))
while mood in ("slow", "deaf"):
    time.sleep(0.02)
"""

SERVER = (
    STEP
    + """
import http.server, json
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model = {"name": "tinystories", "version": "1", "run_id": "ab", "data_fingerprint": "cd"}
        self.reply({"story": asked["prompt"] + " there was a \\u732b cat.", "model": model})
    def reply(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""
)


class DemoCheckout:
    """The folder, and the demo started in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for path in ("infra/demo.py", *SETTINGS):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, folder / path)
        for path, content in {"pipelines/prepare.py": STEP, "tune/sweep.py": STEP, "serve/app.py": SERVER}.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(content)

    def start(self, *options: str, **moods: str) -> "subprocess.Popen[str]":
        """The demo, with each command in its mood: an exit code, slow (until a signal) or deaf (for ever)."""
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | {f"MOOD_{name}": mood for name, mood in moods.items()}
        command = [sys.executable, str(self.folder / "infra" / "demo.py"), "--port", str(free_port()), *options]
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *options: str, **moods: str) -> tuple[int, str, str]:
        """Exit code, output and errors of the demo."""
        with self.start(*options, **moods) as process:
            out, errors = process.communicate(timeout=60)
        return process.returncode, out, errors

    def wait_for(self, command: str, process: "subprocess.Popen[str]") -> None:
        """Until a command has begun."""
        deadline = time.monotonic() + 60
        while not (self.folder / f"{command}-began").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)

    @property
    def log(self) -> list[str]:
        """What the commands wrote, without their process ids."""
        return [line.partition(" ")[2].strip() for line in self._lines()]

    def alive(self) -> list[int]:
        """Process ids of commands that still run."""
        found = []
        for pid in {int(line.split()[0]) for line in self._lines()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 0)
                found.append(pid)
        return found

    def _lines(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []
