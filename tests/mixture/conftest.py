"""Fixtures of the mixture tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from mixing_models import MixRun, write_model


@pytest.fixture
def mix(tmp_path: Path) -> MixRun:
    return MixRun(tmp_path)


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three random Llamas of one shape; read only."""
    root = tmp_path_factory.mktemp("llamas")
    return [write_model(root / name, seed) for seed, name in enumerate("abc")]
