from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

from medcompile.errors import InputError
from medcompile.serve import logs

PLANTED = "Quokkaville Brzezinski"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What is logged, with the process's logging as it was before put back afterwards."""
    root, hooks = logging.getLogger(), (sys.excepthook, sys.unraisablehook)
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure(stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    sys.excepthook, sys.unraisablehook = hooks
    logging.raiseExceptions = True
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi", "medcompile"):
        logging.getLogger(name).setLevel(logging.NOTSET)
        logging.getLogger(name).propagate = True


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_one_line_of_json_with_time_level_and_fields(written: io.StringIO) -> None:
    logs.event("worker ended", {"model": "biobert", "exit": -9}, level=logging.WARNING)
    (line,) = lines(written)
    assert line["time"].endswith("Z") and len(line["time"]) == 24
    told = {"level": "warning", "event": "worker ended", "logger": "medcompile.serve", "model": "biobert", "exit": -9}
    assert line == {"time": line["time"], **told}


def test_lines_bear_the_id_of_the_request_whose_task_wrote_them(written: io.StringIO) -> None:
    async def work(name: str) -> None:
        with logs.of_request(name):
            await asyncio.sleep(0)
            logs.event("began")

    async def both() -> None:
        await asyncio.gather(work("req-1"), work("req-2"))
        logs.event("idle")

    asyncio.run(both())
    assert [line.get("request_id") for line in lines(written)] == ["req-1", "req-2", None]


def test_fields_that_are_not_known_or_no_plain_value_are_left_out(written: io.StringIO) -> None:
    logs.event("request", {"status": 200, "input": PLANTED, "model": [PLANTED], "key": "k" * 1000})  # type: ignore[dict-item]
    (line,) = lines(written)
    assert PLANTED not in written.getvalue()
    assert line["status"] == 200 and len(line["key"]) == 200


def test_an_exception_is_told_by_type_and_places_without_its_words(written: io.StringIO) -> None:
    def fails(text: str) -> None:
        raise ValueError(text)

    try:
        try:
            fails(PLANTED)
        except ValueError as error:
            raise InputError(f"no good: {PLANTED}") from error
    except InputError:
        logs.log.exception("request failed")
    (line,) = lines(written)
    assert PLANTED not in written.getvalue()
    assert line["error"] == "InputError from ValueError"
    assert any("test_logs.py" in place for place in line["trace"])


def test_another_library_keeps_its_wording_and_numbers_and_loses_the_words_it_filled_in(written: io.StringIO) -> None:
    log = logging.getLogger("uvicorn.error")
    log.info("Finished server process [%d]", 1234)
    log.info("%s - refused", PLANTED)
    log.warning("broken %d %d", 1)  # noqa: PLE1206
    told = [line["event"] for line in lines(written)]
    assert told == ["Finished server process [1234]", "… - refused", "broken %d %d"]


def test_asyncio_tells_of_a_failed_task_without_what_it_held(written: io.StringIO) -> None:
    async def main() -> None:
        async def fails(text: str) -> None:
            raise ValueError(text)

        task = asyncio.create_task(fails(PLANTED), name=PLANTED)
        await asyncio.sleep(0)
        del task
        await asyncio.sleep(0)

    asyncio.run(main())
    assert lines(written)[0]["event"] == "Task exception was never retrieved"
    assert lines(written)[0]["error"] == "ValueError"
    assert PLANTED not in written.getvalue()


def test_uvicorns_own_access_log_is_silent(written: io.StringIO) -> None:
    logging.getLogger("uvicorn.access").info('%s - "%s %s"', "127.0.0.1", "GET", f"/v1/models/{PLANTED}")
    assert written.getvalue() == ""


def test_people_may_have_it_in_plain_words(written: io.StringIO) -> None:
    logs.configure(stream=written, as_json=False)
    logs.event("listening", {"host": "127.0.0.1", "port": 8000})
    assert written.getvalue().rstrip().endswith("info    listening host=127.0.0.1 port=8000")


def test_a_line_that_cannot_be_written_is_lost_in_silence(
    written: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    written.close()
    logs.event("request", {"status": 200})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "death",
    [
        "raise ValueError(TEXT)",
        "import threading; t = threading.Thread(target=lambda: int(TEXT)); t.start(); t.join()",
        "import warnings; warnings.warn(TEXT)",
        "class Bad:\n    def __del__(self): raise ValueError(TEXT)\nBad()",
    ],
)
def test_the_interpreters_own_last_words_hold_no_value(death: str) -> None:
    code = f"from medcompile.serve import logs\nlogs.configure()\nTEXT = {PLANTED!r}\n{textwrap.dedent(death)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert PLANTED not in done.stderr + done.stdout
    told = json.loads(done.stderr)
    assert "ValueError" in told.get("error", "") or "UserWarning" in told["event"]
