"""A data set in an object store: written, continued, replaced and read there as on a disk."""

import dataclasses

import pytest

from pipelines import prepare
from slm_ray.dataset import manifest
from slm_ray.dataset.manifest import load_manifest
from slm_ray.dataset.shards import read_split
from slm_ray.locks.lease import LEASE, Lease
from slm_ray.locks.lease_files import LeaseFiles
from slm_ray.preparation import staging, steps
from slm_ray.storage import files_below, storage_path
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training import inputs, preflight
from tests.support.source_files import set_rows_per_range

SOURCE = ("--source", "sample", "--max-stories", "60", "--vocab-size", "300")


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch, tmp_path):
    """Ranges of 30 stories, so that a small input has several; and no lock in the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    set_rows_per_range(monkeypatch, 30)


def contents(address: str) -> dict[str, bytes]:
    """Every file but those of the lease, which a disk has no need of."""
    root = storage_path(address)
    files = {file.as_posix().removeprefix(root.as_posix()): file for file in files_below(root)}
    return {name: file.read_bytes() for name, file in files.items() if not name.startswith(f"/{LEASE}/")}


def run(address: str, *words: str) -> int:
    return prepare.main(["--output", address, *SOURCE, *words])


def test_a_data_set_in_an_object_store_is_that_of_a_disk(s3, tmp_path, capsys):
    assert run(str(tmp_path / "data")) == run("s3://stories/data") == 0
    assert contents("s3://stories/data") == contents(str(tmp_path / "data"))
    assert "data set in s3://stories/data, pictures in s3://stories/data/report/report.html" in capsys.readouterr().out

    assert run("s3://stories/data") == 0
    assert "already holds this data set" in capsys.readouterr().out
    assert load_manifest("s3://stories/data").counts["kept"] == 60
    assert len(read_split("s3://stories/data", "train")[0]) == load_manifest(tmp_path / "data").splits["train"].tokens


def test_a_second_job_is_kept_out_of_a_place_in_a_store(s3, capsys):
    """On whatever machine it is; what the first one wrote so far stays."""
    with Lease(storage_path("s3://stories/taken")).held("taken"):
        assert run("s3://stories/taken") == 2
    assert "another prepare.py is writing to s3://stories/taken: wait for its end" in capsys.readouterr().err
    assert not storage_path("s3://stories/taken/manifest.json").exists()
    assert run("s3://stories/taken") == 0


def test_a_job_that_was_killed_keeps_nobody_of_its_machine_out(s3, monkeypatch, capsys):
    with monkeypatch.context() as killed:
        killed.setattr(Lease, "_give_back", lambda _: None)
        with staging.locked(storage_path("s3://stories/killed")):
            pass
    monkeypatch.setattr("slm_ray.locks.lease.time.sleep", lambda _: pytest.fail("it waits for a dead process"))
    assert run("s3://stories/killed") == 0


def test_a_job_that_another_machine_took_over_publishes_nothing(s3, monkeypatch, capsys):
    written = steps.write_range

    def be_taken_over(item, folder, tokenizer_json):
        lease = LeaseFiles(storage_path("s3://stories/over") / LEASE)
        number, holder = lease.newest()
        if holder.host != "another":
            lease.create(number + 1, dataclasses.replace(holder, owner="another", host="another"))
        return written(item, folder, tokenizer_json)

    monkeypatch.setattr(steps, "write_range", be_taken_over)
    assert run("s3://stories/over") == 2
    assert "was taken over by process" in capsys.readouterr().err
    assert not storage_path("s3://stories/over/manifest.json").exists()


def test_what_was_finished_in_an_object_store_is_not_done_again(s3, monkeypatch, capsys):
    written = steps.write_range

    def fail_at_the_last(item, folder, tokenizer_json):
        if item[0].number == 1:
            raise OSError(28, "No space left on device")
        return written(item, folder, tokenizer_json)

    monkeypatch.setattr(steps, "write_range", fail_at_the_last)
    assert run("s3://stories/broken") == 2
    assert "cannot write to s3://stories/broken: [Errno 28] No space left on device" in capsys.readouterr().err
    assert not storage_path("s3://stories/broken/manifest.json").exists()
    monkeypatch.setattr(steps, "write_range", written)
    assert run("s3://stories/broken") == 0
    assert "skipping 2 of 2 ranges that are cleaned, 1 that are written" in capsys.readouterr().err
    assert not [name for name in contents("s3://stories/broken") if ".staging" in name]


def test_another_data_set_takes_its_place_whole(s3, tmp_path):
    assert run("s3://stories/replaced") == 0
    assert run("s3://stories/replaced", "--test-fraction", "0", "--force") == 0
    assert run(str(tmp_path / "data"), "--test-fraction", "0") == 0
    assert contents("s3://stories/replaced") == contents(str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://absent-bucket/data", "cannot find out whether another process is writing to s3://absent-bucket/data: "),
        ("nosuch://bucket/data", "cannot reach nosuch://bucket/data: "),
    ],
)
def test_a_place_that_cannot_be_written_is_one_clear_line(s3, capsys, address, message):
    assert run(address) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert manifest.MANIFEST not in line


def test_training_reads_its_data_from_an_object_store(s3, tiny_config, tmp_path):
    assert run("s3://stories/data", "--validation-fraction", "0.2", "--force") == 0
    config = dataclasses.replace(
        tiny_config, data="s3://stories/data", model=dataclasses.replace(tiny_config.model, vocab_size=0)
    )
    resolved = preflight.resolve(config, lambda _: 1)
    task = inputs.load_inputs(resolved, NullTracker())
    assert resolved.data == "s3://stories/data"
    assert task.data_fingerprint == load_manifest("s3://stories/data").fingerprint
    assert task.train.n_targets == load_manifest("s3://stories/data").splits["train"].tokens


def test_a_store_that_does_not_answer_once_keeps_its_other_data_set(monkeypatch, capsys):
    """ "Not there", for an error of one moment, let the next command replace it without `--force`."""
    assert run("memory://replaced/data") == 0
    before = contents("memory://replaced/data")
    system = type(storage_path("memory://replaced/data").fs)
    info, asked = system.info, []

    def once(self, path, **options):
        if path.endswith("data/manifest.json"):
            asked.append(path)
            if len(asked) == 1:
                raise TimeoutError("no answer")
        return info(self, path, **options)

    monkeypatch.setattr(system, "info", once)
    assert run("memory://replaced/data", "--test-fraction", "0") == 2
    assert "cannot write to memory://replaced/data: no answer" in capsys.readouterr().err
    assert contents("memory://replaced/data") == before
