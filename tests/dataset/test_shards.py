"""The contract on disk: deterministic shards, a manifest that comes back, and reading that trusts no file."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slm_ray.dataset import shards
from slm_ray.dataset.manifest import FORMAT_VERSION, MANIFEST, Manifest, Split, fingerprint, load_manifest
from slm_ray.dataset.shards import read_split, shard_path, shard_schema, verify_split
from slm_ray.errors import UserError

GOLDEN_SHA256 = "680aadfdb32898ee917bd075fdac44b09b6fa36ed24aa659757045c390ef2794"
STORIES = {"a#0": [5, 6, 0], "a#1": [7, 0]}


def make_table(stories: dict[str, list[int]], vocab_size: int = 4096) -> pa.Table:
    columns = [list(stories), list(stories.values()), [3 * len(ids) for ids in stories.values()]]
    return pa.table(columns, schema=shard_schema(vocab_size))


def make_data_set(folder, vocab_size: int = 4096) -> Manifest:
    first = shards.write_shard(folder / shard_path("train", 0), make_table(STORIES, vocab_size))
    second = shards.write_shard(folder / shard_path("train", 1), make_table({"b#0": [9, 0]}, vocab_size))
    splits = {"train": Split.of((second, first)), "validation": Split.of(()), "test": Split.of(())}
    digest = fingerprint(source_digest="s", parameters={}, tokenizer_sha256="t", splits=splits)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source={"digest": "s"},
        parameters={},
        tokenizer={"sha256": "t", "vocab_size": vocab_size, "end_token_id": 0},
        splits=splits,
        rejected=Split.of(()),
        counts={"read": 3, "kept": 3, "duplicates": 0, "rejected": {}},
        fingerprint=digest,
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return manifest


@pytest.mark.parametrize(("vocab_size", "dtype"), [(4096, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_a_split_comes_back_in_shard_and_row_order(tmp_path, vocab_size, dtype):
    make_data_set(tmp_path, vocab_size)
    tokens, n_bytes = read_split(tmp_path, "train")
    assert tokens.dtype == dtype
    assert tokens.tolist() == [5, 6, 0, 7, 0, 9, 0]
    assert n_bytes == 21


def test_an_empty_split_is_no_tokens(tmp_path):
    make_data_set(tmp_path)
    tokens, n_bytes = read_split(tmp_path, "test")
    assert (len(tokens), n_bytes) == (0, 0)


def test_a_manifest_comes_back_as_it_was(tmp_path):
    manifest = make_data_set(tmp_path)
    assert load_manifest(tmp_path) == manifest
    assert load_manifest(tmp_path).to_json() == manifest.to_json()


def test_the_same_table_gives_the_same_bytes_however_it_is_chunked(tmp_path):
    whole = make_table(STORIES)
    chunked = pa.concat_tables([whole.slice(0, 1), whole.slice(1)])
    first, second = (shards.write_shard(tmp_path / "train" / name, t) for name, t in [("a", whole), ("b", chunked)])
    assert first.sha256 == second.sha256
    assert not list(tmp_path.glob("**/.*"))


@pytest.mark.skipif(pa.__version__ != "25.0.1", reason="Parquet files carry the version of their writer")
def test_shard_bytes_stay_what_they_were(tmp_path):
    assert shards.write_shard(tmp_path / "x.parquet", make_table(STORIES)).sha256 == GOLDEN_SHA256


def test_a_shard_knows_its_sums(tmp_path):
    shard = shards.write_shard(tmp_path / "train" / "00000.parquet", make_table(STORIES))
    assert (shard.file, shard.rows, shard.tokens, shard.bytes) == ("train/00000.parquet", 2, 5, 15)
    schema = pq.read_schema(tmp_path / "train" / "00000.parquet")
    assert schema.equals(shard_schema(4096))


def test_without_a_manifest_there_is_no_data_set(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"no manifest.json in .*: run `python pipelines/prepare.py` first"):
            load_manifest(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 99}', "not json"])
def test_a_strange_manifest_is_refused_in_one_line(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match="is no manifest this version reads") as caught:
        load_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unknown_split_is_refused(tmp_path):
    make_data_set(tmp_path)
    with pytest.raises(UserError, match=r"no split 'dev' .*train, validation, test"):
        read_split(tmp_path, "dev")


def test_a_missing_shard_is_named(tmp_path):
    make_data_set(tmp_path)
    (tmp_path / "train/00001.parquet").unlink()
    with pytest.raises(UserError, match=r"train/00001.parquet.*prepare the data again"):
        read_split(tmp_path, "train")


def test_every_flipped_byte_and_every_truncation_is_found(tmp_path):
    manifest = make_data_set(tmp_path)
    path = tmp_path / "train/00000.parquet"
    content = path.read_bytes()
    for place in range(0, len(content), 37):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match=r"train/00000.parquet was truncated or altered"):
            read_split(tmp_path, "train", manifest=manifest)
        path.write_bytes(content[:place])
        with pytest.raises(UserError, match="truncated or altered"):
            read_split(tmp_path, "train", manifest=manifest)


def test_the_fingerprint_follows_everything_that_matters(tmp_path):
    manifest = make_data_set(tmp_path)
    base = {"source_digest": "s", "parameters": {"a": 1}, "tokenizer_sha256": "t", "splits": manifest.splits}
    train = dataclasses.replace(manifest.splits["train"], shards=manifest.splits["train"].shards[:1])
    changes = [
        {"source_digest": "x"},
        {"parameters": {"a": 2}},
        {"tokenizer_sha256": "x"},
        {"splits": {**manifest.splits, "train": train}},
    ]
    digests = {fingerprint(**{**base, **change}) for change in [{}, *changes]}
    assert len(digests) == 1 + len(changes)
    assert fingerprint(**base) == fingerprint(**{**base, "parameters": {"a": 1}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 3}, r"train/00000.parquet has 2 rows, but manifest.json lists 3: prepare the data again"),
        ({"tokens": 4}, r"train/00000.parquet has 5 tokens, but manifest.json lists 4"),
        ({"tokens": 6}, r"train/00000.parquet has 5 tokens, but manifest.json lists 6"),
    ],
)
def test_a_shard_that_is_not_as_long_as_listed_is_named(tmp_path, change, message):
    manifest = make_data_set(tmp_path)
    first, second = manifest.splits["train"].shards
    train = Split.of((dataclasses.replace(first, **change), second))
    with pytest.raises(UserError, match=message):
        read_split(
            tmp_path, "train", manifest=dataclasses.replace(manifest, splits={**manifest.splits, "train": train})
        )


@pytest.mark.parametrize("tokens", [6, 8])
def test_no_token_is_left_unfilled_or_cut_off(tmp_path, tokens):
    manifest = make_data_set(tmp_path)
    train = dataclasses.replace(manifest.splits["train"], tokens=tokens)
    with pytest.raises(UserError, match=rf"train has 7 tokens by its shards, but manifest.json lists {tokens}"):
        read_split(
            tmp_path, "train", manifest=dataclasses.replace(manifest, splits={**manifest.splits, "train": train})
        )


def test_the_files_of_a_split_are_verified_without_their_tokens(tmp_path, monkeypatch):
    manifest = make_data_set(tmp_path)
    monkeypatch.setattr(pq, "ParquetFile", lambda *_, **__: pytest.fail("decoded"))
    verify_split(tmp_path, "train", manifest)
    miscounted = dataclasses.replace(manifest.splits["train"], tokens=99)
    other = dataclasses.replace(manifest, splits={**manifest.splits, "train": miscounted})
    with pytest.raises(UserError, match=r"tokens by its shards, but .* lists 99"):
        verify_split(tmp_path, "train", other)
    path = tmp_path / shard_path("train", 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train/00001.parquet was truncated or altered"):
        verify_split(tmp_path, "train", manifest)
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*train/00001.parquet: No such file"):
        verify_split(tmp_path, "train", manifest)
