"""The harness with contenders that misbehave: each is one line of the result, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from medcompile.bench import harness, judgement, machine, results, table
from medcompile.bench.harness import Patience, Plan
from medcompile.bench.peer import Cell, Job, Missing
from medcompile.bench.results import Bench, Entry
from medcompile.errors import UsageError

FAKE = str(Path(__file__).parent / "fake.py")
QUICK = Patience(prepare_s=20, load_s=20, run_s=3, warm_s=0.2, turn_s=0.006)


def plan(folder: Path, *ways: str, rounds: int = 6, job: Job | None = None, reference: str = "fake:good") -> Plan:
    inputs = folder / "inputs"
    inputs.mkdir()
    rng = np.random.default_rng(0)
    np.savez(inputs / "2x8.npz", input_ids=rng.integers(1, 9, (64, 8)))
    cpus = machine.cpus()[:1]
    job = job or Job(
        "bert", "embed", cells=(Cell(2, 8),), threads=1, cpus=cpus, inputs=str(inputs), work=str(folder / "work")
    )
    asked = tuple(f"{FAKE}:{way}" for way in ways)
    return Plan("fakes", job, folder, asked, reference=reference, rounds=rounds, limits=False, patience=QUICK)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    ways = ("good", "slow", "prints", "nan", "wrong", "raises", "crashes", "hangs", "killed", "no-load")
    return harness.run(plan(tmp_path_factory.mktemp("run"), *ways), lambda line: None)


def entry(found: Bench, way: str) -> Entry:
    one = found.entry(f"fake:{way}")
    assert one is not None
    return one


def test_a_slower_contender_is_told_as_slower_with_an_interval_that_excludes_one(found: Bench) -> None:
    ratio = judgement.against_reference(found, entry(found, "slow"), "2x8")
    assert ratio is not None and ratio.low is not None
    assert ratio.low > 1
    assert ratio.value > 2
    assert ratio.no_difference is False


def test_what_a_library_prints_does_not_reach_the_harness(found: Bench) -> None:
    timing = entry(found, "prints").timing("2x8")
    assert timing is not None and not timing.error
    assert None not in timing.turns


@pytest.mark.parametrize(("way", "said"), [("nan", "NaN"), ("wrong", "cosine")])
def test_a_contender_that_answers_wrong_is_marked(found: Bench, way: str, said: str) -> None:
    timing = entry(found, way).timing("2x8")
    assert timing is not None and timing.accuracy is not None
    assert said in timing.accuracy.wrong


def test_right_answers_are_not_marked(found: Bench) -> None:
    timing = entry(found, "slow").timing("2x8")
    assert timing is not None and timing.accuracy is not None
    assert timing.accuracy.wrong == ""
    assert timing.accuracy.cosine_worst == pytest.approx(1.0)
    assert timing.accuracy.items >= 2 * 6


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("raises", "ValueError: no such shape"),
        ("crashes", "ended with exit code 7; it said: Segmentation fault"),
        ("hangs", "did not answer within 3 s (run) and was killed"),
        ("killed", "was killed by SIGKILL"),
    ],
)
def test_a_contender_that_fails_in_the_rounds_keeps_its_reason_and_stops_no_other(
    found: Bench, way: str, said: str
) -> None:
    failed = next(t for t in entry(found, way).cells if t.cell == "2x8")
    assert said in failed.error
    assert None in failed.turns
    good = entry(found, "good").timing("2x8")
    assert good is not None and None not in good.turns


def test_a_contender_that_does_not_load_is_told_with_its_error(found: Bench) -> None:
    assert "OSError: no such model" in entry(found, "no-load").error


def test_the_order_is_drawn_anew_in_each_round_and_recorded(found: Bench) -> None:
    shape = found.shape("2x8")
    assert shape is not None
    full = [order for order in shape.orders if len(order) > 4]
    assert len(set(full)) > 1
    assert len(shape.orders) == 6


def test_int8_that_is_slower_than_float_on_the_same_engine_is_warned_of(found: Bench) -> None:
    assert any("fake:slow (int8) is slower than fake:good" in w for w in judgement.warnings(found))


def test_a_comparison_comes_back_from_its_file_as_it_was(found: Bench, tmp_path: Path) -> None:
    results.write(found, tmp_path / "bench.json")
    assert results.read(tmp_path / "bench.json") == found


def test_the_table_names_every_contender_and_every_failure(found: Bench) -> None:
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=250)
    for part in table.told(found):
        console.print(part)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for one in found.entries:
        assert one.title in shown
    assert "WRONG: answers hold NaN" in shown
    assert "no such model" in shown


def test_a_contender_that_cannot_run_is_listed_with_the_reason(tmp_path: Path) -> None:
    asked = plan(tmp_path, "good", job=Job("bert", "image", cells=(Cell(1),), work=str(tmp_path)), reference="")
    (only,) = harness.look(asked)
    assert only.entry.missing == Missing("does not run image")


def test_a_contender_whose_file_is_at_fault_is_listed_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ImportError('not here')")
    asked = plan(tmp_path, "good", job=Job("broken", "embed", work=str(tmp_path)))
    found = harness.look(Plan("x", asked.job, tmp_path, asked=(FAKE, str(tmp_path / "broken.py"))))
    assert [c.entry.missing is not None for c in found] == [True, True]
    assert found[0].entry.missing is not None and "its file is at fault" in found[0].entry.missing.reason
    assert found[1].entry.missing is not None and "not here" in found[1].entry.missing.reason


def test_an_unknown_reference_or_option_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no contender 'nobody'"):
        harness.run(plan(tmp_path, "good", reference="nobody"), lambda line: None)
    with pytest.raises(UsageError, match="has no option bad"):
        harness.look(Plan("x", Job("bert", "embed"), tmp_path, asked=(f"{FAKE}:bad",)))


INTERRUPTED = """
import signal, sys
from pathlib import Path
from medcompile.bench import harness
from tests.bench.test_harness import plan
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
asked = plan(Path(sys.argv[1]), *sys.argv[2:], rounds=200)
harness.run(asked, lambda line: print(line, flush=True))
"""


def alive(group_of: str) -> list[str]:
    """Command lines of processes that name this folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().decode(errors="replace")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if group_of in line and state != "Z" and "worker.py" in line:
            found.append(line)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("how", "ways"),
    [(signal.SIGINT, ("good", "slow", "forks")), (signal.SIGKILL, ("good", "slow"))],  # a kill is not seen by children
)
def test_an_interrupted_comparison_leaves_no_process(
    tmp_path: Path, how: signal.Signals, ways: tuple[str, ...]
) -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path), *ways],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=root,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "round 3" in line:
            break
    assert len(alive(str(tmp_path))) >= len(ways) + ("forks" in ways)
    os.kill(process.pid, how)
    assert process.wait(timeout=60) != 0  # a machine may be busy
    end = time.monotonic() + 10
    while alive(str(tmp_path)) and time.monotonic() < end:
        time.sleep(0.05)
    assert alive(str(tmp_path)) == []
