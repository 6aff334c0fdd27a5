import json
import os

import pytest
from hostile_texts import HOSTILE

import honeloom


@pytest.fixture(scope="session")
def require():
    """Return a thing that may be absent: skip without it, or fail where everything is required."""

    def check(thing, name):
        if thing:
            return thing
        if os.environ.get("HONELOOM_REQUIRE_ALL") == "1":
            pytest.fail(f"{name} is not available, and HONELOOM_REQUIRE_ALL is set")
        pytest.skip(f"{name} is not available")

    return check


@pytest.fixture(scope="module")
def hostile_selection(tmp_path_factory):
    """A real selection from rows whose texts and labels are attempts."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = [
        {"id": f"row {i} {text[:40]}", "instruction": text, "output": f"{text} {'y' * i}", "domain": text[:200]}
        for i, text in enumerate(HOSTILE * 3)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    honeloom.select(path, method="length", model="lab:base", keep="80%", output_dir=folder / "out")
    return folder / "out"
