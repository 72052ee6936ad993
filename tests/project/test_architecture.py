"""The rules of the layout: who may know whom, and what may lie where."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

CORE = sorted((ROOT / "slm_ray").rglob("*.py"))
EVERYWHERE = [
    path for folder in ("pipelines", "slm_ray", "tune", "serve", "infra") for path in (ROOT / folder).rglob("*.py")
]
ENGINES = {  # package -> the only places that may import it
    "apache_beam": {"pipelines"},
    "ray": {"slm_ray/distributed/cluster.py", "slm_ray/train.py", "slm_ray/distributed/workers.py", "tune", "serve"},
    "ray.train": {"slm_ray/train.py", "slm_ray/distributed/workers.py"},
    "ray.tune": {"tune"},
    "ray.serve": {"serve"},
    "mlflow": {"slm_ray/tracking/mlflow_runs.py", "slm_ray/tracking/registry.py", "slm_ray/tracking/system_metrics.py"},
    "torch.utils.tensorboard": {"slm_ray/tracking/tensorboard_tracker.py"},
    "datasets": {"slm_ray/sources/hub.py"},
    "fastapi": {"serve"},
    "onnx": {"slm_ray/generation/onnx_graph.py"},
    "onnxruntime": {"slm_ray/generation/onnx_backend.py"},
}
EXCEPTIONS = {("ray.tune", "tune/sweep.py"), ("ray.train", "tune/sweep.py")}
TOP_LEVEL = {"pipelines", "slm_ray", "tune", "serve", "tests", "infra"}


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("package", ENGINES)
def test_each_engine_is_known_in_one_place(package: str) -> None:
    strangers = [
        place(path)
        for path in EVERYWHERE
        if any(name == package or name.startswith(f"{package}.") for name in imports(path))
        and not any(place(path) == home or place(path).startswith(f"{home}/") for home in ENGINES[package])
        and (package, place(path)) not in EXCEPTIONS
    ]
    assert strangers == []


def test_the_core_does_not_know_the_applications() -> None:
    applications = {"pipelines", "tune", "serve", "infra", "tests"}
    assert [place(path) for path in CORE if applications & {name.split(".")[0] for name in imports(path)}] == []


def test_no_module_hides_a_standard_one() -> None:
    assert {path.stem for path in CORE} & set(sys.stdlib_module_names) == set()


def test_the_top_level_holds_the_six_folders_and_no_others() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folders = {line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    assert {name for name in folders if not name.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize(
    "module",
    ["slm_ray.dataset.shards", "slm_ray.preparation.steps", "slm_ray.tokenization.tokenizer", "slm_ray.sources.plan"],
)
def test_a_beam_worker_needs_neither_torch_nor_ray_nor_mlflow(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'ray', 'mlflow'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", EVERYWHERE, ids=place)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
