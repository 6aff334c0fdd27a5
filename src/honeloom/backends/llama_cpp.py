"""llama.cpp, asked in a process of its own: logits, greedy tokens, how it cuts texts and renders a chat."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from honeloom.errors import HoneloomError, MissingExtraError, VerificationError

__all__ = ["PYTHON_VARIABLE", "Answer", "ask_llama_cpp", "llama_python"]

PYTHON_VARIABLE = "HONELOOM_LLAMA_PYTHON"
"""Environment variable that names a Python with llama.cpp: the package cyllama, or llama-cpp-python."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What llama.cpp said.

    Attributes
    ----------
    rows : list of array
        Logits (T, V) of each row.
    last : list of array
        Logits (V,) of the last position of each row that was asked for alone.
    greedy : list of list of int
        Tokens after each prompt.
    tokens : list of list of int
        Token ids of each text, with the tokens that go around it.
    chat : str or None
        The rendered conversation; None without a template.
    state_bytes : int
        Of the context, keys and values included.
    version : str
        Of the package that llama.cpp came with.
    """

    rows: list[npt.NDArray[np.float32]]
    last: list[npt.NDArray[np.float32]]
    greedy: list[list[int]]
    tokens: list[list[int]]
    chat: str | None
    state_bytes: int
    version: str


def llama_python() -> str:
    """A Python that has llama.cpp: the one that HONELOOM_LLAMA_PYTHON names, else this one.

    Raises
    ------
    MissingExtraError
        There is none.
    """
    given = os.environ.get(PYTHON_VARIABLE)
    if given:
        if not Path(given).is_file():
            raise MissingExtraError(f"{PYTHON_VARIABLE} is {given!r}, and there is no such file; name a Python")
        return given
    if any(importlib.util.find_spec(package) for package in ("llama_cpp", "cyllama")):
        return sys.executable
    raise MissingExtraError(
        "llama.cpp is not here: pip install 'honeloom[serve]' (wheels of cyllama) or llama-cpp-python (compiled, which "
        f"takes minutes), or set {PYTHON_VARIABLE} to a Python that has one of them"
    )


def ask_llama_cpp(
    file: Path,
    *,
    rows: Sequence[Sequence[int]] = (),
    last: Sequence[Sequence[int]] = (),
    prompts: Sequence[Sequence[int]] = (),
    tokens: int = 0,
    texts: Sequence[str] = (),
    chat: Sequence[Mapping[str, str]] = (),
) -> Answer:
    """Let llama.cpp compute a GGUF file, on one CPU thread, with its default cache of float16.

    Parameters
    ----------
    file : Path
        The GGUF file.
    rows, last : sequence of sequence of int
        Token ids whose logits are wanted, at all positions or at the last alone.
    prompts : sequence of sequence of int
        Token ids that are continued greedily by `tokens` tokens.
    texts : sequence of str
        Texts to cut.
    chat : sequence of mapping
        Messages to render.

    Raises
    ------
    MissingExtraError
        No Python here has llama.cpp.
    VerificationError
        llama.cpp does not load the file, or fails on it.
    HoneloomError
        llama.cpp was killed by a signal.
    """
    asked = {
        "rows": [list(r) for r in rows], "last": [list(r) for r in last], "prompts": [list(p) for p in prompts],
        "tokens": tokens, "texts": list(texts), "chat": [dict(m) for m in chat],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        worker, request, answer = (Path(folder) / n for n in ("worker.py", "request.json", "answer.npz"))
        # A script's folder is where its imports are looked for first, and ours has a llama_cpp and a gguf.
        shutil.copyfile(Path(__file__).with_name("llama_cpp_worker.py"), worker)
        request.write_text(json.dumps(asked), encoding="utf-8")
        _run([llama_python(), str(worker), str(file), str(request), str(answer)], file)
        with np.load(answer) as found:
            return _read(dict(found), [len(r) for r in rows])


def _run(command: list[str], file: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    said = " ".join(line for line in done.stderr.splitlines()[-4:] if line.strip())[-600:]
    if done.returncode < 0:
        raise HoneloomError(
            f"llama.cpp was killed by signal {-done.returncode} while it ran {file}: {said or 'it said nothing'}; "
            "signal 4 means that it was compiled for another processor: build llama-cpp-python on this machine"
        )
    if done.returncode and "No module named" in done.stderr:
        raise MissingExtraError(f"{command[0]} has no llama.cpp: {command[0]} -m pip install cyllama jinja2 numpy")
    if done.returncode:
        raise VerificationError(f"llama.cpp cannot run {file}: {said}")


def _read(found: dict[str, Any], lengths: Sequence[int]) -> Answer:
    said = json.loads(str(found["said"]))
    ends = np.cumsum(lengths)[:-1]
    return Answer(
        rows=np.split(found["all"], ends) if lengths else [],
        last=list(found.get("last", ())),
        greedy=[[int(t) for t in row] for row in found.get("greedy", ())],
        tokens=said["tokens"],
        chat=said["chat"],
        state_bytes=said["state_bytes"],
        version=said["version"],
    )
