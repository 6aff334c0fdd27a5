"""Lineage: what a result was made of, what a row, model or client touched, and what is made again without it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from honeloom.data.reader import read_numbered
from honeloom.data.sources import RowFile
from honeloom.errors import ConfigError, SourceError
from honeloom.registry import load_target, suggest
from honeloom.stages.inputs import adapter_base, artefact_fingerprint, resolve_model, resolve_rows
from honeloom.stages.lineage_nodes import Graph, Node, inputs_of, lock_of, open_graph
from honeloom.stages.withdrawn import named_in, withdrawn_fingerprint

__all__ = ["trace"]

UNTOUCHED = "untouched"


def trace(
    run: Path, row: str | None = None, *, artefact: str | None = None, parent: str | None = None,
    client: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What results were made of, stage by stage; and of one thing, how far it went.

    Parameters
    ----------
    run : Path
        A run folder, one result, or a folder of them.
    row : str, optional
        Id of a row.
    artefact : str, optional
        A stage of the run by its name, or the path of a result, of one of its files, of a model or of rows.
    parent : str, optional
        A model: hub id, path, or the first digits (8 or more) of its SHA-256.
    client : str, optional
        Id of a client of a federation.

    Returns
    -------
    dict
        `stages`: each with stage, verb, out, sha256 and reads. With a question, each also has `touched`: what it did
        with the thing, "through <stages>" for a later one, or "untouched"; `rebuild` lists, in order, what must be
        made again once the thing is withdrawn, and `commands` how. They are empty for a result of `run` itself, which
        nothing replaces; OTHER in them stands for what takes the place of a model or file. `outside` are results that
        lie elsewhere, from which these were made, and which the thing touched. For an artefact, `made_from` names what
        it was made of.

    Raises
    ------
    ConfigError
        Several things are asked about at once.
    SourceError
        There is no finished result, or the artefact is none of them and nothing they read.
    """
    asked = {k: v for k, v in {"row": row, "artefact": artefact, "parent": parent, "client": client}.items() if v}
    if len(asked) > 1:
        raise ConfigError(f"--{' and --'.join(asked)}: ask about one thing at a time")
    graph = open_graph(run)
    found: dict[str, Any] = {"run": str(run), "row": row, "artefact": artefact, "parent": parent, "client": client}
    if not asked:
        return {**found, "stages": [_entry(n) for n in graph.nodes if not n.outside]}
    kind, what = next(iter(asked.items()))
    direct = _DIRECT[kind](graph, what)
    touched = graph.closure(direct.how)
    stages: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for node in (n for n in graph.nodes if n in touched or not n.outside):
        entry = {**_entry(node), "touched": touched.get(node, UNTOUCHED)}
        stages[node.outside].append({**entry, "row": entry["touched"]} if kind == "row" else entry)
    again = [n for n in touched if n not in direct.kept]
    commands = _commands(again, graph, direct, kind, what) if direct.start is None else []
    found |= {"stages": stages[False], "outside": stages[True]}
    found |= {"rebuild": [n.name for n in again], "commands": commands}
    if direct.start is not None:
        found["made_from"] = [n.name for n in graph.ancestors(direct.start)]
    return found


@dataclass
class Direct:
    """Where a thing was met itself: how, and the settings that would leave it out.

    `kept` need not be made again: an artefact that is withdrawn is itself gone.
    """

    how: dict[Node, str] = field(default_factory=dict)
    settings: dict[Node, list[str]] = field(default_factory=dict)
    kept: set[Node] = field(default_factory=set)
    start: Node | None = None


def _entry(node: Node) -> dict[str, Any]:
    return {
        "stage": node.name,
        "verb": node.report.verb,
        "out": str(node.folder),
        "sha256": node.sha256,
        "reads": [{k: r[k] for k in ("place", "kind", "value", "sha256")} for r in node.reads],
    }


# --- rows


def _of_row(graph: Graph, row: str) -> Direct:
    find_row: Callable[[Path, str], str | None] = load_target("honeloom.stages.row_records:find_row")
    files = _Files(row)
    direct = Direct()
    for node in graph.nodes:
        told = find_row(node.folder, row) or _read_at(node, row, files)
        if told:
            direct.how[node] = told
    through: Callable[[Path, str], list[str]] = load_target("honeloom.stages.row_records:through")
    touched = graph.closure(direct.how)
    for node in [n for n in graph.nodes if n not in touched]:
        if names := through(node.folder, row):  # a model that keeps such records and is no finished result
            direct.how[node] = f"through {', '.join(names)}"
    return direct


