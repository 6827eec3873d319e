"""Models made once for all end-to-end tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support import models


@pytest.fixture(scope="session")
def shelf_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three different Llamas of about 24 MiB each."""
    root = tmp_path_factory.mktemp("models")
    return {name: models.make_llama(root / name, seed=seed) for seed, name in enumerate(["ash", "birch", "cedar"])}


@pytest.fixture
def model_tables(shelf_models: dict[str, Path]) -> list[dict[str, object]]:
    """The same as `[[model]]` tables."""
    return models.tables(shelf_models)
