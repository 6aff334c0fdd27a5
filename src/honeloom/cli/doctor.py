"""`honeloom doctor`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from honeloom.cli import options as o
from honeloom.cli.shared import print_json, terminal
from honeloom.registry import load_target


def doctor(
    json: o.Json = False,
    devices: Annotated[bool, typer.Option("--devices/--no-devices", help="Import torch to look for devices.")] = True,
) -> None:
    """Say what is installed here: versions, devices and their memory, disk, hub, and what each extra would add.

    Example: honeloom doctor
    """
    terminal(json)  # keeps libraries quiet
    found = load_target("honeloom.runs.environment:describe_installation")()
    found["hub"] = load_target("honeloom.backends.hub:describe_hub")()
    if devices:
        found["devices"] = load_target("honeloom.backends.devices:describe_devices")()
    if json:
        print_json(found)
        return
    typer.echo(f"honeloom {found['packages'].get('honeloom')} on Python {found['python']}, {found['platform']}")
    for device in found.get("devices", []):
        memory = f"{_gib(device['free_bytes'])} of {_gib(device['memory_bytes'])} GiB free"
        typer.echo(f"device: {device['name']} ({device['kind']}), {memory}")
    typer.echo(f"disk: {_gib(found['disk_free_bytes'])} GiB free here")
    for line in _hub(found["hub"]):
        typer.echo(line)
    for name, version in found["packages"].items():
        typer.echo(f"  {name} {version}")
    for extra, state in found["extras"].items():
        typer.echo(f"extra {extra}: {_extra(extra, state)}")


def _hub(hub: dict[str, Any]) -> list[str]:
    token = {"HF_TOKEN": "token in HF_TOKEN", "stored": "a stored token"}.get(
        hub["token"], "no token (HF_TOKEN; only gated and private repositories need one)"
    )
    offline = "; offline: HF_HUB_OFFLINE is set, only the cache is used" if hub["offline"] else ""
    return [
        f"hub: {hub['endpoint']}, {token}{offline}",
        f"cache: {hub['cache']}, {_gib(hub['cache_bytes'])} GiB (HF_HOME chooses the folder)",
    ]


def _extra(name: str, state: dict[str, Any]) -> str:
    adds = f"adds {state['adds']}" if state["adds"] else "adds nothing to this version"
    if not state["missing"]:
        return f"installed, {adds}"
    return f"missing {', '.join(state['missing'])}; {adds}: pip install 'honeloom[{name}]'"


def _gib(amount: int) -> str:
    return f"{amount / 2**30:.1f}"
