"""All tokens that end a text of a foreign model end it in every export, or it is said which do not."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from slm_ray import export
from slm_ray.exports import hf_folder
from slm_ray.exports.gguf_files.reading import read_back
from slm_ray.model_files.foreign_tokenizer import read_tokenizer
from tests.support.foreign_models import write_foreign

CONFIG, GENERATION = "config.json", "generation_config.json"
Changes = dict[str, dict[str, Any]]
ENDS: dict[str, tuple[str, Changes]] = {
    "in config.json": ("llama", {CONFIG: {"eos_token_id": [2, 7]}, GENERATION: {"eos_token_id": None}}),
    "in both": ("llama", {CONFIG: {"eos_token_id": 9}, GENERATION: {"eos_token_id": [7, 2, 11]}}),
    "the BOS among them": ("llama", {CONFIG: {"eos_token_id": [2, 1]}, GENERATION: {"eos_token_id": None}}),
    "of a GPT": ("gpt2", {CONFIG: {"eos_token_id": [5, 0, 6]}, GENERATION: {"eos_token_id": None}}),
    "one": ("gpt2", {}),
}


def made(folder: Path, kind: str, changes: Changes) -> Path:
    write_foreign(folder, kind)
    for name, fields in changes.items():
        path = folder / name
        content = (json.loads(path.read_text()) if path.exists() else {}) | fields
        path.write_text(json.dumps({field: value for field, value in content.items() if value is not None}))
    return folder


def ends(folder: Path) -> tuple[int, int, frozenset[int]]:
    found = read_tokenizer(folder).borders
    return found.start_id, found.eos_id, found.stop_ids


@pytest.mark.parametrize("kind, changes", ENDS.values(), ids=list(ENDS))
@pytest.mark.parametrize("has_generation_config", [True, False])
def test_all_are_there_after_an_export(
    kind: str, changes: Changes, has_generation_config: bool, tmp_path: Path
) -> None:
    source = made(tmp_path / "made", kind, changes)
    if not has_generation_config:
        (source / GENERATION).unlink()
    assert export.main(["--model", str(source), "--output", str(tmp_path / "hf")]) == 0
    assert ends(tmp_path / "hf") == ends(source)
    for name in (CONFIG, GENERATION):
        (tmp_path / "hf" / name).rename(tmp_path / name)  # the other alone says it too
        assert ends(tmp_path / "hf") == ends(source) if name == GENERATION else True
        (tmp_path / name).rename(tmp_path / "hf" / name)
    written = json.loads((tmp_path / "hf" / GENERATION).read_text())["eos_token_id"]
    assert written == json.loads((tmp_path / "hf" / CONFIG).read_text())["eos_token_id"]
    assert export.main(["--model", str(source), "--to", "onnx", "--output", str(tmp_path / "onnx")]) == 0
    genai = json.loads((tmp_path / "onnx" / "genai_config.json").read_text()) if _has_genai(tmp_path) else None
    if genai is not None:
        listed = genai["model"]["eos_token_id"]
        assert set(listed if isinstance(listed, list) else [listed]) == ends(source)[2]


def _has_genai(folder: Path) -> bool:
    return (folder / "onnx" / "genai_config.json").exists()


def test_parity_sees_an_end_that_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = made(tmp_path / "made", *ENDS["of a GPT"])
    monkeypatch.setattr(hf_folder, "end_ids", lambda tokenizer: tokenizer.eos_id)
    assert export.main(["--model", str(source), "--output", str(tmp_path / "hf")]) == 2
    assert "a text ends at the tokens [0], and [0, 5, 6] are expected" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("listed, lost", [([5, 0, 6], []), ([5, 0, 6, 8, 9], [8, 9])])
def test_a_gguf_names_three_and_the_rest_is_said(
    tmp_path: Path, listed: list[int], lost: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    changes = {CONFIG: {"eos_token_id": listed}, GENERATION: {"eos_token_id": listed}}
    source = made(tmp_path / "made", "gpt2", changes)
    assert export.main(["--model", str(source), "--to", "gguf", "--output", str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert read_back(file).stop_ids == {0, 5, 6}
    reader = gguf.GGUFReader(file)
    fields = [reader.get_field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    assert [field.contents() for field in fields if field is not None] == [0, 5, 6]
    card = (tmp_path / "out" / "README.md").read_text()
    assert (f"llama.cpp {lost} do not end one" in caplog.text) == bool(lost)
    assert ("any of 0, 5, 6 ends it" in card) and (("8, 9" in card) == bool(lost))
