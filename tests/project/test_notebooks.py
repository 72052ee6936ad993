"""The notebooks: valid for Jupyter, without a path of a machine, and their cells run in order, with small sizes."""

import re
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest

from tests.support.paths import ROOT

jupytext = pytest.importorskip("jupytext")
NOTEBOOKS = sorted(path for path in (ROOT / "infra" / "notebooks").glob("*.py") if path.stem != "__init__")
SMALL = {"model": {"n_stories": 200, "steps": 12, "vocab_size": 400}}


def run(path: Path, **parameters: Any) -> dict[str, Any]:
    """Run the cells of a notebook, with other values behind its cell of parameters."""
    names: dict[str, Any] = {"__name__": "__main__"}
    matplotlib.use("agg")
    for number, cell in enumerate(jupytext.read(path).cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{path.stem} cell {number}", "exec"), names)
        if "parameters" in cell.metadata.get("tags", ()):
            assert set(parameters) <= set(names)
            names |= parameters
    plt.close("all")
    return names


def test_the_report_says_what_is_in_the_data_set(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(ROOT / "infra/notebooks/data_report.py", data=str(tiny_data))
    printed = capsys.readouterr().out
    train = names["manifest"].splits["train"]
    assert (names["lengths"].sum(), len(names["lengths"])) == (train.tokens, train.rows)
    assert names["n_bytes"].sum() == train.bytes
    assert len(names["stories"]) == train.rows and all(names["stories"])
    assert f"--model.seq-len {names['seq_len']}" in printed
    assert names["slope"] < -0.5


def test_a_model_learns_and_writes_in_a_notebook(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = run(ROOT / "infra/notebooks/model.py", **SMALL["model"])
    assert names["losses"][-1] < names["losses"][0] - 0.3
    assert "temperature 0.7: Once upon a time" in capsys.readouterr().out
    assert not names["inputs"].folder.path.exists(), "it said that it writes nothing"


def test_a_text_of_one_s_own_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n\n".join(f"There was a cat that had {number} kittens and a hat." for number in range(300))
    (tmp_path / "own.txt").write_text(text)
    names = run(ROOT / "infra/notebooks/model.py", own_text=str(tmp_path / "own.txt"), **SMALL["model"])
    assert len(names["texts"]) == 300


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_a_notebook_of_this_checkout_and_of_no_machine(path: Path) -> None:
    notebook = jupytext.read(path)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert jupytext.writes(notebook, "ipynb").startswith("{")
    assert re.search(r"/(home|tmp|work|root|content|Users)\b", path.read_text(encoding="utf-8")) is None


def test_without_the_package_and_without_an_address_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="set `repository` above"):
        run(ROOT / "infra/notebooks/model.py")
