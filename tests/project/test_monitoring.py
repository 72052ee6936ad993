"""`infra/monitoring`: every metric and label that a dashboard or an alert names is one that the code exports."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from prometheus_client.parser import text_string_to_metric_families

from serve.api.metrics import Metrics, Story
from serve.replica_metrics import REPLICA
from slm_ray.distributed.ray_metrics import FACTS, FAILURES, FIGURES, RUN
from slm_ray.generation.engine_thread import Load
from slm_ray.generation.request import Completion
from tests.support.paths import ROOT

MONITORING = ROOT / "infra" / "monitoring"
DASHBOARDS = sorted((MONITORING / "grafana" / "dashboards").glob("*.json"))
ALERTS = yaml.safe_load((MONITORING / "alerts.yml").read_text())
RAYS_OWN = {  # metric -> where Ray names it, and the label that is used
    "ray_serve_application_status": ("serve/_private/application_state.py", "application"),
    "ray_serve_deployment_queued_queries": ("serve/_private/router.py", "deployment"),
    "ray_serve_deployment_replica_healthy": ("serve/_private/deployment_state.py", "deployment"),
    "ray_node_cpu_utilization": ("dashboard/modules/reporter/reporter_agent.py", "ip"),
}
WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "offset", "bool", "group_left", "group_right"}


def served() -> dict[str, set[str]]:
    """What a replica exports, with its labels, as Prometheus knows it."""
    metrics = Metrics()
    completion = Completion(text="", tokens=(1, 2), prompt_tokens=1, finish_reason="stop")
    metrics.count_story(Story(model="m", version="1"), completion, first_s=0.1, all_s=0.2)
    metrics.count_answer("/generate", 200)
    found = text_string_to_metric_families(metrics.text(Load(0, 0)).decode())
    return {f"ray_{one.name}": {REPLICA, *one.labels} for family in found for one in family.samples}


def exported() -> dict[str, set[str]]:
    """Every metric that is exported, with its labels."""
    trained = [name for name, _ in (FIGURES | FACTS).values()] + [f"{FAILURES[0]}_total"]
    return (
        served() | {f"ray_{name}": {RUN} for name in trained} | {name: {label} for name, (_, label) in RAYS_OWN.items()}
    )


def expressions() -> Iterator[tuple[str, str]]:
    """Every PromQL expression, with its place."""
    for path in DASHBOARDS:
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            yield from ((f"{path.stem} {panel['title']}", target["expr"]) for target in panel["targets"])
        for variable in board["templating"]["list"]:
            query = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"])
            assert query, variable["query"]
            yield f"{path.stem} {variable['name']}", f"sum by ({query[2]}) ({query[1]})"
    for group in ALERTS["groups"]:
        yield from ((f"{group['name']} {rule['alert']}", rule["expr"]) for rule in group["rules"])


def named(expression: str) -> tuple[set[str], set[str]]:
    """Metrics and labels of a PromQL expression."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", bare))
    grouping = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", bare)
    labels |= {word for group in grouping for word in re.findall(r"\w+", group)}
    rest = re.sub(r"\b(?:by|without|on|ignoring)\s*\([^)]*\)|\{[^}]*\}|\[[^\]]*\]|\boffset\s+\w+", " ", bare)
    words = set(re.findall(r"(?<![\w.])[a-zA-Z_:][\w:]*(?!\s*\(|\w)", rest))
    return words - WORDS, labels


def metrics_about(subject: str) -> set[str]:
    """Every metric that the dashboard and the alerts about `training` or `serving` name.

    Those that are scraped from a running system have to be among them: `test_local_cluster_run.py`, `test_readme.py`.
    """
    return set().union(*(named(text)[0] for place, text in expressions() if place.split()[0] == subject))


def sample_names(scraped: str) -> set[str]:
    """The names of all samples on a page for Prometheus."""
    return set(re.findall(r"^([a-zA-Z_:][\w:]*)[{ ]", scraped, re.MULTILINE))


def unknown(expression: str, known: dict[str, set[str]]) -> set[str]:
    """Metrics of an expression that nobody exports, and labels that none of its metrics has."""
    metrics, labels = named(expression)
    assert metrics, expression
    has = set().union(*(known.get(metric, set()) for metric in metrics))
    return {metric for metric in metrics if metric not in known} | {f"label {label}" for label in labels - has}


def test_names_are_found_in_an_expression() -> None:
    text = (
        'histogram_quantile(0.5, sum by (le, version) (rate(a_bucket{version=~"$v", b="c d"}[5m]))) > 1e3 and on (x) y'
    )
    assert named(text) == ({"a_bucket", "y"}, {"le", "version", "b", "x"})
    assert named("sum(rate(a_total[1m])) / sum (b offset 30m) or 0 * c == 1") == ({"a_total", "b", "c"}, set())


@pytest.mark.parametrize("expression", [text for _, text in expressions()], ids=[place for place, _ in expressions()])
def test_what_is_named_is_exported(expression: str) -> None:
    assert unknown(expression, exported()) == set()


def test_a_renamed_metric_or_label_is_seen() -> None:
    known = exported()
    labels = known.pop("ray_slm_requests_total")
    expression = 'sum by (route) (rate(ray_slm_requests_total{status="429"}[5m]))'
    assert unknown(expression, known) == {"ray_slm_requests_total", "label route", "label status"}
    assert unknown(expression, known | {"ray_slm_requests_total": labels - {"route"}}) == {"label route"}


@pytest.mark.parametrize("metric", RAYS_OWN)
def test_the_installed_ray_has_its_own_ones(metric: str) -> None:
    place, label = RAYS_OWN[metric]
    text = (Path(ray.__file__).parent / place).read_text(encoding="utf-8")
    assert f'"{metric.removeprefix("ray_")}"' in text and f'"{label}"' in text


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_whole(path: Path) -> None:
    board, text = json.loads(path.read_text()), path.read_text()
    [source] = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert set(re.findall(r'"uid": "(\w+)"', text)) == {source["uid"]}
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == len({panel["title"] for panel in panels})
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert set(re.findall(r"\$(\w+)", "".join(t["expr"] for p in panels for t in p["targets"]))) == variables
    for panel in panels:
        for target in panel["targets"]:
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= named(target["expr"])[1], panel["title"]


def test_alerts_say_what_is_wrong_and_are_explained() -> None:
    rules = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    assert all(set(rule) <= {"alert", "expr", "for", "labels", "annotations"} for rule in rules)
    assert {rule["labels"]["severity"] for rule in rules} == {"warning", "critical"}
    text = (MONITORING / "README.md").read_text()
    for rule in rules:
        assert f"`{rule['alert']}`" in text, "what it means, and what to do"
        used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert used <= set().union(*(exported()[metric] for metric in named(rule["expr"])[0]))


def test_prometheus_asks_every_service_that_exports_metrics_at_its_port() -> None:
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    [names] = job["dns_sd_configs"]
    services: dict[str, Any] = yaml.safe_load((ROOT / "infra/compose.yaml").read_text())["services"]
    port = str(names["port"])
    exporting = {
        name
        for name, service in services.items()
        if f"--metrics-export-port={port}" in service.get("command", ())
        or (service.get("environment", {}).get("SLM_METRICS_PORT") == port and name not in ("keys", "mlflow", "story"))
    }  # fmt: skip
    assert set(names["names"]) == exporting
    mounts = {Path(mount.split(":")[1]).name for mount in services["prometheus"]["volumes"]}
    assert set(config["rule_files"]) <= mounts
