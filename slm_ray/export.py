"""Export a model: `python slm_ray/export.py`.

In: a model reference. Out: a folder in Hugging Face layout (config, safetensors, tokenizer), which transformers opens
where the shape is one that it has; or, with `--format checkpoint`, a folder that this project serves.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, in place of this folder
    from slm_ray.cli.script import run

    run("slm_ray.export")

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from slm_ray.cli.command import command
from slm_ray.cli.script import set_default_environment
from slm_ray.config.options import parse
from slm_ray.errors import UserError
from slm_ray.model import hf_layout
from slm_ray.runs import checkpoint, verification
from slm_ray.tracking.registry import resolved_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model to a folder of its own."""

    model: str = "models:/tinystories@champion"
    """Registered model (models:/NAME@ALIAS or models:/NAME/VERSION) or folder of a checkpoint."""
    output: str = "export"
    """Folder to write; it must not exist yet."""
    format: Literal["hf", "checkpoint"] = "hf"
    """hf: files for transformers; checkpoint: a folder for `serve/app.py --model`, with digests and lineage."""
    tracking_uri: str = ""
    """MLflow store of registered models; MLFLOW_TRACKING_URI or sqlite:///mlflow.db when not given."""


def export_model(config: ExportConfig) -> Path:
    """Verify the model and copy it; the folder appears complete or not at all.

    Raises:
        UserError: no such model, a corrupt one, or an output that is there already or cannot be written.
    """
    output = Path(config.output).absolute()
    if output.exists():
        raise UserError(f"{output} exists already: name another --output")
    with resolved_model(config.model, config.tracking_uri) as source:
        verification.verify(source.path)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as beside:
                copy = Path(beside) / output.name
                if config.format == "checkpoint":
                    checkpoint.copy_for_serving(source.path, copy)
                else:
                    shutil.copytree(source.path / checkpoint.MODEL, copy)
                copy.rename(output)
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror or error}") from error
    return output


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line: parse, copy, print the folder."""
    set_default_environment()
    about = (ExportConfig.__doc__ or "").splitlines()[0]
    config = parse(ExportConfig, argv, prog="export.py", about=about, default=ExportConfig())
    output = export_model(config)
    print(output)
    if config.format == "hf" and (reason := _why_not_transformers(output)):
        print(f"note: {reason}; this project opens it with --format checkpoint", file=sys.stderr)
    return 0


def _why_not_transformers(output: Path) -> str:
    path = output / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    return hf_layout.why_not_transformers(hf_layout.model_config(content, str(path)))
