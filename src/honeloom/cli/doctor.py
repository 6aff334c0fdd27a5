"""`honeloom doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from honeloom.cli import options as o
from honeloom.cli.shared import print_json
from honeloom.registry import load_target


def doctor(
    json: o.Json = False,
    devices: Annotated[bool, typer.Option("--devices/--no-devices", help="Import torch to look for devices.")] = True,
) -> None:
    """Say what is installed here: versions, devices, disk, and what each extra would add.

    Example: honeloom doctor
    """
    found = load_target("honeloom.runs.environment:describe_installation")()
    if devices:
        found["devices"] = load_target("honeloom.backends.devices:describe_devices")()
    if json:
        print_json(found)
        return
    typer.echo(f"honeloom {found['packages'].get('honeloom')} on Python {found['python']}, {found['platform']}")
    for device in found.get("devices", []):
        typer.echo(f"device: {device['name']} ({device['kind']}), {device['memory_bytes'] / 2**30:.1f} GiB")
    typer.echo(f"disk: {found['disk_free_bytes'] / 2**30:.1f} GiB free here")
    for name, version in found["packages"].items():
        typer.echo(f"  {name} {version}")
    for extra, state in found["extras"].items():
        missing = ", ".join(state["missing"])
        typer.echo(
            f"extra {extra}: " + (f"missing {missing}; pip install 'honeloom[{extra}]'" if missing else "installed")
        )
