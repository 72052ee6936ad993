"""A run that begins with given weights: what it takes of them, what it says, and what is refused."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from slm_ray.config.schema import ModelConfig, TrainConfig
from slm_ray.errors import UserError
from slm_ray.lineage.explain import explanation
from slm_ray.model_files.foreign_tokenizer import read_tokenizer
from slm_ray.runs import checkpoint
from slm_ray.runs.outcome import RunStatus
from slm_ray.tokenization.loading import with_end_of_text
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train_bpe
from slm_ray.tracking.tracker import NullTracker
from slm_ray.train import parse_config
from slm_ray.training.inputs import TrainInputs, load_inputs
from slm_ray.training.preflight import refuse_conflicts, resolve, with_its_origin
from slm_ray.training.starting_point import begun_from, check_origin
from tests.support.begun_runs import begin, go_on, train
from tests.support.data_sets import write_data
from tests.support.foreign_models import opened_by_transformers, write_foreign
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


def test_every_model_that_it_goes_back_to_is_named(tiny_config: TrainConfig, origin: Path) -> None:
    """Also somebody's, two hops away."""
    theirs = origin / "model"  # in Hugging Face's layout, and no checkpoint
    first = begin(tiny_config, theirs, "first", model={"seq_len": 32})
    second = begin(tiny_config, first.folder.latest, "second")
    state = checkpoint.load_state(second.folder.latest)
    assert state.origin is not None
    assert [link.reference for link in state.origin.chain] == ["first/step-00000000", "model"]
    assert [link.lineage for link in state.origin.chain] == [[(first.data_fingerprint, 0)], []]
    assert [link.changes for link in state.origin.chain] == [[], ["a context of 32 tokens, of its 64"]]
    assert not state.origin.is_ours
    ours = begin(tiny_config, origin, "ours")
    assert checkpoint.load_state(ours.folder.latest).origin.is_ours  # type: ignore[union-attr]
    told = " ".join(str(explanation(["--explain", str(second.folder.latest)])).split())
    assert "begun from first/step-00000000, weights of sha256" in told
    assert "begun from model, weights of sha256" in told and "a context of 32 tokens, of its 64 made by others" in told
    chain = json.loads(str(explanation(["--explain", str(second.folder.latest), "--json"])))["origin"]
    assert chain["origin"]["reference"] == "model"


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


def resumed(inputs: TrainInputs, init_from: Path | str) -> TrainInputs:
    """The run, gone on with from `--init-from`, once nothing stands in the way."""
    latest = inputs.folder.latest_valid()
    assert latest is not None
    config = dataclasses.replace(inputs.config, resume=True, init_from=str(init_from))
    again = dataclasses.replace(inputs, config=resolve(config, lambda _: 1))
    refuse_conflicts(again, latest)
    return dataclasses.replace(again, config=with_its_origin(again, latest).config)


def test_a_resumed_run_takes_the_same_weights_of_another_place_and_keeps_the_name(
    tiny_config: TrainConfig, origin: Path, tmp_path: Path
) -> None:
    inputs = begin(tiny_config, origin)
    assert inputs.config.init_from == str(origin)
    for same in (origin, shutil.copytree(origin, tmp_path / "copy")):
        again = resumed(inputs, same)
        assert again.config.init_from == str(origin)
    shutil.rmtree(origin)  # what is named as it was is not looked at
    assert resumed(inputs, origin).config == again.config


