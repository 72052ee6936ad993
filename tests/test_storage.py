"""The same operations on a folder and on an object store (fsspec's in memory, here)."""

import itertools
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from slm_ray import storage
from slm_ray.dataset.manifest import load_manifest
from slm_ray.errors import UserError
from slm_ray.locks.lease_files import MAX_BYTES, Holder, LeaseFiles
from slm_ray.preparation.summary_files import load_summary
from slm_ray.storage import StoragePath
from tune.record import RECORD, read_record


@pytest.fixture(params=["folder", "memory"])
def root(request, tmp_path) -> StoragePath:
    return tmp_path if request.param == "folder" else storage.storage_path(f"memory://{uuid.uuid4().hex}")


def listed(folder: StoragePath) -> dict[str, bytes]:
    below = len(folder.as_posix()) + 1
    return {file.as_posix()[below:]: file.read_bytes() for file in storage.files_below(folder)}


def write(folder: StoragePath, **files: bytes) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.replace_file(path, content)


def test_a_file_is_replaced_and_nothing_is_left_beside_it(root):
    write(root, a=b"old")
    write(root, a=b"new")
    assert listed(root) == {"a": b"new"}


def test_a_folder_takes_the_place_of_another(root):
    write(root, new__a=b"1", new__b__c=b"2", old__a=b"x", old__z=b"y")
    storage.put(root / "new", root / "old")
    assert listed(root / "old") == {"a": b"1", "b/c": b"2"}


def test_putting_a_file_twice_is_putting_it_once(root):
    write(root, a=b"1", b=b"2")
    storage.put(root / "a", root / "b")
    if not isinstance(root, Path):
        storage.put(root / "a", root / "b")
    assert (root / "b").read_bytes() == b"1"


def test_files_and_folders_are_removed_and_absent_ones_are_no_fault(root):
    write(root, a=b"1", b__c=b"2", d=b"3")
    for name in ("a", "b", "absent"):
        storage.remove(root / name)
    assert listed(root) == {"d": b"3"}


def test_a_link_is_removed_and_what_it_points_to_is_not(tmp_path):
    write(tmp_path, elsewhere__a=b"1", new__b=b"2")
    (tmp_path / "train").symlink_to(tmp_path / "elsewhere")
    storage.put(tmp_path / "new", tmp_path / "train")
    assert listed(tmp_path / "train") == {"b": b"2"}
    assert listed(tmp_path / "elsewhere") == {"a": b"1"}


@pytest.mark.parametrize("address", ["", "~nosuchuser/data"])
def test_no_path_at_all_is_one_line(address):
    with pytest.raises(UserError):
        storage.storage_path(address)


def test_a_relative_path_is_taken_from_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert storage.storage_path("data/x") == tmp_path / "data/x"
    assert storage.storage_path(f"file://{tmp_path}") == tmp_path


def test_an_unknown_file_system_is_one_line():
    with pytest.raises(UserError, match="cannot reach nosuch://bucket"):
        storage.storage_path("nosuch://bucket")


def test_a_store_that_does_not_answer_is_not_an_empty_one(monkeypatch):
    root = storage.storage_path(f"memory://{uuid.uuid4().hex}")
    write(root, new__a=b"1", old__a=b"x", old__z=b"y")
    kind = type(root.fs)

    def refuse(*_, **__):
        raise PermissionError("not now")

    for act in (lambda: storage.remove(root / "old"), lambda: storage.put(root / "new", root / "old")):
        with monkeypatch.context() as patch, pytest.raises(PermissionError):
            patch.setattr(kind, "info", refuse)
            act()
    assert listed(root / "old") == {"a": b"x", "z": b"y"}
    monkeypatch.setattr(type(root), "is_file", lambda *_: False)  # as fsspec's says on any error
    storage.put(root / "new", root / "old")
    assert listed(root / "old") == {"a": b"1"}


def test_what_is_not_there_reads_as_nothing_and_what_cannot_be_read_does_not(root, monkeypatch):
    assert storage.read_if_there(root / "absent") == b""
    write(root, a=b"1")
    assert storage.read_if_there(root / "a") == b"1"

    def refuse(*_, **__):
        raise PermissionError("not now")

    by = (type(root), "read_bytes") if isinstance(root, Path) else (type(root.fs), "cat_file")
    monkeypatch.setattr(*by, refuse)
    with pytest.raises(PermissionError):
        storage.read_if_there(root / "a")


@pytest.fixture
def written_anew(s3, monkeypatch) -> Callable[[str, Callable[[int], bytes]], None]:
    """Let the owner of an object write it anew after every request of others that has to do with it."""
    import s3fs

    def begin(key: str, content: Callable[[int], bytes]) -> None:
        ask, times = s3fs.S3FileSystem._call_s3, itertools.count(1)
        s3(key, content(0))

        async def then_write(self, method, *args, **kwargs):
            answer = await ask(self, method, *args, **kwargs)
            if method != "get_object":  # whose body is being read
                s3(key, content(next(times)))
            return answer

        monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", then_write)

    return begin


