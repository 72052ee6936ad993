"""An export from beginning to end: complete and checked, or absent."""

import json
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi

from slm_ray import export
from slm_ray.config.schema import ModelConfig
from slm_ray.exports import hf_folder, onnx_parts, push
from slm_ray.exports.gguf_files import file as gguf_file
from slm_ray.runs import checkpoint
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train
from tests.support.saved_models import save_model
from tests.support.tiny_model import random_model, write_tiny_model

GPT_NEO: dict[str, Any] = {"norm": "layer", "mlp": "gelu", "positions": "learned", "bias": True, "qkv_bias": False}
GPT_NEO |= {"scale_attention": False, "local_window": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def run(model: Path | str, output: Path, *options: str) -> int:
    return export.main(["--model", str(model), "--output", str(output), *options])


def checks(folder: Path) -> list[dict[str, Any]]:
    record = json.loads((folder / "parity.json").read_text())
    found: list[dict[str, Any]] = record["checks"]
    return found


def test_all_three_appear_with_their_figures(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, tmp_path / "out", "--to", "all") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"hf", "gguf", "onnx"}
    programs = []
    for name in ("hf", "gguf", "onnx"):
        assert (tmp_path / "out" / name / "README.md").is_file()
        for check in checks(tmp_path / "out" / name):
            programs.append(check["by"].split()[0])
            assert check["largest_logit_error"] <= 1e-5 < check["bound"]
            assert check["greedy_tokens_equal"] == check["greedy_tokens"] > 90
            assert check["texts_with_equal_ids"] == check["texts"]
    assert set(programs) - {"llama.cpp"} == {"transformers", "gguf", "onnxruntime", "onnxruntime-genai"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("to", "dtype"), [("hf", "f16"), ("hf", "bf16"), ("gguf", "q8_0"), ("onnx", "int8")])
