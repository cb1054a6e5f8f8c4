"""The OpenAPI document: whole, true of the answers, and with examples that work as they stand."""

from __future__ import annotations

import html
import json
import re
import shlex
from typing import Any

import jsonschema
import pytest

from medcompile.serve.calls import CALLS
from tests.serve.servers import Server


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.http.get("/openapi.json").json()
    return found


def schema_of(document: dict[str, Any], reference: str) -> dict[str, Any]:
    return {"$ref": reference, "components": document["components"]}


def test_every_call_has_a_body_an_answer_errors_and_words(document: dict[str, Any]) -> None:
    for url in CALLS:
        operation = document["paths"][url]["post"]
        assert operation["description"]
        assert {"200", "400", "404", "413", "429", "503"} <= set(operation["responses"])
        assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert {"/v1/models", "/health/live", "/health/ready", "/metrics"} <= set(document["paths"])


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [r for value in node.values() for r in references(value)]
        return [r for value in node for r in references(value)] if isinstance(node, list) else []

    found = set(references(document))
    assert len(found) > 20
    for reference in found:
        node: Any = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]


@pytest.mark.parametrize("url", sorted(CALLS))
def test_the_example_works_as_it_stands_and_its_answer_fits_the_schema(
    server: Server, document: dict[str, Any], url: str
) -> None:
    operation = document["paths"][url]["post"]
    example = operation["requestBody"]["content"]["application/json"]["example"]
    response = server.post(url, example)
    assert response.status_code == 200, response.text
    answer = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    jsonschema.validate(response.json(), schema_of(document, answer))
    refused = server.post(url, example | {"model": "nobody"})
    jsonschema.validate(refused.json(), schema_of(document, "#/components/schemas/ErrorAnswer"))


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/llm", "/health/live", "/health/ready"])
def test_plain_answers_fit_their_schemas(server: Server, document: dict[str, Any], path: str) -> None:
    documented = path.replace("/llm", "/{model}")
    operation = document["paths"][documented]["get"]
    reference = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    jsonschema.validate(server.http.get(path).json(), schema_of(document, reference))


def test_the_page_to_read_has_a_command_for_each_call_that_works_as_it_stands(server: Server) -> None:
    answer = server.http.get("/docs")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "script" not in answer.headers["content-security-policy"]
    commands = [shlex.split(html.unescape(found)) for found in re.findall(r"<pre>(.*?)</pre>", answer.text, re.DOTALL)]
    assert {command[1].removeprefix(server.url) for command in commands} == set(CALLS)
    for command in commands:
        body = json.loads(command[command.index("-d") + 1])
        assert server.post(command[1].removeprefix(server.url), body).status_code == 200


def test_the_page_to_read_loads_nothing_and_links_to_what_is_there(server: Server) -> None:
    text = server.http.get("/docs").text
    assert "<script" not in text and "src=" not in text and "<link" not in text
    links = set(re.findall(r'href="#([^"]+)"', text))
    assert len(links) > len(CALLS) and all(f'id="{link}"' in text for link in links)
