"""What pages quote holds: messages of the code, ports and pickles of the security page, a config file of Ray Serve."""

import ast
import re
from functools import cache

import pytest
import yaml

from infra.services import PORTS
from serve.options import app_config
from serve.replica_actors import DEPLOYMENT
from slm_ray.tracking.registry import PICKLE_SUFFIXES
from tests.support.paths import ROOT

SYMPTOMS = (ROOT / "infra" / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
SECURITY = (ROOT / ".github" / "SECURITY.md").read_text(encoding="utf-8")
SPOKEN = ("slm_ray", "pipelines", "tune", "serve", "infra")
ANYTHING = "\0"


@cache
def texts() -> tuple[str, ...]:
    """Every text of the code, with one sign for each value that is put in; and the Makefile and the tests' own end."""
    found = [(ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "tests/conftest.py")]
    for path in (path for folder in SPOKEN for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else ANYTHING for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sdg]", ANYTHING, node.value))
    return tuple(found)


def is_said(message: str) -> bool:
    """Whether one text of the code has the message, `...` standing for anything."""
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    return any(re.search(pattern, text, re.DOTALL) for text in texts())


def quoted() -> list[str]:
    """The code in the first cells of the tables of messages."""
    tables = re.findall(r"^\| It says .*\n\|[-|]+\n((?:\|.*\n)+)", SYMPTOMS, re.MULTILINE)
    cells = [line.split(" | ")[0] for table in tables for line in table.splitlines()]
    return [span for cell in cells for span in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("message", quoted())
def test_a_message_that_is_quoted_is_one_of_the_code(message: str) -> None:
    assert len(message.replace("...", "")) > 8 or message == "no browser", "too short to be looked for"
    assert is_said(message)


def test_messages_are_found_in_their_parts_and_not_in_two_texts() -> None:
    assert len(quoted()) > 45
    assert is_said("must be divisible by workers x accumulation_steps")
    assert not is_said("must be divisible by the moon")
    assert not is_said("no Ray cluster answers at ... expected models:/NAME@ALIAS")


def test_the_ports_of_the_security_page_are_those_that_the_doctor_looks_at() -> None:
    assert all(str(port) in SECURITY for port in PORTS)


def test_pickles_that_the_security_page_names_are_refused() -> None:
    assert {".bin", ".pt", ".pkl", ".ckpt"} <= PICKLE_SUFFIXES


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own models use an old form of Pydantic's
def test_the_config_file_of_the_servers_page_is_one_that_ray_and_the_application_take() -> None:
    from ray.serve.schema import ServeDeploySchema

    page = (ROOT / "serve" / "README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    config = ServeDeploySchema.model_validate(yaml.safe_load(block))
    [application] = config.applications
    assert application.import_path == "serve.app:app"
    taken = app_config(application.args)
    assert taken.replicas == 2
    assert config.http_options.request_timeout_s > taken.request_timeout_s
    assert [one.name for one in application.deployments] == [DEPLOYMENT]
