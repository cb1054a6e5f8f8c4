"""Calls with scrubbing around them: what the model is given, where entities are told, what a stream lets out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from medcompile.errors import InputError
from medcompile.serve.asked import Asked
from medcompile.serve.calls import CALLS, Call
from medcompile.serve.engines import Engines
from medcompile.serve.failures import NotSupported
from medcompile.serve.scrub import Scrubber
from medcompile.serve.scrubbing import LONGEST, Scrubbing
from tests.serve.conftest import ON_CPU
from tests.serve.servers import Server
from tests.tiny import Workshop

pytestmark = pytest.mark.anyio

NOTE = "Ann Planted, 61, MRN 00123456, was given metformin by Dr. Planted on March 3rd, 2024 for diabetes."
ENGINES = cast(Engines, None)


@pytest.fixture(scope="module")
def scrubbing() -> Scrubbing:
    pytest.importorskip("presidio_analyzer")
    return Scrubbing(Scrubber())


def call_of(url: str, seen: list[Any], answer: Any) -> Call:
    """The call of a URL, with an answer that was made beforehand; answer: of the body, where it is a function."""

    async def run(_: Engines, body: Any, __: Asked) -> Any:
        seen.append(body)
        return answer(body) if callable(answer) else answer

    real = CALLS[url]
    return Call(url, real.body, run, real.generates)


async def asked(scrubbing: Scrubbing, url: str, body: dict[str, Any], answer: Any = None) -> tuple[Any, Any]:
    """What the model was given, and the answer."""
    seen: list[Any] = []
    call = call_of(url, seen, answer if answer is not None else {"data": [], "choices": []})
    given = await scrubbing.run(call, ENGINES, call.checked(body), Asked())
    return seen[0], given


async def test_every_text_of_every_route_is_scrubbed_before_the_model_sees_it(scrubbing: Scrubbing) -> None:
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": NOTE, "name": NOTE}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": NOTE}]}]}),
        ("/v1/completions", {"prompt": NOTE}),
        ("/v1/completions", {"prompt": [NOTE, NOTE]}),
        ("/v1/embeddings", {"input": NOTE}),
        ("/v1/embeddings", {"input": ["x", NOTE]}),
        ("/v1/entities", {"input": [NOTE]}),
        ("/v1/classify", {"input": NOTE, "pairs": NOTE}),
        ("/v1/rerank", {"query": NOTE, "documents": [NOTE, {"text": NOTE}]}),
        ("/v1/match", {"prompts": [NOTE], "templates": [NOTE + "{}"]}),
        ("/v1/match", {"prompts": {"a": [NOTE], "b": NOTE}}),
    ]
    for url, body in bodies:
        seen, _ = await asked(scrubbing, url, {"model": "m", **body})
        told = seen.model_dump_json()
        assert "Planted" not in told and "00123456" not in told and "March" not in told, told
        assert "[PERSON], 61, MRN [ID], was given metformin" in told
        assert seen.model == "m"


async def test_an_entity_is_told_where_it_lies_in_the_text_that_was_sent(scrubbing: Scrubbing) -> None:
    def found(body: Any) -> dict[str, Any]:
        data = []
        for index, text in enumerate(body.input):
            spots = [(text.index(word), word) for word in ("[PERSON]", "metformin", "diabetes")]
            entities = [{"label": "X", "text": w, "start": at, "end": at + len(w), "score": 1.0} for at, w in spots]
            data.append({"index": index, "entities": entities})
        return {"data": data}

    second = "Follow-up. " + NOTE
    _, answer = await asked(scrubbing, "/v1/entities", {"model": "m", "input": [NOTE, second]}, found)
    for one, text in zip(answer["data"], (NOTE, second), strict=True):
        spans = [text[entity["start"] : entity["end"]] for entity in one["entities"]]
        assert spans == ["Ann Planted", "metformin", "diabetes"]
        assert one["entities"][0]["text"] == "[PERSON]"  # an answer tells nothing that the model did not see


async def test_what_is_generated_is_scrubbed_whole_and_as_a_stream(scrubbing: Scrubbing) -> None:
    whole = {"choices": [{"message": {"content": NOTE}, "finish_reason": "stop"}]}
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    _, answer = await asked(scrubbing, "/v1/chat/completions", body, whole)
    scrubbed = answer["choices"][0]["message"]["content"]
    assert "Planted" not in scrubbed and "metformin" in scrubbed
    _, answer = await asked(
        scrubbing,
        "/v1/completions",
        {"model": "m", "prompt": "x"},
        {"choices": [{"text": NOTE, "finish_reason": "stop"}]},
    )
    assert answer["choices"][0]["text"] == scrubbed

    async def pieces(chat: bool) -> AsyncGenerator[dict[str, Any], None]:
        for index in (0, 1):
            if chat:
                yield {
                    "choices": [{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
                }
        for at in range(0, len(NOTE), 3):
            for index in (0, 1):
                said = NOTE[at : at + 3]
                held = {"delta": {"content": said}} if chat else {"text": said}
                yield {"choices": [{"index": index, **held, "finish_reason": None}]}
        for index in (1, 0):
            yield {"choices": [{"index": index, **({"delta": {}} if chat else {"text": ""}), "finish_reason": "stop"}]}
        yield {"choices": [], "usage": {}}

    for url, chat in (("/v1/chat/completions", True), ("/v1/completions", False)):
        asks = (body if chat else {"model": "m", "prompt": "x"}) | {"stream": True}
        _, stream = await asked(scrubbing, url, asks, pieces(chat))
        said = {0: "", 1: ""}
        async for piece in stream:
            for choice in piece["choices"]:
                said[choice["index"]] += choice["delta"].get("content", "") if chat else choice["text"]
        assert said == {0: scrubbed, 1: scrubbed}


@pytest.mark.parametrize(
    ("url", "more", "param"),
    [
        ("/v1/completions", {"prompt": [1, 2, 3]}, "prompt"),
        ("/v1/completions", {"prompt": [[1], [2]]}, "prompt"),
        ("/v1/completions", {"prompt": "x", "logprobs": 2}, "logprobs"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "logprobs": True}, "logprobs"),
    ],
)
async def test_what_can_not_be_scrubbed_is_refused(
    scrubbing: Scrubbing, url: str, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(NotSupported) as raised:
        await asked(scrubbing, url, {"model": "m", **more})
    assert raised.value.param == param
    with pytest.raises(InputError, match=str(LONGEST)):
        await asked(scrubbing, "/v1/embeddings", {"model": "m", "input": ["x" * LONGEST, "x"]})


# ---- with a real model


@pytest.fixture(scope="module")
def server(decoder: Path, workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("presidio_analyzer")
    names = tmp_path_factory.mktemp("scrub") / "names"
    names.write_text("Zyx Qwerty\n")
    bundles = (f"llm={decoder}", f"text={workshop.bundle}")
    with Server(*bundles, *ON_CPU, "--scrub", "--scrub-names", names, "--cache", "memory") as running:
        yield running


def test_a_real_model_embeds_and_writes_on_from_the_scrubbed_text(server: Server) -> None:
    def row(text: str) -> list[float]:
        told = server.post("/v1/embeddings", {"model": "text", "input": text}).json()
        return cast("list[float]", told["data"][0]["embedding"])

    assert row("zyx qwerty has asthma") == row("[PERSON] has asthma") != row("someone else has asthma")
    echoed = server.post("/v1/completions", {"model": "llm", "prompt": NOTE, "max_tokens": 3, "echo": True}).json()
    assert echoed["choices"][0]["text"].startswith("[PERSON], 61, MRN [ID]")
    entities = server.post("/v1/entities", {"model": "text", "input": NOTE}).json()["data"][0]["entities"]
    assert all(0 <= entity["start"] < entity["end"] <= len(NOTE) for entity in entities)
    refused = server.post("/v1/completions", {"model": "llm", "prompt": NOTE, "logprobs": 1})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "logprobs"
