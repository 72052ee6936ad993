"""The model's card: it says what files say, and what nobody knows it calls unknown."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from slm_ray import export
from slm_ray.dataset.manifest import MANIFEST, load_manifest
from slm_ray.exports.data_card import data_source
from slm_ray.exports.source_model import opened
from slm_ray.lineage.explain import explanation
from slm_ray.runs import checkpoint
from slm_ray.runs.code_version import CodeVersion
from slm_ray.runs.train_state import Attempt, Evaluation, Origin
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking import evaluation_runs, mlflow_runs
from tests.support.champions import register_champion
from tests.support.data_sets import write_data
from tests.support.tiny_model import talkative_model

COMMIT = "c0ffee" * 6 + "c0ff"


def trained_on(
    folder: Path, tokenizer: Tokenizer, data: Path, origin: Origin | None = None, teachers: Sequence[Origin] = ()
) -> Path:
    """A checkpoint with a record as a real run writes it."""
    fingerprint = load_manifest(data).fingerprint
    state = checkpoint.TrainState(
        step=12,
        samples_seen=384,
        seed=5,
        world_size=1,
        data_fingerprint=fingerprint,
        config={"name": "tiny", "data": str(data)},
        metrics=Evaluation(val_loss=2.5, val_perplexity=12.2, val_bits_per_byte=1.25, step=12),
        run_id="run-1",
        origin=origin,
        teachers=list(teachers),
        attempts=[
            Attempt(
                step=0,
                data_fingerprint=fingerprint,
                seed=5,
                batch_size=32,
                world_size=1,
                code_version=CodeVersion(commit=COMMIT, is_dirty=False),
            )
        ],
    )
    checkpoint.save(folder, talkative_model(tokenizer), tokenizer, state, {})
    return folder


@pytest.fixture
def data(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    """A data set that says it is of the hub."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_data(folder, tiny_tokenizer, {"train": [(0, 20)], "validation": [(20, 24)]})
    found = load_manifest(folder)
    source = found.source | {"used": "hub:roneneldan/TinyStories", "revision": "f54c09fd"}
    counts = {"read": 26, "kept": 24, "duplicates": 1, "rejected": {"too short": 1}}
    changed = dataclasses.replace(found, source=source, counts=counts, parameters={"min_chars": 50})
    (folder / MANIFEST).write_text(changed.to_json(), encoding="utf-8")
    return folder


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    card = ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.text


