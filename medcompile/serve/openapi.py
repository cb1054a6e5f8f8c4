"""The OpenAPI document: bodies, answers and errors of every route, with examples that work on what is served here."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from medcompile.serve.answers import ANSWERS, ErrorAnswer, HealthAnswer, ModelAnswer, ModelsAnswer
from medcompile.serve.calls import CALLS, Call
from medcompile.serve.engine import Engine
from medcompile.serve.engines import Engines

_REF = "#/components/schemas/{model}"
_NEEDS: Mapping[str, Sequence[str]] = {  # any of these tasks
    "/v1/chat/completions": ("generate",),
    "/v1/completions": ("generate",),
    "/v1/embeddings": ("embed", "text", "image"),
    "/v1/rerank": ("embed", "text", "sequence-classification"),
    "/v1/entities": ("token-classification",),
    "/v1/classify": ("sequence-classification",),
    "/v1/match": ("image",),
}
_ERRORS = {
    "400": "The request can't be honoured: the message says why, and what to do.",
    "401": "No valid key.",
    "403": "The key has no role for this.",
    "404": "No such model.",
    "413": "More than the limit, which the message tells.",
    "429": "Too many requests, or the model's line is full: Retry-After says when to come back.",
    "503": "The model's process is being started again, or the server stops: Retry-After says when to come back.",
    "504": "Not answered in time.",
}
_SHARED = (ErrorAnswer, HealthAnswer, ModelAnswer, ModelsAnswer)


def document(app: FastAPI, engines: Engines, *, with_keys: bool) -> dict[str, Any]:
    made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    every: list[type[BaseModel]] = [*(call.body for call in CALLS.values()), *ANSWERS.values(), *_SHARED]
    names, told = models_json_schema([(model, "validation") for model in every], ref_template=_REF)
    made.setdefault("components", {})["schemas"] = told["$defs"]
    paths: dict[str, Any] = {}
    for call in CALLS.values():
        model = next((e for e in engines if fits(call, e)), None)
        paths[call.url] = {"post": _operation(call, names[call.body, "validation"]["$ref"], model)}
        _name_model(told["$defs"][call.body.__name__], model)
    for path, item in made["paths"].items():
        for operation in item.values():
            answer = _plain_answer(path)
            if answer:
                operation["responses"] = {"200": _json("The answer.", _REF.format(model=answer)), **_errors("404")}
    made["paths"] = paths | made["paths"]
    if with_keys:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return made


def fits(call: Call, engine: Engine) -> bool:
    """Whether the engine's bundle has a task for the call."""
    if call.url == "/v1/chat/completions" and not engine.facts.get("chat"):
        return False
    if call.url == "/v1/match" and "text" not in engine.tasks:
        return False
    return bool(set(_NEEDS[call.url]) & set(engine.tasks))


def _operation(call: Call, ref: str, model: Engine | None) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": {"$ref": ref}}
    if example := example_of(call, model):
        content["example"] = example
    bodies = {"application/json": content}
    if call.url == "/v1/match":
        bodies["multipart/form-data"] = {"schema": _FORM}
    answer = _REF.format(model=ANSWERS[call.url].__name__)
    responses = {"200": _json("The answer.", answer), **_errors(*_ERRORS)}
    if call.generates:
        responses["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "tags": ["models"],
        "summary": call.run.__name__.capitalize(),
        "operationId": call.run.__name__,
        "description": " ".join((call.run.__doc__ or "").partition(":")[2].split()),
        "requestBody": {"required": True, "content": bodies},
        "responses": responses,
        "parameters": [
            {
                "name": "X-Priority",
                "in": "header",
                "required": False,
                "description": "Where the body says no priority.",
                "schema": {"type": "string", "enum": ["emergency", "routine", "background"]},
            }
        ],
    }


def example_of(call: Call, model: Engine | None) -> dict[str, Any] | None:
    """The schema's own example, of a model that is served; None where none fits."""
    extra: Any = call.body.model_config.get("json_schema_extra")
    if model is None or not extra:
        return None
    example: dict[str, Any] = copy.deepcopy(extra["examples"][0])
    return example | {"model": model.name}


def _name_model(schema: dict[str, Any], model: Engine | None) -> None:
    for example in schema.get("examples", ()):
        example["model"] = model.name if model else example["model"]


def _json(description: str, ref: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": {"$ref": ref}}}}


def _errors(*statuses: str) -> dict[str, Any]:
    return {status: _json(_ERRORS[status], _REF.format(model="ErrorAnswer")) for status in statuses}


def _plain_answer(path: str) -> str | None:
    if path.startswith("/health"):
        return "HealthAnswer"
    if path.startswith("/v1/models"):
        return "ModelsAnswer" if path == "/v1/models" else "ModelAnswer"
    return None


_FORM = {
    "type": "object",
    "required": ["model", "images", "prompts"],
    "properties": {
        "model": {"type": "string"},
        "images": {"type": "array", "items": {"type": "string", "format": "binary"}},
        "prompts": {"type": "array", "items": {"type": "string"}},
        "templates": {"type": "array", "items": {"type": "string"}},
        "priority": {"type": "string", "enum": ["emergency", "routine", "background"]},
    },
}
