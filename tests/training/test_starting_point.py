"""A run that begins with given weights: what it takes of them, what it says, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from slm_ray.config.schema import TrainConfig
from slm_ray.errors import UserError
from slm_ray.runs import checkpoint
from slm_ray.runs.outcome import RunStatus
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train_bpe
from slm_ray.training.preflight import refuse_conflicts
from slm_ray.training.starting_point import begun_from, check_origin
from tests.support.begun_runs import begin, go_on, train
from tests.support.data_sets import write_data
from tests.support.saved_models import save_model, save_talkative
from tests.support.tiny_model import SENTENCES, random_model, talkative_model


@pytest.fixture
def origin(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    return save_talkative(tmp_path / "origin", tiny_tokenizer)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_model(folder)[0].state_dict()


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_begins_with_the_weights_and_says_where_they_come_from(tiny_config: TrainConfig, origin: Path) -> None:
    inputs = begin(tiny_config, origin)
    at_start = checkpoint.load_state(inputs.folder.latest)
    assert_equal(weights(inputs.folder.latest), weights(origin))
    assert (at_start.step, at_start.samples_seen, at_start.metrics) == (0, 0, None)
    summary = train(inputs)
    assert summary.status == RunStatus.FINISHED
    steps, measured = inputs.history.series("val_loss")
    assert steps[:2] == [0, 4] and measured[0] > measured[-1]
    state = checkpoint.load_state(inputs.folder.latest)
    assert state.origin is not None
    assert (state.origin.reference, state.origin.step, state.origin.changes) == ("origin", 12, [])
    assert state.origin.lineage == [("f" * 16, 0)]
    marker = json.loads((origin / "complete.json").read_text())
    assert state.origin.weights_sha256 == marker["files"]["model/model.safetensors"]
    assert [attempt.step for attempt in state.attempts] == [0]
    assert state.lineage == [(inputs.data_fingerprint, 0)]
    log = (inputs.folder.path / "metrics.jsonl").read_text()
    assert "training from the weights of origin" in log
    assert str(origin.parent) not in json.dumps(dataclasses.asdict(state.origin))


def test_it_resumes_without_its_origin_as_if_never_interrupted(tiny_config: TrainConfig, origin: Path) -> None:
    whole = begin(tiny_config, origin, "whole")
    train(whole)
    broken = begin(tiny_config, origin, "broken")
    train(dataclasses.replace(broken, pause_at=4))
    shutil.rmtree(origin)
    train(go_on(broken.config))
    assert_equal(weights(broken.folder.latest), weights(whole.folder.latest))
    state = checkpoint.load_state(broken.folder.latest)
    assert state.origin == checkpoint.load_state(whole.folder.latest).origin
    assert [attempt.step for attempt in state.attempts] == [0, 4]


def test_a_resumed_run_keeps_its_origin_by_name(tiny_config: TrainConfig, origin: Path) -> None:
    inputs = begin(tiny_config, origin)
    latest = inputs.folder.latest_valid()
    moved = dataclasses.replace(inputs.config, resume=True, init_from="/elsewhere/origin")
    refuse_conflicts(dataclasses.replace(inputs, config=moved), latest)
    other = dataclasses.replace(moved, init_from="/elsewhere/another")
    with pytest.raises(UserError, match="init_from was origin and is now another: a resumed run keeps it"):
        refuse_conflicts(dataclasses.replace(inputs, config=other), latest)


def test_muon_and_a_shorter_context_begin_too(tiny_config: TrainConfig, origin: Path) -> None:
    optim = dataclasses.replace(tiny_config.optim, name="muon")
    inputs = begin(tiny_config, origin, optim=optim, model={"seq_len": 32})
    assert train(inputs).status == RunStatus.FINISHED
    state = checkpoint.load_state(inputs.folder.latest)
    assert state.origin is not None and state.origin.changes == ["a context of 32 tokens, of its 64"]


def test_rotary_positions_may_be_lengthened_and_it_is_said(tiny_config: TrainConfig, origin: Path) -> None:
    inputs = begin(tiny_config, origin, model={"seq_len": 80})
    (said,) = checkpoint.load_state(inputs.folder.latest).origin.changes  # type: ignore[union-attr]
    assert said == "a context of 80 tokens, of which it knows 64: those beyond are new to it"


def test_learned_positions_may_be_cut_and_not_lengthened(
    tiny_config: TrainConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = talkative_model(tiny_tokenizer, positions="learned", norm="layer", mlp="gelu", bias=True)
    origin = save_model(tmp_path / "learned", model, tiny_tokenizer)
    inputs = begin(tiny_config, origin, model={"seq_len": 48})
    cut = weights(inputs.folder.latest)["embed_positions.weight"]
    assert torch.equal(cut, model.embed_positions.weight[:48])
    with pytest.raises(UserError, match=r"model.seq_len \(80\) is longer than the 64 positions"):
        begin(tiny_config, origin, "longer", model={"seq_len": 80})
    assert not (tmp_path / "runs" / "longer").exists()


def test_options_of_another_shape_are_refused_by_name(tiny_config: TrainConfig, origin: Path, tmp_path: Path) -> None:
    both = "another shape: model.n_layers is 3 and there 2, model.d_ff is 65 and there 64"
    with pytest.raises(UserError, match=both):
        begin(tiny_config, origin, model={"d_ff": 65, "n_layers": 3})
    assert not (tmp_path / "runs" / "begun").exists()
    given = tmp_path / "given.yaml"
    given.write_text("model: {d_ff: 65, seq_len: 16}\n")
    config = begun_from(tiny_config, str(given), ["--init_from", str(origin)])
    assert (config.model.seq_len, config.model.d_model) == (16, 32)
    with pytest.raises(UserError, match=r"model.d_ff is 65 and there 64"):
        check_origin(config)


def test_another_tokenizer_is_refused_with_the_way_out(
    tiny_config: TrainConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = train_bpe(SENTENCES, vocab_size=512)
    origin = save_talkative(tmp_path / "other", other)
    way_out = r"another tokenizer than that of .*prepare.py --tokenizer .*other/model`"
    with pytest.raises(UserError, match=way_out) as said:
        begin(tiny_config, origin)
    assert "\n" not in str(said.value)
    assert not (tmp_path / "runs" / "begun").exists()


def extended(tokenizer: Tokenizer, *added: str) -> Tokenizer:
    content = json.loads(tokenizer.to_json())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for number, entry in enumerate(added):
        content["added_tokens"].append({"id": tokenizer.vocab_size + number, "content": entry, **flags})
    return Tokenizer.from_json(json.dumps(content))


def test_an_extended_tokenizer_gets_rows_in_the_embedding(
    tiny_config: TrainConfig, tiny_tokenizer: Tokenizer, origin: Path, tmp_path: Path
) -> None:
    data = tmp_path / "extended"
    write_data(data, extended(tiny_tokenizer, "<a>", "<b>"), {"train": [(0, 60)], "validation": [(110, 120)]})
    inputs = begin(tiny_config, origin, data=str(data))
    (said,) = checkpoint.load_state(inputs.folder.latest).origin.changes  # type: ignore[union-attr]
    assert said == "2 new rows in its embedding, of tokens that only the data has (<a>, <b>)"
    before, after = (weights(folder)["embed_tokens.weight"] for folder in (origin, inputs.folder.latest))
    assert torch.equal(after[:512], before) and after.shape == (514, 32)
    torch.testing.assert_close(after[512], before.mean(dim=0))
    assert train(inputs).status == RunStatus.FINISHED


def test_a_model_whose_weights_are_no_numbers_is_refused_and_one_of_huge_ones_diverges_at_once(
    tiny_config: TrainConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = random_model(talkative_model(tiny_tokenizer).config)
    model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"norm\.weight holds numbers that are not finite"):
        begin(tiny_config, save_model(tmp_path / "nan", model, tiny_tokenizer))
    model.norm.weight.data.fill_(3e38)
    inputs = begin(tiny_config, save_model(tmp_path / "huge", model, tiny_tokenizer))
    summary = train(inputs)
    assert (summary.status, summary.step) == (RunStatus.DIVERGED, 0)