class _Files:
    """Whether a row stands among the first rows of some files; each is read once for all stages."""

    def __init__(self, row: str) -> None:
        self._row = row
        self._known: dict[tuple[tuple[RowFile, ...], int | None], bool] = {}

    def hold(self, files: tuple[RowFile, ...], limit: int | None) -> bool:
        """Read on until it is found."""
        key = (files, limit)
        if key not in self._known:
            self._known[key] = any(row.id == self._row for _, row in read_numbered(files, limit=limit))
        return self._known[key]


def _read_at(node: Node, row: str, files: _Files) -> str | None:
    """Whether a stage read the row without keeping a record of it: beyond its split, sample or number of steps."""
    unknown = None
    by_field: dict[str, list[Mapping[str, Any]]] = {}
    for entry in node.reads:
        if entry["kind"] == "rows":
            by_field.setdefault(entry["place"].rpartition(".")[0], []).append(entry)
        if entry["kind"] == "file" and named_in([p for p in inputs_of(entry, node) if p.is_file()], [row]):
            return f"named in {entry['place']}"
    for name, entries in by_field.items():
        if any(row in entry.get("withdrawn", ()) for entry in entries):
            continue
        given = [_rows_of(entry, node) for entry in entries]
        if None in given:
            unknown = f"perhaps read: what {name} names is gone or has changed since"
            continue
        limit = None if name in ("target", "train_rows") else lock_of(node).get("limit")
        if files.hold(tuple(f for some in given if some for f in some), limit):
            return f"read in {name}"
    return unknown


def _rows_of(entry: Mapping[str, Any], node: Node) -> tuple[RowFile, ...] | None:
    """The files of an input as they were when it was read, or None."""
    try:
        if entry["relative"]:
            return resolve_rows(str(node.folder / entry["relative"]), known="").files
        value = str(entry["value"])
        places = [value] if value.startswith("lab:") else entry["paths"]
        found = [resolve_rows(str(p)) for p in places]
        files = tuple(f for one in found for f in one.files)
        digest: str = load_target("honeloom.data.sources:fingerprint")(files)
    except SourceError:
        return None
    known = entry["sha256"]
    same = known in (withdrawn_fingerprint(digest, entry.get("withdrawn", ())), *(_as_artefact(files)))
    return files if same else None


def _as_artefact(files: tuple[RowFile, ...]) -> list[str]:
    return [artefact_fingerprint(files[0].path)] if len(files) == 1 and files[0].path.is_file() else []


# --- models, artefacts, clients


def _of_parent(graph: Graph, model: str) -> Direct:
    digests, places = _identify(model)
    direct = Direct()
    for node in graph.nodes:
        for entry in node.reads:
            if entry["kind"] in ("model", "adapter", "encoder") and _is(entry, node, model, digests, places):
                direct.how.setdefault(node, f"read as {entry['place']}")
                direct.settings.setdefault(node, []).append(entry["place"])
    return direct


def _identify(model: str) -> tuple[set[str], set[Path]]:
    """Fingerprints and places of a model as far as it is here."""
    try:
        found = resolve_model(model, fetch=False)
    except SourceError:
        return set(), set()
    return {found.fingerprint}, set(found.paths)


def _is(entry: Mapping[str, Any], node: Node, model: str, digests: set[str], places: set[Path]) -> bool:
    names = str(entry["value"]).split("+")
    named = model in names or model in [n.partition("@")[0] for n in names]
    by_hash = len(model) >= 8 and str(entry["sha256"]).startswith(model)
    if named or by_hash or entry["sha256"] in digests or places & set(inputs_of(entry, node)):
        return True
    if entry["relative"]:  # what it stands on was read by the stage that made it
        return False
    return any(_base_is(p, model, digests, places) for p in inputs_of(entry, node) if p.is_dir())


def _base_is(adapter: Path, model: str, digests: set[str], places: set[Path]) -> bool:
    """Whether an adapter stands on the model."""
    if not (adapter / "adapter_config.json").is_file():
        return False
    base = adapter_base(adapter)
    if base is None:
        return False
    found, where = _identify(base)
    return model in (base, base.partition("@")[0]) or bool(found & digests or where & places)


def _of_artefact(graph: Graph, what: str) -> Direct:
    place = Path(what).expanduser().resolve()
    name = what.removeprefix("$")
    start = next((n for n in graph.nodes if n.name == name), None) or next(
        (n for n in graph.nodes if place == n.folder or n.folder in place.parents), None
    )
    if start is not None:
        return Direct({start: "it is the artefact"}, {}, {start}, start)
    digests = _fingerprints(place)
    direct = Direct()
    for node in graph.nodes:
        for entry in node.reads:
            if entry["sha256"] in digests or place in inputs_of(entry, node):
                direct.how.setdefault(node, f"read as {entry['place']}")
                direct.settings.setdefault(node, []).append(entry["place"])
    if not direct.how:
        names = [n.name for n in graph.nodes]
        raise SourceError(
            f"--artefact {what!r}: no result here, and nothing that was read{suggest(name, names)} (results: "
            f"{', '.join(names)})"
        )
    return direct


