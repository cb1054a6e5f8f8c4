from __future__ import annotations

import asyncio
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcompile.errors import MedcompileError
from medcompile.serve import batch
from medcompile.serve.batch import MODEL_DOWN, Progress, Slots
from medcompile.serve.batch_lines import Answered, Request
from tests.serve import batches


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return batches.write(tmp_path / "in.jsonl", 300)


class Model:
    """One process that dies with all that it works on, whenever it works on a poisoned request."""

    def __init__(self, poison: set[str]) -> None:
        self.poison = poison
        self.working: dict[str, asyncio.Future[Answered]] = {}
        self.deaths = 0
        self.asked: Counter[str] = Counter()

    async def ask(self, request: Request, _: str) -> Answered:
        self.asked[request.custom_id] += 1
        done = self.working[request.custom_id] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.001, self._work, request)
        return await done

    def _work(self, request: Request) -> None:
        if request.custom_id not in self.working:
            return
        if request.custom_id in self.poison:
            self.deaths += 1
            for done in self.working.values():
                done.set_result(Answered(MODEL_DOWN, b'{"error":{}}', 1.0))
            self.working.clear()
        else:
            self.working.pop(request.custom_id).set_result(Answered(200, batches.answer_to(request)))


def test_answers_stand_in_the_order_of_the_requests_however_they_come(path: Path, tmp_path: Path) -> None:
    chance = random.Random(3)

    async def ragged(request: Request, request_id: str) -> Answered:
        await asyncio.sleep(0.02 * chance.random() ** 4)
        return await batches.echo(request, request_id)

    made = batches.run(path, tmp_path / "out.jsonl", ragged)
    batches.check(path, tmp_path / "out.jsonl")
    assert made is not None and (made.records, made.failed, made.new) == (300, 3, 300)
    assert made.position == made.total


