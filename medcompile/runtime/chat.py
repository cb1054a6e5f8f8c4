"""Chat templates: a conversation becomes the one text that a model was taught to answer.

Templates come with checkpoints and are programs, so they run in jinja2's immutable sandbox and see plain data only.
Names, filters and white space are those of transformers' apply_chat_template, without transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from medcompile.errors import InputError

if TYPE_CHECKING:
    from jinja2 import Environment

Message = Mapping[str, Any]
"""At least role and content, as in OpenAI's interface; what else a template reads is up to the template."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names for what a model thought before it answered; templates read the first two."""


class ChatTemplate:
    """A compiled template. names: what it may call by name: bos_token, eos_token and the other special tokens.

    Raises InputError where it is no valid template.
    """

    def __init__(self, source: str, names: Mapping[str, str]) -> None:
        from jinja2 import TemplateSyntaxError

        self._names = dict(names)
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise InputError(
                f"chat template, line {error.lineno}: {error.message}", fix="rebuild from a checkpoint with a valid one"
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text, by default up to where the model's answer begins.

        tools: JSON schemas. variables: anything else the template reads, such as enable_thinking.
        Raises InputError where the template refuses the conversation.
        """
        from jinja2 import TemplateError

        if not messages or not all(isinstance(m, Mapping) and "role" in m for m in messages):
            raise InputError("a conversation is a list of messages, each with a role", fix='[{"role": "user", ...}]')
        given = {
            **self._names,
            **(variables or {}),
            "messages": [_with_reasoning(m) for m in messages],
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(_plain(given))
        except (TemplateError, TypeError, ValueError, KeyError, OverflowError) as error:  # the template's own doing
            raise InputError(
                f"the chat template refuses this conversation: {error}", fix="change the roles or their order"
            ) from error


def _environment() -> Environment:
    import jinja2.ext
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.nodes import Node, Scope
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks answers for training; here its content simply stands."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 says so)

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class SafeNamespace(Namespace):
        """Without underscored names, by which a template could reach Python's internals."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may pass self=
            self, *rest = args
            names = dict(*rest, **kwargs)
            for name in names:
                _check(name)
            Namespace.__init__(self, names)

        def __setitem__(self, name: str, value: Any) -> None:
            _check(name)
            Namespace.__setitem__(self, name, value)

    class MakeDict:
        """What a template may do with dict; the type itself has more."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, keys: Sequence[Any], value: Any = None) -> dict[Any, Any]:
            return dict.fromkeys(keys, value)

    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a template's namespace takes no underscored name, such as {name!r}")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """jinja2's own would escape HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, namespace=SafeNamespace)
    environment.globals["dict"] = MakeDict()
    return environment


def _with_reasoning(message: Message) -> Message:
    """Under every name that templates read it by."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """JSON types alone, copied: objects have methods that a sandbox does not know to be dangerous."""
    if value is None or type(value) in {str, int, float, bool}:
        return value
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value)) if isinstance(value, tuple) else [_plain(v) for v in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"
