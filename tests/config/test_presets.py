"""Every preset: really trained a few steps, of the size that its comment and the README of `slm_ray` state."""

import dataclasses
import math
import re
import shutil

import pytest

from slm_ray.config.files import load_config, presets
from slm_ray.config.schema import ModelConfig, TrainConfig
from slm_ray.errors import UserError
from slm_ray.model import hf_layout
from slm_ray.model.decoder import parameter_count
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve
from tests.support.paths import ROOT

PRESETS = ROOT / "slm_ray" / "presets"
WANTED = {
    *("demo", "story-5m", "keras-4x256", "gpt-6x384", "wiki-7x384", "neo-2x512", "rope-4x64"),
    *(f"tinystories-{size}" for size in ("1m", "3m", "8m", "28m", "33m")),
    *(f"llama2c-{size}" for size in ("260k", "15m", "42m")),
}
STEPS = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the README's table."""

    preset: str
    shape: str
    parameters: str
    vocabulary: str
    opens_as: str
    source: str


def readme_rows() -> dict[str, Row]:
    text = (ROOT / "slm_ray" / "README.md").read_text(encoding="utf-8")
    section = text.split("## Presets\n")[1].split("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    rows = [Row(*(cell.strip() for cell in line.strip("|").split(" | "))) for line in lines]
    return {row.preset.strip("`"): row for row in rows}


def shape(model: ModelConfig) -> str:
    """How the table writes a shape: layers x width, heads, FF width, context."""
    heads = f"{model.n_heads} heads"
    heads += f" of {model.d_head}" if model.d_head else ""
    heads += f" on {model.n_kv_heads}" if model.n_kv_heads else ""
    return f"{model.n_layers} x {model.d_model}, {heads}, FF {model.d_ff:,}, context {model.seq_len:,}"


def count_by_formula(model: ModelConfig, vocab_size: int) -> int:
    """Embeddings, and a block's projections, norms and biases, written out."""
    d, ff = model.d_model, model.d_ff
    of_qkv, of_o, of_mlp = model.has_qkv_bias, model.has_o_bias, model.has_mlp_bias
    q, kv = model.n_heads * model.head_width, model.kv_heads * model.head_width
    attention = (d + of_qkv) * (q + 2 * kv) + (q + of_o) * d + 2 * model.head_width * model.qk_norm
    feed_forward = (d + of_mlp) * ff * (2 if model.mlp == "swiglu" else 1) + (ff + of_mlp) * d
    norm = d * (2 if model.norm == "layer" and model.bias else 1)
    embeddings = vocab_size * d * (1 if model.tie_embeddings else 2)
    positions = model.seq_len * d if model.positions == "learned" else 0
    return embeddings + positions + model.n_layers * (attention + feed_forward + 2 * norm) + norm


def comment(name: str) -> str:
    """The comment that a preset begins with, as one line."""
    lines = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if not line.startswith("# "))
    return " ".join(line.removeprefix("# ") for line in lines[:first])


def test_all_wanted_presets_are_there_and_in_the_table() -> None:
    assert set(presets()) == set(readme_rows()) == WANTED


@pytest.mark.parametrize("name", presets())
def test_the_readme_states_what_the_preset_is(name: str) -> None:
    model, row = load_config(name).model, readme_rows()[name]
    vocab_size = int(row.vocabulary.split()[0].replace(",", ""))
    built = parameter_count(dataclasses.replace(model, vocab_size=vocab_size))
    assert row.parameters == f"{built:,}"
    assert built == count_by_formula(model, vocab_size)
    assert row.shape == shape(model)
    family = hf_layout.family(dataclasses.replace(model, vocab_size=vocab_size))
    assert row.opens_as == (hf_layout.FAMILIES[family].title if family in hf_layout.FAMILIES else "no")
    assert (row.opens_as == "GPT-Neo") == (name == "neo-2x512" or name.startswith("tinystories-"))
    assert row.source


@pytest.mark.parametrize("name", presets())
def test_its_comment_says_source_size_and_vocabulary(name: str) -> None:
    text, row = comment(name), readme_rows()[name]
    assert " Source: " in text
    assert f" Parameters: {row.parameters} with " in text
    assert f"{row.vocabulary.split()[0]}" in text
    assert load_config(name).model.vocab_size == 0, "the data set's is taken"


@pytest.mark.parametrize("name", presets())
def test_one_worker_or_two_can_share_its_batch(name: str) -> None:
    config = load_config(name)
    for workers in (1, 2):
        config.check_batch(workers=workers)
        assert config.batch_size % (workers * config.accumulation_steps) == 0
    with pytest.raises(UserError, match="must be divisible"):
        config.check_batch(workers=config.batch_size + 1)


@pytest.mark.parametrize("name", sorted(set(presets()) - {"demo", "story-5m"}))
def test_a_preset_of_another_work_says_what_differs(name: str) -> None:
    assert re.search(r" Differs: \S", comment(name))


def shrunk(preset: TrainConfig, tiny: TrainConfig) -> TrainConfig:
    """The preset on tiny data: its layers, rates and accumulation, on few and short samples."""
    parts = min(preset.accumulation_steps, 2)
    return dataclasses.replace(
        tiny,
        batch_size=4,
        accumulation_steps=parts,
        max_steps=STEPS,
        eval_interval_steps=STEPS,
        log_interval_steps=1,
        sample_prompt="",
        model=dataclasses.replace(preset.model, seq_len=min(preset.model.seq_len, 64)),
        optim=dataclasses.replace(preset.optim, lr=preset.optim.lr / 4, min_lr=None),  # as within the warmup
    )


@pytest.mark.parametrize("name", presets())
def test_it_learns_from_its_first_steps(name: str, tiny_config: TrainConfig) -> None:
    inputs = load_inputs(resolve(shrunk(load_config(name), tiny_config), lambda _: 1), NullTracker())
    summary = fit(inputs, TrainContext())
    losses = inputs.history.series("train_loss")[1]
    shutil.rmtree(tiny_config.output)  # the larger ones leave 350 MB
    assert summary.status == "finished"
    assert losses[0] == pytest.approx(math.log(inputs.config.model.vocab_size), rel=0.05)
    assert len(losses) == STEPS
    assert summary.metrics.val_loss < losses[0]
