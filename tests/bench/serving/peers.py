"""Environments of the peers of `serve.py`, each of its own: what one of them needs is nothing that we run on.

In: the name of a peer. Out: the Python that has it, made the first time (`.bench/` in the repository), or why there is
none. An environment borrows what this Python has installed, torch above all, and adds exact versions beside it.
"""

import dataclasses
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[3] / ".bench"
INSTALL_S = 1200


@dataclasses.dataclass(frozen=True)
class Peer:
    """A package by the name under which it is imported, and what pip is given for it."""

    module: str
    packages: tuple[str, ...]


PEERS = {
    "llama.cpp": Peer("llama_cpp", ("llama-cpp-python>=0.3",)),
    "transformers": Peer("transformers", ("transformers>=5.0",)),
    "openvino": Peer(
        "openvino_genai",
        (
            "--no-deps",  # optimum-intel asks for a torchvision that does not fit the torch that is borrowed
            "openvino==2026.4.1",
            "openvino-genai==2026.4.1.0",
            "openvino-tokenizers==2026.4.1.0",
            "openvino-telemetry==2025.2.0",
            "optimum==2.3.0",
            "optimum-intel==2.2.0",
            "nncf==3.4.0",
            "transformers==5.5.0",
            "tokenizers==0.22.2",
            "huggingface-hub==1.33.0",
        ),
    ),
}


class MissingPeerError(Exception):
    """A peer that does not install here; the message says why."""


def python_of(name: str) -> Path:
    """The Python that runs a peer: this one where it has the package, else that of an environment of its own.

    Raises:
        MissingPeerError: pip could not install it.
    """
    peer = PEERS[name]
    if importlib.util.find_spec(peer.module):
        return Path(sys.executable)
    python = FOLDER / name / "bin" / "python"
    if not _has(python, peer.module):
        print(f"installing {name} into {FOLDER / name} (once)", file=sys.stderr, flush=True)
        _make(FOLDER / name, python, peer)
        if not _has(python, peer.module):
            raise MissingPeerError(f"{name} was installed and cannot be imported")
    return python


def _make(folder: Path, python: Path, peer: Peer) -> None:
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(folder)])
        (site,) = (folder / "lib").glob("python*/site-packages")
        (site / "zz_borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.packages])


def _has(python: Path, module: str) -> bool:
    if not python.exists():
        return False
    return subprocess.run([str(python), "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


def _run(words: list[str]) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=INSTALL_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingPeerError(str(error)) from error
    if done.returncode:
        raise MissingPeerError((done.stderr.strip().splitlines() or ["pip failed"])[-1])
