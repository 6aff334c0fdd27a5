"""The committed notebook runs, and its outputs are of the kind that is committed."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "notebook.ipynb"


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def kinds(cell):
    """What a cell shows: kinds of output and their media types. What libraries say on stderr is not ours."""
    outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return {(o.output_type, *sorted(o.get("data", {}))) for o in outputs}


def test_committed_outputs_are_small_complete_and_name_no_machine(committed):
    assert NOTEBOOK.stat().st_size < 300_000
    nbformat.validate(committed)
    code = [c for c in committed.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    outputs = str([c.outputs for c in code])
    assert not re.search(r"/(home|root|tmp|work|usr|Users|var|opt)/|[A-Z]:\\\\", outputs)
    assert "error" not in {o.output_type for c in code for o in c.outputs}
    assert sum(o.output_type == "execute_result" for c in code for o in c.outputs) >= 4


@pytest.mark.slow
def test_notebook_runs_and_shows_the_same_kinds_of_output(committed, tmp_path):
    fresh = nbformat.from_dict(committed)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(fresh, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    old = nbformat.read(NOTEBOOK, as_version=4)
    pairs = [(a, b) for a, b in zip(old.cells, fresh.cells, strict=True) if a.cell_type == "code"]
    assert [kinds(a) for a, _ in pairs] == [kinds(b) for _, b in pairs]
    # One display per task: it was updated, not repeated.
    bars = [o for _, b in pairs for o in b.outputs if o.output_type == "display_data"]
    texts = [o.data["text/plain"] for o in bars]
    assert 3 <= len(texts) <= 12
    assert all(re.search(r": ([\d,]+) of \1 in ", text) for text in texts), texts
    assert (tmp_path / "notebook-run" / "measured" / "report.html").exists()
