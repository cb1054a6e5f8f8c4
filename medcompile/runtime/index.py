"""Exact search over embeddings in memory: cosine by one matrix product, the best by partition. Saved as one .npz.

An index knows the digest of the bundle whose embeddings it holds, and is refused for another. What makes embeddings is
towers.py and encoder.py.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from medcompile.errors import InputError, UsageError

Array = np.ndarray[Any, Any]

FORMAT = 1
BLOCK_BYTES = 64 * 2**20
"""Scores held at a time while searching, whatever the number of queries."""

BROKEN = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, RuntimeError, SyntaxError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error, InputError),
)
"""What numpy raises on files that are no .npz of ours, as seen."""


@dataclass(frozen=True)
class Hit:
    """A key, and the cosine of its embedding with the query's."""

    key: str
    score: float


class Index:
    """Embeddings by key, at unit length. Thread-safe.

    dim: their size. digest: of the bundle that made them; "" where that is not known.
    """

    def __init__(self, dim: int, *, digest: str = "") -> None:
        self.dim = dim
        self.digest = digest
        self._keys: list[str] = []  # in the order of the rows; only ever appended to
        self._known: set[str] = set()
        self._blocks: list[Array] = []
        self._lock = threading.Lock()

    @classmethod
    def of(cls, embeddings: Array, keys: Sequence[str], *, digest: str = "") -> Self:
        """An index of embeddings [n, dim] under n keys."""
        rows = np.asarray(embeddings)
        index = cls(rows.shape[-1] if rows.ndim else 0, digest=digest)
        index.add(rows, keys)
        return index

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, embeddings: Array, keys: Sequence[str]) -> None:
        """Add embeddings [n, dim] under n new keys: all or none.

        Raises InputError for a size that differs, a NaN or infinity, or a key that is no str or is there already.
        """
        rows = self._unit(embeddings)
        keys = [keys] if isinstance(keys, str) else list(keys)
        if len(keys) != len(rows):
            raise InputError(
                f"{len(rows)} embeddings but {len(keys)} keys", fix="give one key per embedding, in a list"
            )
        for i, key in enumerate(keys):
            if not isinstance(key, str):
                raise InputError(f"key {i} is {type(key).__name__}, not str", fix="convert it: str(key)")
        with self._lock:
            fresh = set(keys) - self._known
            twice = len(keys) - len(fresh)
            if twice:
                raise InputError(
                    f"{twice} of {len(keys)} keys are there already", fix="give each embedding its own key"
                )
            self._keys += keys
            self._known |= fresh
            self._blocks.append(rows)

    def search(self, query: Array, k: int = 10) -> list[Hit]:
        """The k best for one query [dim] (or [1, dim]), best first; equal scores in the order they were added."""
        found = self.search_all(query, k)
        if len(found) != 1:
            raise InputError(f"one query is wanted, not {len(found)}", fix="take search_all for several")
        return found[0]

    def search_all(self, queries: Array, k: int = 10) -> list[list[Hit]]:
        """The k best for each of queries [n, dim]: fewer where the index holds fewer."""
        if k < 1:
            raise UsageError(f"k is {k}; it must be at least 1")
        rows = self._unit(queries)
        with self._lock:
            matrix = self._merged()
        k = min(k, len(matrix))
        if not k:
            return [[] for _ in rows]
        step = max(1, BLOCK_BYTES // (4 * len(matrix)))
        found = []
        for at in range(0, len(rows), step):
            for scores in rows[at : at + step] @ matrix.T:
                least = np.partition(scores, len(scores) - k)[len(scores) - k]
                among = np.flatnonzero(scores >= least)  # every one that ties for the last place
                best = among[np.argsort(-scores[among], kind="stable")][:k]
                found.append([Hit(self._keys[i], float(scores[i])) for i in best])
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one .npz, whole or not at all."""
        with self._lock:
            matrix, keys = self._merged(), list(self._keys)
        facts = {"format": FORMAT, "digest": self.digest, "dim": self.dim, "keys": keys}
        place = Path(path)
        with tempfile.NamedTemporaryFile(dir=place.parent, prefix=place.name, suffix=".part", delete=False) as part:
            try:
                np.savez(part, embeddings=matrix, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8))
                part.flush()
                os.fsync(part.fileno())
                Path(part.name).replace(place)
            except BaseException:
                Path(part.name).unlink(missing_ok=True)
                raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, digest: str = "") -> Self:
        """Read what save() wrote. digest: the bundle's that will make the queries.

        Raises InputError if the file is no such index, or holds another bundle's embeddings.
        """
        name = Path(path).name
        try:
            with np.load(path, allow_pickle=False) as stored:
                facts, matrix = json.loads(stored["facts"].tobytes()), stored["embeddings"]
            if facts["format"] != FORMAT:
                raise ValueError(f"its format is {facts['format']}, and this version reads {FORMAT}")
            index = cls(facts["dim"], digest=facts["digest"])
            if matrix.dtype != np.float32 or matrix.shape != (len(facts["keys"]), index.dim):
                raise ValueError(f"{len(facts['keys'])} keys for embeddings of {matrix.dtype} {list(matrix.shape)}")
            index.add(matrix, facts["keys"])
            index._blocks = [matrix]  # of unit length already: to the last bit what was saved
        except BROKEN as error:
            raise InputError(f"{name}: not a saved index: {error}", fix="make it again with Index.save") from error
        if digest and index.digest != digest:
            raise InputError(
                f"{name}: holds embeddings of bundle {index.digest[:12] or 'unknown'}, and this one is {digest[:12]}",
                fix="search it with the bundle that made it, or embed its images or texts again with this one",
            )
        return index

    def _merged(self) -> Array:
        if len(self._blocks) != 1:
            self._blocks = [np.concatenate([np.zeros((0, self.dim), np.float32), *self._blocks])]
        return self._blocks[0]

    def _unit(self, embeddings: Array) -> Array:
        """[n, dim] at unit length, a copy; a row of zeros stays one. A single [dim] is a row."""
        rows = np.atleast_2d(np.asarray(embeddings, np.float32))
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise InputError(
                f"embeddings of shape {list(rows.shape)}; this index takes [n, {self.dim}]",
                fix="embed with the model that made the index",
            )
        if not np.isfinite(rows).all():
            bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            raise InputError(f"embedding {bad[0]} holds NaN or infinity ({len(bad)} do)", fix="leave those rows out")
        lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        return np.asarray(rows / np.maximum(lengths, 1e-12), np.float32)
