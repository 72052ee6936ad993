"""A checkpoint as a folder of MLflow's own: what is registered opens with `mlflow.pyfunc.load_model` too.

In: a checkpoint that holds no place of its maker. Out: a folder with `MLmodel`, the code that loads it, and the
checkpoint among its artifacts; and for such a folder, where its checkpoint is.
"""

import importlib.metadata
import os
import warnings
from pathlib import Path

CHECKPOINT = "artifacts/checkpoint"
"""Where the checkpoint lies in such a folder."""
_CODE = Path(__file__).with_name("story_model.py")
_NEEDS = ("slm-ray", "mlflow", "torch", "tokenizers", "safetensors", "numpy", "onnx", "onnxruntime")
_PARAMETERS = {  # name -> type and default, those of generate.py
    "max_tokens": ("integer", 200),
    "temperature": ("double", 0.7),
    "top_k": ("integer", 50),
    "top_p": ("double", 1.0),
    "repetition_penalty": ("double", 1.0),
    "seed": ("long", -1),
}


def write_mlflow_model(checkpoint: Path, target: Path) -> None:
    """Write the folder: models from code, so that nothing of it is a pickle, and no path of this machine is in it."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of MLflow's own types, and that there is no example of an input
        import mlflow.pyfunc
        from mlflow.models import Model, ModelSignature
        from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

        mlflow.pyfunc.save_model(
            path=str(target),
            python_model=str(_CODE),
            artifacts={Path(CHECKPOINT).name: str(checkpoint)},
            pip_requirements=_requirements(),
        )
    description = Model.load(str(target))
    texts = Schema([ColSpec("string")])
    parameters = ParamSchema([ParamSpec(name, kind, default) for name, (kind, default) in _PARAMETERS.items()])
    description.signature = ModelSignature(inputs=texts, outputs=texts, params=parameters)  # type hints give no params
    flavor = description.flavors["python_function"]
    flavor["model_code_path"] = _CODE.name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    description.save(str(target / "MLmodel"))


def _requirements() -> list[str]:
    """The packages that a reader needs, as they are here; what is not installed here was not needed."""
    found = []
    for name in _NEEDS:
        try:
            found.append(f"{name}=={importlib.metadata.version(name).partition('+')[0]}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint of a registered folder; the folder itself for versions that were registered before."""
    inner = folder / CHECKPOINT
    return inner if inner.is_dir() else folder