def _fingerprints(place: Path) -> set[str]:
    """Under which a path may have been read."""
    found: set[str] = set()
    if place.is_file():
        found.add(artefact_fingerprint(place))
    for look in (resolve_model, resolve_rows):
        try:
            found.add(look(str(place), fetch=False).fingerprint)
        except SourceError:
            continue  # it is the other, or neither
    return found


def _of_client(graph: Graph, client: str) -> Direct:
    direct, rows = Direct(), set[str]()
    for node in graph.nodes:
        known = {str(c.get("id", c.get("name"))): c for c in node.report.details.get("clients", ()) if "status" in c}
        if client not in known:
            continue
        came = [i for i, status in enumerate(known[client]["status"], 1) if status == "ok"]
        rounds = f"in round{'s' * (len(came) > 1)} {', '.join(map(str, came))}" if came else "in no round that counted"
        direct.how[node] = f"trained {rounds}"
        rows |= _rows_of_client(node, client)
    for node in graph.nodes:
        if node not in direct.how and (places := [e["place"] for e in node.reads if e["sha256"] in rows]):
            direct.how[node] = f"read the client's rows in {places[0]}"
            direct.settings[node] = places
    if not direct.how:
        known_ids = sorted(
            {str(c.get("id")) for n in graph.nodes for c in n.report.details.get("clients", ())} - {"None"}
        )
        raise SourceError(f"--client {client!r}: no federation here had it (known: {', '.join(known_ids) or 'none'})")
    return direct


def _rows_of_client(node: Node, client: str) -> set[str]:
    """Fingerprints of the rows that a client brought along."""
    places = [f"clients.{k}.rows" for k, c in enumerate(lock_of(node).get("clients", ())) if c["id"] == client]
    return {e["sha256"] for e in node.reads if e["place"].rpartition(".")[0] in places}


_DIRECT: dict[str, Callable[[Graph, str], Direct]] = {
    "row": _of_row, "parent": _of_parent, "artefact": _of_artefact, "client": _of_client,
}  # fmt: skip


# --- what to do


def _commands(again: list[Node], graph: Graph, direct: Direct, kind: str, what: str) -> list[str]:
    """How everything touched is made again without the thing: a command per run or single result, in order."""
    made: dict[Path, Path] = {}
    commands, seen = [], set[Path]()
    for node in again:
        home = node.run or node.folder
        if home in seen:
            continue
        seen.add(home)
        mine = [n for n in again if (n.run or n.folder) == home]
        settings = (
            ["--withdraw", what] if kind == "row" else [s for n in mine for s in _settings(n, direct, kind, what)]
        )
        moved = [s for n in mine for s in _moved(n, graph, made)]
        target = home if node.run else home.with_name(f"{home.name}-again")
        if not node.run:
            made[home] = target / "stages" / f"1-{node.report.verb}"
        given = _once([*settings, *moved])
        parts = ["honeloom", "run", str(home / "recipe.lock.yaml"), *given, "--output-dir", str(target)]
        commands.append(shlex.join([*parts, *(["--resume"] if node.run else [])]))
    return commands


def _stage_of(node: Node) -> str:
    """What its recipe calls it; the variants of a sweep are one stage there."""
    return node.folder.name.split("-", 1)[-1].partition(".")[0] if node.run else node.report.verb


def _settings(node: Node, direct: Direct, kind: str, what: str) -> list[str]:
    stage = _stage_of(node)
    if kind == "client" and node in direct.how and node not in direct.settings:
        kept = [*lock_of(node).get("without", ()), what]
        return ["--set", f"{stage}.without=[{', '.join(kept)}]"]
    return [part for place in direct.settings.get(node, ()) for part in ("--set", f"{stage}.{place}=OTHER")]


def _moved(node: Node, graph: Graph, made: Mapping[Path, Path]) -> list[str]:
    """Inputs that an earlier command makes anew elsewhere."""
    stage, parents = _stage_of(node), graph.parents[node]
    return [
        part
        for parent, places in parents.items()
        if (parent.run or parent.folder) in made
        for place in places
        for part in ("--set", f"{stage}.{place}={made[parent.run or parent.folder]}")
    ]


def _once(flags: list[str]) -> list[str]:
    """Pairs of flag and value, each once."""
    pairs = dict.fromkeys(zip(flags[::2], flags[1::2], strict=True))
    return [part for pair in pairs for part in pair]
