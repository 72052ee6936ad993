"""`hub:OWNER/NAME` as a model, against a stand-in of the hub."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch

from slm_ray.errors import UserError
from slm_ray.tracking import registry
from tests.support import hub_stand_in
from tests.support.foreign_models import write_foreign

NAME = "mouse/tiny-llama"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> hub_stand_in.Files:
    folder = write_foreign(tmp_path_factory.mktemp("made") / "llama", "llama")
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {"pytorch_model.bin": b"a pickle"}


@pytest.fixture
def hub(files: hub_stand_in.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_stand_in.Hub]:
    pickled = {name: content for name, content in files.items() if name != "model.safetensors"}
    index = json.dumps({"weight_map": {"x": "../../../../owned.safetensors"}}).encode()
    repositories = {
        NAME: {"main": files},
        "mouse/pickled": {"main": pickled, "refs%2Fpr%2F1": files},
        "mouse/leading-out": {"main": pickled | {"model.safetensors.index.json": index}},
    }
    with hub_stand_in.running(repositories) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield server


def test_a_model_of_the_hub_is_fetched_once_and_then_needs_no_hub(
    hub: hub_stand_in.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = registry.resolve_model(f"hub:{NAME}")
    commit = hub_stand_in.commit_of(NAME, "main")
    assert (found.name, found.version, found.is_foreign) == (NAME, commit[:8], True)
    assert found.pinned == f"hub:{NAME}@{commit}"
    model, tokenizer = registry.load_model(found)
    assert tokenizer.decode(tokenizer.encode("Once upon a time")) == "Once upon a time"
    asked = {line.rpartition("/")[2] for line in hub.asked}
    assert "pytorch_model.bin" not in asked and "model.safetensors" in asked
    assert registry.locate(f"hub:{NAME}") == found.identity
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    nobody = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody)
    again = registry.resolve_model(f"hub:{NAME}")
    assert again.path == found.path
    assert torch.equal(registry.load_model(again)[0].lm_head.weight, model.lm_head.weight)
    with pytest.raises(UserError, match="cannot get the model hub:mouse/unknown"):
        registry.resolve_model("hub:mouse/unknown")


def test_a_revision_is_named(hub: hub_stand_in.Hub) -> None:
    commit = hub_stand_in.commit_of(NAME, "main")
    assert registry.resolve_model(f"hub:{NAME}@{commit}").version == commit[:8]
    with pytest.raises(UserError, match="cannot get the model hub:mouse/tiny-llama@v9"):
        registry.resolve_model(f"hub:{NAME}@v9")


def test_a_model_of_pickles_alone_is_refused_with_the_way_out(hub: hub_stand_in.Hub) -> None:
    with pytest.raises(UserError, match=r"pickles \(\.bin, \.pt\) are not read.*hub:mouse/pickled@refs/pr/1") as said:
        registry.resolve_model("hub:mouse/pickled")
    assert "\n" not in str(said.value)


def test_an_index_that_leads_out_is_refused_before_anything_of_it_is_asked_for(hub: hub_stand_in.Hub) -> None:
    with pytest.raises(UserError, match="leads out of the folder"):
        registry.resolve_model("hub:mouse/leading-out")
    assert not any("owned" in line for line in hub.asked)


@pytest.mark.parametrize("word", ["hub:", "hub:a b", "hub:a/b:train", "hub:../..", "hub:a/b/c"])
def test_words_that_name_no_model(word: str) -> None:
    with pytest.raises(UserError, match="hub:"):
        registry.resolve_model(word)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_out_of_the_cache_is_refused(hub: hub_stand_in.Hub, tmp_path: Path, name: str) -> None:
    found = registry.resolve_model(f"hub:{NAME}")
    assert (found.path / name).is_symlink()  # to the cache's own blobs
    (tmp_path / "elsewhere").write_bytes((found.path / name).read_bytes())
    (found.path / name).unlink()
    (found.path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of its folder"):
        registry.load_model(found)
