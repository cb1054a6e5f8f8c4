"""The official client against the real server: what it sends unchanged, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path

import numpy as np
import openai
import pytest

import medcompile
from medcompile.runtime.sampling import Sampling
from tests.serve.servers import Server, wait_for
from tests.tiny import Workshop

PROMPT = "the patient denies chest pain"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.openai()


def running(server: Server) -> float:
    return server.metric("medcompile_requests_running") + server.metric("medcompile_requests_waiting")


def test_the_client_lists_the_models_and_retrieves_one(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["llm", "text", "pair"]
    assert client.models.retrieve("llm").owned_by == "medcompile"


def test_a_completion_is_what_the_bare_session_generates(client: openai.OpenAI, decoder: Path) -> None:
    done = client.completions.create(model="llm", prompt=PROMPT, max_tokens=12, temperature=0)
    with medcompile.load(decoder, backend="onnxruntime", variant="fp32", threads=1) as session:
        (bare,) = session.generate(PROMPT, Sampling(max_tokens=12))
    (choice,) = done.choices
    assert (choice.text, choice.finish_reason) == (bare.text, bare.finish_reason)
    assert done.usage
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (bare.prompt_tokens, len(bare.token_ids))
    assert done.usage.total_tokens == bare.prompt_tokens + len(bare.token_ids)


def test_a_chat_is_rendered_by_the_models_own_template(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model="llm", messages=MESSAGES, max_tokens=12, temperature=0)
    rendered = f"system:Be brief.;user:{PROMPT};assistant:"
    plain = client.completions.create(model="llm", prompt=rendered, max_tokens=12, temperature=0)
    assert done.choices[0].message.content == plain.choices[0].text
    assert done.choices[0].message.role == "assistant"


def test_content_may_come_in_parts_of_text(client: openai.OpenAI) -> None:
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "the patient "}, {"type": "text", "text": "denies"}]}
    ]
    whole = [{"role": "user", "content": "the patient denies"}]
    answers = [
        client.chat.completions.create(model="llm", messages=m, max_tokens=8, temperature=0).choices[0].message.content
        for m in (parts, whole)
    ]
    assert answers[0] == answers[1]


def test_the_pieces_of_a_stream_are_the_whole_answer_and_end_with_usage(client: openai.OpenAI) -> None:
    asked = {"model": "llm", "messages": MESSAGES, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(c.choices[0].delta.content or "" for c in pieces) == whole.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len(pieces) > 5
    assert all(c.usage is None for c in pieces)
    assert last.choices == []
    assert last.usage
    assert whole.usage
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 20
    assert len({c.id for c in chunks}) == 1


def test_streamed_completions_of_several_prompts_and_answers_keep_their_places(client: openai.OpenAI) -> None:
    asked = {"model": "llm", "prompt": ["chest pain", "no fever"], "n": 2, "max_tokens": 6, "seed": 5, "temperature": 1}
    whole = client.completions.create(**asked)
    texts = ["", "", "", ""]
    for chunk in client.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]


def test_the_same_seed_gives_the_same_answers_and_n_of_them_differ(client: openai.OpenAI) -> None:
    asked = {"model": "llm", "messages": MESSAGES, "max_tokens": 12, "temperature": 1.0, "n": 3}
    once, again, other = (client.chat.completions.create(**asked, seed=seed) for seed in (7, 7, 8))
    told = [[c.message.content for c in done.choices] for done in (once, again, other)]
    assert told[0] == told[1] != told[2]
    assert len(set(told[0])) == 3
    assert client.chat.completions.create(**asked, seed=-7).choices


def test_logprobs_of_a_chat_tell_each_token_its_bytes_and_the_best_others(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="llm", messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    (choice,) = done.choices
    assert choice.logprobs
    assert choice.logprobs.content
    assert "".join(one.token for one in choice.logprobs.content) == choice.message.content
    for one in choice.logprobs.content:
        assert one.bytes == list(one.token.encode())
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].logprob == pytest.approx(one.logprob)  # greedy takes the best
        assert sorted((t.logprob for t in one.top_logprobs), reverse=True) == [t.logprob for t in one.top_logprobs]


def test_logprobs_of_a_completion_have_the_old_shape_streamed_and_whole(client: openai.OpenAI) -> None:
    asked = {"model": "llm", "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**asked).choices[0]
    assert whole.logprobs
    assert whole.logprobs.tokens
    assert "".join(whole.logprobs.tokens) == whole.text
    assert whole.logprobs.text_offset == [len("".join(whole.logprobs.tokens[:i])) for i in range(6)]
    tokens, offsets = [], []
    for chunk in client.completions.create(**asked, stream=True):
        if told := chunk.choices[0].logprobs:
            tokens += told.tokens or []
            offsets += told.text_offset or []
    assert (tokens, offsets) == (whole.logprobs.tokens, whole.logprobs.text_offset)


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    asked = {"model": "llm", "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[8:10]
    cut = client.completions.create(**asked, stop=[stop]).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_prompts_may_be_token_ids_and_be_echoed(client: openai.OpenAI) -> None:
    by_ids = client.completions.create(model="llm", prompt=[40, 41, 42], max_tokens=5, temperature=0, echo=True)
    by_text = client.completions.create(model="llm", prompt=by_ids.choices[0].text[:3], max_tokens=5, temperature=0)
    assert by_ids.choices[0].text[3:] == by_text.choices[0].text


def test_a_response_format_holds_the_answer_to_a_schema_and_a_regular_expression(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"urgent": {"type": "boolean"}, "ward": {"enum": ["A", "B"]}},
        "required": ["urgent", "ward"],
        "additionalProperties": False,
    }
    done = client.chat.completions.create(
        model="llm",
        messages=MESSAGES,
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "triage", "schema": schema, "strict": True}},
    )
    found = json.loads(done.choices[0].message.content or "")
    assert set(found) == {"urgent", "ward"}
    told = client.completions.create(
        model="llm", prompt="x", max_tokens=20, extra_body={"response_format": {"type": "regex", "regex": "[0-9]{4}"}}
    )
    assert told.choices[0].text.isdigit()


def test_embeddings_are_the_sessions_as_floats_and_as_the_clients_base64(
    client: openai.OpenAI, workshop: Workshop
) -> None:
    texts = ["the patient denies chest pain", "fever", ""]
    with medcompile.load(workshop.bundle, backend="onnxruntime", variant="fp32") as session:
        bare = session.embed(texts)
    packed = client.embeddings.create(model="text", input=texts)  # the client asks for base64 by itself
    plain = client.embeddings.create(model="text", input=texts, encoding_format="float")
    np.testing.assert_allclose([e.embedding for e in packed.data], bare, atol=1e-5)
    np.testing.assert_allclose([e.embedding for e in plain.data], bare, atol=1e-5)
    raw = client.embeddings.with_raw_response.create(model="text", input="fever", encoding_format="base64")
    said = json.loads(raw.text)["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(said), "<f4"), bare[1], atol=1e-5)
    assert packed.usage.prompt_tokens == 6


def test_fewer_dimensions_are_the_first_ones_at_unit_length(client: openai.OpenAI) -> None:
    whole = np.array(client.embeddings.create(model="text", input="fever").data[0].embedding)
    cut = np.array(client.embeddings.create(model="text", input="fever", dimensions=8).data[0].embedding)
    np.testing.assert_allclose(cut, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-6)
    with pytest.raises(openai.BadRequestError, match="of 32"):
        client.embeddings.create(model="text", input="fever", dimensions=33)


@pytest.mark.parametrize(
    ("kind", "status", "param", "asked"),
    [
        (openai.NotFoundError, 404, "model", {"model": "gpt-4o"}),
        (openai.BadRequestError, 400, "temperature", {"temperature": 3}),
        (openai.BadRequestError, 400, "max_tokens", {"max_tokens": 0}),
        (openai.BadRequestError, 400, "tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (openai.BadRequestError, 400, "logit_bias", {"logit_bias": {"50": 1}}),
        (openai.BadRequestError, 400, "top_logprobs", {"top_logprobs": 2}),
        (openai.BadRequestError, 400, "messages", {"messages": []}),
        (openai.BadRequestError, 400, "stop", {"stop": [""]}),
        (openai.BadRequestError, 400, None, {"extra_body": {"temprature": 1}}),
        (openai.BadRequestError, 400, None, {"messages": [{"role": "user", "content": "x" * 5000}]}),
    ],
)
def test_the_client_raises_its_own_errors_with_the_parameters_name(
    client: openai.OpenAI, kind: type[openai.APIStatusError], status: int, param: str | None, asked: dict[str, object]
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": "llm", "messages": MESSAGES, "max_tokens": 4} | asked)
    assert (caught.value.status_code, caught.value.param) == (status, param)
    assert caught.value.type == "invalid_request_error"


def test_a_model_that_can_not_do_it_says_what_it_can(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="its tasks are: embed"):
        client.chat.completions.create(model="text", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="its tasks are: generate"):
        client.embeddings.create(model="llm", input="x")


def test_a_client_that_times_out_is_cancelled_in_the_model(server: Server) -> None:
    hasty = server.openai(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        hasty.completions.create(model="llm", prompt="x", max_tokens=3000, extra_body={"ignore_eos": True})
    wait_for(lambda: running(server) == 0)


def test_a_stream_that_is_closed_is_cancelled_in_the_model(server: Server, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="llm", prompt="x", max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    for _, _chunk in zip(range(5), stream, strict=False):
        pass
    assert running(server) == 1
    stream.close()
    wait_for(lambda: running(server) == 0)
    made = server.metric("medcompile_generated_tokens_total", model="llm")
    time.sleep(0.2)
    assert server.metric("medcompile_generated_tokens_total", model="llm") == made


def test_many_at_once_get_the_answers_that_they_would_get_alone(server: Server, client: openai.OpenAI) -> None:
    prompts = [f"{'chest pain ' * i}fever" for i in range(16)]
    asked = {"model": "llm", "max_tokens": 10, "temperature": 0}
    alone = [client.completions.create(prompt=p, **asked).choices[0].text for p in prompts]

    async def together() -> list[str]:
        async with server.async_openai() as many:
            done = await asyncio.gather(*(many.completions.create(prompt=p, **asked) for p in prompts))
            return [one.choices[0].text for one in done]

    assert asyncio.run(together()) == alone


def test_an_async_stream_is_read_as_it_comes(server: Server) -> None:
    async def read() -> list[float]:
        async with server.async_openai() as client:
            stream = await client.chat.completions.create(
                model="llm", messages=MESSAGES, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
            )
            return [time.monotonic() async for _ in stream]

    times = asyncio.run(read())
    assert len(times) > 100
    assert times[-1] - times[0] > 0.02  # not all at the end


def test_priorities_are_taken_from_the_body_and_from_the_header(server: Server) -> None:
    body = {"model": "text", "input": "fever"}
    before = server.metric("medcompile_queue_seconds_count", priority="emergency")
    assert server.post("/v1/embeddings", body | {"priority": "emergency"}).status_code == 200
    assert server.post("/v1/embeddings", body, headers={"X-Priority": "emergency"}).status_code == 200
    assert server.metric("medcompile_queue_seconds_count", priority="emergency") == before + 2
    assert server.post("/v1/embeddings", body | {"priority": "asap"}).status_code == 400


def test_a_prompt_that_was_computed_before_counts_as_cached_for_the_same_salt_alone(client: openai.OpenAI) -> None:
    asked = {"model": "llm", "prompt": "fever " * 40, "max_tokens": 2, "n": 2}

    def cached(salt: str) -> int:
        usage = client.completions.create(**asked, extra_body={"cache_salt": salt}).usage
        assert usage
        assert usage.prompt_tokens_details
        return usage.prompt_tokens_details.cached_tokens or 0

    assert cached("a") == 0
    assert cached("a") >= 192  # whole blocks of 32 of its 239 tokens
    assert cached("b") == 0
