"""Encoders over HTTP: entities, classes, rerank and matches are the session's own, and bad input is told with care."""

from __future__ import annotations

import base64
import io
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

import medcompile
from medcompile.runtime.session import Session
from tests.serve.servers import Server
from tests.tiny import PLANTED, Workshop
from tests.tiny_pair import drawn

TEXTS = ["the patient denies chest pain, no fever", "kidney injury", "no fever " * 80]


@pytest.fixture(scope="module")
def texts(workshop: Workshop) -> Session:
    return medcompile.load(workshop.bundle, backend="onnxruntime", variant="fp32", threads=1)


@pytest.fixture(scope="module")
def towers(pair: Workshop) -> Session:
    return medcompile.load(pair.bundle, backend="onnxruntime", variant="fp32", threads=1)


def png(seed: int = 0) -> bytes:
    held = io.BytesIO()
    drawn("disc", seed).save(held, "PNG")
    return held.getvalue()


def data_url(raw: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(raw).decode()}"


def answer(server: Server, url: str, body: dict[str, Any]) -> dict[str, Any]:
    response = server.post(url, body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def error(server: Server, url: str, body: Any, status: int = 400) -> dict[str, Any]:
    response = server.post(url, body)
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    return found


def test_entities_are_the_sessions_with_offsets_into_the_text(server: Server, texts: Session) -> None:
    told = answer(server, "/v1/entities", {"model": "text", "input": TEXTS})
    bare = [[asdict(e) for e in found] for found in texts.extract(TEXTS)]
    for one, expected, text in zip(told["data"], bare, TEXTS, strict=True):
        assert [e | {"score": 0} for e in one["entities"]] == [e | {"score": 0} for e in expected]
        assert all(text[e["start"] : e["end"]] == e["text"] for e in one["entities"])
        np.testing.assert_allclose([e["score"] for e in one["entities"]], [e["score"] for e in expected], atol=1e-5)
    assert any(one["entities"] for one in told["data"])


def test_classes_are_the_sessions_of_texts_and_of_pairs(server: Server, texts: Session) -> None:
    told = answer(server, "/v1/classify", {"model": "text", "input": TEXTS})
    for one, expected in zip(told["data"], texts.classify(TEXTS), strict=True):
        assert one["label"] == expected[0].label
        np.testing.assert_allclose([s["score"] for s in one["scores"]], [s.score for s in expected], atol=1e-5)
    both = {"model": "text", "input": TEXTS[:2], "pairs": ["no fever", "chest pain"], "top_k": 1}
    told = answer(server, "/v1/classify", both)
    expected_pairs = texts.classify(TEXTS[:2], ["no fever", "chest pain"])
    assert [len(one["scores"]) for one in told["data"]] == [1, 1]
    assert [one["label"] for one in told["data"]] == [e[0].label for e in expected_pairs]
    assert "2 texts, 1 pairs" in error(server, "/v1/classify", both | {"pairs": "x"})["message"]


def test_rerank_orders_documents_by_their_likeness_to_the_query(server: Server, texts: Session) -> None:
    asked = {"model": "text", "query": "chest pain", "documents": ["kidney injury", {"text": "chest pain"}, "no fever"]}
    told = answer(server, "/v1/rerank", asked | {"return_documents": True, "top_n": 2})
    rows = texts.embed(["chest pain", "kidney injury", "chest pain", "no fever"]).astype(float)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    scores = rows[1:] @ rows[0]
    assert [r["index"] for r in told["results"]] == np.argsort(-scores)[:2].tolist()
    assert told["results"][0]["document"] == {"text": "chest pain"}
    np.testing.assert_allclose([r["relevance_score"] for r in told["results"]], np.sort(scores)[::-1][:2], atol=1e-5)


def test_matches_are_the_sessions_by_data_url_and_by_form(server: Server, towers: Session) -> None:
    images, prompts = [png(0), png(1)], ["a round shadow", "ribs in a row", "nothing"]
    bare = towers.match(images, prompts)
    told = answer(server, "/v1/match", {"model": "pair", "images": [data_url(i) for i in images], "prompts": prompts})
    form = server.http.post(
        "/v1/match",
        data={"model": "pair", "prompts": prompts},
        files=[("images", (f"{i}.png", image, "image/png")) for i, image in enumerate(images)],
    )
    assert form.status_code == 200, form.text
    assert form.json() == told
    for one, row in zip(told["data"], bare, strict=True):
        assert [s["prompt"] for s in one["scores"]] == [prompts[i] for i in np.argsort(-row)]
        np.testing.assert_allclose([s["score"] for s in one["scores"]], np.sort(row)[::-1], atol=1e-5)


def test_prompts_may_have_labels_of_several_names_and_templates(server: Server, towers: Session) -> None:
    prompts = {"round": ["a disc", "a ball"], "bars": "ribs"}
    body = {"model": "pair", "images": [data_url(png())], "prompts": prompts, "templates": ["{}"]}
    told = answer(server, "/v1/match", body)
    (row,) = towers.match([png()], prompts, ["{}"])
    assert {s["label"]: pytest.approx(s["score"], abs=1e-5) for s in told["data"][0]["scores"]} == dict(
        zip(prompts, row.tolist(), strict=True)
    )


def test_images_and_texts_are_embedded_in_one_space(server: Server, towers: Session) -> None:
    part = {"type": "image_url", "image_url": {"url": data_url(png())}}
    told = answer(server, "/v1/embeddings", {"model": "pair", "input": [part]})
    np.testing.assert_allclose(told["data"][0]["embedding"], towers.embed_images([png()])[0], atol=1e-5)
    told = answer(server, "/v1/embeddings", {"model": "pair", "input": "a hand"})
    np.testing.assert_allclose(told["data"][0]["embedding"], towers.embed_texts(["a hand"])[0], atol=1e-5)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (data_url(b"no image at all"), "not an image"),
        (data_url(png()[:60]), "image"),
        ("data:image/png;base64,!!!!", "not valid base64"),
        ("https://example.org/x.png", "nothing is fetched"),
        ("/etc/passwd", "nothing is fetched"),
    ],
)
def test_a_bad_image_is_told_by_its_place_and_kills_nothing(server: Server, image: str, words: str) -> None:
    body = {"model": "pair", "images": [data_url(png()), image], "prompts": ["a", "b"]}
    told = error(server, "/v1/match", body)
    assert words in told["message"]
    assert "1" in told["message"]
    assert server.metric("medcompile_worker_restarts_total") == 0


