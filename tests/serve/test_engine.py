"""A worker process as the server sees it, without HTTP: asked, given up, hung, dead, started again."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest

import medcompile
from medcompile.errors import BundleError, InputError, UsageError
from medcompile.serve.asked import Asked
from medcompile.serve.calls import CALLS
from medcompile.serve.engine import Engine, State
from medcompile.serve.engines import Engines
from medcompile.serve.failures import DeadlinePassed, Draining, ModelNotFound, QueueFull, WorkerDown
from medcompile.serve.settings import Limits, Model
from tests.tiny import Workshop


def model(workshop: Workshop, **options: object) -> Model:
    return Model(workshop.bundle, backend="onnxruntime", variant="fp32", threads=1, **options)  # type: ignore[arg-type]


def engines(workshop: Workshop, **limits: float) -> Engines:
    return Engines([model(workshop)], Limits(**limits))  # type: ignore[arg-type]


def running(its: Engines) -> Engine:
    return its.get("tiny")


async def embedded(its: Engines, text: str = "chest pain") -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    answer = await CALLS["/v1/embeddings"](its, {"model": "tiny", "input": text}, Asked())
    assert isinstance(answer, dict)
    row: np.ndarray[tuple[int], np.dtype[np.float32]] = answer["data"][0]["embedding"]
    return row


@pytest.mark.anyio
async def test_an_answer_is_the_sessions_and_its_cost_is_in_the_tally(small: Workshop) -> None:
    with medcompile.load(small.bundle, backend="onnxruntime", variant="fp32", threads=1) as session:
        bare = session.embed("chest pain")[0]
    async with engines(small) as its:
        asked = Asked()
        answer = await CALLS["/v1/embeddings"](its, {"model": "tiny", "input": ["chest pain", "x"]}, asked)
        assert isinstance(answer, dict)
        np.testing.assert_allclose(answer["data"][0]["embedding"], bare, atol=1e-5)
        tally, engine = asked.tally, running(its)
        assert (tally.model, tally.digest, tally.items, tally.tokens_in) == ("tiny", engine.digest, 2, 3)
        assert tally.artifact == "fp32/onnxruntime-cpu"
        assert tally.queued_s is not None


@pytest.mark.anyio
async def test_a_worker_that_stands_still_is_ended_and_started_again(small: Workshop) -> None:
    async with engines(small, stuck_s=1.5) as its:
        engine = running(its)
        first = engine.pid
        assert first
        os.kill(first, signal.SIGSTOP)
        with pytest.raises(WorkerDown):
            await embedded(its)
        await asyncio.wait_for(engine.until_ready(), 60)
        assert engine.pid != first
        assert engine.restarts == 1
        assert len(await embedded(its)) == 32


@pytest.mark.anyio
async def test_a_worker_that_dies_again_and_again_is_given_longer_and_longer_pauses(small: Workshop) -> None:
    async with engines(small) as its:
        engine = running(its)
        for expected in (1, 2):
            assert engine.pid
            os.kill(engine.pid, signal.SIGKILL)
            while engine.restarts < expected:
                await asyncio.sleep(0.02)
            await asyncio.wait_for(engine.until_ready(), 60)
        assert len(await embedded(its)) == 32


@pytest.mark.anyio
async def test_requests_that_come_while_a_worker_loads_again_wait_for_it(small: Workshop) -> None:
    async with engines(small) as its:
        engine = running(its)
        assert engine.pid
        os.kill(engine.pid, signal.SIGKILL)
        while engine.state is not State.STARTING:
            await asyncio.sleep(0.01)
        assert len(await embedded(its)) == 32


@pytest.mark.anyio
async def test_a_request_that_takes_too_long_or_is_given_up_leaves_nothing_behind(small: Workshop) -> None:
    async with engines(small, timeout_s=30) as its:
        engine = running(its)
        assert engine.pid
        os.kill(engine.pid, signal.SIGSTOP)
        with pytest.raises(DeadlinePassed, match=r"no whole answer after 0\.2 s"):
            await engine.ask("embed", {"texts": ["x"]}, timeout_s=0.2)
        task = asyncio.create_task(embedded(its))
        await asyncio.sleep(0.1)
        assert engine.in_flight == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert engine.in_flight == 0
        os.kill(engine.pid, signal.SIGCONT)
        assert len(await embedded(its)) == 32


@pytest.mark.anyio
async def test_the_line_is_bounded_by_priority_and_by_bytes(small: Workshop) -> None:
    async with engines(small, queue=4, pending_bytes=1000) as its:
        engine = running(its)
        assert engine.pid
        os.kill(engine.pid, signal.SIGSTOP)
        held = [asyncio.create_task(engine.ask("embed", {"texts": ["x"]})) for _ in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(QueueFull) as caught:
            await engine.ask("embed", {"texts": ["x"]}, priority="background")
        assert caught.value.retry_after_s
        with pytest.raises(QueueFull, match="MiB of waiting images"):
            await engine.ask("embed", {"texts": [], "images": [2000]}, bytes(2000))
        held.append(asyncio.create_task(engine.ask("embed", {"texts": ["x"]})))
        await asyncio.sleep(0.05)
        with pytest.raises(QueueFull):
            await engine.ask("embed", {"texts": ["x"]})
        held.append(asyncio.create_task(engine.ask("embed", {"texts": ["x"]}, priority="emergency")))
        os.kill(engine.pid, signal.SIGCONT)
        assert len(await asyncio.gather(*held)) == 5


@pytest.mark.anyio
async def test_an_engine_that_drains_ends_what_it_has_and_takes_nothing_new(small: Workshop) -> None:
    async with engines(small) as its:
        task = asyncio.create_task(embedded(its))
        await asyncio.sleep(0)
        await its.drain(10)
        assert len(await task) == 32
        with pytest.raises(Draining):
            await embedded(its)


@pytest.mark.anyio
async def test_a_text_beyond_the_limit_is_refused_before_and_after_it_is_tokenized(small: Workshop) -> None:
    async with engines(small, text_tokens=100) as its:
        assert len(await embedded(its, "x " * 100)) == 32
        with pytest.raises(InputError, match="a text of 101 tokens; the limit is 100"):
            await embedded(its, "x " * 101)
        with pytest.raises(InputError, match="a text of 100000 characters"):
            await embedded(its, "x" * 100_000)


@pytest.mark.anyio
async def test_what_keeps_a_bundle_from_loading_is_raised_and_every_process_ended(
    small: Workshop, tmp_path: Path
) -> None:
    broken = small.copy(tmp_path / "w").bundle
    artifact = next(broken.glob("artifacts/onnxruntime-cpu/fp32/**/*.onnx"))
    artifact.write_bytes(b"\0" + artifact.read_bytes()[1:])
    its = Engines([model(small), Model(broken, "broken", "onnxruntime", "fp32")])
    with pytest.raises(BundleError, match="differ from what"):
        await its.start()
    assert all(engine.pid is None for engine in its)


def test_names_are_one_bundles_each_and_unknown_ones_are_told_what_there_is(small: Workshop) -> None:
    with pytest.raises(UsageError, match="two bundles are named tiny"):
        Engines([model(small), model(small)])
    with pytest.raises(UsageError, match="no bundle to serve"):
        Engines([])
    its = Engines([model(small), model(small, name="other")])
    assert [engine.name for engine in its] == ["tiny", "other"]
    with pytest.raises(ModelNotFound, match="no model of this name"):
        its.get("nobody")
