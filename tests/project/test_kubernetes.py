"""The manifests of `infra/k8s`, as kustomize puts them together, checked without a cluster."""

import copy
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import options
from serve.api.middleware import PUBLIC_ROUTES
from serve.options import ServeConfig, app_config
from slm_ray.config.options import parse
from tests.support.kustomize import Manifest, build
from tests.support.paths import ROOT

K8S = ROOT / "infra" / "k8s"
OVERLAYS = ("kind", "gke", "eks")
FOLDERS = {"plain": K8S / "plain"} | {name: K8S / "overlays" / name for name in OVERLAYS}
KUBERAY = ROOT.parent / "shared" / "schemas" / "kuberay-v1.json"
KUBERNETES = "1.34"
USER = 10001
RAY_API = "ray.io/v1"
every_folder = pytest.mark.parametrize("folder", FOLDERS.values(), ids=list(FOLDERS))
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [one for one in manifests if one["kind"] == kind]


def ray_service(overlay: str = "kind") -> Manifest:
    [service] = of_kind(build(FOLDERS[overlay]), "RayService")
    return service


def pod_templates(node: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template below a manifest, with its place."""
    if isinstance(node, list):
        for number, one in enumerate(node):
            yield from pod_templates(one, f"{place}/{number}")
    elif isinstance(node, dict):
        if "containers" in node.get("spec", {}) if isinstance(node.get("spec"), dict) else False:
            yield place, node
        for name, one in node.items():
            yield from pod_templates(one, f"{place}/{name}")


def templates(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    found = [(f"{m['kind']} {m['metadata']['name']}{p}", t) for m in build(folder) for p, t in pod_templates(m)]
    assert found
    return found


@every_folder
def test_core_kinds_are_valid_and_have_no_unknown_field(folder: Path) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    core = [one for one in build(folder) if one["apiVersion"] != RAY_API]
    for manifest in core:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    wrong = copy.deepcopy(of_kind(core, "Deployment")[0])
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


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


def faults(manifest: Manifest) -> list[str]:
    """What KubeRay's own schema has against a manifest."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = strict(json.loads(KUBERAY.read_text(encoding="utf-8"))[manifest["kind"]])
    found = jsonschema.Draft4Validator(schema).iter_errors(manifest)
    return [f"{'/'.join(map(str, one.absolute_path))}: {one.message}" for one in found]


needs_kuberay = pytest.mark.skipif(
    not KUBERAY.exists(), reason="no ../shared/schemas/kuberay-v1.json: KubeRay's schema is not here"
)


@needs_kuberay
@every_overlay
def test_kuberay_accepts_the_manifests_and_knows_each_of_their_fields(overlay: str) -> None:
    ray_kinds = [one for one in build(FOLDERS[overlay]) if one["apiVersion"] == RAY_API]
    assert sorted(one["kind"] for one in ray_kinds) == ["RayJob", "RayJob", "RayService"]
    assert [fault for one in ray_kinds for fault in faults(one)] == []


@needs_kuberay
def test_a_wrong_field_and_a_wrong_type_are_seen() -> None:
    wrong = copy.deepcopy(ray_service())
    head = wrong["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    head["containers"][0]["readynessProbe"] = {}
    wrong["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"] = "one"
    assert len(faults(wrong)) == 2


def hardening_faults(place: str, template: dict[str, Any]) -> list[str]:
    """What a pod template lacks of what every one here has."""
    spec = template["spec"]
    pod = spec["securityContext"]
    wrong = [f"{place}: {what}" for what, is_so in {
        "may be root": pod.get("runAsNonRoot") is not True or pod.get("runAsUser") != USER,
        "has all system calls": pod.get("seccompProfile") != {"type": "RuntimeDefault"},
        "shares the host": any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")),
        "mounts the host": any("hostPath" in volume for volume in spec["volumes"]),
    }.items() if is_so]  # fmt: skip
    volumes = {volume["name"] for volume in spec["volumes"]}
    for container in [*spec["containers"], *spec.get("initContainers", ())]:
        wrong += [f"{place}: {container['name']} {fault}" for fault in container_faults(container, volumes)]
    return wrong


def container_faults(container: dict[str, Any], volumes: set[str]) -> list[str]:
    security, resources = container["securityContext"], container["resources"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    is_server = container["name"] != "ray-job-submitter"
    checks = {
        "may become root": security.get("allowPrivilegeEscalation") is not False,
        "writes to its root": security.get("readOnlyRootFilesystem") is not True,
        "keeps capabilities": security.get("capabilities") != {"drop": ["ALL"]},
        "has no room to write": "/tmp" not in mounts,
        "mounts what is not there": not set(mounts.values()) <= volumes,
        "has no limit": set(resources["limits"]) != {"cpu", "memory"},
        "requests nothing": set(resources["requests"]) != {"cpu", "memory"},
        "is not probed": is_server and not {"readinessProbe", "livenessProbe"} <= set(container),
        "has a secret in its environment": any(
            re.search("TOKEN|SECRET|PASSWORD", one["name"]) for one in container["env"]
        ),
    }
    return [name for name, is_so in checks.items() if is_so]


@every_folder
def test_what_a_probe_of_the_server_asks_for_is_answered(folder: Path) -> None:
    probes = [
        probe["httpGet"]["path"]
        for _, template in templates(folder)
        for container in template["spec"]["containers"]
        if "serve/app.py" in " ".join([*container.get("command", ()), *container.get("args", ())])
        for probe in (container.get(name) for name in ("startupProbe", "readinessProbe", "livenessProbe"))
        if probe
    ]
    assert bool(probes) == (folder == FOLDERS["plain"])
    assert set(probes) <= PUBLIC_ROUTES  # without a key


@every_folder
def test_every_pod_is_hardened(folder: Path) -> None:
    assert [fault for place, template in templates(folder) for fault in hardening_faults(place, template)] == []


@pytest.mark.parametrize(
    "loosen",
    [
        lambda spec: spec["securityContext"].pop("runAsNonRoot"),
        lambda spec: spec["containers"][0]["securityContext"].pop("readOnlyRootFilesystem"),
        lambda spec: spec["containers"][0].pop("livenessProbe"),
        lambda spec: spec["containers"][0]["resources"]["limits"].pop("memory"),
    ],
    ids=["root", "read-only", "probe", "limit"],
)
def test_a_pod_that_is_not_hardened_is_seen(loosen: Any) -> None:
    [head] = [one for place, one in templates(FOLDERS["kind"]) if place.startswith("RayService") and "head" in place]
    loosen(head["spec"])
    assert len(hardening_faults("head", head)) == 1


def test_pods_have_the_user_of_the_image() -> None:
    assert f"USER {USER}" in (ROOT / "infra" / "Dockerfile").read_text().splitlines()


@every_overlay
def test_sidecars_of_the_operator_are_hardened_and_ray_asks_for_a_token(overlay: str) -> None:
    for manifest in build(FOLDERS[overlay]):
        spec = manifest["spec"] if manifest["apiVersion"] == RAY_API else {}
        for cluster in filter(None, (spec.get("rayClusterConfig"), spec.get("rayClusterSpec"))):
            assert cluster["authOptions"] == {"mode": "token"}
            autoscaler = cluster.get("autoscalerOptions")
            assert bool(autoscaler) == bool(cluster.get("enableInTreeAutoscaling"))
            if autoscaler:
                assert autoscaler["securityContext"]["readOnlyRootFilesystem"] is True
                assert set(autoscaler["resources"]["limits"]) == {"cpu", "memory"}


@every_folder
def test_claims_secrets_and_accounts_that_pods_name_are_there(folder: Path) -> None:
    manifests = build(folder)
    names = {kind: {one["metadata"]["name"] for one in of_kind(manifests, kind)} for kind in (
        "PersistentVolumeClaim", "ServiceAccount")}  # fmt: skip
    secrets = set()
    for _, template in templates(folder):
        for volume in template["spec"]["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in names["PersistentVolumeClaim"]
            secrets |= {volume["secret"]["secretName"]} if "secret" in volume else set()
        account = template["spec"].get("serviceAccountName")
        assert account is None or account in names["ServiceAccount"]
    assert secrets == {"slm-ray-keys"}, "made by hand: README.md says how"
    assert of_kind(manifests, "Secret") == [], "no secret stands in a file"


def pod_labels(folder: Path) -> list[dict[str, str]]:
    """Of every pod: those of its template, and the one of KubeRay's that is the same in every cluster.

    The name of a RayService stands on the RayCluster and its services, not on the pods (kuberay issue 2583).
    """
    found = list[dict[str, str]]()
    for place, template in templates(folder):
        kind = re.search("/(head|worker)Group", place)
        found.append(template["metadata"]["labels"] | ({"ray.io/node-type": kind[1]} if kind else {}))
    return found


@every_folder
def test_what_selects_pods_finds_some(folder: Path) -> None:
    manifests, labels = build(folder), pod_labels(folder)
    for kind in ("Service", "Deployment", "PodDisruptionBudget", "NetworkPolicy"):
        for manifest in of_kind(manifests, kind):
            selector = manifest["spec"].get("selector", manifest["spec"].get("podSelector"))
            wanted = selector.get("matchLabels", {}) if kind != "Service" else selector
            assert any(wanted.items() <= one.items() for one in labels), manifest["metadata"]["name"]


@every_folder
def test_nothing_comes_in_from_everywhere(folder: Path) -> None:
    policies = of_kind(build(folder), "NetworkPolicy")
    assert {"podSelector": {}, "policyTypes": ["Ingress"]} in [one["spec"] for one in policies]
    assert all(rule["from"] for one in policies for rule in one["spec"].get("ingress", ()))


@every_folder
def test_a_serving_endpoint_survives_the_drain_of_a_node(folder: Path) -> None:
    """Where the owner of pods does not say how many there should be, as a RayCluster, `maxUnavailable` lets none go."""
    [budget] = of_kind(build(folder), "PodDisruptionBudget")
    wanted = budget["spec"].pop("selector")["matchLabels"]
    assert budget["spec"] == ({"maxUnavailable": 1} if folder.name == "plain" else {"minAvailable": 1})
    met = [one for one in pod_labels(folder) if wanted.items() <= one.items()]
    assert {one["app.kubernetes.io/component"] for one in met} <= {"serve", "endpoint"} and len(met) == 1


@every_folder
def test_steps_are_applied_by_a_label_that_everything_has(folder: Path) -> None:
    steps = {one["metadata"]["labels"]["app.kubernetes.io/component"] for one in build(folder)}
    assert steps == ({"mlflow", "endpoint"} if folder.name == "plain" else {"mlflow", "prepare", "train", "serve"})


def entrypoint(overlay: str, step: str) -> list[str]:
    [job] = [one for one in of_kind(build(FOLDERS[overlay]), "RayJob") if one["metadata"]["name"] == f"slm-ray-{step}"]
    return shlex.split(job["spec"]["entrypoint"])


@every_overlay
def test_jobs_are_ones_that_the_scripts_accept_and_hand_on_the_data(overlay: str) -> None:
    from slm_ray.train import parse_config

    prepare, train = entrypoint(overlay, "prepare"), entrypoint(overlay, "train")
    assert (prepare[:2], train[:2]) == (["python", "pipelines/prepare.py"], ["python", "slm_ray/train.py"])
    _, settings = options.parse(prepare[2:])
    config = parse_config([word for word in train[2:] if word != "--resume"])  # with it, the run's place is read
    config.check_batch(config.workers)  # as the driver does, before anything starts
    assert config.data == settings.output
    assert config.register == "tinystories" and "--resume" in train


@every_overlay
def test_an_overlay_has_a_claim_or_a_bucket_for_the_data(overlay: str) -> None:
    claims = {one["metadata"]["name"] for one in of_kind(build(FOLDERS[overlay]), "PersistentVolumeClaim")}
    place = entrypoint(overlay, "train")[-3]
    assert ("slm-ray-data" in claims) == place.startswith("/data/"), place


def test_the_plain_endpoint_has_options_that_the_server_accepts() -> None:
    manifests = build(FOLDERS["plain"])
    [endpoint] = [one for one in of_kind(manifests, "Deployment") if one["metadata"]["name"] == "slm-ray"]
    [container] = endpoint["spec"]["template"]["spec"]["containers"]
    config = parse(ServeConfig, container["command"][2:], prog="serve/app.py", about="", default=ServeConfig())
    assert (config.host, config.port) == ("0.0.0.0", container["ports"][0]["containerPort"])
    assert set(config.allowed_hosts) == {one["metadata"]["name"] for one in of_kind(manifests, "Service")} - {"mlflow"}
    grace = endpoint["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > config.drain_s, "running stories are finished before the pod is killed"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own models use an old form of Pydantic's
def test_ray_accepts_the_serve_config() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(ray_service()["spec"]["serveConfigV2"]))
    assert [application.import_path for application in config.applications] == ["serve.app:app"]


@every_overlay
def test_the_service_fits_the_application(overlay: str) -> None:
    """Its options are taken, its proxy waits longer than the application, and what it scales to can be scheduled."""
    spec = ray_service(overlay)["spec"]
    assert not {name for name in spec if name.endswith("UnhealthySecondThreshold")}, "KubeRay ignores them since 1.1"
    serve = yaml.safe_load(spec["serveConfigV2"])
    config = app_config(serve["applications"][0]["args"])
    assert serve["http_options"]["request_timeout_s"] > config.request_timeout_s
    assert spec["rayClusterConfig"]["enableInTreeAutoscaling"] is True
    assert config.most_replicas <= spec["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplicas"]


@every_overlay
def test_keys_are_a_file_in_every_pod_that_serves(overlay: str) -> None:
    for place, template in pod_templates(ray_service(overlay)):
        [container] = template["spec"]["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        environment = {one["name"]: one["value"] for one in container["env"]}
        assert environment["SLM_API_KEYS"] == f"{mounts['keys']}/keys", place
        [keys] = [volume["secret"] for volume in template["spec"]["volumes"] if volume["name"] == "keys"]
        assert "optional" not in keys


def test_the_tested_ray_is_the_one_that_clusters_are_told() -> None:
    [version] = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for path in sorted(K8S.rglob("*.yaml")):
        assert set(re.findall(r'rayVersion: "(.+)"', path.read_text())) <= {version}, path


def test_steps_of_the_page_name_what_is_there() -> None:
    page = (K8S / "README.md").read_text()
    manifests = build(FOLDERS["kind"]) + build(FOLDERS["plain"])
    names = {(one["kind"].lower(), one["metadata"]["name"]) for one in manifests} | {("service", "slm-ray-serve-svc")}
    named = re.findall(r"\b(rayjob|rayservice|deployment|service)/([\w-]+)", page)
    assert len(named) > 5 and set(named) <= names
    steps = [one["metadata"]["labels"]["app.kubernetes.io/component"] for one in build(FOLDERS["kind"])]
    applied = re.findall(r"apply -k infra/k8s/overlays/kind -l app.kubernetes.io/component=(\w+)", page)
    assert applied == ["mlflow", "prepare", "train", "serve"] and set(applied) == set(steps)
    assert "create secret generic slm-ray-keys --from-file=keys" in page
    assert [name for name in re.findall(r"-k (infra/[\w/]+)", page) if not (ROOT / name).is_dir()] == []


def test_the_cost_of_an_epoch_is_what_its_figures_give() -> None:
    page = (K8S / "README.md").read_text()
    tokens = 2_119_719 / 20_711 * 4_151_384
    assert f"{tokens / 1e6:.0f} million tokens" in page
    hours = round(tokens, -6) / 4000 / 3600
    assert f"{hours:.1f} hours" in page and f"{hours * 0.10:.2f}" in page and f"{hours * 0.03:.2f}" in page
