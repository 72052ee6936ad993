"""Two machines, one place: a lease in a folder, in fsspec's memory and in a real object store."""

import dataclasses
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from slm_ray.errors import UserError
from slm_ray.locks import folder_lock
from slm_ray.locks.lease import LEASE, SETTLE_S, STALE_S, WATCH_S, Lease, LeaseLostError
from slm_ray.locks.lease_files import Holder, LeaseFiles
from slm_ray.storage import StoragePath, storage_path
from tests.support.paths import ROOT

TAKEN = "another is writing there: wait"


@pytest.fixture(params=["folder", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    if request.param == "folder":
        return tmp_path
    if request.param == "s3":
        request.getfixturevalue("s3")
        return storage_path(f"s3://stories/{uuid.uuid4().hex}")
    return storage_path(f"memory://{uuid.uuid4().hex}")


def not_asked(_: float) -> None:
    raise AssertionError("nothing had to be waited for")


def lease(place: StoragePath, pause: Callable[[float], Any] = not_asked) -> Lease:
    return Lease(place, pause=pause)


def silence(place: StoragePath, seconds: float = 2 * STALE_S) -> None:
    """Let the last sign of life be that old: its owner was killed, or stopped."""
    files = LeaseFiles(place / LEASE)
    number, holder = files.newest()
    assert holder is not None
    files.write(number, dataclasses.replace(holder, alive_s=time.time() - seconds))


def test_a_second_one_is_refused_with_who_has_it_until_it_is_given_back(place: StoragePath) -> None:
    first, second = lease(place), lease(place)
    with first.held(TAKEN):
        for _ in range(2):
            expected = rf"{TAKEN} \(it began as process \d+ on .+ at 20.*120 s"
            with pytest.raises(UserError, match=expected), second.held(TAKEN):
                pass
        first.check()
    with second.held(TAKEN), pytest.raises(UserError, match=TAKEN), first.held(TAKEN):
        pass


def test_two_that_start_at_once_are_one(place: StoragePath) -> None:
    at_once = threading.Barrier(2)
    with lease(place).held(TAKEN):
        pass
    silence(place)

    class Slow(LeaseFiles):
        def create(self, number: int, holder: Holder) -> None:
            if self.read(number) is None:
                at_once.wait(30)
            super().create(number, holder)

    def start() -> str:
        mine = lease(place)
        mine._files = Slow(place / LEASE)
        try:
            mine._take(TAKEN, "")
        except UserError as error:
            return str(error)
        mine.check()
        return "begun"

    with ThreadPoolExecutor(2) as pool:
        said = sorted(future.result() for future in [pool.submit(start) for _ in range(2)])
    assert said[1] == "begun" and said[0].startswith(TAKEN)


def test_one_whose_heart_has_stopped_is_taken_over_and_says_so(place: StoragePath) -> None:
    first, second = lease(place), lease(place, pause=lambda _: None)
    with pytest.raises(LeaseLostError, match=r"was taken over by process \d+ on .*has stopped writing"), first.held(""):
        silence(place)
        with second.held(TAKEN):
            with pytest.raises(LeaseLostError):
                first.check()
            before = LeaseFiles(place / LEASE).newest()
            first._beat()
            first._give_back()
            assert LeaseFiles(place / LEASE).newest() == before
            second.check()
            raise RuntimeError("what came of it")


@pytest.mark.parametrize("fault", [None, RuntimeError("of this")])
def test_one_that_sleeps_and_ends_before_its_next_sign_of_life_is_told(
    place: StoragePath, fault: Exception | None
) -> None:
    first = lease(place)
    with pytest.raises(LeaseLostError, match="was taken over by process"), first.held(TAKEN):
        silence(place)
        with lease(place, pause=lambda _: None).held(TAKEN):
            pass
        if fault:
            raise fault


def test_a_sign_of_life_that_is_recent_is_not_waited_for(place: StoragePath) -> None:
    with lease(place).held(""):
        silence(place, STALE_S / 2)
        with pytest.raises(UserError, match=TAKEN), lease(place).held(TAKEN):
            pass


def test_a_clock_that_is_wrong_costs_a_living_owner_nothing(place: StoragePath) -> None:
    first = lease(place)
    with first.held(""):
        for seconds in (3600, -3600):
            silence(place, seconds)
            with pytest.raises(UserError, match=TAKEN), lease(place, pause=lambda _: first._beat()).held(TAKEN):
                pass
            first.check()


def test_a_takeover_is_won_by_one(place: StoragePath) -> None:
    winner = lease(place, pause=lambda _: None)
    with pytest.raises(LeaseLostError, match="was taken over"), lease(place).held(""):
        silence(place)
        late = lease(place, pause=lambda _: winner._take(TAKEN, ""))
        with pytest.raises(UserError, match=TAKEN), late.held(TAKEN):
            pass
        winner.check()
    winner.check()  # the first gave back nothing of the winner's


def test_an_owner_that_is_known_to_be_dead_is_not_waited_for(place: StoragePath) -> None:
    killed = lease(place)
    killed._take("", "")
    again, late = lease(place), lease(place)
    with again.held(TAKEN, killed.owner), pytest.raises(UserError, match=TAKEN), late.held(TAKEN, killed.owner):
        pass


def test_what_is_no_file_of_a_lease_is_somebody_until_it_was_watched(place: StoragePath) -> None:
    files = LeaseFiles(place / LEASE)
    files.create(3, Holder())
    for content in (b"", b"[]", b'{"owner": {}, "pid": "x"}', b"\xff", b"[" * 100_000):
        (place / LEASE / "00000003.json").write_bytes(content)
        assert files.newest() == (3, Holder(is_begun=not content))

        def is_written(_: float) -> None:
            files.write(3, Holder(owner="x", alive_s=time.time()))

        with pytest.raises(UserError, match=TAKEN), lease(place, pause=is_written).held(TAKEN):
            pass
    (place / LEASE / "00000003.json").write_bytes(b"")
    with lease(place, pause=lambda _: None).held(TAKEN):
        assert files.newest()[0] == 4


def test_a_beginning_of_a_file_is_watched_for_as_long_as_a_write_may_take(place: StoragePath) -> None:
    """Its owner has not begun: it looks at the whole file first, and finds itself outnumbered then."""
    files = LeaseFiles(place / LEASE)
    whole = Holder(owner="x", host="there", pid=1, since_s=1.0, alive_s=time.time())
    text = whole.to_json()
    assert Holder.from_json(text) == whole
    foreign = [b"[]", b"{}", b"x", b'{"owner"', b'{"alive_at": 3', b"\xff", text.replace(b'"pid"', b'"id"')]
    for content in [*(text[:length] for length in (0, 1, 12, 13, len(text) // 2, len(text) - 1)), *foreign]:
        files.create(3, Holder()) if files.newest()[0] < 3 else None
        (place / LEASE / f"{files.newest()[0]:08d}.json").write_bytes(content)
        waited: list[float] = []
        late = lease(place, pause=waited.append)
        with late.held(TAKEN):
            assert waited == [WATCH_S if content in foreign else SETTLE_S]
        waited.clear()

    def is_written(_: float) -> None:
        files.write(files.newest()[0], dataclasses.replace(whole, alive_s=time.time()))

    (place / LEASE / f"{files.newest()[0]:08d}.json").write_bytes(text[:20])
    with pytest.raises(UserError, match=f"{TAKEN}.*on there"), lease(place, pause=is_written).held(TAKEN):
        pass


def test_who_was_taken_over_while_it_wrote_its_lease_does_not_begin(tmp_path: Path) -> None:
    class Slow(LeaseFiles):
        def create(self, number: int, holder: Holder) -> None:
            super().create(number, holder)
            if not taken:
                path = tmp_path / LEASE / f"{number:08d}.json"
                path.write_bytes(holder.to_json()[:30])
                taken.append(lease(tmp_path, pause=lambda _: None))
                taken[0]._take(TAKEN, "")
                path.write_bytes(holder.to_json())

    taken: list[Lease] = []
    slow = lease(tmp_path)
    slow._files = Slow(tmp_path / LEASE)
    with pytest.raises(UserError, match=TAKEN), slow.held(TAKEN):
        pass
    taken[0].check()


KILLED = """
import os, signal, sys
from pathlib import Path
from slm_ray.locks.lease import Lease
os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with Lease(Path(sys.argv[1])).held(""):
    pass
"""


def test_a_kill_leaves_no_half_of_a_lease(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert LeaseFiles(tmp_path / LEASE).newest() == (0, None)
    with lease(tmp_path).held(TAKEN):  # which waits for nothing
        pass


@pytest.mark.parametrize("left", [".00000001.json.12-abcdef01", "00000001.json.abcdef.partial"])
def test_what_killed_writers_of_a_lease_left_is_removed_and_nothing_else(tmp_path: Path, left: str) -> None:
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, timeout=120)
    folder = tmp_path / LEASE
    assert len([*folder.glob("00000001.json.*.partial")]) == 2
    others = {"notes.partial", "00000002.json.abcdef.partial", ".00000002.json.12-abcdef01", "00000001.json.bak"}
    for name in {left, *others}:  # those of number 2 may be of one that is about to try it
        (folder / name).touch()
    with lease(tmp_path).held(TAKEN):
        assert {path.name for path in folder.iterdir()} == {"00000001.json", *others}


@pytest.mark.parametrize(
    "code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL, errno.EACCES,
             errno.EIO, errno.ENOTTY]
)  # fmt: skip
def test_a_disk_without_hard_links_has_leases_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def without_links(*_: object) -> None:
        raise OSError(code, "no links here")

    monkeypatch.setattr(os, "link", without_links)
    for number in (1, 2):
        with lease(tmp_path).held(TAKEN):
            assert [path.name for path in (tmp_path / LEASE).iterdir()] == [f"{number:08d}.json"]
            with pytest.raises(UserError, match=TAKEN), lease(tmp_path).held(TAKEN):
                pass


@pytest.mark.parametrize("code", [errno.EEXIST, errno.EIO])
def test_a_link_whose_answer_was_lost_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    link = os.link

    def lost(source: Path, target: Path) -> None:
        link(source, target)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", lost)
    with lease(tmp_path).held(TAKEN):
        assert [path.name for path in (tmp_path / LEASE).iterdir()] == ["00000001.json"]


def test_a_full_disk_leaves_no_half_of_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match="No space left"), lease(tmp_path).held(TAKEN):
            pass
    assert [*(tmp_path / LEASE).iterdir()] == []


def test_workers_check_it_by_its_token(place: StoragePath) -> None:
    first = lease(place)
    Lease(place, first.token).check()  # there is none
    with first.held(""):
        theirs = Lease(place, first.token)
        theirs.check()
    with pytest.raises(LeaseLostError), lease(place).held(""):
        theirs.check()


def test_a_place_that_cannot_be_looked_at_is_neither_free_nor_lost(
    place: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lease(place)
    with first.held(""):
        with monkeypatch.context() as patch:

            def refuse(self: LeaseFiles) -> list[int]:
                raise RuntimeError("AccessDenied http://me:secret@store/x\nmore")

            patch.setattr(LeaseFiles, "_numbers", refuse)
            expected = r"cannot find out whether .*: AccessDenied http://store/x$"
            with pytest.raises(UserError, match=expected), lease(place).held(TAKEN):
                pass
            with pytest.raises(OSError, match="AccessDenied"):
                first.check()
            first._beat()
        first.check()


def test_in_a_store_without_conditional_writes_the_last_one_has_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = storage_path(f"memory://{uuid.uuid4().hex}")
    kind = type(place.fs)  # type: ignore[union-attr]
    monkeypatch.setattr(kind, "pipe_file", lambda self, path, content, mode: self.open(path, "wb", data=content))
    second = lease(place, pause=lambda _: None)

    def over_it(_: float) -> None:
        LeaseFiles(place / LEASE).write(1, Holder(owner="the second", host="there", alive_s=time.time()))

    with pytest.raises(UserError, match=f"{TAKEN}.*on there"), lease(place, pause=over_it).held(TAKEN):
        pass
    silence(place)
    with second.held(TAKEN):
        second.check()
    assert "no conditional write" in caplog.text


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_a_disk_without_locks_has_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def without_locks(*_: object) -> None:
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    for _ in range(2):
        with folder_lock.locked(tmp_path / "run", TAKEN) as is_certain:
            assert not is_certain
            expected = f"{TAKEN} \\(it began"
            with pytest.raises(UserError, match=expected), folder_lock.locked(tmp_path / "run", TAKEN):
                pass
