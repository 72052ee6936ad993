"""Say what this machine has, and what follows for the commands: `make doctor`, or `python infra/doctor.py`.

In: nothing. Out: a line for each thing, with what to do; exit code 0, or 1 where something is missing that no command
can do without. It needs Python alone, starts and writes nothing, and asks nobody but the hub, once (`--offline`: not).
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    if sys.version_info < (3, 11):  # noqa: UP036  # whoever has an older one is to read a sentence
        sys.exit("error: Python %d.%d is too old: install 3.11 or newer" % sys.version_info[:2])  # noqa: UP031
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, in place of this folder
    from slm_ray.cli.script import run

    run("infra.doctor")

import argparse
import dataclasses
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from infra import machine, services
from infra.machine import Finding
from slm_ray.cli.command import command
from slm_ray.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
EXIT_MISSING = 1
MARKS = {"ok": " ", "note": "!", "missing": "X"}
WIDTH = 120


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Look, print, and say by the exit code whether anything is missing."""
    parser = argparse.ArgumentParser(prog="doctor.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--offline", action="store_true", help="do not ask the hub")
    parser.add_argument(
        "--champion",
        action="store_true",
        help="print nothing; exit code 1 where the store on this disk has no model to serve, else 0",
    )
    options = parser.parse_args(argv)
    if options.champion:
        return 0 if may_have_champion() else EXIT_MISSING
    findings = look(is_offline=options.offline)
    is_ready = all(finding.state != "missing" for finding in findings)
    if options.json:
        content = {"is_ready": is_ready, "findings": [dataclasses.asdict(finding) for finding in findings]}
        print(json.dumps(content, indent=1))
    else:
        print(report(findings))
    return 0 if is_ready else EXIT_MISSING


def look(*, is_offline: bool) -> list[Finding]:
    """Everything, in the order in which it is shown."""
    found = machine.gpus()
    return [
        machine.system(),
        machine.python(),
        *machine.packages(ROOT / "pyproject.toml"),
        machine.torch_build(bool(found)),
        machine.cpu_features(),
        machine.cores(),
        machine.memory(),
        machine.gpu(found),
        machine.compiler(),
        machine.disk(ROOT),
        machine.shared_memory(),
        *services.ports(),
        services.ray(),
        services.ray_token(),
        services.store(),
        services.data_set(),
        machine.chromium(),
        services.hub(is_offline),
    ]


def may_have_champion() -> bool:
    """Whether there is a model to serve; yes where that cannot be known, for the server then says what is wrong."""
    try:
        return services.champion() is not None
    except UserError:
        return True


def report(findings: Sequence[Finding]) -> str:
    """Two lines for each finding, or one where they fit, and a last one with the counts."""
    lines = [line for finding in findings for line in _lines(finding)]
    missing, notes = (sum(finding.state == state for finding in findings) for state in ("missing", "note"))
    end = f"{missing} missing (X), {notes} to know (!)"
    return "\n".join([*lines, end if missing or notes else "nothing is missing"])


def _lines(finding: Finding) -> list[str]:
    begin = f"{MARKS[finding.state]} {finding.name:<15} "
    line = f"{begin}{finding.found} -> {finding.advice}"
    if len(line) <= WIDTH:
        return [line]
    indent = " " * len(begin)
    found = textwrap.wrap(finding.found, WIDTH, initial_indent=begin, subsequent_indent=indent)
    return [*found, f"{indent}-> {finding.advice}"]  # not broken: a command in it is to be copied
