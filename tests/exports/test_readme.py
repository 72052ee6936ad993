"""The program for plain ONNX Runtime that stands in the README, as it stands there."""

import re
import sys
from pathlib import Path

import pytest

from slm_ray import export
from slm_ray.exports.parity import TorchRuntime
from slm_ray.runs.checkpoint import load_model
from slm_ray.tokenization.tokenizer import Tokenizer
from tests.support.paths import ROOT
from tests.support.saved_models import save_talkative

PROMPT = "Once upon a time"


def test_thirty_lines_write_torch_s_story(
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "slm_ray/exports/README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(program.splitlines()) <= 32
    model, tokenizer = load_model(save_talkative(tmp_path / "model", tiny_tokenizer))
    options = ["--to", "onnx", "--model", str(tmp_path / "model")]
    assert export.main([*options, "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["story.py", str(tmp_path / "out"), PROMPT])
    exec(compile(program, "story.py", "exec"), {})
    printed = capsys.readouterr().out
    tokens = [tokenizer.eos_id, *tokenizer.encode(PROMPT)]
    runtime = TorchRuntime(model, tokenizer.encode, tokenizer.stop_ids, "torch")
    story = tokenizer.decode([*tokens, *runtime.write(tokens, model.config.seq_len - len(tokens))])
    assert printed.startswith(PROMPT)
    assert printed == f"{story}\n"
