"""Steps: one piece of a build each, made once and kept in the cache. A step that fails is told with where it failed.

What the steps are and in which order they go is pipeline.py's; how an entry stays whole is cache.py's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from medcompile import cache
from medcompile.errors import MedcompileError, PassError
from medcompile.program import Context, Pass, PassRecord, Progress
from medcompile.resources import peak_rss_bytes, reset_peak_rss
from medcompile.run_onnx import run_onnx
from medcompile.spec import Variant

if TYPE_CHECKING:
    from collections.abc import Iterator

    from medcompile.beside import Beside
    from medcompile.program import Feeds


@dataclass(frozen=True)
class Step:
    """A finished step: its key, and the cache folder that holds its result."""

    key: str
    folder: Path


@dataclass
class Steps:
    """Runs steps, or finds them in the cache. done: names of those that are finished, in order."""

    cache: cache.Cache
    progress: Progress
    done: list[str] = field(default_factory=list)

    def run(self, name: str, key: str, fill: Callable[[Path], None], beside: Beside | None = None) -> Step:
        """The cache's entry for key; if it is not there, fill writes it into an empty folder now.

        beside: a process that may be about to make it; it is waited for first.

        Errors of this project come through, PassErrors with where they arose. Anything else that a library raises
        becomes a PassError with the same, and is its cause.
        """
        folder = self.cache.entry(key)
        if folder is not None:
            self.progress.end(PassRecord(name, key, 0.0, 0, cached=True))
        else:
            started = time.perf_counter()
            self.progress.begin(name)
            reset_peak_rss()
            if beside is not None:
                beside.wait(lambda: self.cache.entry(key) is not None)
                folder = self.cache.entry(key)
            folder = folder or self._filled(name, key, fill)
            self.progress.end(PassRecord(name, key, time.perf_counter() - started, peak_rss_bytes(), cached=False))
        self.done.append(name)
        return Step(key, folder)

    def run_pass(
        self,
        pass_: Pass,
        before: Step,
        versions: Mapping[str, str],
        batches: Callable[[str], Iterator[Feeds]],
        *,
        label: str = "",
        variant: Variant | None = None,
        parts: Sequence[object] = (),
    ) -> Step:
        """The program that a pass makes of what the step before left.

        versions: of the libraries that the pass uses; parts: what else decides its result. Both are in its key.
        """
        key = cache.key(before.key, pass_.name, pass_, variant, parts, versions)

        def fill(folder: Path) -> None:
            program = cache.read_program(before.folder)
            assert program.stage >= pass_.needs, f"{pass_.name} needs {pass_.needs.name}, got {program.stage.name}"
            result = pass_(program, Context(folder, watched, variant, batches, run_onnx))
            assert result.stage is pass_.gives, f"{pass_.name} gave {result.stage.name}"
            cache.write_program(result, folder)

        watched = _Watched(self.progress)
        try:
            return self.run(f"{pass_.name} {label}".rstrip(), key, fill)
        except PassError as error:
            error.at = watched.last
            raise

    def _filled(self, name: str, key: str, fill: Callable[[Path], None]) -> Path:
        try:
            return self.cache.put(key, fill)
        except PassError as error:
            error.step, error.before = name, tuple(self.done)
            raise
        except MedcompileError:
            raise
        except Exception as error:
            wrapped = PassError(
                f"{type(error).__name__}: {error}",
                fix="check the permissions of the cache folder and the room on its disk, or name another with --cache"
                if isinstance(error, OSError)
                else "run again with -v for the traceback; if nothing in the recipe explains it, report it",
            )
            wrapped.step, wrapped.before = name, tuple(self.done)
            raise wrapped from error


class _Watched:
    """Passes progress on and remembers the last thing a pass said it was at: a graph, or a graph and a node."""

    def __init__(self, inner: Progress) -> None:
        self._inner = inner
        self.last = ""

    def begin(self, name: str) -> None:
        self._inner.begin(name)

    def step(self, message: str, done: int = 0, total: int = 0) -> None:
        self.last = message
        self._inner.step(message, done, total)

    def end(self, record: PassRecord) -> None:
        self._inner.end(record)

    def note(self, message: str) -> None:
        self._inner.note(message)
