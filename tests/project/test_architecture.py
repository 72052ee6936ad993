"""The rules of the layout: who may know whom, and what may lie where."""

import ast
import graphlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.ray_files import starts_ray

CORE = sorted((ROOT / "slm_ray").rglob("*.py"))
EVERYWHERE = [
    path for folder in ("pipelines", "slm_ray", "tune", "serve", "infra") for path in (ROOT / folder).rglob("*.py")
]
FLOORS = [  # bottom up: a room imports only what lies on the floors below it, or beside it on the ground
    {
        "errors",
        "internals",
        "storage",
        "periodic",
        "limits",
        "malloc",
        "locks",
        "hub_reference",
        "corpus",
        "config",
        "cli",
    },
    {"model", "dataset", "tokenization"},
    {"model_files"},
    {"sources", "generation", "runs"},
    {"preparation", "tracking"},
    {"training"},
    {"evaluation", "lineage", "exports"},
    {"distributed"},
    {"train", "generate", "evaluate", "export"},
]
ENGINES = {  # package -> the only folders and files that may import it
    "apache_beam": {"pipelines"},
    "ray": {"slm_ray/distributed", "tune", "serve"},
    "ray.train": {"slm_ray/distributed"},
    "ray.tune": {"tune"},
    "ray.serve": {"serve"},
    "mlflow": {"slm_ray/tracking"},
    "tensorboard": {"slm_ray/tracking/besides"},
    "torch.utils.tensorboard": {"slm_ray/tracking/besides"},
    "wandb": {"slm_ray/tracking/besides"},
    "datasets": {"slm_ray/sources/hub.py"},
    "fastapi": {"serve"},
    "lm_eval": {"slm_ray/evaluation/harness.py"},
    "model_signing": {"slm_ray/evaluation/card/signature.py"},
    "gguf": {"slm_ray/exports/gguf_files"},
    "llama_cpp": {"slm_ray/exports/gguf_files/llamacpp.py"},
    "opentelemetry": {"serve/api/tracing.py"},
    "onnx": {"slm_ray/generation/onnx_graph.py", "slm_ray/generation/graph", "slm_ray/exports"},
    "onnxruntime": {"slm_ray/generation/onnx_backend.py", "slm_ray/exports/onnx_runtimes.py"},
    "onnxruntime_genai": {"slm_ray/exports/onnx_runtimes.py"},
    "pydantic": {"slm_ray/config", "slm_ray/runs/train_state.py", "serve"},
    "tyro": {"slm_ray/config", "pipelines/config.py", "pipelines/options.py"},
    "torch": {
        f"slm_ray/{room}"
        for room in ("model", "model_files", "generation", "runs", "training", "evaluation", "distributed")
    },
}
TORCH_ON_TOP = {
    "slm_ray/exports",
    "slm_ray/evaluate.py",
    "slm_ray/generate.py",
    "slm_ray/tracking/besides/tensorboard_tracker.py",
    "serve",
}
ENGINES["torch"] |= TORCH_ON_TOP | {"slm_ray/exports"}
MAX_FILES, MAX_LINES, MAX_FUNCTION_LINES, MAX_CLASS_LINES = 16, 300, 50, 150
TABLES = {"slm_ray/corpus/words.py"}  # a list of words, longer than a file of code may be
FOREIGN_TO_BEAM_WORKERS = {"torch", "ray", "mlflow", "pydantic"}
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
    ]
    assert strangers == []


def room(name: str) -> str:
    """`slm_ray.model.decoder`, `slm_ray.model` and `slm_ray/model.py` are all in the room `model`."""
    return name.split(".")[1]


def test_doors_open_downwards() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    rooms = {name: {room(used) for path in paths for used in imports(path) if used.startswith("slm_ray.")}
             for name, paths in by_room().items()}  # fmt: skip
    assert set(rooms) == set(floor)
    upwards = [
        f"{name} -> {used}"
        for name, known in rooms.items()
        for used in known - {name}
        if floor[used] > floor[name] or floor[used] == floor[name] > 0
    ]
    assert upwards == []
    graphlib.TopologicalSorter({name: known - {name} for name, known in rooms.items()}).prepare()  # no cycle


