"""Streams: several runs of one model side by side on a CPU, a core each.

A core does most by itself: cores that share one run wait for each other at the end of every operator. So batches that
come together go to whichever stream is free, and a batch that comes alone is cut by rows, if it has rows enough.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.backends import Backend, Executor, StreamsBackend, check_feeds
from medcompile.resources import available_cores
from medcompile.runtime.flow import ahead
from medcompile.spec import GraphSpec, Target, Variant

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]
    Feeds = Mapping[str, Array]

_PIECES = 2
"""Pieces of a batch for each stream: more would even out what others on the machine take, but each reads all weights
again."""
_PIECE_ELEMENTS = 256
"""Of the first input (tokens, or pixels), in a piece at least, where each stream has one."""


def load_streamed(
    backend: Backend,
    path: Path,
    spec: GraphSpec,
    variant: Variant,
    target: Target,
    threads: int | None = None,
    streams: int | None = None,
) -> Executor:
    """The artifact at path, in streams where there are several: batches run side by side, a core each.

    streams None: as many as threads, on a CPU, where the backend has streams and the graph takes batches of any size.
    There are never more than threads.
    """
    wide = backend.load(path, spec, variant, target, threads)
    cores = threads or available_cores()
    count = min(streams or cores, cores)
    if target.device != "cpu" or count == 1 or not isinstance(backend, StreamsBackend) or not _in_rows(spec):
        return wide
    return StreamedExecutor(wide, lambda: backend.load_streams(path, spec, variant, target, count), count)


def _in_rows(spec: GraphSpec) -> bool:
    """Whether a batch of any size may be cut: every input and output has the same first axis, and profiles take one."""
    axes = {tensor.shape[0] if tensor.shape else None for tensor in (*spec.inputs, *spec.outputs)}
    axis = axes.pop()
    return not axes and isinstance(axis, str) and all(profile.axis(axis).min == 1 for profile in spec.profiles)


class StreamedExecutor(Executor):
    """wide: the artifact over all cores. narrow: opens it so that so many runs at once take a core each.

    narrow is called when there is first something to do side by side. Both are closed with this.
    """

    def __init__(self, wide: Executor, narrow: Callable[[], Executor], streams: int) -> None:
        super().__init__(wide.spec)
        self.streams = streams
        self.step = wide.step
        self._wide = wide
        self._open = narrow
        self._narrow: Executor | None = None
        self._pool = ThreadPoolExecutor(streams, thread_name_prefix="medcompile-stream")
        self._closed = False
        self._lock = threading.Lock()

    def run(self, feeds: Feeds) -> dict[str, Array]:
        check_feeds(self.spec, feeds)
        first = feeds[self.inputs[0].name]
        rows = len(first)
        if rows < self.streams:
            return self._wide.run(feeds)
        enough = -(-_PIECE_ELEMENTS * rows // max(1, first.size))
        size = min(max(rows // (_PIECES * self.streams), enough, 1), -(-rows // self.streams))
        pieces = ({name: a[at : at + size] for name, a in feeds.items()} for at in range(0, rows, size))
        parts = list(self._side_by_side(pieces))
        return {tensor.name: np.concatenate([part[tensor.name] for part in parts]) for tensor in self.outputs}

    def run_each(self, batches: Iterable[Feeds]) -> Iterator[dict[str, Array]]:
        source = iter(batches)
        head = list(islice(source, 2))
        if len(head) == 1:
            yield self.run(head[0])
        elif head:
            yield from self._side_by_side(chain(head, source))

    def _side_by_side(self, batches: Iterable[Feeds]) -> Iterator[dict[str, Array]]:
        """In order, and read no further ahead than keeps every stream busy."""
        try:
            yield from ahead(self._streams().run, batches, depth=2 * self.streams, pool=self._pool)
        except (CancelledError, RuntimeError) as error:
            if self._closed:  # what a pool cancelled, or did not take any more
                raise self.closed() from error
            raise

    def _streams(self) -> Executor:
        with self._lock:
            if self._closed:
                raise self.closed()
            if self._narrow is None:
                self._narrow = self._open()
            return self._narrow

    def close(self) -> None:
        with self._lock:
            self._closed = True
            narrow, self._narrow = self._narrow, None
        self._pool.shutdown(cancel_futures=True)
        self._wide.close()
        if narrow is not None:
            narrow.close()
