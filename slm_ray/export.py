"""Export a model: `python slm_ray/export.py`.

In: a model reference. Out: a folder that other programs open: transformers, llama.cpp, ONNX Runtime; or, with
`--to checkpoint`, one that this project serves. It is checked against the model in torch before it appears.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, in place of this folder
    from slm_ray.cli.script import run

    run("slm_ray.export")

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from slm_ray.cli.command import command
from slm_ray.cli.script import set_default_environment
from slm_ray.config.options import parse
from slm_ray.exports.formats import Dtype, Target, misfit


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model to a folder of its own, for other programs."""

    model: str = "models:/tinystories@champion"
    """Registered model (models:/NAME@ALIAS or models:/NAME/VERSION) or folder of a checkpoint."""
    output: str = "export"
    """Folder to write; it must not exist yet."""
    to: Literal["", "hf", "gguf", "onnx", "all", "checkpoint"] = ""
    """hf: for transformers; gguf: for llama.cpp; onnx: for ONNX Runtime; all: the three in folders of their names;
    checkpoint: for `serve/app.py --model`, with digests and lineage. hf when not given."""
    dtype: Dtype = "f32"
    """Numbers of the weights: f32, f16, bf16 (hf, gguf), q8_0 (gguf), int8 (onnx)."""
    data: str = ""
    """Folder of the data set that it was trained on, for the model's card; where the run had it when not given."""
    push: str = ""
    """Upload the folder to this repository of the Hugging Face hub (OWNER/NAME), made private where there is none."""
    format: Literal["", "hf", "checkpoint"] = ""
    """The name of --to in earlier versions."""
    tracking_uri: str = ""
    """MLflow store of registered models; MLFLOW_TRACKING_URI or sqlite:///mlflow.db when not given."""

    def __post_init__(self) -> None:
        if self.to and self.format and self.to != self.format:
            raise ValueError(f"--to {self.to} and --format {self.format} are two names of one option: give one of them")
        if why := misfit(self.target, self.dtype):
            raise ValueError(why)
        if self.push and self.target in ("checkpoint", "all"):
            raise ValueError(f"--push takes one export for others, not --to {self.target}")

    @property
    def target(self) -> Target:
        """What is to be written, resolved."""
        return self.to or self.format or "hf"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line: parse, write, check, print the folder."""
    set_default_environment()
    about = (ExportConfig.__doc__ or "").splitlines()[0]
    config = parse(ExportConfig, argv, prog="export.py", about=about, default=ExportConfig())
    from slm_ray.exports.writing import export_model  # torch, which `--help` need not wait for
    from slm_ray.model import hf_layout

    done = export_model(
        config.model,
        Path(config.output),
        config.target,
        config.dtype,
        data=config.data,
        push_to=config.push,
        tracking_uri=config.tracking_uri,
    )
    print(done.folder)
    for parity in done.checks:
        print(f"checked in {parity}", file=sys.stderr)
    if config.target in ("hf", "all") and (reason := hf_layout.why_not_transformers(done.shape)):
        print(f"note: {reason}; this project opens it with --to checkpoint", file=sys.stderr)
    if done.note:
        print(f"note: {done.note}", file=sys.stderr)
    if done.address:
        print(f"pushed to {done.address}", file=sys.stderr)
    return 0
