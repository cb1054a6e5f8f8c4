"""The calls of encoders: embeddings, rerank, and the three that OpenAI has no route for: entities, classify, match."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medcompile.serve import schemas
from medcompile.serve.asked import Asked
from medcompile.serve.engine import Engine
from medcompile.serve.engines import Engines
from medcompile.serve.failures import BadRequest, TooLarge
from medcompile.serve.frames import Frame

Array = np.ndarray[Any, Any]


async def embed(engines: Engines, body: schemas.EmbeddingRequest, asked: Asked) -> dict[str, Any]:
    """/v1/embeddings: of texts, or of images where there are any."""
    engine = engines.get(body.model)
    images = [*asked.files]
    texts: list[str] = []
    for one in [body.input] if isinstance(body.input, str) else body.input:
        if isinstance(one, str):
            texts.append(one)
        elif isinstance(one, schemas.ImagePart):
            images.append(_decoded(one, len(images)))
        else:
            raise BadRequest("token ids mean nothing to this model's tokenizer", fix="send texts", param="input")
    if images and texts:
        raise BadRequest("texts and images in one request", fix="send one request for each", param="input")
    _check_count(engines, "input", len(images or texts))
    frame = await _asked(engine, asked, body, "embed", {"texts": texts}, images, len(images or texts))
    rows = _rows(frame)
    if body.dimensions is not None:
        if body.dimensions > rows.shape[1]:
            raise BadRequest(
                f"{body.dimensions} dimensions of {rows.shape[1]}",
                fix=f"ask for {rows.shape[1]} at most",
                param="dimensions",
            )
        rows = rows[:, : body.dimensions]
        rows = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)
    told: Sequence[Any] = list(rows)
    if body.encoding_format == "base64":
        told = [base64.b64encode(row.astype("<f4").tobytes()).decode("ascii") for row in rows]
    data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(told)]
    return {"object": "list", "data": data, "model": engine.name, "usage": _usage(frame)}


async def extract(engines: Engines, body: schemas.EntitiesRequest, asked: Asked) -> dict[str, Any]:
    """/v1/entities: labelled stretches of each text, by character offsets into it."""
    engine, texts = engines.get(body.model), _texts(engines, "input", body.input)
    frame = await _asked(engine, asked, body, "extract", {"texts": texts}, (), len(texts))
    data = [{"object": "entities", "index": i, "entities": found} for i, found in enumerate(frame.header["found"])]
    return {"object": "list", "data": data, "model": engine.name, "usage": _usage(frame)}


async def classify(engines: Engines, body: schemas.ClassifyRequest, asked: Asked) -> dict[str, Any]:
    """/v1/classify: the classes of each text, or pair of texts, with their probabilities."""
    engine, texts = engines.get(body.model), _texts(engines, "input", body.input)
    payload: dict[str, Any] = {"texts": texts}
    if body.pairs is not None:
        payload["pairs"] = _texts(engines, "pairs", body.pairs)
        if len(payload["pairs"]) != len(texts):
            raise BadRequest(f"{len(texts)} texts, {len(payload['pairs'])} pairs", fix="as many of each", param="pairs")
    frame = await _asked(engine, asked, body, "classify", payload, (), len(texts))
    data = [
        {"object": "classification", "index": i, "label": scores[0]["label"], "scores": scores[: body.top_k]}
        for i, scores in enumerate(frame.header["found"])
    ]
    return {"object": "list", "data": data, "model": engine.name, "usage": _usage(frame)}


async def rerank(engines: Engines, body: schemas.RerankRequest, asked: Asked) -> dict[str, Any]:
    """/v1/rerank: documents by how well they fit the query, the best first (Jina's and Cohere's shape)."""
    engine = engines.get(body.model)
    documents = [d if isinstance(d, str) else d.text for d in body.documents]
    _check_count(engines, "documents", len(documents))
    payload = {"query": body.query, "texts": documents}
    frame = await _asked(engine, asked, body, "rerank", payload, (), len(documents))
    scores = frame.header["scores"]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n]
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in order]
    if body.return_documents:
        for result in results:
            result["document"] = {"text": documents[result["index"]]}
    return {"object": "list", "results": results, "model": engine.name, "usage": _usage(frame)}


async def match(engines: Engines, body: schemas.MatchRequest, asked: Asked) -> dict[str, Any]:
    """/v1/match: how probable each prompt is for each image, the most probable first."""
    engine = engines.get(body.model)
    images = [*asked.files, *(_decoded(image, i) for i, image in enumerate(body.images, len(asked.files)))]
    _check_count(engines, "images", len(images))
    _check_count(engines, "prompts", len(body.prompts))
    named = isinstance(body.prompts, Mapping)
    labels = list(body.prompts)
    prompts = list(body.prompts.values()) if isinstance(body.prompts, Mapping) else body.prompts
    payload = {"prompts": prompts, "templates": body.templates}
    frame = await _asked(engine, asked, body, "match", payload, images, len(images))
    data = []
    for i, row in enumerate(_rows(frame)):
        scores = [{"label" if named else "prompt": labels[j], "score": row[j]} for j in np.argsort(-row, kind="stable")]
        data.append({"object": "match", "index": i, "scores": scores})
    return {"object": "list", "data": data, "model": engine.name, "usage": _usage(frame)}


async def _asked(
    engine: Engine,
    asked: Asked,
    body: schemas.Body,
    op: str,
    payload: Mapping[str, Any],
    images: Sequence[bytes],
    items: int,
) -> Frame:
    asked.tally.met(engine, items)
    asked.priority = body.priority or asked.priority
    frame = await engine.ask(
        op,
        {**payload, "images": [len(image) for image in images]} if images else payload,
        b"".join(images),
        priority=asked.priority,
        timeout_s=asked.timeout_s,
    )
    h = frame.header
    asked.tally.tokens_in, asked.tally.queued_s, asked.tally.batch = h["tokens"], h["queued_s"], h["batch"]
    return frame


def _rows(frame: Frame) -> Array:
    return np.frombuffer(frame.body, "<f4").reshape(frame.header["shape"])


def _usage(frame: Frame) -> dict[str, int]:
    return {"prompt_tokens": frame.header["tokens"], "total_tokens": frame.header["tokens"]}


def _texts(engines: Engines, param: str, texts: str | Sequence[str]) -> list[str]:
    found = [texts] if isinstance(texts, str) else list(texts)
    _check_count(engines, param, len(found))
    return found


def _check_count(engines: Engines, param: str, count: int) -> None:
    limit = engines.limits.items
    if not count:
        raise BadRequest(f"{param} is empty", fix="send at least one", param=param)
    if count > limit:
        raise TooLarge(f"{param} holds {count} items; the limit is {limit}", fix="send several requests", param=param)


def _decoded(image: str | schemas.ImagePart, index: int) -> bytes:
    """The file in a data URL. Other URLs are refused: a server that fetches what it is told to is a hole."""
    param = f"images.{index}"
    url: Any = image
    if isinstance(image, schemas.ImagePart):
        url = image.image_url if isinstance(image.image_url, str) else image.image_url.url
    head, comma, data = url.partition(",")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise BadRequest(
            f"image {index} is no data URL", fix="send data:image/png;base64,...; nothing is fetched", param=param
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"image {index} is not valid base64", fix="encode the file's bytes", param=param) from None
