"""Fixtures of the merge tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from merging_models import MergeRun, make_model


@pytest.fixture
def models(tmp_path) -> dict[str, Path]:
    """Three models of one architecture: base, a, b."""
    return {name: make_model(tmp_path / name, seed) for seed, name in enumerate(("base", "a", "b"))}


@pytest.fixture
def merge(tmp_path) -> MergeRun:
    return MergeRun(tmp_path)
