"""Calibration feeds: data as a graph's inputs, made by the runtime's own encoder, so that they are what it will see.

Nothing is kept: a batch at a time is encoded, taken and dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from medcompile import verify
from medcompile.backends import Executor
from medcompile.runtime.encoder import Encoder
from medcompile.spec import GraphSpec

if TYPE_CHECKING:
    import numpy as np

    from medcompile.data import Item
    from medcompile.program import Feeds
    from medcompile.runtime.text import TextAssets


def feeds(
    items: Sequence[Item], spec: GraphSpec, text: TextAssets, labels: Sequence[str], batch: int
) -> Iterator[Feeds]:
    """The inputs of spec's graph for items, batch of them asked at a time."""
    recorder = _Recorder(spec)
    encoder = Encoder(text, {spec.name: recorder}, {spec.name: spec}, labels)
    # Texts of one length share a batch, so that little of it is padding. What is observed of a text stays the same.
    asked = sorted(verify.questions(spec.name, items, text), key=lambda q: (len(q.text), q.item.digest))
    for start in range(0, len(asked), batch):
        verify.predict(encoder, spec.name, asked[start : start + batch])
        yield from recorder.take()


class _Recorder(Executor):
    """An executor that keeps what it is fed and answers zeros."""

    def __init__(self, spec: GraphSpec) -> None:
        super().__init__(spec)
        self._fed: list[Feeds] = []

    def run(self, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        import numpy as np

        self._fed.append(feeds)
        batch, sequence = feeds["input_ids"].shape
        sizes = {"batch": batch, "sequence": sequence}
        return {t.name: np.zeros([sizes.get(str(d), d) for d in t.shape], t.dtype) for t in self.spec.outputs}

    def take(self) -> list[Feeds]:
        taken, self._fed = self._fed, []
        return taken

    def close(self) -> None:
        self._fed = []
