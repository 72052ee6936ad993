"""A folder that a stranger made: every lie is one line, before memory is taken, and nothing outside is read."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from slm_ray import export, storage
from slm_ray.config.schema import ModelConfig
from slm_ray.errors import UserError
from slm_ray.generation import cache_size
from slm_ray.model import hf_layout
from slm_ray.model.decoder import Decoder
from slm_ray.model_files import folders, reading
from slm_ray.model_files.json_files import MAX_JSON_BYTES
from slm_ray.model_files.reading import LEAST_TENSORS
from slm_ray.model_files.weights import MAX_HEADER_BYTES
from slm_ray.runs import checkpoint
from slm_ray.tokenization.loading import open_tokenizer
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking import registry
from tests.support.foreign_models import qwen_tokenizer, write_foreign
from tests.support.tiny_model import write_tiny_model

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_foreign(tmp_path_factory.mktemp("made") / "llama", "llama")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "stranger")


def load(folder: Path) -> tuple[Any, Any]:
    return registry.load_model(registry.resolve_model(str(folder)))


def refusal(folder: Path) -> str:
    """The one line that a folder is refused with, without memory being taken for it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024  # KB; torch loads its meta device
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_json(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = safetensors.torch.load_file(folder / "model.safetensors")
    return found


def rewrite(folder: Path, content: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("hidden_size", 2**40, "hidden_size"),
        ("hidden_size", -32, "hidden_size"),
        ("hidden_size", 0, "hidden_size"),
        ("hidden_size", float("nan"), "hidden_size"),
        ("hidden_size", 32.5, "hidden_size"),
        ("hidden_size", "32", "hidden_size"),
        ("hidden_size", [32], "hidden_size"),
        ("hidden_size", 10**300, "hidden_size"),
        ("intermediate_size", 2**23, "has shape [48, 32], and [8388608, 32] is expected"),
        ("num_hidden_layers", 10**9, "num_hidden_layers"),
        ("num_hidden_layers", 4000, "n_layers is 4000, and there are 21 tensors"),
        ("num_hidden_layers", 1, "layers.1"),
        ("num_hidden_layers", 3, "layers.2"),
        ("vocab_size", 2**24, "embed_tokens.weight has shape"),
        ("vocab_size", 300, "embed_tokens.weight has shape"),
        ("max_position_embeddings", 2**24, "must be at most"),
        ("max_position_embeddings", float("inf"), "max_position_embeddings"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps"),
        ("num_attention_heads", 5, ""),
        ("num_key_value_heads", 3, ""),
        ("num_key_value_heads", 10**12, "num_key_value_heads"),
        ("model_type", "bert", "llama"),
        ("model_type", {}, "llama"),
    ],
)
def test_sizes_that_nobody_has_or_the_weights_do_not_bear_out(folder: Path, field: str, value: Any, said: str) -> None:
    change_json(folder, "config.json", lambda content: content.update({field: value}))
    assert said in refusal(folder)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_sizes_that_are_missing(folder: Path, field: str) -> None:
    change_json(folder, "config.json", lambda content: content.pop(field))
    assert f"{field} is missing" in refusal(folder)


def test_an_architecture_that_is_not_known_gets_the_names_of_those_that_are(folder: Path) -> None:
    change_json(folder, "config.json", lambda content: content.update(model_type="mamba", architectures=["Mamba"]))
    said = refusal(folder)
    assert "mamba" in said and all(name in said for name in ("llama", "qwen3", "gpt2", "gpt_neo"))


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "", "{", " " * (MAX_JSON_BYTES + 1)])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_of_any_kind(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_is_missing_or_no_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refusal(folder)
    (folder / name).mkdir()
    assert "is no file" in refusal(folder)
    (folder / name).rmdir()
    os.mkfifo(folder / name)  # would wait for a writer for ever
    assert "is no file" in refusal(folder)


def test_weights_that_are_missing_or_more_than_there_should_be(folder: Path) -> None:
    whole = tensors(folder)
    rewrite(folder, {name: tensor for name, tensor in whole.items() if "layers.1.mlp.up_proj" not in name})
    assert "layers.1.mlp.up_proj.weight is missing" in refusal(folder)
    rewrite(folder, whole | {"model.extra.weight": torch.zeros(3)})
    assert "extra.weight is there, and the model has none" in refusal(folder)
    rewrite(folder, whole | {"embed_tokens.weight": whole["model.embed_tokens.weight"].clone()})
    assert "twice" in refusal(folder)
    rewrite(folder, whole | {"model.norm.weight": torch.ones(33)})
    assert "norm.weight has shape [33], and [32] is expected" in refusal(folder)


@pytest.mark.parametrize(
    "dtype, word",
    [(torch.int8, "I8"), (torch.float64, "F64"), (torch.bool, "BOOL"), (torch.float8_e4m3fn, "F8_E4M3")],
)
def test_weights_of_another_type_are_refused_by_its_name(folder: Path, dtype: torch.dtype, word: str) -> None:
    whole = tensors(folder)
    rewrite(folder, whole | {"model.norm.weight": whole["model.norm.weight"].to(dtype)})
    said = refusal(folder)
    assert f"is of type {word}" in said and "F32, F16, BF16 are read" in said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_computed_in_fp32(folder: Path, dtype: torch.dtype) -> None:
    whole = tensors(folder)
    rewrite(folder, {name: tensor.to(dtype) for name, tensor in whole.items()})
    model, _ = load(folder)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert torch.equal(model.embed_tokens.weight, whole["model.embed_tokens.weight"].to(dtype).float())


def with_header(path: Path, change: Callable[[dict[str, Any]], object], length: int | None = None) -> None:
    """The same file with another header, whose length may be a lie."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + content[8 + size :])


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "change, length",
    [
        (lambda header: None, 2**62),
        (lambda header: None, 2**64 - 1),
        (lambda header: None, 3),
        (lambda header: None, 0),
        (lambda header: header[NORM].update(shape=[2**40]), None),
        (lambda header: header[NORM].update(shape=[2**62, 2**62]), None),
        (lambda header: header[NORM].update(shape=[-32]), None),
        (lambda header: header[NORM].update(data_offsets=[0, 2**50]), None),
        (lambda header: header[NORM].update(data_offsets=[2**50, 2**50 + 128]), None),
        (lambda header: header[NORM].update(data_offsets=[64, 0]), None),
        (lambda header: header[NORM].update(dtype="Q4"), None),
        (lambda header: header.update({NORM: []}), None),
        (lambda header: header.update({"__metadata__": {"format": "x" * (MAX_HEADER_BYTES + 1)}}), None),
    ],
)
def test_a_header_that_lies(folder: Path, change: Callable[[dict[str, Any]], object], length: int | None) -> None:
    with_header(folder / "model.safetensors", change, length)
    assert "model.safetensors" in refusal(folder)


@pytest.mark.parametrize("name", ["x" * 100_000, "a\n\x1b[31mb", "\u202eb"])
def test_a_tensor_s_name_acts_on_no_terminal(folder: Path, name: str) -> None:
    rewrite(folder, tensors(folder) | {name: torch.zeros(0)})
    said = refusal(folder)
    assert "has a tensor with the name" in said and len(said) < 600 and said.isprintable()


def test_a_file_that_is_cut_off_or_longer_than_its_header_says(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:200], whole[:4], b"", whole + b"more"):
        path.write_bytes(content)
        assert "model.safetensors" in refusal(folder)


def shard(folder: Path, *, is_doubled: bool = False) -> None:
    """The same weights in two files with an index."""
    whole = tensors(folder)
    (folder / "model.safetensors").unlink()
    first = dict(list(whole.items())[::2])
    second = {name: tensor for name, tensor in whole.items() if name not in first or (is_doubled and "norm" in name)}
    where: dict[str, str] = {}
    for name, part in zip(("a.safetensors", "b.safetensors"), (first, second), strict=True):
        safetensors.torch.save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_shards_are_one_model(folder: Path, made: Path) -> None:
    shard(folder)
    one, other = load(folder)[0].state_dict(), load(made)[0].state_dict()
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    shard(folder, is_doubled=True)
    assert "is there twice, in a.safetensors and in b.safetensors" in refusal(folder)


@pytest.mark.parametrize(
    "name, said",
    [
        ("../other.safetensors", "leads out of the folder"),
        ("/etc/passwd", "leads out of the folder"),
        ("inside/x.safetensors", "leads out of the folder"),
        ("..", "leads out of the folder"),
        ("weights.bin", "only .safetensors files are read"),
        ("missing.safetensors", "has no missing.safetensors"),
        (5, "does not list tensors with their files"),
    ],
)
def test_an_index_that_names_what_is_no_file_of_the_folder(folder: Path, name: object, said: str) -> None:
    shard(folder)
    change_json(folder, INDEX, lambda content: content["weight_map"].update({NORM: name}))
    assert said in refusal(folder)


def test_a_pickle_alone_is_refused_by_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle, which can run any code" in refusal(folder)
    (folder / "config.json").unlink()
    assert "pytorch_model.bin is a pickle, which can run any code" in refusal(folder)


def test_a_pickle_beside_safetensors_is_left_alone_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    load(folder)
    assert "pytorch_model.bin is a pickle, and is not read" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_no_numbers_are_refused(folder: Path, value: float, dtype: torch.dtype) -> None:
    whole = {name: tensor.to(dtype) for name, tensor in tensors(folder).items()}
    whole["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    rewrite(folder, whole)
    assert "model.layers.1.mlp.up_proj.weight holds numbers that are not finite" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("gpt_neo", "transformer.h.0.attn.attention.masked_bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_a_buffer_that_is_not_read_may_hold_anything(tmp_path: Path, name: str, buffer: str, value: float) -> None:
    """Old versions of transformers wrote masks of -1e9, which is -inf in fp16."""
    folder = write_foreign(tmp_path / name, name)
    whole = {key: tensor.half() for key, tensor in tensors(folder).items()} | {buffer: torch.tensor(value).half()}
    rewrite(folder, whole)
    model, _ = load(folder)
    assert model(torch.zeros(1, 4, dtype=torch.long)).isfinite().all()
    norm = next(key for key in whole if "norm" in key or "ln_1" in key)
    rewrite(folder, whole | {norm: whole[norm] * float("nan")})
    assert f"{norm} holds numbers that are not finite" in refusal(folder)


def test_weights_whose_sum_is_too_large_for_a_number_are_finite(folder: Path) -> None:
    rewrite(folder, tensors(folder) | {"model.norm.weight": torch.full((32,), 3e38)})
    load(folder)


@pytest.mark.parametrize(
    "content", [{"model_type": "mistral"}, {"model_type": "llama"}, {"model_type": "llama", "hidden_size": 8}]
)
def test_no_digest_is_made_of_weights_that_are_no_model(
    folder: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of a terabyte of zeros costs its maker nothing."""
    (folder / "config.json").write_text(json.dumps(content))
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2**40)

    def read(path: Path) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(storage, "file_sha256", read)
    refusal(folder)