def test_an_image_that_claims_more_pixels_than_may_be_is_refused(server: Server) -> None:
    head = b"P5 100000 100000 255\n"  # a PGM of ten thousand million pixels in twenty bytes
    body = {"model": "pair", "images": [data_url(head)], "prompts": ["a", "b"]}
    assert "too many pixels" in error(server, "/v1/match", body)["message"]


@pytest.mark.parametrize(
    ("url", "body", "status", "words"),
    [
        ("/v1/embeddings", {"model": "text", "input": []}, 400, "input is empty"),
        ("/v1/embeddings", {"model": "text", "input": [1, 2]}, 400, "token ids"),
        ("/v1/embeddings", {"model": "text", "input": ["x"] * 2049}, 413, "the limit is 2048"),
        ("/v1/embeddings", {"model": "text", "input": "x", "dimension": 3}, 400, "did you mean dimensions?"),
        ("/v1/embeddings", {"model": "text"}, 400, "input: is required"),
        ("/v1/embeddings", {"model": "nobody", "input": "x"}, 404, "choose from: llm, text, pair"),
        ("/v1/match", {"model": "pair", "images": [], "prompts": ["a"]}, 400, "images is empty"),
        ("/v1/match", {"model": "text", "images": [data_url(png())], "prompts": ["a", "b"]}, 400, "its tasks are"),
        ("/v1/entities", {"model": "pair", "input": "x"}, 400, "its tasks are: image, text"),
        ("/v1/classify", ["not", "an", "object"], 400, "body"),
    ],
)
def test_what_can_not_be_honoured_says_why_and_what_to_do(
    server: Server, url: str, body: Any, status: int, words: str
) -> None:
    assert words in error(server, url, body, status)["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b'{"model": "text", "input": "x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "text", "input": "\\ud800"}',
        b'{"model": "text", "input": NaN}',
        b'{"model": "text", "input": "x", "priority": {"a": 1}}',
    ],
)
def test_a_body_that_is_no_request_is_refused_in_openais_shape(server: Server, raw: bytes) -> None:
    response = server.http.post("/v1/embeddings", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_errors_never_say_what_was_sent(server: Server) -> None:
    bodies: list[Any] = [
        {"model": PLANTED, "input": "x"},
        {"model": "text", "input": {PLANTED: PLANTED}},
        {"model": "text", "input": "x", PLANTED: PLANTED},
        {"model": "text", "input": "x", "encoding_format": PLANTED},
        {"model": "text", "input": "x", "priority": PLANTED},
        {"model": "text", "input": "x", "dimensions": PLANTED},
        {"model": "text", "input": [[PLANTED]]},
        {"model": "text", "input": [{"type": PLANTED, "image_url": PLANTED}]},
        {"model": "text", "input": [{"type": "image_url", "image_url": f"https://{PLANTED}"}]},
        {"model": "text", "input": "x", "metadata": PLANTED},
    ]
    for body in bodies:
        response = server.post("/v1/embeddings", body)
        assert 400 <= response.status_code < 500
        assert not any(word in response.text for word in PLANTED.split()), response.text
    assert not any(word in "".join(server.said) for word in PLANTED.split())
    assert not any(word in server.http.get("/metrics").text for word in PLANTED.split())


def test_another_content_type_and_another_method_are_refused(server: Server) -> None:
    response = server.http.post("/v1/embeddings", content=b"{}", headers={"Content-Type": "text/plain"})
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    for path, status in (("/v1/embeddings", 405), ("/v1/nothing", 404)):
        response = server.http.get(path)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_request_id_goes_out_with_every_answer(server: Server) -> None:
    first, second = (server.post("/v1/embeddings", {"model": "text", "input": "x"}) for _ in range(2))
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
