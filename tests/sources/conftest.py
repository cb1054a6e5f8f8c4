"""A small whole checkpoint, and a cache of its own for every test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDCOMPILE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete checkpoint folder with two small tensors."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text('{"model_type": "bert"}')
    (place / "vocab.txt").write_text("[PAD]\n[UNK]")
    save_file(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4).to(torch.bfloat16)}, place / "model.safetensors"
    )
    return place
