"""Inputs on disks, in memory and in object stores, under the same names."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import fsspec
import pytest

from slm_ray.errors import UserError
from slm_ray.sources import addresses
from slm_ray.sources.plan import plan_source
from slm_ray.sources.reading import read_ranges
from tests.support.paths import ROOT

LINES = [json.dumps({"text": f"Story {number}."}).encode() for number in range(10)]
JSONL = b"\n".join(LINES)


def read(*words: str, **options: Any) -> dict[str, str]:
    made = plan_source(words, rows_per_range=4, **options)
    return {
        story: text.decode()
        for task in made.tasks
        for _, batch in read_ranges(task)
        for story, text in zip(batch["story_id"].to_pylist(), batch["text"].to_pylist())
    }


def ten(name: str) -> dict[str, str]:
    return {f"{name}#{row}": f"Story {row}." for row in range(10)}


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["/x/a.txt"], ["a.txt"]),
        (["/x/a/1.txt", "/x/b/1.txt"], ["a/1.txt", "b/1.txt"]),
        (["s3://one/a/1.txt", "s3://two/a/1.txt"], ["one/a/1.txt", "two/a/1.txt"]),
        (["/x/1.txt", "/x/2.txt", "s3://b/1.txt"], ["1.txt", "2.txt", "s3/1.txt"]),
        (["memory:///d/1.txt", "memory:///d/e/1.txt"], ["1.txt", "e/1.txt"]),
    ],
)
def test_names_tell_files_apart_and_not_where_they_lie(paths, expected):
    assert addresses.names(paths) == expected


def test_what_a_folder_or_glob_holds_besides_is_said(tmp_path, caplog):
    folder = tmp_path / "gl"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jsonl", "b.json", "c\x1b[31m.bz2", ".hidden", "sub/d.jsonl"):
        (folder / name).write_text("x")
    (folder / "dangling.jsonl").symlink_to(folder / "nothing")
    (folder / "linked").symlink_to(folder / "sub")
    is_known = lambda name: name.endswith(".jsonl")  # noqa: E731
    assert len(addresses.expand([str(folder)], is_known, ".jsonl")) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: skipped 2 that are links to a folder or to nothing: dangling.jsonl, linked",
        f"{folder}: skipped 2 that end in none of .jsonl: b.json, c\\x1b[31m.bz2",
    ]
    caplog.clear()
    assert len(addresses.expand([str(folder / "[as]*")], is_known, ".jsonl")) == 1
    [record] = caplog.records
    assert "skipped 1 that are no files (name a folder itself to read what is in it): sub" in record.getMessage()


def test_a_file_address_is_a_path(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    assert read(f"file://{tmp_path}/a.jsonl") == read(f"file://{tmp_path}") == ten("a.jsonl")
    assert read(f"file://{tmp_path}/*.jsonl", str(tmp_path)) == ten("a.jsonl")


def test_files_folders_and_globs_of_a_remote_place():
    store = fsspec.filesystem("memory")
    for path in ("/shelf/a/1.jsonl", "/shelf/b/1.jsonl", "/shelf/.hidden/2.jsonl", "/shelf/b/notes.md"):
        store.pipe(path, JSONL)
    assert read("memory://shelf/a/1.jsonl") == ten("1.jsonl")
    both = ten("a/1.jsonl") | ten("b/1.jsonl")
    assert read("memory://shelf") == read("memory://shelf/*/*.jsonl") == both
    assert read("memory://shelf/a", "memory://shelf/b/1.jsonl", "memory://shelf/a/1.jsonl") == both


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("memory://nowhere/a.jsonl", "no such file, folder or glob: memory://nowhere/a.jsonl"),
        ("memory://nowhere/*.jsonl", "no such file, folder or glob: memory://nowhere/"),
        ("gopher://a/b.jsonl", "cannot read gopher://a/b.jsonl: Protocol not known: gopher"),
    ],
)
def test_a_bad_address_is_one_clear_line(word, message):
    with pytest.raises(UserError) as caught:
        plan_source(word)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_absent_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # whether installed or not
    with pytest.raises(UserError, match=r"cannot read gs://a/b.jsonl: Please install gcsfs"):
        plan_source("gs://a/b.jsonl")


@pytest.fixture(scope="module")
def shelf(s3: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of the object store with Parquet, gzip JSONL and plain JSONL."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path_factory.mktemp("s3") / "a.parquet"
    pq.write_table(pa.table({"text": [f"Story {row}." for row in range(10)]}), path, row_group_size=3)
    s3("shelf/a.parquet", path.read_bytes())
    s3("shelf/b.jsonl.gz", gzip.compress(JSONL))
    s3("shelf/c/d.jsonl", JSONL)
    return "s3://stories/shelf"


def test_an_object_store_is_read_like_a_disk(shelf):
    assert read(f"{shelf}/a.parquet") == ten("a.parquet")
    assert read(f"{shelf}/b.jsonl.gz") == ten("b.jsonl.gz")
    assert read(f"{shelf}/*.*") == ten("a.parquet") | ten("b.jsonl.gz")
    assert read(shelf) == ten("a.parquet") | ten("b.jsonl.gz") | ten("c/d.jsonl")


def test_the_digest_does_not_depend_on_the_place(shelf, tmp_path):
    (tmp_path / "d.jsonl").write_bytes(JSONL)
    assert plan_source(f"{shelf}/c/d.jsonl").source == plan_source(str(tmp_path / "d.jsonl")).source


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "s3://nobody/a.jsonl",
            "no such file, folder or glob: s3://nobody/a.jsonl (The specified bucket does not exist)",
        ),
        ("s3://stories/nothing", "no such file, folder or glob: s3://stories/nothing"),
        ("s3://stories/nothing/*.jsonl", "no such file, folder or glob: s3://stories/nothing/*.jsonl"),
    ],
)
def test_what_an_object_store_has_not_is_one_clear_line(shelf, word, message):
    with pytest.raises(UserError) as caught:
        plan_source(word)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_credentials_are_one_clear_line(shelf):
    secret = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    env = {name: value for name, value in os.environ.items() if name not in secret}
    env |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere", "PYTHONPATH": str(ROOT)}
    code = "from slm_ray.sources.plan import plan_source; plan_source('s3://stories/shelf')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        "slm_ray.errors.UserError: cannot read s3://stories/shelf: Unable to locate credentials"
    )


def test_a_remote_folder_that_cannot_be_listed_is_not_passed_over(monkeypatch):
    """fsspec's `find` leaves it out, and its stories would be lost without a word."""
    for name in ("shelves/a/1.jsonl", "shelves/closed/1.jsonl"):
        with fsspec.open(f"memory://{name}", "wb") as file:
            file.write(JSONL)
    system = fsspec.filesystem("memory")
    listed = type(system).ls

    def refuse(self, path, *words, **options):
        if path.rstrip("/").endswith("closed"):
            raise TimeoutError("no answer")
        return listed(self, path, *words, **options)

    monkeypatch.setattr(type(system), "ls", refuse)
    with pytest.raises(UserError, match="cannot read memory://shelves: no answer"):
        read("memory://shelves")