def by_room() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in CORE:
        if path != ROOT / "slm_ray" / "__init__.py":
            found.setdefault(room(dotted(path)), []).append(path)
    return found


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_module_needs_itself() -> None:
    modules = {dotted(path): path for path in EVERYWHERE}
    known = {name: {used for used in imports(path) if used in modules} for name, path in modules.items()}
    graphlib.TopologicalSorter(known).prepare()


def test_applications_are_known_to_nobody_below_or_beside_them() -> None:
    applications = {"pipelines", "tune", "serve", "infra", "tests"}
    assert [
        f"{place(path)} -> {name}"
        for path in EVERYWHERE
        for name in imports(path)
        if name.split(".")[0] in applications - {place(path).split("/")[0]}
    ] == []


def test_no_private_name_leaves_its_module() -> None:
    private = [
        f"{place(path)}: {name}"
        for path in EVERYWHERE
        for name in imports(path)
        if name.split(".")[0] in TOP_LEVEL and any(part.startswith("_") and part[1] != "_" for part in name.split("."))
    ]
    assert private == []


def test_a_room_says_what_it_is_and_pulls_nothing() -> None:
    folders = {path.parent for path in EVERYWHERE} - {ROOT / name for name in TOP_LEVEL}
    for folder in sorted(folders | {ROOT / "slm_ray"}):
        body = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
        assert len(body) == 1 and ast.get_docstring(ast.Module(body, [])), place(folder)


def test_nothing_is_too_large() -> None:
    folders = Counter(place(path.parent) for path in [*EVERYWHERE, *(ROOT / "tests" / "bench").rglob("*.py")])
    assert {name: count for name, count in folders.items() if count > MAX_FILES} == {}
    lengths = {place(path): len(path.read_text(encoding="utf-8").splitlines()) for path in EVERYWHERE}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES and name not in TABLES} == {}
    limits = {
        ast.FunctionDef: MAX_FUNCTION_LINES,
        ast.AsyncFunctionDef: MAX_FUNCTION_LINES,
        ast.ClassDef: MAX_CLASS_LINES,
    }
    large = [
        f"{place(path)}: {node.name} has {length} lines"
        for path in EVERYWHERE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if type(node) in limits and (length := node.end_lineno - node.lineno + 1) > limits[type(node)]
    ]
    assert large == []


def test_no_module_hides_a_standard_one() -> None:
    assert {path.stem for path in EVERYWHERE} & set(sys.stdlib_module_names) == set()


def test_the_top_level_holds_the_six_folders_and_no_others() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folders = {line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    assert {name for name in folders if not name.startswith(".")} <= TOP_LEVEL


def test_a_beam_worker_needs_no_torch_ray_mlflow_or_pydantic() -> None:
    modules = [dotted(path) for path in by_room()["preparation"]]
    modules += ["pipelines.transforms", "pipelines.forked_workers"]
    code = f"import sys, {', '.join(modules)}; print(*{FOREIGN_TO_BEAM_WORKERS} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.split() == []


STARTS_A_RAY = re.compile(r"\blocal_ray\b|\bray\.init\(|cluster\.connect\(|[\"'/ ](train|sweep|app|demo)\.py[\"' ]")
STARTS_NONE = {  # they name a command, and start none that comes as far as a Ray
    "tests/cli/test_help.py",
    "tests/cli/test_script.py",
    "tests/project/test_architecture.py",
    "tests/project/test_infra.py",
    "tests/project/test_makefile.py",
    "tests/project/test_seeds.py",
    "tests/project/test_containers.py",
    "tests/project/test_kubernetes.py",
    "tests/pipelines/test_prepare.py",
    "tests/preparation/test_staging.py",
}


def test_every_test_file_that_may_start_a_ray_says_so() -> None:
    files = (ROOT / "tests").rglob("test_*.py")
    silent = [path for path in files if STARTS_A_RAY.search(path.read_text(encoding="utf-8")) and not starts_ray(path)]
    assert {place(path) for path in silent} <= STARTS_NONE


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pytestmark = pytest.mark.ray", True),
        ("pytestmark = [pytest.mark.slow, pytest.mark.ray]", True),
        ("pytestmark = pytest.mark.slow", False),
        ("other = pytest.mark.ray", False),
    ],
)
def test_the_marker_of_a_file_is_found_before_it_is_imported(line: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(f"import nothing_that_exists\n{line}\n")
    assert starts_ray(tmp_path / "test_it.py") == expected


@pytest.mark.parametrize("path", EVERYWHERE, ids=place)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
