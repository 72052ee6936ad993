"""The same operations on a folder and on an object store (fsspec's in memory, here)."""

import uuid
from pathlib import Path

import pytest

from slm_ray import storage
from slm_ray.errors import UserError
from slm_ray.storage import StoragePath


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

    monkeypatch.setattr(type(root), "read_bytes", refuse)
    with pytest.raises(PermissionError):
        storage.read_if_there(root / "a")