def numbered(number: int) -> bytes:
    return b"%d" % number * (number + 1)  # each of another length


@pytest.mark.parametrize(
    "read",
    [storage.read, storage.read_if_there, lambda path: storage.read_at_most(path, 100)],
    ids=["whole", "if there", "at most"],
)
def test_a_file_that_its_owner_writes_anew_is_read_as_one_of_both(written_anew, read):
    written_anew("anew/content", numbered)
    content = read(storage.storage_path("s3://stories/anew/content"))
    assert content in [numbered(number) for number in range(9)]


def test_a_sign_of_life_between_two_requests_is_no_reason_to_lose_a_lease(written_anew):
    written_anew("anew/.lease/00000001.json", lambda alive: Holder(owner="mouse", alive_s=float(alive)).to_json())
    number, holder = LeaseFiles(storage.storage_path("s3://stories/anew/.lease")).newest()
    assert number == 1 and holder is not None and holder.owner == "mouse" and holder.alive_s > 0


def test_a_large_file_is_read_as_one_version_too(s3, monkeypatch):
    """In parts, each in a request of its own, it was half of one and half of another."""
    import s3fs

    fetch, size = s3fs.S3FileSystem._call_s3, 3000

    async def write_before_later_parts(self, method, *args, **kwargs):
        if method == "get_object" and not kwargs.get("Range", "bytes=0-").startswith("bytes=0-"):
            s3("anew/large", b"B" * size)
        return await fetch(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "default_block_size", 1000)
    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", write_before_later_parts)
    s3("anew/large", b"A" * size)
    path = storage.storage_path("s3://stories/anew/large")
    assert path.fs.default_block_size == 1000
    assert storage.read(path) == b"A" * size


def test_a_folder_is_no_empty_file(root):
    write(root, folder__a=b"1")
    for read in (storage.read, storage.read_if_there, lambda path: storage.read_at_most(path, 9)):
        with pytest.raises(IsADirectoryError):
            read(root / "folder")


def test_a_store_that_answers_nonsense_does_not_say_who_has_a_lease(root, monkeypatch):
    """It was taken for a lease of somebody unknown: its owner gave up, and another took the run."""
    write(root, **{"00000001.json": Holder(owner="mouse").to_json()})

    def nonsense(*_, **__):
        raise ValueError("Invalid timestamp")

    monkeypatch.setattr(*((Path, "open") if isinstance(root, Path) else (type(root.fs), "cat_file")), nonsense)
    with pytest.raises(ValueError, match="Invalid timestamp"):
        LeaseFiles(root).read(1)


def test_a_store_that_answers_nonsense_has_no_broken_or_absent_file(root, monkeypatch):
    """Whoever has good data was told to prepare it again, or to take another name for the sweep."""
    write(root, **{"manifest.json": b"{}", RECORD: b"{}", "00001.json": b"{}"})

    def nonsense(*_, **__):
        raise ValueError("Invalid timestamp")

    monkeypatch.setattr(*((Path, "open") if isinstance(root, Path) else (type(root.fs), "cat_file")), nonsense)
    with pytest.raises(UserError, match=r"cannot read .*: Invalid timestamp"):
        load_manifest(root)
    with pytest.raises(UserError, match=r"cannot be read: Invalid timestamp"):
        read_record(root)
    with pytest.raises(ValueError, match="Invalid timestamp"):
        load_summary(root / "00001.json")


def test_a_larger_file_than_any_lease_is_held_by_somebody_unknown(root):
    write(root, **{"00000001.json": Holder(owner="mouse").to_json() + b" " * MAX_BYTES})
    assert LeaseFiles(root).read(1) == Holder()


def test_a_store_gives_no_more_of_a_file_than_was_asked_for_and_nothing_of_an_empty_one(s3, monkeypatch):
    import s3fs

    fetch, asked = s3fs.S3FileSystem._call_s3, list[str]()

    async def noted(self, method, *args, **kwargs):
        asked.extend([kwargs.get("Range", "all")] if method == "get_object" else ())
        return await fetch(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", noted)
    for size in (0, 1, 99, 100):
        s3("anew/sized", b"x" * size)
        assert storage.read_at_most(storage.storage_path("s3://stories/anew/sized"), 100) == b"x" * size
    assert asked == ["bytes=0-100"] * 3
    s3("anew/sized", b"x" * 101)
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        storage.read_at_most(storage.storage_path("s3://stories/anew/sized"), 100)