def test_no_digest_is_made_of_weights_that_no_memory_holds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(storage, "file_sha256", read)
    monkeypatch.setattr(cache_size, "available_bytes", lambda: 1000)
    assert "of memory" in refusal(folder) or "are free" in refusal(folder)


def least_tensors(kind: str) -> int:
    """Tensors in a block of the smallest model of a family, as it may lie in a file."""
    shape: dict[str, Any] = {"vocab_size": 8, "seq_len": 4, "n_layers": 1, "d_model": 4, "n_heads": 1, "d_ff": 4}
    rest = {"norm": "layer", "mlp": "gelu", "positions": "learned"} if kind.startswith("gpt") else {}
    config = ModelConfig(**shape, **rest, scale_attention=kind != "gpt_neo")
    assert hf_layout.family(config) == kind or kind == "own"
    written = hf_layout.to_hf(Decoder(config).state_dict(), config)
    bare = {name: tensor for name, tensor in written.items() if not name.endswith("bias")}  # zeros may be left out
    assert hf_layout.from_hf(bare, config).keys() == Decoder(config).state_dict().keys()
    return sum(".0." in name for name in bare)


def test_the_least_tensors_of_a_block_are_those_of_gpt2() -> None:
    counts = {kind: least_tensors(kind) for kind in ("llama", "gpt2", "gpt_neo")}
    assert counts == {"llama": 9, "gpt2": LEAST_TENSORS, "gpt_neo": 8}


