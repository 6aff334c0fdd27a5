"""Lengths and cycles: functions at most 60 lines (90th percentile 30), files at most 500, no import cycles.

Only `honeloom.system` knows the operating system: no other module imports what one system alone has, or asks its name.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src" / "honeloom"
MAX_FUNCTION, P90_FUNCTION, MAX_FILE = 60, 30, 500
PLATFORM_MODULES = {"fcntl", "msvcrt", "resource", "winreg", "pwd", "grp", "termios"}
PLATFORM_NAMES = {("os", "name"), ("os", "uname"), ("sys", "platform"), ("platform", "system")}


def function_lengths(tree: ast.Module) -> list[tuple[int, str, int]]:
    """(lines without the docstring, name, line number) of every function."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            is_doc = isinstance(first, ast.Expr) and isinstance(getattr(first, "value", None), ast.Constant)
            doc = (first.end_lineno or 0) - first.lineno + 1 if is_doc else 0
            found.append(((node.end_lineno or 0) - node.lineno + 1 - doc, node.name, node.lineno))
    return found


def imports(tree: ast.Module, modules: set[str]) -> set[str]:
    """Modules of this package imported at module scope."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{a.name}" for a in node.names}
            found |= names if names & modules else {node.module}
    return found & modules


def platform_uses(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, what) of everything that belongs in `honeloom.system`, wherever it stands in the module."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names if a.name in PLATFORM_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = [f"{node.module}.{a.name}" for a in node.names if (node.module, a.name) in PLATFORM_NAMES]
            found += [(node.lineno, n) for n in [node.module] * (node.module in PLATFORM_MODULES) + named]
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            found += [(node.lineno, f"{owner}.{node.attr}")] * ((owner, node.attr) in PLATFORM_NAMES)
    return found


def cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """One import cycle, or None."""
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(node: str) -> list[str] | None:
        state[node] = 1
        path.append(node)
        for target in sorted(graph[node]):
            if state.get(target) == 1:
                return [*path[path.index(target) :], target]
            if target not in state and (found := visit(target)):
                return found
        path.pop()
        state[node] = 2
        return None

    for name in sorted(graph):
        if name not in state and (found := visit(name)):
            return found
    return None


def main() -> int:
    """Print every violation and return the exit status."""
    problems, lengths, trees = [], [], {}
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text()
        name = ".".join(("honeloom", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        trees[name] = ast.parse(text)
        if len(text.splitlines()) > MAX_FILE:
            problems.append(f"{path}: {len(text.splitlines())} lines, at most {MAX_FILE}")
        for length, function, line in function_lengths(trees[name]):
            lengths.append(length)
            if length > MAX_FUNCTION:
                problems.append(f"{path}:{line} {function}: {length} lines, at most {MAX_FUNCTION}")
        if name != "honeloom.system":
            problems += [
                f"{path}:{line} {what}: belongs in honeloom.system" for line, what in platform_uses(trees[name])
            ]
    p90 = sorted(lengths)[int(len(lengths) * 0.9)]
    if p90 > P90_FUNCTION:
        problems.append(f"90th percentile of function length is {p90}, at most {P90_FUNCTION}")
    graph = {name: imports(tree, set(trees)) - {name} for name, tree in trees.items()}
    if found := cycle(graph):
        problems.append(f"import cycle: {' -> '.join(found)}")
    print(
        "\n".join(problems) or f"structure: {len(trees)} files, {len(lengths)} functions, 90th percentile {p90} lines"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
