"""One process at a time in a folder."""

from pathlib import Path

import pytest

from slm_ray.errors import UserError
from slm_ray.locks import folder_lock


def test_a_refused_lock_leaves_the_folder_of_its_owner(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with folder_lock.locked(folder, "taken"):
        with pytest.raises(UserError, match="taken"), folder_lock.locked(folder, "taken"):
            pass
        assert folder.is_dir()  # empty as it is
        with pytest.raises(UserError, match="taken"), folder_lock.locked(folder, "taken"):
            pass
    assert not folder.exists()  # its owner made it, and left nothing
    with pytest.raises(KeyError), folder_lock.locked(tmp_path / "new" / "deep" / "run", ""):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_of_the_user_stays(tmp_path: Path) -> None:
    with folder_lock.locked(tmp_path, "taken"):
        pass
    assert tmp_path.is_dir()


def test_a_lock_on_a_folder_that_its_owner_just_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second opens the folder, the first removes it and leaves, the second gets the lock of what is gone."""
    folder, lock = tmp_path / "run", folder_lock._lock
    n_tries: list[int] = []

    def slow(descriptor: int, refusal: str) -> bool:
        n_tries.append(1)
        if len(n_tries) == 1:
            folder.rmdir()
        return lock(descriptor, refusal)

    monkeypatch.setattr(folder_lock, "_lock", slow)
    with folder_lock.locked(folder, "taken"):
        monkeypatch.setattr(folder_lock, "_lock", lock)
        assert len(n_tries) == 2
        with pytest.raises(UserError, match="taken"), folder_lock.locked(folder, "taken"):
            pass
