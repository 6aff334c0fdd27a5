"""The shape of the source: lengths, cycles, documentation, and one tree of errors."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

import honeloom
from honeloom import errors

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = Path(honeloom.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))


def test_lengths_and_cycles(capsys):
    spec = importlib.util.spec_from_file_location("check_structure", REPOSITORY / "scripts" / "check_structure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main() in (0, None), capsys.readouterr().out


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_every_module_and_public_name_is_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.name != "__init__.py" or tree.body:
        assert ast.get_docstring(tree), "the module says nothing of itself"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    bare = [n.name for n in tree.body if isinstance(n, kinds) and n.name[0] != "_" and not ast.get_docstring(n)]
    assert bare == []


def test_every_error_is_in_the_tree_and_has_an_exit_code():
    defined = {n: c for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.HoneloomError)}
    assert sorted(defined) == errors.__all__
    drawn = errors.__doc__.split("Messages name")[0]
    for name, cls in defined.items():
        assert drawn.count(f" {name} ") + drawn.count(f"─ {name}\n") == 1, name
        assert cls.exit_code == (2 if issubclass(cls, errors.InputError) else 3 if name == "VerificationError" else 1)


def test_no_assertion_guards_what_a_user_gives():
    """An `assert` may only state what the code itself has made sure; there are few, and each says why."""
    bare = []
    for path in MODULES:
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.Assert) and "#" not in lines[node.lineno - 1] and node.msg is None:
                bare.append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    assert [place for place in bare if not place.startswith("testing/")] == []
