from __future__ import annotations

import pytest

from medcompile.serve import batch_progress
from medcompile.serve.batch import Progress
from medcompile.serve.batch_progress import Rate, Shown


def progress(seconds: float, new: int, *, position: int = 0, failed: int = 0) -> Progress:
    return Progress(position, 1000, 500 + new, failed, new, seconds)


def test_the_rate_is_of_the_last_while_so_that_a_slow_start_is_soon_forgotten() -> None:
    rate = Rate()
    rate.see(progress(0.0, 0))
    assert rate.per_second == 0.0
    rate.see(progress(5.0, 5))
    assert rate.per_second == 1.0
    for second in range(6, 30):
        rate.see(progress(float(second), 5 + 100 * (second - 5)))
    assert rate.per_second == pytest.approx(100.0)


def test_where_stderr_is_no_terminal_a_line_is_told_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(batch_progress.time, "monotonic", lambda: now[0])
    with Shown("line", 1000, 200) as shown:
        for second in range(100):
            now[0] = float(second)
            shown(progress(now[0], 10 * second, position=200 + 4 * second, failed=second // 50))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert told[0] == " 32%  810 lines, 10.0/s  3 min left"
    assert told[-1].startswith(" 57%  1,430 lines, 1 failed, 10.0/s")


def test_on_a_terminal_there_is_a_bar_that_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(batch_progress, "DRAW_S", 0.0)
    with Shown("row", 1000, 0) as shown:
        for second in range(5):
            shown(progress(float(second), second, position=100 * second))
    told = capsys.readouterr().err
    assert "rows" in told and "left" in told


@pytest.mark.parametrize(("seconds", "told"), [(0.4, "0 s"), (59, "59 s"), (90, "2 min"), (3700, "1 h 2 min")])
def test_durations_are_told_in_the_two_largest_units_that_matter(seconds: float, told: str) -> None:
    assert batch_progress._duration(seconds) == told