def test_rounded_weights_stay_within_their_bound(model: Path, to: str, dtype: str, tmp_path: Path) -> None:
    assert run(model, tmp_path / "out", "--to", to, "--dtype", dtype) == 0
    for check in checks(tmp_path / "out"):
        assert 0 < check["largest_logit_error"] < check["bound"]
    whole = sum(path.stat().st_size for path in (model / "model").glob("*.safetensors"))
    weights = [path for path in (tmp_path / "out").iterdir() if path.suffix in (".safetensors", ".gguf")]
    assert all(path.stat().st_size < 0.7 * whole for path in weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "gguf", "--dtype", "int8"], "--to gguf takes --dtype f32 or f16 or bf16 or q8_0, not int8"),
        (["--to", "all", "--dtype", "f16"], "--to all takes --dtype f32, not f16, which is of gguf and hf"),
        (["--format", "checkpoint", "--dtype", "f16"], "--to checkpoint takes --dtype f32"),
        (["--to", "gguf", "--format", "hf"], "--to gguf and --format hf are two names of one option"),
        (["--to", "checkpoint", "--push", "a/b"], "--push takes one export for others, not --to checkpoint"),
        (["--to", "all", "--push", "a/b"], "--push takes one export for others, not --to all"),
        (["--push", "nobody"], "--push nobody is not a name of the hub: expected OWNER/NAME"),
        (["--push", "a/b"], "--push a/b needs a token of the hub"),
        (["--data", "no/such"], "no manifest.json in no/such"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    model: Path,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(push, "get_token", lambda: None)
    assert run(model, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_story_may_fill_the_context(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    shape = ModelConfig(vocab_size=512, seq_len=12, n_layers=1, d_model=32, n_heads=4, d_ff=64, qk_norm=True)
    model = save_model(tmp_path / "model", random_model(shape), tiny_tokenizer)
    assert run(model, tmp_path / "out", "--to", "all") == 0
    assert "onnxruntime-genai" in {check["by"].split()[0] for check in checks(tmp_path / "out" / "onnx")}


def _untouched_rows(values: Any, width: int) -> Any:
    """The rows of q and k left in our order."""
    return values


def _wrong_scales(weight: torch.Tensor) -> tuple[Any, Any]:
    levels, scales = _right(weight)
    return levels, scales * np.float32(1.5)


_right = onnx_parts.quantized


@pytest.mark.parametrize(
    ("options", "break_it", "message"),
    [
        (["--to", "gguf"], (gguf_file, "neighbours", _untouched_rows), "gguf"),
        (["--to", "gguf"], (gguf_file, "vocabulary", "swapped"), "it has other ids for"),
        (["--to", "hf", "--dtype", "f16"], (hf_folder, "TYPES", {"f16": torch.int8}), "the hf export was not written"),
        (["--to", "onnx"], (onnx_parts, "OPSET", 9), "the onnx export was not written"),
    ],
)
def test_a_broken_exporter_leaves_no_folder(
    model: Path,
    options: list[str],
    break_it: tuple[Any, str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, name, broken = break_it
    monkeypatch.setattr(module, name, _swapped(module.vocabulary) if broken == "swapped" else broken)
    assert run(model, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def _swapped(vocabulary: Callable[..., Any]) -> Callable[..., Any]:
    """A vocabulary with two entries in each other's place."""
    import dataclasses

    def broken(*arguments: Any) -> Any:
        found = vocabulary(*arguments)
        tokens = list(found.tokens)
        tokens[80], tokens[81] = tokens[81], tokens[80]
        return dataclasses.replace(found, tokens=tuple(tokens))

    return broken


def test_a_graph_that_computes_something_else_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from slm_ray.exports import onnx_graph

    monkeypatch.setattr(onnx_parts, "quantized", _wrong_scales)
    monkeypatch.setattr(onnx_graph, "quantized", _wrong_scales)
    assert run(model, tmp_path / "out", "--to", "onnx", "--dtype", "int8") == 2
    assert "its logits differ by up to" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_model_and_an_output_that_is_there_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    checkpoint.copy_for_serving(model, copy)
    weights = copy / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert run(copy, tmp_path / "out", "--to", "gguf") == 2
    assert "the checkpoint is corrupt" in capsys.readouterr().err
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "link"):
        assert run(model, tmp_path / name, "--to", "gguf") == 2
        assert f"{name} exists already" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "there", "link"}


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond a limit, as the system has it; safetensors meets it in Rust."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize(
    "options", [["--to", "hf"], ["--to", "hf", "--dtype", "bf16"], ["--to", "gguf"], ["--to", "onnx"]]
)
def test_a_full_disk_leaves_nothing(
    model: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot write {tmp_path / 'out'}: ")
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_llama_cpp_does_not_have_is_refused_before_anything_is_written(
    tiny_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ModelConfig(vocab_size=512, seq_len=32, n_layers=2, d_model=32, n_heads=4, d_ff=64, **GPT_NEO)
    neo = save_model(tmp_path / "neo", random_model(shape), tiny_tokenizer)
    for to in ("gguf", "all"):
        assert run(neo, tmp_path / "out", "--to", to) == 2
        error = capsys.readouterr().err
        assert error == (
            "error: llama.cpp has no architecture for this model: it has Llama, Qwen3 and GPT-2, and not GPT-Neo\n"
        )
    unigram = train(["Once upon a time there was a cat."], 300, "unigram")
    shape = ModelConfig(vocab_size=unigram.vocab_size, seq_len=32, n_layers=1, d_model=32, n_heads=4, d_ff=64)
    other = save_model(tmp_path / "unigram", random_model(shape), unigram)
    assert run(other, tmp_path / "out", "--to", "gguf") == 2
    assert "llama.cpp has no tokenizer that gives the ids of this one: it is Unigram" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"neo", "unigram"}


def test_a_shape_of_our_own_is_checked_by_our_own_reader(
    tiny_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ModelConfig(
        vocab_size=512, seq_len=32, n_layers=1, d_model=32, n_heads=4, d_ff=64, norm="layer", positions="rotary"
    )
    own = save_model(tmp_path / "own", random_model(shape), tiny_tokenizer)
    assert run(own, tmp_path / "out", "--format", "hf") == 0
    assert [check["by"] for check in checks(tmp_path / "out")] == ["slm-ray"]
    assert "note: transformers has no model of this shape" in capsys.readouterr().err


class Hub:
    """What `HfApi` was asked for, in its place."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.fault = fault

    def create_repo(self, _api: Any, repo: str, **options: Any) -> None:
        self.asked.append(("create_repo", {"repo": repo, **options}))

    def upload_folder(self, _api: Any, **options: Any) -> Any:
        self.asked.append(("upload_folder", options))
        if self.fault:
            raise self.fault
        return type("Commit", (), {"commit_url": "https://hub.test/me/stories/commit/1"})()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(push, "get_token", lambda: "hf_secretsecret")
    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo, **options: found.create_repo(api, repo, **options))
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **options: found.upload_folder(api, **options))
    return found


def test_a_push_uploads_what_was_checked(
    model: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, tmp_path / "out", "--to", "gguf", "--push", "me/stories") == 0
    (first, repo), (second, upload) = hub.asked
    assert (first, second) == ("create_repo", "upload_folder")
    assert repo == {"repo": "me/stories", "repo_type": "model", "private": True, "exist_ok": True}
    assert upload["folder_path"] == tmp_path / "out"
    assert upload["repo_id"] == "me/stories"
    assert "pushed to https://hub.test/me/stories/commit/1" in capsys.readouterr().err


def test_nothing_is_pushed_that_is_not_equal(
    model: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "neighbours", _untouched_rows)
    assert run(model, tmp_path / "out", "--to", "gguf", "--push", "me/stories") == 2
    assert hub.asked == []


def test_a_hub_that_refuses_is_said_in_one_line_without_the_token(
    model: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fault = RuntimeError("403 for https://me:pw@hub.test/x?token=hf_secretsecret with hf_secretsecret\nmore")
    assert run(model, tmp_path / "out", "--to", "gguf", "--push", "me/stories") == 2
    error = capsys.readouterr().err
    assert "the hub does not take me/stories (403 for https://hub.test/x with hf_...)" in error
    assert "secretsecret" not in error
    assert len(error.splitlines()) == 1
    assert (tmp_path / "out" / "parity.json").is_file()


def test_a_package_that_is_missing_is_named_before_a_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "slm_ray.exports.gguf_files.folder", raising=False)
    monkeypatch.setitem(sys.modules, "slm_ray.exports.gguf_files.file", None)
    assert run("no/such/model", tmp_path / "out", "--to", "gguf") == 2
    assert "pip install 'slm-ray[export]'" in capsys.readouterr().err
