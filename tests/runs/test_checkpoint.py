"""A checkpoint is complete or absent, tells when it was altered, and opens elsewhere."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from slm_ray.config.resuming import with_earlier_defaults
from slm_ray.config.schema import ModelConfig
from slm_ray.errors import UserError
from slm_ray.model.decoder import Decoder
from slm_ray.runs import checkpoint, verification
from slm_ray.runs.checkpoint import Checkpoint
from slm_ray.runs.train_state import Evaluation, TrainState
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.training.optim import OptimConfig, make_optimizer

STATE = TrainState(
    step=3,
    samples_seen=24,
    seed=0,
    world_size=1,
    data_fingerprint="f" * 64,
    config=with_earlier_defaults({"name": "tiny", "packing": "stories", "validation": "stories"}),
    metrics=Evaluation(val_loss=1.5, val_perplexity=4.5, val_bits_per_byte=0.8, step=3),
)


@pytest.fixture
def model(tiny_tokenizer: Tokenizer) -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=tiny_tokenizer.vocab_size, seq_len=32, n_layers=2, d_model=32, n_heads=4, d_ff=64)
    return Decoder(config).eval()


@pytest.fixture
def saved(model: Decoder, tiny_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "step-00000003"
    optimizer = make_optimizer(model, OptimConfig())
    checkpoint.save(folder, model, tiny_tokenizer, STATE, optimizer.state_dict())
    return folder


def test_what_was_saved_comes_back(saved: Path, model: Decoder, tiny_tokenizer: Tokenizer) -> None:
    loaded, tokenizer = checkpoint.load_model(saved)
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded(tokens), model(tokens))
    assert tokenizer.sha256 == tiny_tokenizer.sha256
    assert checkpoint.load_state(saved) == STATE
    assert Checkpoint.open(saved).optimizer()["param_groups"][0]["weight_decay"] == 0.1


def test_it_opens_in_transformers_with_equal_logits_and_tokens(
    saved: Path, model: Decoder, tiny_tokenizer: Tokenizer
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved / "model")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(saved / "model")
    ids = tiny_tokenizer.encode("Once upon a time, a boy lost his kite.")
    assert their_tokenizer("Once upon a time, a boy lost his kite.")["input_ids"] == ids
    assert their_tokenizer.eos_token_id == tiny_tokenizer.eos_id
    tokens = torch.tensor([ids])
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["model/model.safetensors", "model/config.json", "model/tokenizer.json", "optimizer.pt", "state.json"],
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_and_named(saved: Path, name: str, damage: str) -> None:
    path = saved / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with pytest.raises(UserError, match="corrupt") as caught:
        checkpoint.load_model(saved)
    assert name in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}'])
def test_a_broken_marker_is_one_clear_line(saved: Path, content: str) -> None:
    (saved / verification.MARKER).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=verification.MARKER):
        verification.verify(saved)


def test_without_its_marker_it_is_none(saved: Path) -> None:
    (saved / verification.MARKER).unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.load_model(saved)


def test_a_failed_write_leaves_nothing_and_keeps_the_old(
    saved: Path, model: Decoder, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(saved, model, tiny_tokenizer, STATE, {})
    verification.verify(saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_the_copy_for_serving_has_no_optimizer_and_cannot_be_resumed(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "served"
    checkpoint.copy_for_serving(saved, copy)
    checkpoint.load_model(copy)
    with pytest.raises(UserError, match="made for serving"):
        Checkpoint.open(copy).optimizer()


def test_a_pickle_in_place_of_the_optimizer_is_not_run(saved: Path) -> None:
    shutil.copy(Path(__file__), saved / checkpoint.OPTIMIZER)
    torch.save({"evil": Path("/")}, saved / checkpoint.OPTIMIZER)  # a class that weights_only does not know
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        Checkpoint(saved, STATE).optimizer()


def test_the_model_files_name_the_end_of_text_token(saved: Path, tiny_tokenizer: Tokenizer) -> None:
    content = json.loads((saved / "model" / "generation_config.json").read_text(encoding="utf-8"))
    assert content["eos_token_id"] == tiny_tokenizer.eos_id
