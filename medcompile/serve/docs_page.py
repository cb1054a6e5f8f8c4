"""/docs: the OpenAPI document as a page to read. It runs no script and loads nothing, as closed networks need it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from medcompile import page
from medcompile.page import escape

POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
"""What a browser may do with it: the style is in the page."""
_KEY = "Authorization: Bearer $KEY"


def html(document: Mapping[str, Any], base_url: str) -> str:
    """The page. base_url: where the examples ask, without a slash at its end."""
    info, keyed = document["info"], bool(document.get("security"))
    routes = [(p, verb, o) for p, item in document["paths"].items() for verb, o in item.items()]
    schemas = document["components"]["schemas"]
    links = "".join(f'<li><a href="#{_anchor(p, verb)}">{verb.upper()} {escape(p)}</a></li>' for p, verb, _ in routes)
    parts = [
        '<a class="skip" href="#main">To the content</a>',
        f"<header><h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['summary'])}</p>",
        '<p>The same for programs: <a href="openapi.json">openapi.json</a>.</p></header>',
        f'<nav aria-label="Routes"><ul>{links}</ul></nav><main id="main">',
        *(_operation(path, verb, told, schemas, base_url, keyed=keyed) for path, verb, told in routes),
        "</main>",
    ]
    return page.document(f"{info['title']}: routes", "\n".join(parts))


def curl(url: str, example: Mapping[str, Any], *, keyed: bool) -> str:
    """A command that asks with this body."""
    key = f' \\\n  -H "{_KEY}"' if keyed else ""
    body = shlex.quote(json.dumps(example, ensure_ascii=False, indent=2))
    return f"curl {shlex.quote(url)} -H 'Content-Type: application/json'{key} \\\n  -d {body}"


def _operation(
    path: str, verb: str, told: Mapping[str, Any], schemas: Mapping[str, Any], base_url: str, *, keyed: bool
) -> str:
    parts = [
        f'<section><h2 id="{_anchor(path, verb)}">{verb.upper()} <code>{escape(path)}</code></h2>',
        f"<p>{escape(told.get('description', ''))}</p>",
    ]
    for media, content in told.get("requestBody", {}).get("content", {}).items():
        schema = content["schema"]
        fields = schemas[_named(schema)] if "$ref" in schema else schema
        if "example" in content:
            parts.append(f"<pre>{escape(curl(base_url + path, content['example'], keyed=keyed))}</pre>")
        elif media == "application/json":
            parts.append("<p>No bundle that is served here can be asked this.</p>")
        parts.append(page.table(f"Body, {media}", ("field", "type", "needed", "what it is"), _fields(fields)))
    rows = [(status, _answer(answer), answer["description"]) for status, answer in told["responses"].items()]
    parts.append(page.table("Answers", ("status", "body", "when"), rows))
    return "\n".join((*parts, "</section>"))


def _fields(schema: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Those that one must give first, then those that are explained, then the others."""
    needed = set(schema.get("required", ()))
    order = sorted(schema["properties"].items(), key=lambda f: (f[0] not in needed, "description" not in f[1]))
    for name, field in order:
        default = field.get("default")
        when = "yes" if name in needed else "no" if default is None else f"no: {json.dumps(default)}"
        yield name, _type(field), when, field.get("description", "")


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return _named(schema)
    if "anyOf" in schema:
        return " or ".join(t for each in schema["anyOf"] if (t := _type(each)) != "null")
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    kind = str(schema.get("type", "any"))
    return f"{kind} of {_type(schema['items'])}" if "items" in schema else kind


def _answer(answer: Mapping[str, Any]) -> str:
    told = answer.get("content", {}).items()
    return ", ".join(_named(c["schema"]) if "$ref" in c.get("schema", {}) else media for media, c in told)


def _named(reference: Mapping[str, Any]) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _anchor(path: str, verb: str) -> str:
    return escape(verb + path.replace("/", "-").replace("{", "").replace("}", ""))
