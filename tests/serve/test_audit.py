"""The audit log: whole after any crash, and any change of it is found, wherever it is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcompile.errors import AuditError, UsageError
from medcompile.serve import audit
from medcompile.serve.audit import AuditLog, Record
from medcompile.serve.chain import ZERO, files_of, records, verify
from tests.command_line import ROOT, call

ONE = Record("ward-3", "id-1", "/v1/embeddings", 200, model="bert", bundle="ab" * 32, items=2, tokens_in=40)
KEY = bytes(range(32))


def written(folder: Path, count: int = 6, *, key: bytes | None = None, most_bytes: int = 256 << 20) -> Path:
    with AuditLog(folder, key=key, most_bytes=most_bytes, clock=lambda: 1_800_000_000.0) as log:
        for _ in range(count):
            log.append(ONE)
    return folder


def test_a_record_tells_who_what_and_how_much_and_nothing_else(tmp_path: Path) -> None:
    written(tmp_path, 1)
    opened, told = list(records(tmp_path))
    assert opened["event"] == "opened" and opened["before"] == ZERO and opened["keyed"] is False
    assert told == {
        "n": 1,
        "time": "2027-01-15T08:00:00.000000Z",
        "event": "request",
        "caller": "ward-3",
        "request_id": "id-1",
        "route": "/v1/embeddings",
        "status": 200,
        "model": "bert",
        "bundle": "ab" * 32,
        "items": 2,
        "tokens_in": 40,
        "hash": told["hash"],
    }


def test_the_hash_is_what_the_documentation_says_so_that_others_can_check_it(tmp_path: Path) -> None:
    import hashlib
    import hmac

    lines = files_of(written(tmp_path / "plain"))[0].read_bytes().splitlines()
    before = ZERO
    for line in lines:
        body, told = line[: -len(',"hash":""}') - 64], line[-66:-2].decode()
        assert hashlib.sha256(before.encode() + b"\n" + body).hexdigest() == told
        before = told
    body = files_of(written(tmp_path / "keyed", 0, key=KEY))[0].read_bytes().splitlines()[0]
    assert hmac.digest(KEY, ZERO.encode() + b"\n" + body[:-75], "sha256").hex() == body[-66:-2].decode()


@pytest.mark.parametrize("key", [None, KEY])
def test_any_one_bit_changed_is_found(tmp_path: Path, key: bytes | None) -> None:
    file = files_of(written(tmp_path, 3, key=key))[0]
    good = file.read_bytes()
    assert verify(tmp_path, key=key).whole
    starts = [0, *(at + 1 for at, byte in enumerate(good) if byte == 10)]
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        verdict = verify(tmp_path, key=key)
        assert not verdict.whole, f"bit {bit}"
        assert verdict.last < sum(start <= bit // 8 for start in starts) - 1, "a changed record was called good"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_lines_taken_out_doubled_or_moved_are_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("audit")
    file = files_of(written(folder, 8))[0]
    lines = file.read_bytes().splitlines(keepends=True)
    order = data.draw(st.lists(st.integers(0, 8), max_size=12).filter(lambda o: o != list(range(len(o)))))
    file.write_bytes(b"".join(lines[at] for at in order))
    assert not verify(folder).whole


def test_an_end_that_was_cut_off_is_found_by_a_head_that_was_noted(tmp_path: Path) -> None:
    with AuditLog(tmp_path) as log:
        log.append(ONE)
        log.append(ONE)
        number, head = log.head
    file = files_of(tmp_path)[0]
    assert verify(tmp_path, head=head).whole and number == 2
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    assert verify(tmp_path).whole  # what a chain alone can't show
    assert "cut off" in verify(tmp_path, head=head).problem


def test_a_log_written_anew_is_found_where_there_is_a_key(tmp_path: Path) -> None:
    written(tmp_path / "forged", 3, key=b"another key of thirty-two bytes!")
    assert not verify(tmp_path / "forged", key=KEY).whole
    assert "has a key" in verify(tmp_path / "forged").problem
    written(tmp_path / "plain", 3)
    assert not verify(tmp_path / "plain", key=KEY).whole  # nor can a log without one be put in its place


def test_files_follow_each_other_and_one_that_is_missing_is_found(tmp_path: Path) -> None:
    written(tmp_path, 30, most_bytes=1000)
    files = files_of(tmp_path)
    verdict = verify(tmp_path)
    assert len(files) > 3 and verdict.whole and verdict.first == 0
    assert verdict.records == sum(len(f.read_bytes().splitlines()) for f in files)
    assert verify(files[1]).whole and verify(files[1]).before == verify(files[0]).head
    moved = files[1].rename(tmp_path / "away")
    assert "does not go on" in verify(tmp_path).problem and verify(tmp_path).file == files[2].name
    moved.rename(files[1])
    files[0].unlink()  # older files may be archived elsewhere: then it is told where the rest begins
    assert verify(tmp_path).whole and verify(tmp_path).before != ZERO


def test_a_log_goes_on_after_a_restart_and_across_files(tmp_path: Path) -> None:
    for _ in range(4):
        written(tmp_path, 3, most_bytes=900, key=KEY)
    verdict = verify(tmp_path, key=KEY)
    assert verdict.whole and [r["n"] for r in records(tmp_path)] == list(range(verdict.records))
    assert sum(r["event"] == "request" for r in records(tmp_path)) == 12


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 2000))
def test_a_log_cut_anywhere_by_a_crash_opens_again_whole_and_says_what_was_cut(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("audit")
    file = files_of(written(folder, 5))[0]
    good = file.read_bytes()
    cut %= len(good)
    file.write_bytes(good[:cut])
    with AuditLog(folder) as log:
        log.append(ONE)
    told = list(records(folder))
    assert (
        verify(folder).whole and file.read_bytes()[: good[:cut].rfind(b"\n") + 1] == good[: good[:cut].rfind(b"\n") + 1]
    )
    torn = cut - (good[:cut].rfind(b"\n") + 1)
    again = next(r for r in told if r["event"] == "reopened")
    assert again.get("cut_bytes", 0) == torn


def test_a_log_whose_last_file_was_altered_is_not_written_on(tmp_path: Path) -> None:
    file = files_of(written(tmp_path))[0]
    file.write_bytes(file.read_bytes().replace(b"ward-3", b"ward-4", 1))
    with pytest.raises(AuditError, match="does not fit its hash") as raised:
        AuditLog(tmp_path)
    assert "evidence" in raised.value.fix
    written(tmp_path / "other")  # and the lock of the refused one is let go
    with pytest.raises(AuditError):
        AuditLog(tmp_path)


def test_two_processes_cannot_write_to_one_log(tmp_path: Path) -> None:
    with AuditLog(tmp_path), pytest.raises(UsageError, match="another process writes"):
        AuditLog(tmp_path)
    AuditLog(tmp_path).close()


class FullDisk:
    """os, but its disk takes so many bytes more."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def write(self, file: int, line: bytes) -> int:
        took = os.write(file, line[: self.room]) if self.room else 0
        if not took:
            raise OSError(28, "No space left on device")
        self.room -= took
        return took


