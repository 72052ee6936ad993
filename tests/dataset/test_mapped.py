"""The mapped file of a split holds the shards' tokens, is made once, and is never believed where it is not whole."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_ray.dataset import shards
from slm_ray.dataset.manifest import Manifest, Split
from slm_ray.dataset.mapping import mapped, turns, verified
from slm_ray.dataset.mapping.header import HEADER_BYTES
from slm_ray.dataset.mapping.mapped import make_mapped, mapped_path, open_split, story_index
from slm_ray.dataset.shards import read_split
from slm_ray.dataset.stream import TokenStream
from slm_ray.errors import UserError
from slm_ray.storage import json_sha256
from tests.dataset.test_shards import make_data_set, make_table

TOKENS = [5, 6, 0, 7, 0, 9, 0]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_data_set(tmp_path)


def opened(folder: Path, manifest: Manifest) -> TokenStream:
    stream, note = open_split(folder, "train", manifest, 0)
    assert note == ""
    return stream


def is_mapped(stream: TokenStream) -> bool:
    base = stream.tokens
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    return not isinstance(base, np.ndarray)


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.lists(st.integers(1, 65_535), max_size=9), max_size=5), min_size=1, max_size=3),
    st.sampled_from([2**16, 2**17]),
)
def test_its_tokens_are_those_of_the_shards(stories: list[list[list[int]]], vocab_size: int) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        written = []
        for number, rows in enumerate(stories):
            table = make_table({f"{number}#{row}": [*ids, 0] for row, ids in enumerate(rows)}, vocab_size)
            written.append(shards.write_shard(folder / shards.shard_path("train", number), table))
        whole = make_data_set(folder / "other", vocab_size)
        manifest = dataclasses.replace(whole, splits={**whole.splits, "train": Split.of(tuple(written))})
        stream = opened(folder, manifest)
        expected, n_bytes = read_split(folder, "train", manifest=manifest)
        assert stream.tokens.tolist() == [0, *expected.tolist()] and stream.n_bytes == n_bytes
        ends = np.cumsum([0, *(len(ids) + 1 for rows in stories for ids in rows)])
        again = opened(folder, manifest)  # out of the file
        for found in (stream, again, TokenStream.of_split(expected, n_bytes, 0, ends)):
            assert found.stories.ends.tolist() == ends.tolist()
            lengths = np.diff(ends)[found.stories.by_length]
            assert lengths.tolist() == sorted(lengths.tolist())
            assert np.repeat(found.stories.lengths, found.stories.counts).tolist() == lengths.tolist()
    finally:
        shutil.rmtree(folder)


def test_it_is_mapped_and_made_once(tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_mapped(tmp_path, "train", manifest, 0) == ""
    made = mapped_path(tmp_path, "train").stat()
    monkeypatch.setattr(mapped, "split_parts", lambda *_: pytest.fail("the shards were read again"))
    stream = opened(tmp_path, manifest)
    assert is_mapped(stream) and stream.tokens.tolist() == [0, *TOKENS]
    assert story_index(tmp_path, "train", manifest).ends.tolist() == [0, 3, 5, 7]
    assert mapped_path(tmp_path, "train").stat().st_ino == made.st_ino


def test_an_empty_split_is_an_end_mark_alone(tmp_path: Path, manifest: Manifest) -> None:
    stream, note = open_split(tmp_path, "test", manifest, 0)
    assert (stream.tokens.tolist(), stream.n_targets, len(stream.stories), note) == ([0], 0, 0, "")


@pytest.mark.parametrize("fault", ["cut", "grown", "flipped", "no header", "empty", "foreign"])
def test_a_file_that_is_not_whole_or_of_other_shards_is_made_anew_and_that_is_said_once(
    tmp_path: Path, manifest: Manifest, fault: str
) -> None:
    opened(tmp_path, manifest)
    path = mapped_path(tmp_path, "train")
    content = path.read_bytes()
    if fault == "foreign":
        other = shards.write_shard(tmp_path / shards.shard_path("train", 1), make_table({"b#0": [8, 8, 0]}))
        train = Split.of((manifest.splits["train"].shards[0], other))
        manifest = dataclasses.replace(manifest, splits={**manifest.splits, "train": train})
    changed, said = {
        "cut": (content[:-1], "was cut short"),
        "grown": (content + b"x", "has grown"),
        "flipped": (content[:4100] + bytes([content[4100] ^ 1]) + content[4101:], "was altered"),
        "no header": (b"[]" + content[2:], "is no file of tokens"),
        "empty": (b"", "is no file of tokens"),
        "foreign": (content, "belongs to other shards"),
    }[fault]
    path.write_bytes(changed)
    stream, note = open_split(tmp_path, "train", manifest, 0)
    assert note == f"{path} {said}: made anew"
    assert stream.tokens.tolist() == [0, *read_split(tmp_path, "train", manifest=manifest)[0].tolist()]
    assert is_mapped(opened(tmp_path, manifest))
    assert [one.name for one in path.parent.iterdir() if one.suffix not in (".lock", ".tokens", ".verified")] == []


HEADERS = [
    {"dtype": ">u2"}, {"dtype": "(2,"}, {"tokens": float("inf")}, {"tokens": 11}, {"tokens": 7}, {"tokens": True},
    {"stories": 2}, {"stories": 4}, {"stories": -1}, {"lengths": 10**30}, {"lengths": []}, {"sha256": None},
    {"sha256": "\ud800"}, {"first": 1}, {"key": []},
]  # fmt: skip


@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize("change", HEADERS, ids=str)
def test_a_header_that_is_not_that_of_the_shards_is_made_anew_and_said_once(
    tmp_path: Path, manifest: Manifest, change: dict[str, object], is_signed: bool
) -> None:
    opened(tmp_path, manifest)
    path = mapped_path(tmp_path, "train")
    content = path.read_bytes()
    header = json.loads(content[:HEADER_BYTES]) | change
    if is_signed and change != {"sha256": "\ud800"}:
        del header["header_sha256"]
        header["header_sha256"] = json_sha256(header)
    path.write_bytes(json.dumps(header).encode().ljust(HEADER_BYTES) + content[HEADER_BYTES:])
    stream, note = open_split(tmp_path, "train", manifest, 0)
    assert note.startswith(f"{path} ") and note.endswith(": made anew")
    assert stream.tokens.tolist() == [0, *TOKENS] == opened(tmp_path, manifest).tokens.tolist()


def forge(path: Path, place: int, value: int) -> None:
    """Change a byte of the arrays, and let the file agree with itself again."""
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + place] = value
    header = json.loads(content[:HEADER_BYTES])
    del header["header_sha256"]
    header["sha256"] = hashlib.sha256(content[HEADER_BYTES:]).hexdigest()
    header["header_sha256"] = json_sha256(header)
    path.write_bytes(json.dumps(header).encode().ljust(HEADER_BYTES) + content[HEADER_BYTES:])


@pytest.mark.parametrize("place", [0, 2, 64 + 8], ids=["end mark", "token", "border of a story"])
def test_one_that_agrees_with_itself_and_not_with_its_shards_is_made_anew(
    tmp_path: Path, manifest: Manifest, place: int
) -> None:
    opened(tmp_path, manifest)
    path = mapped_path(tmp_path, "train")
    forge(path, place, 2)
    stream, note = open_split(tmp_path, "train", manifest, 0)
    assert note == f"{path} has other tokens than its shards: made anew"
    assert stream.tokens.tolist() == [0, *TOKENS] and stream.stories.ends.tolist() == [0, 3, 5, 7]
    forge(path, place, 2)
    assert make_mapped(tmp_path, "train", manifest, 0).endswith("has other tokens than its shards: made anew")
    forge(path, place, 2)
    assert story_index(tmp_path, "train", manifest).ends.tolist() == [0, 3, 5, 7]


def test_one_that_comes_from_elsewhere_is_compared_with_its_shards_once_on_a_machine(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path, manifest)
    compared, original = [], mapped.split_parts
    monkeypatch.setattr(mapped, "split_parts", lambda *given: compared.append(1) or original(*given))
    monkeypatch.setattr(verified, "_machine", lambda: "another")
    for _ in range(3):
        verified._CHECKED.clear()
        assert make_mapped(tmp_path, "train", manifest, 0) == ""
        verified._CHECKED.clear()
        assert is_mapped(opened(tmp_path, manifest))
    assert compared == [1]


def test_where_nothing_can_be_written_the_user_s_cache_tells_the_other_workers(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path, manifest)
    path = mapped_path(tmp_path, "train")
    verified.marker_path(path).unlink()
    verified.marker_path(path).mkdir()  # nobody writes over a folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read, original = [], mapped._digest
    monkeypatch.setattr(mapped, "_digest", lambda *given: read.append(1) or original(*given))
    for _ in range(3):
        verified._CHECKED.clear()
        assert is_mapped(opened(tmp_path, manifest))
    assert read == [1]


def test_a_header_of_brackets_is_no_traceback(tmp_path: Path, manifest: Manifest) -> None:
    opened(tmp_path, manifest)
    path = mapped_path(tmp_path, "train")
    path.write_bytes(b"[" * HEADER_BYTES + path.read_bytes()[HEADER_BYTES:])
    assert open_split(tmp_path, "train", manifest, 0)[1] == f"{path} is no file of tokens: made anew"


def test_it_is_read_through_once_in_a_process_and_once_on_a_machine(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, original = [], mapped._digest
    monkeypatch.setattr(mapped, "_digest", lambda *given: read.append(1) or original(*given))

    def all_of_it() -> None:
        for _ in range(2):
            make_mapped(tmp_path, "train", manifest, 0)
            opened(tmp_path, manifest)
            story_index(tmp_path, "train", manifest)

    all_of_it()
    assert len(read) == 1  # when it was made
    verified._CHECKED.clear()  # a worker of this machine
    opened(tmp_path, manifest)
    all_of_it()
    assert len(read) == 1
    verified._CHECKED.clear()  # another driver
    make_mapped(tmp_path, "train", manifest, 0)
    all_of_it()
    assert len(read) == 2
    verified._CHECKED.clear()
    monkeypatch.setattr(verified, "_machine", lambda: "another")
    opened(tmp_path, manifest)
    verified._CHECKED.clear()
    opened(tmp_path, manifest)
    assert len(read) == 3


def test_who_holds_the_lock_and_does_nothing_is_not_waited_for(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(turns, "SAID_AFTER_S", 0.0)
    monkeypatch.setattr(turns, "GIVEN_UP_AFTER_S", 0.3)
    lock = mapped_path(tmp_path, "train").with_suffix(".lock")
    lock.parent.mkdir()
    lock.touch()
    with lock.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        stream, note = open_split(tmp_path, "train", manifest, 0)
    assert stream.tokens.tolist() == [0, *TOKENS] and not is_mapped(stream)
    assert f"another process holds {lock} and has done nothing for 0.3 s" in note
    assert [record.message for record in caplog.records] == [
        f"waiting for another process that holds {lock} (at most 0.3 s after it stops working)"
    ]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path, manifest: Manifest) -> None:
    path = mapped_path(tmp_path, "train")
    path.parent.mkdir()
    left = path.with_name(f".{path.name}.123-abcdef01")
    left.write_bytes(b"half")
    opened(tmp_path, manifest)
    assert not left.exists() and path.exists()


def test_a_place_that_cannot_be_written_leaves_the_tokens_in_memory(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / mapped.FOLDER).write_text("in the way")
    stream, note = open_split(tmp_path, "train", manifest, 0)
    assert not is_mapped(stream) and stream.tokens.tolist() == [0, *TOKENS]
    assert stream.stories.ends.tolist() == [0, 3, 5, 7] == story_index(tmp_path, "train", manifest).ends.tolist()
    assert "every worker holds the train split in memory" in note and note.count("\n") == 0


def test_of_a_data_set_that_this_user_only_reads_it_lies_in_the_cache_folder(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    beside, make = tmp_path / mapped.FOLDER, Path.mkdir

    def refused(path: Path, *given: Any, **named: Any) -> None:
        if path == beside:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        make(path, *given, **named)

    monkeypatch.setattr(Path, "mkdir", refused)
    assert make_mapped(tmp_path, "train", manifest, 0) == ""
    verified._CHECKED.clear()
    monkeypatch.setattr(mapped, "split_parts", lambda *_: pytest.fail("the shards were read again"))
    stream = opened(tmp_path, manifest)  # a worker
    assert is_mapped(stream) and stream.tokens.tolist() == [0, *TOKENS]
    named = dataclasses.replace(manifest, tokenizer={**manifest.tokenizer, "end_token_id": 0})
    assert story_index(tmp_path, "train", named).ends.tolist() == [0, 3, 5, 7]
    assert not beside.exists() and len([*(tmp_path / "cache").rglob("train.tokens")]) == 1


def test_a_full_disk_leaves_the_tokens_in_memory_and_nothing_half_written(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped, "_digest", full)
    stream, note = open_split(tmp_path, "train", manifest, 0)
    assert not is_mapped(stream) and "No space left on device" in note
    assert [one.name for one in (tmp_path / mapped.FOLDER).iterdir()] == ["train.lock"]


def test_a_damaged_shard_is_refused_and_never_mapped(tmp_path: Path, manifest: Manifest) -> None:
    path = tmp_path / shards.shard_path("train", 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train/00001.parquet was truncated or altered"):
        open_split(tmp_path, "train", manifest, 0)
    assert not mapped_path(tmp_path, "train").exists()


def test_many_at_once_make_it_once(tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    made, original = [], shards.split_parts
    monkeypatch.setattr(mapped, "split_parts", lambda *given: made.append(1) or original(*given))
    found: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: found.append(opened(tmp_path, manifest).tokens.tolist())) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[0, *TOKENS]] * 6 and made == [1]


def test_a_data_set_in_a_store_is_mapped_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = mapped_path("memory://stories/data", "train")
    assert here.is_relative_to(tmp_path) and here != mapped_path("memory://stories/other", "train")
    assert os.fspath(mapped_path(tmp_path / "data", "train")).startswith(os.fspath(tmp_path / "data"))