@pytest.mark.parametrize("layers", [4, 4000, 5000, 10**9])
def test_more_layers_than_the_weights_can_have_are_not_built(folder: Path, layers: int) -> None:
    own = {"vocab_size": 400, "seq_len": 64, "n_layers": layers, "d_model": 32, "n_heads": 4, "d_ff": 48}
    (folder / "config.json").write_text(json.dumps({"model_type": "slm_ray", "slm_ray": own}))
    assert f"n_layers is {layers}" in refusal(folder)


def test_thousands_of_layers_without_a_number_are_refused_without_being_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = {f"model.layers.{layer}.x{number}.weight": torch.zeros(0) for layer in range(4096) for number in range(6)}
    rewrite(folder, empty)
    change_json(folder, "config.json", lambda content: content.update(num_hidden_layers=4096))
    built: list[int] = []

    class Counted(Decoder):
        def __init__(self, config: ModelConfig) -> None:
            built.append(config.n_layers)
            super().__init__(config)

    monkeypatch.setattr(reading, "Decoder", Counted)
    assert "model.safetensors does not fit its config.json" in refusal(folder)
    assert set(built) <= {1}


OF_A_FOLDER = ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", OF_A_FOLDER)
def test_links_to_themselves_lead_nowhere(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(name)
    assert f"{name} is a link that leads nowhere" in refusal(folder)


def test_a_template_that_is_a_link_to_itself_or_cannot_be_looked_at(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    template = folder / "chat_template.jinja"
    template.symlink_to(template.name)
    found = registry.resolve_model(str(folder))
    with pytest.raises(UserError, match=r"chat_template\.jinja is a link that leads nowhere"):
        registry.has_instructions(found)
    for to in ("hf", "onnx"):
        assert export.main(["--model", str(folder), "--to", to, "--output", str(tmp_path / to)]) == 2
        assert "chat_template.jinja is a link that leads nowhere" in capsys.readouterr().err

    def fails(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folders, "model_file", fails)
    with pytest.raises(UserError, match="Permission denied"):
        registry.has_instructions(found)


@pytest.mark.parametrize("to", ["hf", "gguf", "onnx"])
def test_a_template_of_a_gigabyte_is_not_read(tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_foreign(tmp_path / "made", "gpt2")
    with (folder / "chat_template.jinja").open("wb") as file:
        file.truncate(2**31)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert export.main(["--model", str(folder), "--to", to, "--output", str(tmp_path / "out")]) == 2
    assert "chat_template.jinja cannot be read: it is larger than" in capsys.readouterr().err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_a_gigabyte_is_not_read(folder: Path, tmp_path: Path) -> None:
    ours = write_tiny_model(tmp_path / "ours")
    for path in (folder / "tokenizer.json", ours / "model" / "tokenizer.json"):
        with path.open("wb") as file:
            file.truncate(2**31)
    assert "it is larger than" in refusal(folder)
    with pytest.raises(UserError, match=r"tokenizer\.json: it is larger than"):
        Tokenizer.load(ours / "model" / "tokenizer.json")
    with pytest.raises(UserError, match="it is larger than"):
        open_tokenizer(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert f"{name} is a link that leads out of its folder" in refusal(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "nowhere")
    assert f"{name} is a link that leads nowhere" in refusal(folder)


def test_links_within_the_folder_and_to_it_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "blob").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("blob")
    (tmp_path / "link").symlink_to(folder)
    load(tmp_path / "link")


def test_the_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    qwen_tokenizer().save(str(folder / "tokenizer.json"))
    said = refusal(folder)
    assert "has the token 402 and the vocabulary of its model ends at 399" in said


def test_a_model_of_many_more_rows_than_the_tokenizer_has_entries_is_another(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "wide", "llama", padding=1100)
    assert "has 400 entries and its model 1500: they are not of one another" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{}", '{"model": {}}', "[" * 100_000, "\ufeff", '{"model": {"dropout": 0.1}}'])
def test_a_tokenizer_file_that_is_none(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    assert "tokenizer.json" in refusal(folder)


def test_a_checkpoint_of_ours_stays_as_strict(tmp_path: Path) -> None:
    ours = write_tiny_model(tmp_path / "ours")
    (ours / "model" / "config.json").write_text((ours / "model" / "config.json").read_text() + " ")
    assert "its sha256 differs" in refusal(ours)
    (ours / "complete.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        load(ours)
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.load_model(ours)