def test_a_full_disk_refuses_the_request_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AuditLog(tmp_path) as log:
        log.append(ONE)
        for room in (0, 1, 100):
            monkeypatch.setattr(audit, "os", FullDisk(room))
            with pytest.raises(AuditError, match="can't be written"):
                log.append(ONE)
        monkeypatch.undo()
        log.append(ONE)
    assert verify(tmp_path).whole and sum(r["event"] == "request" for r in records(tmp_path)) == 2


def test_a_record_that_cannot_be_brought_to_disk_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(5, "Input/output error")

    with AuditLog(tmp_path, fsync="always") as log:
        monkeypatch.setattr(audit.os, "fsync", broken)
        with pytest.raises(AuditError, match="Input/output"):
            log.append(ONE)
        monkeypatch.undo()
        log.append(ONE)
    assert verify(tmp_path).whole and sum(r["event"] == "request" for r in records(tmp_path)) == 1


@pytest.mark.parametrize(("policy", "fewest"), [("always", 5), ("interval", 1), ("never", 0)])
def test_the_disk_is_reached_as_often_as_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: audit.Fsync, fewest: int
) -> None:
    calls: list[int] = []
    log = AuditLog(tmp_path, fsync=policy, interval_s=0.02)
    monkeypatch.setattr(audit.os, "fsync", calls.append)
    for _ in range(5):
        log.append(ONE)
    until = time.monotonic() + 5
    while len(calls) < fewest and time.monotonic() < until:
        time.sleep(0.01)
    assert len(calls) >= fewest and (policy != "never" or not calls) and (policy != "interval" or len(calls) < 5)
    monkeypatch.undo()
    log.close()


