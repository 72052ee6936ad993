"""Models that others made leave for the same programs, with their own tokenizers and ends."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from huggingface_hub import ModelCard

from slm_ray import export
from slm_ray.exports.parity import Expected, Story
from slm_ray.tokenization.from_sentencepiece import convert
from tests.support.foreign_models import SHAPES, write_foreign
from tests.support.sentencepiece_models import sentencepiece_model


@pytest.fixture(scope="module", params=sorted(SHAPES))
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_foreign(tmp_path_factory.mktemp("made") / request.param, request.param, padding=8)


def programs(folder: Path) -> list[str]:
    """Who opened it, and found it equal."""
    found: list[dict[str, Any]] = json.loads((folder / "parity.json").read_text())["checks"]
    assert all(one["texts_with_equal_ids"] == one["texts"] >= 12 for one in found)
    assert all(one["largest_logit_error"] <= one["bound"] for one in found)
    return [one["by"].split()[0] for one in found]


def test_it_is_written_for_transformers_and_onnx_runtime(foreign: Path, tmp_path: Path) -> None:
    for to in ("hf", "onnx"):
        assert export.main(["--model", str(foreign), "--to", to, "--output", str(tmp_path / to)]) == 0
    assert programs(tmp_path / "hf") == ["transformers"]
    assert programs(tmp_path / "onnx")[:2] == ["onnxruntime"] * 2
    assert (tmp_path / "onnx" / "genai_config.json").exists() == ("onnxruntime-genai" in programs(tmp_path / "onnx"))
    card = ModelCard.load(tmp_path / "hf" / "README.md")
    assert "license" not in card.data.to_dict()
    assert "made by others and exported by SLM-Ray" in card.text


REFUSALS = {
    "gpt_neo": "it has Llama, Qwen3 and GPT-2, and not GPT-Neo",
    "qwen3": "it changes text before it is cut (NFC)",
    "llama": "its merges are not all ways to put its pieces together",  # BPE of `tokenizers`, written as a Llama has it
}


def test_llama_cpp_s_file_has_its_tokenizer_or_is_refused(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = export.main(["--model", str(foreign), "--to", "gguf", "--output", str(tmp_path / "out")])
    if foreign.name in REFUSALS:
        assert code == 2
        assert REFUSALS[foreign.name] in capsys.readouterr().err
        return
    assert code == 0
    assert "gguf" in programs(tmp_path / "out")
    assert ends(tmp_path / "out") == ["gpt2", 0, 0, False]


def test_a_llama_with_sentencepiece_s_tokenizer_keeps_its_marks(tmp_path: Path) -> None:
    made = write_foreign(tmp_path / "made", "llama", padding=150)
    content = convert(sentencepiece_model("bpe"), "stories.model")
    (made / "tokenizer.json").write_text(content, encoding="utf-8")
    assert export.main(["--model", str(made), "--to", "gguf", "--output", str(tmp_path / "out")]) == 0
    assert "gguf" in programs(tmp_path / "out")
    assert ends(tmp_path / "out") == ["llama", 1, 2, True]


def ends(folder: Path) -> list[Any]:
    (file,) = folder.glob("*.gguf")
    reader = gguf.GGUFReader(file)
    names = ("model", "bos_token_id", "eos_token_id", "add_bos_token")
    return [field.contents() for name in names if (field := reader.get_field(f"tokenizer.ggml.{name}"))]


def test_what_is_no_checkpoint_is_not_copied_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_data: Path
) -> None:
    made = write_foreign(tmp_path / "made", "gpt2")
    (made / "evil.bin").write_bytes(b"x")
    (made / "chat_template.jinja").symlink_to("/etc/passwd")
    options = ["--model", str(made), "--output", str(tmp_path / "out")]
    assert export.main([*options, "--to", "checkpoint"]) == 2
    assert "is no checkpoint of ours" in capsys.readouterr().err
    assert export.main([*options, "--data", str(tiny_data)]) == 2
    assert "this is a model that others made" in capsys.readouterr().err
    assert export.main(options) == 2
    assert "a link that leads out of its folder" in capsys.readouterr().err
    (made / "chat_template.jinja").unlink()
    assert export.main(options) == 0
    assert not (tmp_path / "out" / "evil.bin").exists()


def test_neither_code_nor_a_place_of_its_maker_goes_into_an_export(tmp_path: Path) -> None:
    """Nor does a penalty that its maker wrote with make a right export fail."""
    made = write_foreign(tmp_path / "made", "gpt2")
    theirs = {
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": ["evil--repo--x.Foo", None]},
            "name_or_path": "/home/alice/secret",
            "note": "C:\\secret\\x",
        },
        "generation_config.json": {"_from": "http://bob:pw@host/x", "repetition_penalty": 1.3},
    }
    for name, fields in theirs.items():
        path = made / name
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | fields))
    for to in ("hf", "onnx"):
        assert export.main(["--model", str(made), "--to", to, "--output", str(tmp_path / to)]) == 0
        for file in (tmp_path / to).glob("*.json"):
            text = file.read_text(encoding="utf-8")
            assert not any(word in text for word in ("evil", "alice", "secret", "bob", "pw@"))
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["repetition_penalty"] == 1.3


def test_what_is_added_to_all_logits_allows_no_larger_error() -> None:
    rows = np.random.default_rng(0).normal(size=(5, 50))
    for shift in (0.0, -100.0):
        story = Story(prompt=(1, 2), written=(3,), logits=rows + shift)
        assert Expected(
            stories=(story,), ids={}, end_ids=frozenset({0}), stop_ids=frozenset({0})
        ).largest_distance == pytest.approx(np.abs(rows - rows.mean(axis=-1, keepdims=True)).max())
