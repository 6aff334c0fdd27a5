"""The documentation against the code: its blocks run, its flags exist, every method and command has its place."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import typer.main

from honeloom import lab
from honeloom.cli.main import app, main
from honeloom.config.recipe import recipe_schema
from honeloom.registry import FAMILIES, family
from honeloom.verbs import VERBS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts),
]
NAMES = [p.relative_to(ROOT).as_posix() for p in PAGES]

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>.+?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z_-]*")
_SHELL = set("|<>&;$`*")
_OTHER_TOOLS = {
    "--help", "--version", "--config_file", "--num_processes", "--nproc-per-node", "--auth-supernode-private-key",
    "--database", "--disable-runtime-dependency-installation", "--enable-supernode-auth", "--host", "--insecure",
    "--node-config", "--port", "--root-certificates", "--ssl-ca-certfile", "--ssl-certfile", "--ssl-keyfile",
    "--stream", "--superlink",
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One fenced block, the mark above it, and its line."""

    mark: str
    language: str
    text: str
    line: int

    @property
    def exit_code(self) -> int:
        found = re.fullmatch(r"run exit (\d)", self.mark)
        return int(found[1]) if found else 0


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["mark"] or "", m["language"], m["text"], text.count("\n", 0, m.start()) + 1)
        for m in _BLOCK.finditer(text)
    ]


def commands(text: str) -> list[str]:
    """The lines of a bash block, continued ones joined, comments left out."""
    joined = text.replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in joined if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages speak of."""
    folder = tmp_path_factory.mktemp("pages")
    tests = (row for row in lab.rows("test") if row.get("domain") in ("arith", "lists+"))
    wanted = (row for row in lab.rows("dev") if row.get("domain") in ("arith", "lists+"))
    files = (("rows.jsonl", lab.rows("pool"), 140), ("test.jsonl", tests, 24), ("wanted.jsonl", wanted, 24))
    for name, rows, count in files:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in islice(rows, count)]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def desk(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a page's blocks run in."""
    for file in stage.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "examples").mkdir()
    for recipe in (ROOT / "examples").glob("*.yaml"):  # with fewer steps, for the time it takes
        shorter = re.sub(r"max_steps: \d+", "max_steps: 3", recipe.read_text(encoding="utf-8"))
        (tmp_path / "examples" / recipe.name).write_text(shorter, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    monkeypatch.setenv("PATH", path)
    return tmp_path


def concrete(block: Block) -> str:
    return block.text.replace("org/name", "lab:base")


def bash(text: str) -> int:
    return subprocess.run(["bash", "-euc", text], check=False, timeout=280).returncode


def in_process(line: str) -> int:
    """Run one command here, which spares the start of a process; lines with shell syntax go to bash."""
    if not line.startswith("honeloom ") or set(line) & _SHELL:
        return bash(line)
    with pytest.raises(SystemExit) as end:
        main(shlex.split(line)[1:])
    return int(end.value.code or 0)


def play(page: Path, *, everything: bool) -> None:
    """Run the blocks of a page in order: each bash line in this process, or each block as the reader would."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks_of(page):
        place = f"{page.name}:{block.line}"
        if block.mark.startswith("file: "):
            Path(block.mark.removeprefix("file: ")).write_text(concrete(block), encoding="utf-8")
        elif block.mark.startswith("run") or (everything and block.mark == "slow"):
            if block.language == "python":
                exec(compile(concrete(block), place, "exec"), names)
            elif everything:
                assert bash(concrete(block)) == block.exit_code, place
            else:
                for line in commands(concrete(block)):
                    assert in_process(line) == block.exit_code, f"{place}: {line}"


RUNNABLE = [
    name for name, page in zip(NAMES, PAGES, strict=True) if any(b.mark.startswith("run") for b in blocks_of(page))
]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNNABLE)
def test_blocks_of_a_page_run(name: str, desk: Path) -> None:
    play(ROOT / name, everything=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_blocks_run_as_the_reader_runs_them(name: str, desk: Path) -> None:
    play(ROOT / name, everything=True)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_block_says_whether_it_runs(page: Path) -> None:
    allowed = re.compile(r"run|run exit \d|slow|file: \S+|skip: .+")
    unmarked = [b.line for b in blocks_of(page) if b.language in ("bash", "python") and not allowed.fullmatch(b.mark)]
    assert not unmarked, f"{page.name}: blocks at lines {unmarked} have no mark"


def flags_of(command: Any) -> set[str]:
    own = {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}
    return own.union(*(flags_of(sub) for sub in getattr(command, "commands", {}).values()))


def test_every_flag_exists() -> None:
    known = flags_of(typer.main.get_command(app)) | _OTHER_TOOLS
    used = {(page.name, flag) for page in PAGES for flag in _FLAG.findall(page.read_text(encoding="utf-8"))}
    assert not {(page, flag) for page, flag in used if flag not in known}


def test_every_command_takes_its_flags() -> None:
    root: Any = typer.main.get_command(app)
    for page in PAGES:
        for block in (b for b in blocks_of(page) if b.language == "bash"):
            for words in (shlex.split(line) for line in commands(block.text) if line.startswith("honeloom ")):
                command, rest = root, words[1:]
                while rest and rest[0] in getattr(command, "commands", {}):
                    command, rest = command.commands[rest[0]], rest[1:]
                assert command is not root, f"{page.name}: {' '.join(words)}"
                unknown = {w.split("=")[0] for w in rest if w.startswith("--")} - flags_of(command)
                assert not unknown, f"{page.name}: {' '.join(words)}"


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_method_has_a_page(kind: str) -> None:
    wanted = {m.name for m in family(kind) if m.target.startswith("honeloom.")}
    assert {p.stem for p in (DOCS / "methods" / kind).glob("*.md")} == wanted
    index = (DOCS / "methods" / "index.md").read_text(encoding="utf-8")
    for name in wanted:
        page = (DOCS / "methods" / kind / f"{name}.md").read_text(encoding="utf-8")
        assert f"{{method-card}} {kind} {name}\n" in page
        for title in ("## Formula", "## When to use it", "## What it does not do"):
            assert title in page, f"{name}: no {title!r}"
        assert f"\n{kind}/{name}\n" in index


def test_every_verb_and_command_has_a_how_to() -> None:
    pages = {p.stem: p.read_text(encoding="utf-8") for p in (DOCS / "how-to").glob("*.md")}
    root: Any = typer.main.get_command(app)
    groups = {name: getattr(c, "commands", None) for name, c in root.commands.items()}
    names = {f"{n} {sub}" if subs else n for n, subs in groups.items() for sub in (subs or {"": None})}
    shown = {m for text in pages.values() for m in re.findall(r"^```\{command\} (.+)$", text, re.MULTILINE)}
    assert shown == names
    assert {*VERBS, "run", "rows", "verify", "report", "lineage"} <= set(pages)


def test_the_schema_is_the_one_that_init_prints() -> None:
    written = json.loads((DOCS / "recipe.schema.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(recipe_schema())), "write it again: honeloom init --schema"


def test_the_readme_names_every_method() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for kind in FAMILIES:
        for method in family(kind):
            if method.target.startswith("honeloom."):
                assert f"`{method.name}`" in text, method.name