WRITER = """
import sys
from pathlib import Path
from medcompile.serve.audit import AuditLog, Record
log = AuditLog(Path(sys.argv[1]), most_bytes=20_000)
number = 0
while True:
    log.append(Record("a", str(number), "/v1/x", 200))
    print(number, flush=True)
    number += 1
"""


def test_after_kill_9_no_record_is_lost_that_was_told_as_written(tmp_path: Path) -> None:
    told = -1
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert writer.stdout is not None
        for line in writer.stdout:
            told = int(line)
            if told >= 300:
                writer.send_signal(signal.SIGKILL)
                break
        rest = writer.stdout.read().split()
        writer.wait()
        last = int(rest[-1]) if rest and rest[-1].isdigit() else told
        written_ids = [r["request_id"] for r in _whole_records(tmp_path) if r["event"] == "request"]
        assert str(last) in written_ids[-2:]
    with AuditLog(tmp_path) as log:
        log.append(ONE)
    assert verify(tmp_path).whole


def _whole_records(folder: Path) -> list[dict[str, object]]:
    lines = b"".join(f.read_bytes() for f in files_of(folder)).split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


# ---- the command


def test_audit_verify_says_that_a_log_is_whole_and_what_that_does_not_show(tmp_path: Path) -> None:
    done = call("audit", "verify", written(tmp_path))
    assert done.exit_code == 0
    assert "whole" in done.stdout and "--head" in done.stdout and "no key" in done.stdout


def test_audit_verify_exits_1_and_names_the_line_that_was_altered(tmp_path: Path) -> None:
    file = files_of(written(tmp_path))[0]
    lines = file.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"items":2', b'"items":3')
    file.write_bytes(b"".join(lines))
    done = call("audit", "verify", tmp_path)
    assert done.exit_code == 1 and "BROKEN at 000000000000.jsonl:3" in done.stdout and "record 1" in done.stdout
    machine = json.loads(call("audit", "verify", tmp_path, "--json").stdout)
    assert machine["line"] == 3 and machine["last"] == 1 and machine["problem"]


def test_audit_verify_takes_a_key_and_a_head(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY)
    written(tmp_path / "log", key=KEY)
    head = verify(tmp_path / "log", key=KEY).head
    good = call("audit", "verify", tmp_path / "log", "--key-file", tmp_path / "key", "--head", head)
    assert good.exit_code == 0 and "not shown" not in good.stdout
    assert call("audit", "verify", tmp_path / "log", "--key-file", tmp_path / "key", "--head", "0" * 64).exit_code == 1
    assert call("audit", "verify", tmp_path / "log").exit_code == 1
    short = tmp_path / "short"
    short.write_bytes(b"x")
    assert call("audit", "verify", tmp_path / "log", "--key-file", short).exit_code == 2


def test_audit_verify_of_no_log_says_so(tmp_path: Path) -> None:
    done = call("audit", "verify", tmp_path)
    assert done.exit_code == 2 and "holds no audit log" in done.stderr