def test_a_card_says_licences_data_lineage_and_evaluation(
    data: Path, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = trained_on(tmp_path / "model", tiny_tokenizer, data)
    assert export.main(["--model", str(model), "--output", str(tmp_path / "out")]) == 0
    metadata, text = card_of(tmp_path / "out")
    assert metadata["license"] == "apache-2.0"
    assert metadata["datasets"] == ["roneneldan/TinyStories"]
    assert metadata["library_name"] == "transformers"
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"]["type"] == "roneneldan/TinyStories"
    assert {one["type"]: one["value"] for one in result["metrics"]} == {
        "bits_per_byte": 1.25,
        "loss": 2.5,
        "perplexity": 12.2,
    }
    for part in (
        "**Data**: CDLA-Sharing-1.0",
        "at revision f54c09fd",
        load_manifest(data).fingerprint,
        "26 read, 24 kept, 1 duplicates, 1 rejected (too short 1)",
        "**train**: 20 stories",
        "| `min_chars` | `50` |",
        f"seed 5, code {COMMIT}",
        "`run-1`, step 12, 384 samples",
        "| transformers ",
    ):
        assert part in text, part
    assert str(tmp_path) not in text


OURS = Origin(reference="best", weights_sha256="a1", step=12, run_id="run-0", lineage=[("f" * 64, 0)])
"""As earlier versions wrote it: nothing says what it began from."""
OTHERS = Origin(reference="hub:someone/noncommercial", weights_sha256="b2", changes=["a context of 32 tokens"])
WHOLE = dataclasses.replace(OURS, is_start_known=True)


@pytest.mark.parametrize(
    ("origin", "licence", "said"),
    [
        (OTHERS, None, "hub:someone/noncommercial`, weights sha256 `b2`, made by others"),
        (OURS, None, "What that began from is not known"),
        (WHOLE, "apache-2.0", "**Which began from** random weights"),
        (dataclasses.replace(WHOLE, origin=OTHERS), None, "**Which began from** `hub:someone/noncommercial`"),
        (dataclasses.replace(WHOLE, origin=OURS), None, "What that began from is not known"),
        (dataclasses.replace(WHOLE, origin=WHOLE), "apache-2.0", "**Which began from** random weights"),
    ],
    ids=["others", "ours, of before", "ours", "ours of others", "ours, of ours of before", "ours of ours"],
)
def test_a_model_is_under_our_licence_only_if_all_that_it_goes_back_to_is_known_and_ours(
    data: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, origin: Origin, licence: str | None, said: str
) -> None:
    model = trained_on(tmp_path / "model", tiny_tokenizer, data, origin)
    assert export.main(["--model", str(model), "--output", str(tmp_path / "out")]) == 0
    metadata, text = card_of(tmp_path / "out")
    assert metadata.get("license") == licence
    assert said in text
    assert "**Data**: CDLA-Sharing-1.0 of the data set described below; what else it learned from" in text
    for link in origin.chain:
        assert f"began from** `{link.reference}`" in text.replace("Begun from", "began from")
        assert all(f"  - with {change}" in text for change in link.changes)
        assert not link.step or f"`{link.reference}` at step 12 of run `run-0`, weights sha256 `a1`" in text
        assert all(f"of a model that it goes back to `{data}`" in text for data, _ in link.lineage)


@pytest.mark.parametrize(
    ("teachers", "licence", "said"),
    [
        ([OTHERS], None, "**Learned from** `hub:someone/noncommercial`, weights sha256 `b2`, made by others"),
        ([WHOLE, OTHERS], None, "**Learned from** `best` at step 12 of run `run-0`, weights sha256 `a1`"),
        ([dataclasses.replace(WHOLE, teachers=[OTHERS])], None, "**Which learned from** `hub:someone/noncommercial`"),
        ([OURS], None, "What that began from is not known"),
        ([WHOLE], "apache-2.0", "**Learned from** `best`"),
    ],
    ids=["others", "ours and others", "ours, taught by others", "ours, of before", "ours"],
)
def test_a_student_is_under_our_licence_only_if_all_its_teachers_are_known_and_ours(
    data: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, teachers: list[Origin], licence: str | None, said: str
) -> None:
    model = trained_on(tmp_path / "model", tiny_tokenizer, data, None, teachers)
    assert export.main(["--model", str(model), "--output", str(tmp_path / "out")]) == 0
    metadata, text = card_of(tmp_path / "out")
    assert metadata.get("license") == licence
    assert said in text
    told = explanation(["--explain", str(model)])
    assert told is not None and f"taught by  {teachers[0].reference}" in told
    whole = json.loads(explanation(["--explain", str(model), "--json"]) or "")
    assert [one["reference"] for one in whole["teachers"]] == [one.reference for one in teachers]


def test_an_evaluation_is_written_as_the_hub_reads_it(data: Path, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = trained_on(tmp_path / "model", tiny_tokenizer, data)
    assert export.main(["--model", str(model), "--output", str(tmp_path / "out"), "--to", "gguf"]) == 0
    (file,) = (tmp_path / "out" / ".eval_results").iterdir()
    entries = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert {(entry.dataset_id, entry.task_id, entry.value) for entry in entries} == {
        ("roneneldan/TinyStories", "bits_per_byte", 1.25),
        ("roneneldan/TinyStories", "loss", 2.5),
        ("roneneldan/TinyStories", "perplexity", 12.2),
    }
    assert entries[0].dataset_revision == "f54c09fd"
    assert "validation split while training" in (entries[0].notes or "")


def test_what_nobody_knows_is_called_unknown(tiny_data: Path, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = trained_on(tmp_path / "model", tiny_tokenizer, tiny_data)
    assert export.main(["--model", str(model), "--output", str(tmp_path / "out"), "--to", "gguf"]) == 0
    metadata, text = card_of(tmp_path / "out")
    assert "datasets" not in metadata
    assert "**Licence of the data**: not known" in text
    assert "1 file(s) of whoever prepared the data" in text
    assert not (tmp_path / "out" / ".eval_results").exists()


def test_a_data_set_that_is_not_at_hand_is_said_and_another_one_refused(
    data: Path,
    tiny_data: Path,
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = trained_on(tmp_path / "model", tiny_tokenizer, data)
    data.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(model), "--to", "gguf"]
    assert export.main([*options, "--output", "first"]) == 0
    assert "Not known here: the data set was not at hand." in card_of(tmp_path / "first")[1]
    with opened(str(model)) as given:
        assert "no manifest.json in" in given.why_no_manifest
    assert "note: the card says little of the data (no manifest.json in" in capsys.readouterr().err
    assert export.main([*options, "--output", "second", "--data", str(tiny_data)]) == 2
    assert "and the model was trained on" in capsys.readouterr().err
    assert export.main([*options, "--output", "third", "--data", "elsewhere"]) == 0
    assert "CDLA-Sharing-1.0" in card_of(tmp_path / "third")[1]


def test_an_address_in_a_checkpoint_is_not_asked_and_no_word_of_it_breaks_a_line(
    tiny_data: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = trained_on(tmp_path / "model", tiny_tokenizer, tiny_data)
    state = dataclasses.replace(
        checkpoint.load_state(model), config={"name": "a\n# b", "data": "s3://me:pw@bucket/x"}, run_id="r\u202e\x1b[1m"
    )
    checkpoint.save(model, talkative_model(tiny_tokenizer), tiny_tokenizer, state, {})
    with opened(str(model)) as given:
        assert given.why_no_manifest.startswith("s3://bucket/x is an address; no manifest.json in")
    assert export.main(["--model", str(model), "--output", "out", "--to", "gguf"]) == 0
    text = card_of(tmp_path / "out")[1]
    assert "# a\\n# b step-12" in text
    assert "r\\u202e\\x1b[1m" in text


def test_the_sample_corpus_is_this_project_s_own(tiny_data: Path) -> None:
    found = load_manifest(tiny_data)
    sample = data_source(dataclasses.replace(found, source=found.source | {"used": "sample", "revision": "3"}))
    assert (sample.licence, sample.hub_name) == ("Apache-2.0", "")
    other = data_source(dataclasses.replace(found, source=found.source | {"used": "hub:somebody/stories"}))
    assert (other.licence, other.hub_name) == ("", "somebody/stories")


def test_what_promotion_measured_stands_before_the_last_validation(
    tiny_data: Path, tiny_tokenizer: Tokenizer, mlflow_uri: str, tmp_path: Path
) -> None:
    model = trained_on(tmp_path / "model", tiny_tokenizer, tiny_data)
    run_id = mlflow_runs.start_run(mlflow_uri, "x", "a run", {}).run_id
    version = register_champion(mlflow_uri, "stories", model, run_id)
    store = mlflow_runs.client(mlflow_uri)
    figures = {"bits_per_byte": "1.125", "split": "test", "measure": "stories", "data_fingerprint": "abc", "loss": "?"}
    for name, value in figures.items():
        store.set_model_version_tag("stories", version, f"{evaluation_runs.EVALUATION}.{name}", value)
    options = ["--model", "models:/stories@champion", "--tracking-uri", mlflow_uri, "--to", "gguf"]
    assert export.main([*options, "--output", str(tmp_path / "out"), "--data", str(tiny_data)]) == 0
    metadata, text = card_of(tmp_path / "out")
    (result,) = metadata["model-index"][0]["results"]
    assert [(one["type"], one["value"]) for one in result["metrics"]] == [("bits_per_byte", 1.125)]
    assert result["dataset"]["split"] == "test"
    assert "By promotion, split `test` of data set `abc`, measure `stories`" in text
    assert (tmp_path / "out" / f"stories-{version}-f32.gguf").is_file()
