"""What `kubectl kustomize` would give, for the few fields that `infra/k8s` uses; any other one is refused.

In: a folder with a `kustomization.yaml`. Out: manifests. No program is needed: a file, a target or a path of a patch
that is not there is an `AssertionError`.
"""

from pathlib import Path
from typing import Any

import jsonpatch
import yaml

KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
IN_NO_NAMESPACE = {"Namespace"}

Manifest = dict[str, Any]


def build(folder: Path) -> list[Manifest]:
    """The manifests of a kustomization."""
    content = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    assert content["kind"] == "Kustomization" and set(content) <= KNOWN, set(content) - KNOWN
    manifests = [manifest for name in content["resources"] for manifest in resource(folder / name)]
    for manifest in manifests:
        if "namespace" in content and manifest["kind"] not in IN_NO_NAMESPACE:
            manifest["metadata"]["namespace"] = content["namespace"]
    for patch in content.get("patches", ()):
        manifests = patched(manifests, folder / patch["path"], patch.get("target"))
    for image in content.get("images", ()):
        assert sum(rename(manifest, image) for manifest in manifests), f"no container has the image {image['name']}"
    return manifests


def resource(path: Path) -> list[Manifest]:
    """The manifests of a file, or of the kustomization in a folder."""
    assert path.exists(), path
    return build(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def identity(manifest: Manifest) -> dict[str, str]:
    """By what a patch names its target."""
    group, _, version = manifest["apiVersion"].rpartition("/")
    metadata = manifest["metadata"]
    return {"group": group, "version": version, "kind": manifest["kind"], "name": metadata["name"]} | (
        {"namespace": metadata["namespace"]} if "namespace" in metadata else {}
    )


def patched(manifests: list[Manifest], path: Path, target: dict[str, str] | None) -> list[Manifest]:
    """The manifests with a patch: a list of operations for its target, or the deletion of the one that it names."""
    assert path.exists(), path
    patch = yaml.safe_load(path.read_text(encoding="utf-8"))
    is_deletion = isinstance(patch, dict)
    assert is_deletion != bool(target)
    if is_deletion:
        assert patch.pop("$patch") == "delete" and set(patch) == {"apiVersion", "kind", "metadata"}, path
    wanted = (identity(patch) if is_deletion else target) or {}
    [found] = [one for one in manifests if wanted.items() <= identity(one).items()]
    if is_deletion:
        return [one for one in manifests if one is not found]
    return [jsonpatch.apply_patch(one, patch) if one is found else one for one in manifests]


def rename(node: Any, image: dict[str, str]) -> int:
    """Give containers the image's new name and tag; returns how many had it."""
    if isinstance(node, list):
        return sum(rename(one, image) for one in node)
    if not isinstance(node, dict):
        return 0
    count = 0
    for key in ("containers", "initContainers"):
        for container in node.get(key, ()):
            if container["image"].split(":")[0] == image["name"]:
                container["image"] = f"{image.get('newName', image['name'])}:{image['newTag']}"
                count += 1
    return count + sum(rename(one, image) for one in node.values())
