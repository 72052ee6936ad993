"""Surroundings that are not a developer's laptop: names that are not UTF-8, output in ASCII, another locale."""

import json
import os
import subprocess
import sys

from pipelines import prepare
from slm_ray.dataset.manifest import load_manifest
from tests.support.paths import ROOT

ASCII = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
WORDS = ("--runner", "DirectRunner", "--vocab-size", "300", "--validation-fraction", "0", "--test-fraction", "0")


def write(folder, name: bytes) -> None:
    rows = [f"The cat Mümmel sat by the old red door of house {number}, 小猫.\n" for number in range(12)]
    lines = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)
    (folder / os.fsdecode(name)).write_bytes(lines.encode())


def test_a_file_name_that_is_no_utf8_is_written_out(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in", b"caf\xe9.jsonl")
    assert prepare.main([*WORDS, "--source", str(tmp_path / "in"), "--output", str(tmp_path / "data")]) == 0
    assert [file["name"] for file in load_manifest(tmp_path / "data").source["files"]] == ["caf\\xe9.jsonl"]
    assert prepare.main(["--output", str(tmp_path / "data"), "--explain", "caf\\xe9.jsonl#3"]) == 0
    assert "of house 3" in capsys.readouterr().out


def test_what_ascii_lacks_is_written_out(tmp_path):
    source, output = tmp_path / os.fsdecode("bär".encode()), tmp_path / os.fsdecode(b"d\xff")
    source.mkdir()
    write(source, "bücher.jsonl".encode())

    def run(*words: str) -> str:
        command = [sys.executable, "pipelines/prepare.py", "--output", str(output), *words]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **ASCII}, capture_output=True, check=False)
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr.decode()
        return done.stdout.decode("ascii")

    assert "d\\udcff" in run(*WORDS, "--source", str(source))
    assert "\\u5c0f\\u732b" in run("--explain", "bücher.jsonl#3")


def test_worker_processes_write_into_a_folder_of_any_name(tmp_path, capsys):
    write(tmp_path, b"a.jsonl")
    output = tmp_path / os.fsdecode(b"d\xff")
    words = [*WORDS, "--direct_num_workers", "1", "--direct_running_mode", "multi_processing"]
    assert prepare.main([*words, "--source", str(tmp_path / "a.jsonl"), "--output", str(output)]) == 0
    assert "read 12 = kept 12" in capsys.readouterr().out


def test_worker_processes_do_not_write_into_a_memory_of_their_own(tmp_path, capsys):
    write(tmp_path, b"a.jsonl")
    words = [*WORDS, "--direct_running_mode", "multi_processing"]
    assert prepare.main([*words, "--source", str(tmp_path / "a.jsonl"), "--output", "memory://private/d"]) == 2
    assert "memory://private/d is the memory of one process" in capsys.readouterr().err