def test_a_resumed_run_refuses_other_weights_under_the_same_last_name(
    tiny_config: TrainConfig, origin: Path, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    inputs = begin(tiny_config, origin)
    other = save_talkative(tmp_path / "elsewhere" / "origin", tiny_tokenizer, noise=0.1)
    said = f"init_from was {origin} and is now {other}, which has other weights: a resumed run keeps it; leave it out"
    with pytest.raises(UserError, match=said):
        resumed(inputs, other)
    with pytest.raises(UserError, match="and is now not given: a resumed run keeps it"):
        resumed(inputs, "")
    plain = load_inputs(resolve(dataclasses.replace(tiny_config, name="plain"), lambda _: 1), NullTracker())
    train(dataclasses.replace(plain, pause_at=4))
    with pytest.raises(UserError, match=f"init_from was not given and is now {origin}: a resumed run keeps it"):
        resumed(plain, origin)


@pytest.mark.parametrize("place", ["/elsewhere/origin", "models:/origin@champion"])
def test_weights_that_cannot_be_looked_at_are_not_the_same(tiny_config: TrainConfig, origin: Path, place: str) -> None:
    inputs = begin(tiny_config, origin)
    with pytest.raises(UserError, match=f"is now {place}, whose weights cannot be compared .*leave it out") as said:
        resumed(inputs, place)
    assert "\n" not in str(said.value)


def test_a_run_that_is_spelled_in_another_way_goes_on(tiny_config: TrainConfig, origin: Path) -> None:
    inputs = begin(tiny_config, origin)
    model = dataclasses.replace(inputs.config.model, n_kv_heads=4, d_head=8, qkv_bias=False)
    again = dataclasses.replace(inputs, config=dataclasses.replace(inputs.config, model=model))
    assert resumed(again, origin).config.model == model
    other = dataclasses.replace(again, config=dataclasses.replace(again.config, model=ModelConfig(n_kv_heads=2)))
    with pytest.raises(UserError, match="n_kv_heads was 4 and is now 2"):
        resumed(other, origin)


def test_the_same_words_begin_a_run_with_given_weights_and_go_on_with_it(
    tiny_config: TrainConfig, origin: Path, tmp_path: Path
) -> None:
    fields = dataclasses.asdict(tiny_config) | {"model": {"seq_len": 48}, "tracking_uri": "none"}
    del fields["init_from"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    words = ["--config", str(tmp_path / "run.yaml"), "--init-from", str(origin), "--resume"]
    first = parse_config(words)
    inputs = begin(first, origin, first.name, model={"seq_len": 48})
    for again in (words, [*words[:2], "--resume"]):
        config = parse_config(again)
        assert (config.model.n_layers, config.model.seq_len) == (2, 48)
        resumed(dataclasses.replace(inputs, config=config), config.init_from)
    with pytest.raises(UserError, match=r"model\.d_model was 32 and is now 256"):
        config = parse_config(["--config", "story-5m", *words[2:], "--name", first.name, "--output", first.output])
        resumed(dataclasses.replace(inputs, config=config), origin)


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


@pytest.mark.parametrize(
    ("theirs", "spelled"),
    [
        ({}, {"n_kv_heads": 4, "d_head": 8, "qkv_bias": False, "o_bias": False, "mlp_bias": False}),
        ({}, {"bias": True, "qkv_bias": False, "o_bias": False, "mlp_bias": False}),  # RMSNorm has none
        ({"n_kv_heads": 4, "d_head": 8}, {"n_kv_heads": 0, "d_head": 0}),
        ({"bias": True, "norm": "layer"}, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}),
        ({"positions": "learned"}, {"rope_theta": 50.0}),
        ({"local_window": 40}, {"local_window": 0, "seq_len": 40}),
    ],
)
def test_another_spelling_of_the_shape_is_the_same_shape(
    tiny_config: TrainConfig,
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    theirs: dict[str, Any],
    spelled: dict[str, Any],
) -> None:
    origin = save_model(tmp_path / "origin", talkative_model(tiny_tokenizer, **theirs), tiny_tokenizer)
    inputs = begin(tiny_config, origin, model=spelled)
    assert_equal(weights(inputs.folder.latest), weights(origin))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"n_kv_heads": 2}, "model.n_kv_heads is 2 and there 4"),
        ({"d_head": 4}, "model.d_head is 4 and there 8"),
        ({"bias": True}, "model.qkv_bias is True and there False"),
        ({"local_window": 16}, "model.local_window is 16 and there 0"),
        ({"rope_theta": 50.0}, "model.rope_theta is 50.0 and there 10000.0"),
        ({"bias": True, "norm": "layer", "qkv_bias": False}, "model.norm is layer and there rms, model.bias is True"),
    ],
)
def test_another_shape_is_refused_however_it_is_spelled(
    tiny_config: TrainConfig, origin: Path, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        begin(tiny_config, origin, model=changed)


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


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_end_of_text_token_begins_as_what_it_stands_for(
    tiny_config: TrainConfig, tmp_path: Path, is_tied: bool
) -> None:
    """It is read as the token before a text, and written as the one after it; of tied weights one row is both."""
    theirs = write_foreign(tmp_path / "theirs", "llama", tie_word_embeddings=is_tied)
    tokenizer = Tokenizer.from_json(with_end_of_text((theirs / "tokenizer.json").read_text(encoding="utf-8")))
    write_data(tmp_path / "extended", tokenizer, {"train": [(0, 60)], "validation": [(110, 120)]})
    inputs = begin(tiny_config, theirs, data=str(tmp_path / "extended"), model={"seq_len": 32})
    before, after = opened_by_transformers(theirs).state_dict(), weights(inputs.folder.latest)
    its_own = read_tokenizer(theirs)
    assert its_own.start_id != its_own.eos_id
    read, written = after["embed_tokens.weight"][tokenizer.eos_id], after["lm_head.weight"][tokenizer.eos_id]
    assert torch.equal(read, before["model.embed_tokens.weight"][its_own.start_id])
    assert torch.equal(written, before["lm_head.weight"][its_own.start_id if is_tied else its_own.eos_id])
    assert torch.equal(read, written) == is_tied


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
