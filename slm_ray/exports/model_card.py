"""The model's card, `README.md`, in the form of the Hugging Face hub, and its evaluation as the hub reads it.

In: a `SourceModel` and what parity found. Out: `README.md` with metadata (licence, data set, evaluation) and, where the
data is a data set of the hub and an evaluation was recorded, `.eval_results/`. Nothing is measured here.

Source: https://huggingface.co/docs/hub/model-cards, https://huggingface.co/docs/hub/eval-results.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from slm_ray.errors import visible_lines
from slm_ray.exports.data_card import (
    DataSource,
    before_lines,
    data_licence,
    data_lines,
    data_source,
    hub_names,
    licence,
    licence_text,
)
from slm_ray.exports.formats import GGUF_ENDS, Dtype, Format
from slm_ray.exports.parity import Parity
from slm_ray.exports.source_model import SourceModel
from slm_ray.model import hf_layout
from slm_ray.model.decoder import count_parameters

CARD, EVAL_RESULTS = "README.md", ".eval_results"
OPENED_BY: dict[Format, str] = {
    "hf": "transformers",
    "gguf": "llama.cpp and what is built on it (Ollama, LM Studio)",
    "onnx": "ONNX Runtime, and ONNX Runtime GenAI by genai_config.json",
}
LIBRARIES: dict[Format, str] = {"hf": "transformers", "gguf": "gguf", "onnx": "onnx"}
METRICS = {"bits_per_byte": "bits per byte", "loss": "nats a token", "perplexity": "perplexity"}


def write_card(folder: Path, given: SourceModel, to: Format, dtype: Dtype, found: Sequence[Parity]) -> None:
    """Write `README.md`, and `.eval_results/` where there is something for it. Raises: OSError."""
    source, figures = data_source(given.manifest), recorded(given)
    card = ModelCard(f"---\n{_metadata(given, to, source, figures).to_yaml()}\n---\n\n{_text(given, to, dtype, found)}")
    (folder / CARD).write_text(str(card), encoding="utf-8")
    entries = _entries(given, source, figures)
    if entries:
        (folder / EVAL_RESULTS).mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        (folder / EVAL_RESULTS / "slm_ray.yaml").write_text(text, encoding="utf-8")


def recorded(given: SourceModel) -> dict[str, float]:
    """The figures that were recorded of a model, by the names in `METRICS`: those of its promotion, which are by story,
    or else those of the last validation of its run."""
    known = {name: given.evaluation.get(name, "") for name in METRICS}
    found = {name: float(value) for name, value in known.items() if _is_number(value)}
    if not found and given.state is not None and given.state.metrics is not None:
        validated = given.state.metrics.metrics
        found = {name: validated[f"val_{name}"] for name in METRICS if f"val_{name}" in validated}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def how_measured(given: SourceModel) -> str:
    """On which stories, and by which measure."""
    if given.evaluation:
        known = given.evaluation
        split, measure = known.get("split", "a held-out split"), known.get("measure", "?")
        return f"split `{split}` of data set `{known.get('data_fingerprint', '?')}`, measure `{measure}`"
    found = given.state.metrics if given.state else None
    by_stories = found is not None and found.val_measure == "stories"
    way = "measure `stories`" if by_stories else "windows of the stream of tokens"
    return f"validation split while training, {way}"


def _metadata(given: SourceModel, to: Format, source: DataSource, figures: dict[str, float]) -> ModelCardData:
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=source.hub_name or "stories",
            dataset_name=source.hub_name or "stories that the card describes",
            dataset_split=given.evaluation.get("split", "validation"),
            dataset_revision=source.revision or None,
            metric_type=name,
            metric_name=METRICS[name],
            metric_value=value,
        )
        for name, value in figures.items()
    ]
    return ModelCardData(
        license=licence(given).lower() or None,
        library_name=LIBRARIES[to],
        pipeline_tag="text-generation",
        tags=["slm-ray", hf_layout.family(given.model.config), "stories"],
        datasets=hub_names(given.manifest) or None,
        model_name=given.title,
        eval_results=results or None,
    )


def _entries(given: SourceModel, source: DataSource, figures: dict[str, float]) -> list[EvalResultEntry]:
    """For `.eval_results/`: the hub takes a data set of its own alone."""
    if not source.hub_name:
        return []
    return [
        EvalResultEntry(
            dataset_id=source.hub_name,
            task_id=name,
            value=value,
            dataset_revision=source.revision or None,
            notes=f"{METRICS[name]}; {how_measured(given)}",
        )
        for name, value in figures.items()
    ]


def _text(given: SourceModel, to: Format, dtype: Dtype, found: Sequence[Parity]) -> str:
    config = given.model.config
    shape = f"{config.n_layers} x {config.d_model}, {config.n_heads} heads, FF {config.d_ff}, context {config.seq_len}"
    parts = [
        f"# {given.title}",
        f"A small language model, {_made(given)} SLM-Ray: {count_parameters(given.model):,} parameters "
        f"({shape}, vocabulary {config.vocab_size:,}), in {dtype}. This folder is for {OPENED_BY[to]}. A text begins "
        f"after the token {given.tokenizer.start_id}, and {_ends(given, to)}.",
        "## Licence",
        "\n".join(_licences(given)),
        "## Data",
        "\n".join(data_lines(given)),
        "## Where it comes from",
        "\n".join(_lineage(given)),
        "## Evaluation",
        "\n".join(_evaluation(given)),
        "## Checked against the model in torch",
        "\n".join(_checks(found)),
    ]
    return visible_lines("\n\n".join(parts)) + "\n"


def _made(given: SourceModel) -> str:
    return "made by others and exported by" if given.state is None else "made with"


def _ends(given: SourceModel, to: Format) -> str:
    ends = given.tokenizer.borders.end_ids
    named, lost = (ends[:GGUF_ENDS], ends[GGUF_ENDS:]) if to == "gguf" else (ends, [])
    said = f"any of {', '.join(map(str, named))} ends it" if len(named) > 1 else f"{named[0]} ends it"
    return f"{said} (of the model's own ends {', '.join(map(str, lost))} have no field in this file)" if lost else said


def _licences(given: SourceModel) -> Iterator[str]:
    yield f"- **Code** that trained it: {licence_text(given)}"
    yield f"- **Data**: {data_licence(given)}"
    if licence(given):
        yield ""
        yield "The metadata above names the licence of the code; whoever publishes the weights decides on theirs."


def _lineage(given: SourceModel) -> Iterator[str]:
    state = given.state
    if state is None:
        yield f"- **Weights**: sha256 `{given.weights_sha256}`, of a model that others made: ask them"
        return
    yield f"- **Run**: `{given.run_id or 'not tracked'}`, step {state.step:,}, {state.samples_seen:,} samples"
    yield f"- **Weights**: sha256 `{given.weights_sha256}` of the checkpoint's"
    yield from before_lines(state)
    for attempt in state.attempts:
        code = str(attempt.code_version) if attempt.code_version else "that no commit names"
        yield (
            f"- **From step {attempt.step + 1:,} on**: data set `{attempt.data_fingerprint}`, batches of "
            f"{attempt.batch_size}, seed {attempt.seed}, code {code}"
        )


def _evaluation(given: SourceModel) -> Iterator[str]:
    figures = recorded(given)
    if not figures:
        yield "None was recorded."
        return
    yield f"On the {how_measured(given)}:" if not given.evaluation else f"By promotion, {how_measured(given)}:"
    yield ""
    yield "| Measure | Value |"
    yield "|---|---|"
    for name, value in figures.items():
        yield f"| {METRICS[name]} | {value:.6g} |"


def _checks(found: Sequence[Parity]) -> Iterator[str]:
    yield "| Opened by | Largest error of a logit | Allowed | Greedy tokens equal | Texts with equal ids |"
    yield "|---|---|---|---|---|"
    for one in found:
        yield (
            f"| {one.by} | {one.largest_logit_error:.3g} | {one.bound:.3g} | "
            f"{one.greedy_tokens_equal} of {one.greedy_tokens} | {one.texts_with_equal_ids} of {one.texts} |"
        )


def made_with() -> dict[str, Any]:
    """Versions of what wrote the export."""
    import importlib.metadata

    names = ("slm-ray", "torch", "tokenizers", "safetensors", "onnx", "onnxruntime", "gguf")
    return {name: importlib.metadata.version(name) for name in names if _is_there(name)}


def _is_there(name: str) -> bool:
    import importlib.metadata

    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
