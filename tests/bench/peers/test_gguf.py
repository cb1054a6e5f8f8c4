"""The GGUF file that llama.cpp's contenders are given: what our own reader of GGUF finds in it is the checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from medcompile.bench.peers import _gguf
from medcompile.errors import SourceError
from medcompile.sources import gguf as reader
from tests import decoders


@pytest.mark.parametrize("kind", ["llama", "norms"])
def test_a_checkpoint_written_as_gguf_gives_the_same_logits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    source = decoders.write_checkpoint(kind, tmp_path / kind)
    (tmp_path / "file").mkdir()
    _gguf.write(source, tmp_path / "file" / "model.gguf")

    class NoTokenizer:  # the file has none, which llama.cpp needs not to run token ids
        def save_pretrained(self, folder: Path) -> None:
            shutil.copy(source / "tokenizer.json", folder)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: NoTokenizer())
    again = reader.read_gguf("test", tmp_path / "file" / "model.gguf", "0" * 64, tmp_path / "cache").folder
    ids = np.random.default_rng(0).integers(3, decoders.VOCABULARY, 20)
    right = decoders.logits_of(decoders.reference(source), ids)
    np.testing.assert_allclose(decoders.logits_of(decoders.reference(again), ids), right, atol=1e-4)


def test_positions_that_the_writer_does_not_know_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source = decoders.write_checkpoint("yarn", tmp_path / "yarn")
    with pytest.raises(SourceError, match="scaled by yarn"):
        _gguf.write(source, tmp_path / "model.gguf")
