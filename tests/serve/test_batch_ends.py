"""Every way that a batch can end before its end, and that the next run loses and doubles no line."""

from __future__ import annotations

import asyncio
import errno
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcompile.errors import DataError, MedcompileError, UsageError
from medcompile.serve import batch
from medcompile.serve.batch_lines import Answered, Request
from medcompile.serve.spool import Spool
from tests.command_line import ROOT
from tests.serve import batches

KILLS = 10


def child(path: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.serve.batches", str(path), str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_killed_at_ten_random_points_and_run_again_every_line_is_there_once(tmp_path: Path) -> None:
    path, out = batches.write(tmp_path / "in.jsonl", 12_000), tmp_path / "out.jsonl"
    chance = random.Random(7)
    kept = []
    for _ in range(KILLS):
        with child(path, out, "--pause", "0.03") as process:
            assert process.stdout is not None and process.stdout.readline() == "up\n"
            try:
                process.wait(chance.uniform(0.0, 0.25))
            except subprocess.TimeoutExpired:
                process.kill()
            assert process.wait() == -signal.SIGKILL
        part = tmp_path / "out.jsonl.part"
        kept.append(part.read_bytes().count(b"\n") if part.exists() else 0)
    assert kept == sorted(kept), "a run threw whole lines away"
    assert kept[-1] > 0
    with child(path, out) as process:
        assert process.wait(60) == 0
    batches.check(path, out)


def test_killed_before_each_thing_that_lasts_every_line_is_there_once(tmp_path: Path) -> None:
    path = batches.write(tmp_path / "in.jsonl", 60)
    died = 0
    for number in range(1, 40):
        out = tmp_path / f"{number}.jsonl"
        with child(path, out, "--die-at", str(number)) as process:
            code = process.wait(60)
        died += code == -signal.SIGKILL
        batches.run(path, out) if not _done(out) else None
        batches.check(path, out)
        if code == 0:
            break
    assert code == 0 and died >= 8


def _done(out: Path) -> bool:
    return out.exists() and len(list(out.parent.glob(f"{out.name}*"))) == 1


class Half:
    """The state of a run that ended about in the middle, to be spoilt in many ways."""

    def __init__(self, folder: Path) -> None:
        self.path, self.out = batches.write(folder / "in.jsonl", 300), folder / "half" / "out.jsonl"
        self.out.parent.mkdir()
        seen = 0

        async def stops(request: Request, request_id: str) -> Answered:
            nonlocal seen
            seen += 1
            if seen == 200:
                raise MedcompileError("the end of this run")
            return await batches.echo(request, request_id)

        with pytest.raises(MedcompileError, match="the end of this run"):
            batches.run(self.path, self.out, stops, in_flight=4)
        with Spool(self.out, batches.about(self.path)) as spool:
            self.safe_bytes = spool.mark.size_bytes

    def copy(self, folder: Path) -> Path:
        shutil.copytree(self.out.parent, folder, dirs_exist_ok=True)
        return folder / self.out.name


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Half:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "COMMIT_S", 0.0)
        patch.setattr(batch, "AHEAD", 40)
        return Half(tmp_path_factory.mktemp("half"))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_a_power_cut_left_after_the_last_mark_every_line_is_there_once(
    half: Half, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    out = half.copy(tmp_path_factory.mktemp("cut"))
    part = out.with_name(out.name + ".part")
    journal = out.with_name(out.name + ".part.journal")
    marks = journal.read_bytes().splitlines(keepends=True)
    kept = data.draw(st.integers(1, len(marks)))
    torn = data.draw(st.integers(0, len(marks[kept]) - 1)) if kept < len(marks) else 0
    journal.write_bytes(b"".join(marks[:kept]) + (marks[kept][:torn] if torn else b""))
    with Spool(out, batches.about(half.path)) as spool:
        safe = spool.mark.size_bytes
    whole = part.read_bytes()
    cut = data.draw(st.integers(safe, len(whole)))
    tail = data.draw(
        st.sampled_from([b"", b"\0" * 5000, b"\n", b"{}\n", whole[:700], b'{"id":"x"\n', whole[cut + 1 :]])
    )
    part.write_bytes(whole[:cut] + tail)
    batches.run(half.path, out)
    batches.check(half.path, out)


def test_lines_after_the_last_mark_are_kept_while_they_are_whole(half: Half, tmp_path: Path) -> None:
    out = half.copy(tmp_path)
    journal = out.with_name(out.name + ".part.journal")
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:1]))  # as if no mark had been written
    out.with_name(out.name + ".part.ids").write_bytes(b"")
    before = out.with_name(out.name + ".part").read_bytes().count(b"\n")
    made = batches.run(half.path, out)
    assert made is not None and made.new == made.records - before
    batches.check(half.path, out)


