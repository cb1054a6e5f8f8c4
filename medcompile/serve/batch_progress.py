"""How far a batch is, on stderr: a bar where that is a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from medcompile import terminal
from medcompile.serve.batch import Progress

LINE_EVERY_S, DRAW_S = 30.0, 0.1
_SMOOTH_S, _STEP_S = 10.0, 0.25


class Rate:
    """Records per second over the last while, so that a slow start is soon forgotten."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque([(0.0, 0)])

    def see(self, progress: Progress) -> None:
        if progress.seconds - self._seen[-1][0] < _STEP_S:
            return
        self._seen.append((progress.seconds, progress.new))
        while len(self._seen) > 2 and self._seen[1][0] < progress.seconds - _SMOOTH_S:
            self._seen.popleft()

    @property
    def per_second(self) -> float:
        (then_s, then), (now_s, now) = self._seen[0], self._seen[-1]
        return (now - then) / (now_s - then_s) if now_s > then_s else 0.0


class Shown:
    """A context manager that is told of progress. unit: what a record is called."""

    def __init__(self, unit: str, total: int, position: int) -> None:
        self._unit = unit
        self._rate = Rate()
        self._began_at = position
        self._told_s = self._drawn_s = time.monotonic()
        self._console = terminal.console(stderr=True)
        self._bar: Bar | None = None
        if self._console.is_terminal:
            self._bar = Bar(
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[told]}"),
                _Left(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=max(total, 1), completed=position, told="starting")

    def __call__(self, progress: Progress) -> None:
        now_s = time.monotonic()
        self._rate.see(progress)
        if self._bar is not None:
            if now_s - self._drawn_s >= DRAW_S:
                self._drawn_s = now_s
                self._bar.update(self._task, completed=progress.position, told=self._words(progress))
        elif now_s - self._told_s > LINE_EVERY_S:
            self._told_s = now_s
            done = progress.position - self._began_at
            left_s = progress.seconds * (progress.total - progress.position) / done if done else 0.0
            share = progress.position / max(progress.total, 1)
            told = f"{share:4.0%}  {self._words(progress)}  {_duration(left_s)} left"
            self._console.print(told, markup=False)

    def _words(self, progress: Progress) -> str:
        failed = f", {progress.failed:,} failed" if progress.failed else ""
        return f"{progress.records:,} {self._unit}s{failed}, {self._rate.per_second:,.1f}/s"

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


class _Left(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        found = super().render(task)
        return Text.assemble(found, " left")


def _duration(seconds: float) -> str:
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60 + 1e-9), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