def test_an_empty_file_has_an_empty_file_of_answers(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\n\n")
    made = batches.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert made is not None and made.records == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_a_request_that_kills_its_model_is_found_and_all_others_are_answered(path: Path, tmp_path: Path) -> None:
    model = Model({"note-70", "note-71", "note-250"})
    batches.run(path, tmp_path / "out.jsonl", model.ask)
    found = batches.lines(tmp_path / "out.jsonl")
    statuses = {a["custom_id"]: a["response"]["status_code"] for a in found if a["response"]}
    assert {name for name, status in statuses.items() if status != 200} == model.poison
    assert len(found) == 300
    assert model.deaths <= 20, "it was looked for among too many at a time"


def test_a_model_that_dies_once_costs_no_line(path: Path, tmp_path: Path) -> None:
    model = Model({"note-100"})
    ask = model.ask

    async def heals(request: Request, request_id: str) -> Answered:
        if model.deaths:
            model.poison.clear()
        return await ask(request, request_id)

    batches.run(path, tmp_path / "out.jsonl", heals)
    batches.check(path, tmp_path / "out.jsonl")
    assert model.deaths == 1 and max(model.asked.values()) == 2


def test_a_model_that_dies_at_every_request_ends_the_run_and_not_every_line(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    model = Model({f"note-{i}" for i in range(1000)})
    with pytest.raises(MedcompileError, match="one after another") as told:
        batches.run(path, out, model.ask)
    assert "goes on" in told.value.fix
    assert sum(model.asked.values()) < 400
    assert not out.exists() and out.with_name("out.jsonl.part").exists()


def test_a_model_that_does_not_come_back_ends_the_run_at_once(path: Path, tmp_path: Path) -> None:
    async def gone(request: Request) -> None:
        if request.custom_id == "note-150":
            raise MedcompileError("gone for good")
        if request.custom_id == "note-149":
            await asyncio.sleep(60)

    with pytest.raises(MedcompileError, match="gone for good"):
        batches.run(path, tmp_path / "out.jsonl", ready=gone)


def test_a_full_queue_is_waited_for(path: Path, tmp_path: Path) -> None:
    refused: Counter[str] = Counter()

    async def full(request: Request, request_id: str) -> Answered:
        if refused[request.custom_id] < 2:
            refused[request.custom_id] += 1
            return Answered(429, b"{}", 0.001)
        return await batches.echo(request, request_id)

    batches.run(path, tmp_path / "out.jsonl", full)
    batches.check(path, tmp_path / "out.jsonl")


def test_no_more_is_in_flight_than_was_said_and_as_much_as_there_can_be(path: Path, tmp_path: Path) -> None:
    now = most = 0

    async def counted(request: Request, request_id: str) -> Answered:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return await batches.echo(request, request_id)

    batches.run(path, tmp_path / "out.jsonl", counted, in_flight=16)
    assert most == 16


def test_a_slow_line_holds_back_writing_but_not_the_work_on_others(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "AHEAD", 100)
    answered: set[str] = set()
    first = asyncio.Event()

    async def slow(request: Request, request_id: str) -> Answered:
        if request.custom_id == "note-0":
            await first.wait()
        answered.add(request.custom_id)
        if len(answered) == 98:  # all that may be read ahead, but for the first and a line of garbage
            first.set()
        return await batches.echo(request, request_id)

    batches.run(path, tmp_path / "out.jsonl", slow, in_flight=8)
    batches.check(path, tmp_path / "out.jsonl")


def test_progress_tells_of_every_line_and_ends_at_the_end(path: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    made = batches.run(path, tmp_path / "out.jsonl", tell=told.append)
    assert [p.records for p in told] == sorted(p.records for p in told)
    assert made is not None and told[-1].position == made.total == path.stat().st_size


def test_memory_is_of_what_is_in_flight_and_not_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "AHEAD", 64)
    peaks = []
    for count in (1_000, 8_000):
        path = batches.write(tmp_path / f"{count}.jsonl", count)
        tracemalloc.start()
        batches.run(path, tmp_path / f"{count}-out.jsonl")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@settings(max_examples=40, deadline=None)
@given(bits=st.lists(st.floats(0, 0.999999), min_size=1, max_size=4))
def test_a_wrong_bit_spoils_no_line_but_its_own(tmp_path_factory: pytest.TempPathFactory, bits: list[float]) -> None:
    folder = tmp_path_factory.mktemp("rotten")
    whole = batches.write(folder / "whole.jsonl", 30).read_bytes()
    path = folder / "in.jsonl"
    path.write_bytes(batches.rotten(whole, {int(bit * 8 * len(whole)) for bit in bits}))
    batches.run(path, folder / "out.jsonl")
    batches.check(path, folder / "out.jsonl")
    still = {line for line in path.read_bytes().splitlines() if line in set(whole.splitlines())}
    good = [a for a in batches.lines(folder / "out.jsonl") if a["response"] is not None]
    assert len(good) >= sum(b"custom_id" in line and b"body" in line for line in still)


def test_slots_let_the_earliest_in_first_and_what_is_too_large_alone() -> None:
    async def main() -> list[int]:
        slots, order = Slots(4), list[int]()

        async def work(number: int, items: int) -> None:
            alone = await slots.enter(number, items)
            assert not alone
            order.append(number)
            await asyncio.sleep(0)
            slots.leave(items)

        await slots.enter(0, 4)
        tasks = [asyncio.create_task(work(number, items)) for number, items in ((5, 1), (2, 9), (3, 2), (1, 4))]
        await asyncio.sleep(0)
        assert order == []
        slots.leave(4)
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(main()) == [1, 2, 3, 5]


def test_a_place_that_was_given_to_what_is_cancelled_is_free_again() -> None:
    async def main() -> None:
        slots = Slots(1)
        await slots.enter(0, 1)
        waiting = asyncio.create_task(slots.enter(1, 1))
        await asyncio.sleep(0)
        slots.leave(1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await asyncio.wait_for(slots.enter(2, 1), 1)

    asyncio.run(main())