def test_a_part_that_is_shorter_than_its_journal_tells_is_refused(half: Half, tmp_path: Path) -> None:
    out = half.copy(tmp_path)
    out.with_name(out.name + ".part").write_bytes(b"")
    with pytest.raises(DataError, match="journal") as told:
        batches.run(half.path, out)
    assert "--restart" in told.value.fix
    batches.run(half.path, out, restart=True)
    batches.check(half.path, out)


def test_another_input_does_not_go_on_with_what_was_begun(half: Half, tmp_path: Path) -> None:
    out = half.copy(tmp_path)
    other = batches.write(tmp_path / "other.jsonl", 300, seed=1)
    with pytest.raises(UsageError, match="begun with other input"):
        batches.run(other, out)
    batches.run(half.path, out)
    batches.check(half.path, out)


def test_two_runs_do_not_write_the_same_answers(tmp_path: Path) -> None:
    path, out = batches.write(tmp_path / "in.jsonl", 5), tmp_path / "out.jsonl"
    with Spool(out, batches.about(path)), pytest.raises(UsageError, match="another run"):
        batches.run(path, out)
    batches.run(path, out)
    batches.check(path, out)


def test_answers_that_are_there_are_not_overwritten_unless_told_to(tmp_path: Path) -> None:
    path, out = batches.write(tmp_path / "in.jsonl", 5), tmp_path / "out.jsonl"
    out.write_text("dear\n")
    with pytest.raises(UsageError, match="is there already"):
        batches.run(path, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    batches.run(path, out, restart=True)
    batches.check(path, out)


def test_a_full_disk_ends_the_run_with_what_to_do_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "COMMIT_S", 0.0)
    path, out = batches.write(tmp_path / "in.jsonl", 2000), tmp_path / "out.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (100_000, 180_001, 250_003):  # a limit of the system's own, that cuts in the middle of a line
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises(MedcompileError, match="can't be written") as told:
                batches.run(path, out)
            assert "make room" in told.value.fix
            assert not out.exists()
            assert out.with_name("out.jsonl.part").stat().st_size <= limit
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    made = batches.run(path, out)
    assert made is not None and made.new < made.records, "what was written before was computed again"
    batches.check(path, out)


@pytest.mark.parametrize("what", ["fsync", "replace"])
def test_a_disk_that_fails_late_is_told_of_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path, out = batches.write(tmp_path / "in.jsonl", 50), tmp_path / "out.jsonl"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if what == "fsync":
            done = iter(range(1))
            patch.setattr("os.fsync", lambda file: None if next(done, None) is not None else full())
        else:
            patch.setattr(Path, "replace", full)
        with pytest.raises(MedcompileError, match="No space left"):
            batches.run(path, out)
    batches.run(path, out)
    batches.check(path, out)


def test_a_run_that_is_cancelled_keeps_what_was_answered(tmp_path: Path) -> None:
    path, out = batches.write(tmp_path / "in.jsonl", 100), tmp_path / "out.jsonl"

    async def hangs(request: Request, request_id: str) -> Answered:
        if request.custom_id == "note-60":
            await asyncio.sleep(3600)
        return await batches.echo(request, request_id)

    async def cancelled() -> None:
        with Spool(out, batches.about(path)) as spool:
            task = asyncio.create_task(batch.Batch(batches.job(path, hangs), spool, lambda _: None).run())
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancelled())
    made = batches.run(path, out)
    assert made is not None and made.new <= 40
    batches.check(path, out)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_disk_that_is_really_full_ends_the_run_and_room_lets_it_go_on(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    path = batches.write(tmp_path / "in.jsonl", 3000)
    run = f"{sys.executable} -m tests.serve.batches {path} {disk}/out.jsonl"
    script = f"""
        mount -t tmpfs -o size=256k tmpfs {disk} || exit 77
        {run} 2> {tmp_path}/told && exit 9
        mount -o remount,size=64m {disk}
        {run} && cp {disk}/* {tmp_path}/
    """
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    if done.returncode in (1, 77) and not (tmp_path / "told").exists():
        pytest.skip("no file system can be mounted here")
    assert done.returncode == 0
    assert "No space left on device" in (tmp_path / "told").read_text()
    batches.check(path, tmp_path / "out.jsonl")
