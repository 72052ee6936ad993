"""A checkpoint's files are compared with each other before memory is asked for."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slm_ray.config.schema import ModelConfig
from slm_ray.errors import UserError
from slm_ray.generation.backend_choice import make_backend
from slm_ray.generation.cache_size import available_bytes, check_cache
from slm_ray.model.decoder import Decoder
from slm_ray.model_files.json_files import MAX_JSON_BYTES
from slm_ray.model_files.reading import MAX_CONTEXT
from slm_ray.runs import checkpoint, verification
from tests.support.tiny_model import write_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


def changed(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """The checkpoint with other content in one of its files, digests and all."""
    content = json.loads((folder / name).read_text())
    change(content)
    return rewritten(folder, name, json.dumps(content))


def rewritten(folder: Path, name: str, text: str) -> Path:
    partial = folder.rename(folder.with_name("raw"))
    (partial / name).write_text(text)
    (partial / verification.MARKER).unlink()
    checkpoint.commit_partial(partial, folder)
    return folder


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("d_ff", 2**24, "has shape [64, 32], and [16777216, 32] is expected"),
        ("vocab_size", 10**8, "embed_tokens.weight has shape"),
        ("d_head", 2**22, "self_attn.q_proj.weight has shape"),
        ("d_model", 2**50, "Storage size calculation overflowed"),
        ("d_model", 10**30, "Overflow"),
        ("n_layers", 4000, "n_layers is 4000, and there are 20 tensors"),
        ("seq_len", 10**9, f"must be at most {MAX_CONTEXT}"),
        ("vocab_size", 0, "vocab_size (0)"),
        ("tie_embeddings", False, "lm_head.weight is missing"),
    ],
)
def test_a_size_that_the_weights_do_not_bear_out_is_refused_before_it_takes_memory(
    folder: Path, field: str, value: int, message: str
) -> None:
    own = {"model_type": "slm_ray"}  # with no family's fields beside it, which would say otherwise
    changed(
        folder, "model/config.json", lambda content: content["slm_ray"].update({field: value}) or content.update(own)
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="does not fit its config") as caught:
        checkpoint.load_model(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024  # KB; torch loads its meta device


def test_a_context_that_no_cache_holds_is_refused_before_it_is_made() -> None:
    shape = {"vocab_size": 300, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 64}
    with torch.device("meta"):
        model = Decoder(ModelConfig(**shape, seq_len=MAX_CONTEXT))
    free = available_bytes()
    assert free is not None
    with pytest.raises(UserError, match="the cache of 1000000 stories"):
        make_backend(model, 10**6)
    with pytest.raises(UserError, match="the cache of a story"):
        check_cache(ModelConfig(**(shape | {"n_layers": 20}), seq_len=MAX_CONTEXT), 1)
    check_cache(ModelConfig(**shape, seq_len=1024), 8)


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "does not list state.json, model/config.json"),
        ([], "does not list files with their digests"),
        ({"state.json": 5}, "does not list files with their digests"),
        ({"../secret": "0"}, "'../secret', which leads out of the folder"),
        ({"/etc/passwd": "0"}, "'/etc/passwd', which leads out"),
        ({"model/../../x": "0"}, "leads out"),
    ],
)
def test_a_marker_that_lists_nothing_or_leads_out_does_not_verify(folder: Path, files: object, message: str) -> None:
    (folder / verification.MARKER).write_text(json.dumps({"format_version": 1, "files": files}))
    with pytest.raises(UserError, match="corrupt") as caught:
        verification.verify(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["complete.json", "state.json", "model/config.json"])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[1]", "3", "{}", " " * (MAX_JSON_BYTES + 1), "\ufeff{}", '{"a": 1e999}']
)
def test_json_of_any_kind_is_one_line(folder: Path, name: str, text: str) -> None:
    if name == "complete.json":
        (folder / name).write_text(text, encoding="utf-8")
    else:
        rewritten(folder, name, text)
    with pytest.raises(UserError) as caught:
        checkpoint.load_state(folder)
        checkpoint.load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "field, value",
    [
        ("step", "many"), ("step", [1]), ("step", None), ("config", []), ("config", "x"), ("data_fingerprint", 5),
        ("run_id", {}), ("metrics", 3), ("metrics", {"val_loss": "low"}), ("metrics", [1]), ("best", [1]),
        ("pending_losses", 3), ("scaler", 1), ("best", {"step": 1e999}), ("unknown", 1),
    ],
)  # fmt: skip
def test_a_state_of_odd_types_is_one_line(folder: Path, field: str, value: object) -> None:
    changed(folder, "state.json", lambda content: content.update({field: value}))
    with pytest.raises(UserError, match="cannot be read") as caught:
        checkpoint.load_state(folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_tokens_that_the_model_does_not_know_is_refused(folder: Path) -> None:
    def add(content: dict[str, Any]) -> None:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        content["added_tokens"].append({"id": 300, "content": "beyond", **flags})

    changed(folder, "model/tokenizer.json", add)
    with pytest.raises(UserError, match="has the token 300 and the vocabulary of its model ends at 299"):
        checkpoint.load_model(folder)


def test_a_tokenizer_whose_file_makes_its_package_panic_is_one_line(folder: Path) -> None:
    broken = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    changed(folder, "model/tokenizer.json", lambda content: content.update(normalizer=broken))
    with pytest.raises(UserError, match="is not a tokenizer"):
        checkpoint.load_model(folder)
