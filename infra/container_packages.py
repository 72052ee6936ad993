"""The list of packages of an image (SBOM), as CycloneDX, out of what is installed here.

In: the name of a target of the Dockerfile, and the extras that it installs. Out: a JSON file with each package that
they ask for, directly or not, in the version of this environment: in the image, that of the image; elsewhere, that of
`constraints.txt`, from which both were made. `make sbom` writes one for each target.

    python infra/container_packages.py serve --output sbom/serve.json
"""

import argparse
import importlib.metadata as metadata
import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from cyclonedx.model import License, LicenseChoice
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import OutputFormat, SchemaVersion, get_instance
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
INSTALLED = re.compile(r'^FROM builder AS (\w+)-packages$.*?"\.\[([\w,]+)\$', re.MULTILINE | re.DOTALL)


class PackagesError(Exception):
    """The list cannot be made; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the list of one target. Returns 0, or 2 with one line on why not."""
    targets = dict(INSTALLED.findall((ROOT / "infra" / "Dockerfile").read_text(encoding="utf-8")))
    parser = argparse.ArgumentParser(prog="container_packages.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=sorted(targets))
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    options = parser.parse_args(argv)
    try:
        text = bill_of_materials(options.target, targets[options.target].split(","))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")
    except (PackagesError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def bill_of_materials(target: str, extras: Sequence[str]) -> str:
    """CycloneDX JSON of what the project installs with these extras.

    Raises:
        PackagesError: a package is not installed.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(word for name in extras for word in project["optional-dependencies"][name])]
    found = sorted(closure(map(Requirement, asked)).values(), key=lambda one: canonicalize_name(one.name))
    bom = Bom(components=[component(one) for one in found])
    name = f"slm-ray-{target}"
    image = Component(name=name, version=project["version"], component_type=ComponentType.CONTAINER)
    image.dependencies = {one.bom_ref for one in bom.components}
    bom.metadata.component = image
    return str(get_instance(bom, OutputFormat.JSON, SchemaVersion.V1_4).output_as_string())


def closure(asked: Iterable[Requirement]) -> dict[str, metadata.Distribution]:
    """The installed packages that requirements lead to, by name.

    Raises:
        PackagesError: one is not installed.
    """
    found: dict[str, metadata.Distribution] = {}
    left = [(one, "") for one in asked]
    seen: set[tuple[str, str]] = set()
    while left:
        requirement, extra = left.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            try:
                found[name] = metadata.distribution(name)
            except metadata.PackageNotFoundError as error:
                raise PackagesError(f"{name} is not installed: `make setup`") from error
            left += [(Requirement(word), wanted) for word in found[name].requires or ()]
    return found


def component(package: metadata.Distribution) -> Component:
    """One line of the list."""
    about = package.metadata.json
    given = str(about.get("license_expression") or about.get("license") or "")
    licence = given.strip().splitlines()[:1]  # some have the whole text there
    licences = [LicenseChoice(license_=License(license_name=licence[0]))] if licence else None
    purl = PackageURL(type="pypi", name=canonicalize_name(package.name), version=package.version)
    return Component(name=package.name, version=package.version, purl=purl, bom_ref=purl.to_string(), licenses=licences)


if __name__ == "__main__":
    raise SystemExit(main())
