"""YAML files with a line and a column for every value, and pydantic's complaints told in those places.

Recipes and data manifests are both read here: plain values only (no tags, no aliases, no duplicate keys), `--set`
overrides laid over them, and every problem kept until the whole file has been judged. What the keys mean is not
known here; that is recipe.py and data/manifest.py.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from medcompile.errors import Problem

MAX_BYTES = 1_000_000
MAX_DEPTH = 24

Keys = tuple[str | int, ...]
"""The way to a value: mapping keys and list indices from the root."""

M = TypeVar("M", bound=BaseModel)


@dataclass
class Document:
    """A YAML file as plain values, where each of them stands, and the problems found so far.

    name: the file as the user wrote it. overrides: (way, the whole `--set ...` text) for values that came from there.
    """

    name: str
    value: Any = None
    overrides: list[tuple[Keys, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    key_marks: dict[Keys, tuple[int, int]] = field(default_factory=dict)
    value_marks: dict[Keys, tuple[int, int]] = field(default_factory=dict)

    def report(self, way: Keys, message: str, fix: str = "", *, at_key: bool = False) -> None:
        """Add a problem at the value that way leads to (at_key: at its key), or at its nearest parent that is there."""
        for length in range(len(way), -1, -1):
            here = way[:length]
            for target, text in reversed(self.overrides):
                if target == here or (target[:length] == here and here not in self.value_marks):
                    self.problems.append(Problem(text, 0, 0, message, fix))
                    return
            marks = self.key_marks if at_key and here in self.key_marks else self.value_marks
            if here in marks:
                line, column = marks[here]
                self.problems.append(Problem(self.name, line, column, message, fix))
                return
            at_key = True  # a missing value is shown at the key of the mapping that lacks it
        self.problems.append(Problem(self.name, 0, 0, message, fix))

    def in_order(self) -> tuple[Problem, ...]:
        """Every problem once, in file order; those of overrides last."""
        return tuple(sorted(dict.fromkeys(self.problems), key=lambda p: (p.path != self.name, p.line, p.column)))


def read(path: Path, name: str) -> Document:
    """The document in the file at path. What keeps it from being read at all stands in .problems, and value is None."""
    document = Document(name)
    text = _text(path, document)
    if text is not None:
        _parse(text, document)
        if document.value is None and not document.problems:
            document.report((), "the file is empty", fix="start from a file in recipes/ or calibration/")
    return document


def override(document: Document, settings: Sequence[str]) -> None:
    """Lay `key.path=value` settings over the document, in order; value is YAML, a number in the path a list index."""
    for setting in settings:
        label = f"--set {setting}"
        dotted, equals, text = setting.partition("=")
        parts = dotted.strip().split(".")
        if not equals or not all(parts):
            document.problems.append(
                Problem(label, 0, 0, "is not key.path=value", "write for example --set budget.f1.max_drop=0.02")
            )
            continue
        parsed = Document(label)
        _parse(text, parsed)
        if parsed.problems:
            document.problems += [Problem(label, 0, 0, p.message, p.fix) for p in parsed.problems]
            continue
        way = _place(document, parts, parsed.value, label)
        if way is not None:
            for marks in (document.key_marks, document.value_marks):
                for inside in [w for w in marks if w[: len(way)] == way]:
                    del marks[inside]
            document.overrides.append((way, label))


def validate(model: type[M], document: Document) -> M | None:
    """document.value as a model, or None after reporting everything pydantic found wrong with it."""
    if not isinstance(document.value, dict):
        document.report((), f"expected keys and values, found {_kind(document.value)}", "write `key: value` lines")
        return None
    try:
        return model.model_validate(document.value)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            _translate(model, document, detail)
    return None


def nearest(word: str, words: Iterable[str]) -> str:
    """ ". Did you mean 'x'?" for the word most like the given one, or nothing."""
    by_lower = {w.lower(): w for w in words}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f". Did you mean {by_lower[found[0]]!r}?" if found else ""


def failure(message: str, fix: str) -> PydanticCustomError:
    """What a field's own validator raises, so that validate() reports it with its fix."""
    return PydanticCustomError("medcompile", "{message}", {"message": message, "fix": fix})


def shown(value: object) -> str:
    """A value as it may stand in a message: short, on one line."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(path: Path, document: Document) -> str | None:
    """The file's text, or None after reporting why there is none."""
    if path.is_dir():
        document.report((), "is a folder, not a file", "name the YAML file inside it")
        return None
    if not path.exists():
        beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        document.report((), f"no such file{nearest(path.name, beside)}", "check the path")
        return None
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        document.report((), f"cannot be read: {error.strerror}", "check the file's permissions")
        return None
    if len(raw) > MAX_BYTES:
        document.report((), "is larger than 1 MB", "this is no recipe or manifest; data belongs in its own file")
        return None
    if b"\0" in raw:
        document.report((), "is a binary file, not YAML text", "name a .yaml file, saved as UTF-8")
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _position(raw[: error.start].decode("utf-8"), error.start)
        document.problems.append(Problem(document.name, line, column, "is not UTF-8 text here", "save it as UTF-8"))
        return None


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars only: yes and on are words, 1e-3 is a number, dates are text. No aliases."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not used here", problem_mark=event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="is nested too deeply", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])


def _parse(text: str, document: Document) -> None:
    loader = _Loader("")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line, column = _position(text, error.position)
        document.problems.append(
            Problem(document.name, line, column, "a control character that YAML does not allow", "delete it")
        )
        return
    except yaml.MarkedYAMLError as error:
        document.problems.append(_syntax_problem(document.name, text, error))
        return
    finally:
        loader.dispose()
    document.value = _construct(node, (), document)


def _syntax_problem(name: str, text: str, error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    source = text.split("\n")[line - 1] if line <= text.count("\n") + 1 else ""
    if "\t" in source[: len(source) - len(source.lstrip())] or source[column - 1 : column] == "\t":
        return Problem(name, line, column, "a tab; YAML is indented with spaces", "replace the tab by spaces")
    message = error.problem or "not valid YAML"
    if error.context and error.context_mark:
        message = f"{error.context}: {message} (begun on line {error.context_mark.line + 1})"
    if "alias" in message:
        return Problem(name, line, column, message, "write the value out where it is needed")
    return Problem(name, line, column, f"not valid YAML: {message}", "check colons, quotes, brackets and indentation")


def _construct(node: yaml.Node | None, way: Keys, document: Document) -> Any:
    """The plain value of a node, noting where it stands; what can't be a plain value is reported and becomes None."""
    if node is None:
        return None
    document.value_marks[way] = (node.start_mark.line + 1, node.start_mark.column + 1)
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if isinstance(node, yaml.MappingNode) and kind == "map":
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line, column = key_node.start_mark.line + 1, key_node.start_mark.column + 1
            if not isinstance(key_node, yaml.ScalarNode):
                document.problems.append(Problem(document.name, line, column, "a key must be a word", "use a word"))
                continue
            key = key_node.value
            if key in mapping:
                first = document.key_marks[(*way, key)][0]
                document.problems.append(
                    Problem(document.name, line, column, f"key {key!r} again; line {first} has it", "keep one of them")
                )
                continue
            document.key_marks[(*way, key)] = (line, column)
            mapping[key] = _construct(value_node, (*way, key), document)
        return mapping
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_construct(item, (*way, i), document) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        read = _SCALARS.get(kind)
        try:
            if read is not None:
                return read(node.value)
        except ValueError:
            pass  # an explicit tag over text of another type: reported below
    if kind in _SCALARS and isinstance(node, yaml.ScalarNode):
        document.report(way, f"{shown(node.value)} can't be read as {kind}", "write a plain value")
    else:
        document.report(way, f"tag {shown(node.tag)} is not used here", "remove the tag")
    return None


_SCALARS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "null": lambda _: None,
    "bool": lambda text: text.lower() == "true",
}


def _place(document: Document, parts: list[str], value: Any, label: str) -> Keys | None:
    """Put value where parts lead, making mappings on the way; its way, or None after reporting why it can't go there.

    Names may hold dots, so at each mapping the longest run of parts that is a key there wins.
    """
    if document.value is None:
        document.value = {}
    here, way = document.value, ()  # type: tuple[Any, Keys]
    while True:
        if isinstance(here, list):
            step: str | int = int(parts[0]) if parts[0].isdigit() else -1
            if not 0 <= int(step) <= len(here) - (len(parts) > 1):
                end = f"an index from 0 to {len(here)}"
                document.problems.append(
                    Problem(label, 0, 0, f"{_dotted(way)} is a list; {parts[0]!r} is not {end}", "count from 0")
                )
                return None
            parts = parts[1:]
        elif isinstance(here, dict):
            length = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in here), 1)
            step, parts = ".".join(parts[:length]), parts[length:]
        else:
            document.problems.append(
                Problem(label, 0, 0, f"{_dotted(way)} is {_kind(here)}, which has no keys", f"set {_dotted(way)} whole")
            )
            return None
        way = (*way, step)
        if not parts:
            if isinstance(here, list) and step == len(here):
                here.append(value)
            else:
                here[step] = value
            return way
        if isinstance(here, dict) and here.get(str(step)) is None:
            here[str(step)] = {}
        here = here[step]


def _translate(model: type[BaseModel], document: Document, detail: Mapping[str, Any]) -> None:
    """One of pydantic's complaints, in our words and at its place."""
    way: Keys = detail["loc"]
    kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
    name = _dotted(way)
    if way[-1:] == ("[key]",):
        way, kind = way[:-1], "extra_forbidden"
    if kind == "extra_forbidden":
        allowed = _keys_of(_type_at(model, way[:-1]))
        hint = nearest(str(way[-1]), allowed)
        home = (
            next((s for s in _sections(model) if way[-1] in _keys_of(_type_at(model, s))), None) if not hint else None
        )
        message = f"unknown key {str(way[-1])!r} in {_dotted(way[:-1])}{hint}"
        fix = f"move it to {_dotted(home)}" if home is not None else f"keys here: {', '.join(allowed)}"
        document.report(way, message, fix, at_key=True)
    elif kind == "missing":
        document.report(
            way, f"missing key {str(way[-1])!r} in {_dotted(way[:-1])}", f"add {way[-1]}: {_example(model, way)}"
        )
    elif kind == "literal_error":
        options = [str(o) for o in get_args(_type_at(model, way))]
        quoted = '. Write "null" in quotes.' if given is None and "null" in options else ""
        message = f"{name}: {shown(given)} is not known here{nearest(str(given), options)}{quoted}"
        document.report(way, message, f"choose from: {', '.join(options)}")
    elif kind == "medcompile":
        document.report(way, f"{name}: {detail['msg']}", context["fix"])
    else:
        bounds = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
        limit = next((f"{words} {context[b]:g}" for b, words in bounds.items() if b in context), None)
        if kind in {"too_short", "string_too_short"}:
            message, fix = f"{name} is empty", f"write {name}: {_example(model, way)}"
        elif limit is not None:
            message, fix = f"{name}: {shown(given)} is not {limit}", f"write for example {_example(model, way)}"
        else:
            wanted = _WANTED.get(kind, detail["msg"])
            message, fix = f"{name} must be {wanted}, not {_kind(given)}", f"write {name}: {_example(model, way)}"
        document.report(way, message, fix)


_WANTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
}


def _kind(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool() | int() | float():
            return shown(value)
        case str():
            return f"the text {shown(value)}"
        case list():
            return "a list"
    return "a mapping"


def _dotted(way: Keys) -> str:
    return ".".join(str(w) for w in way) or "the file"


def _type_at(model: type[BaseModel], way: Keys) -> Any:
    """The declared type of the value at way, Optional taken off; None where nothing is declared."""
    declared: Any = model
    for step in way:
        if isinstance(declared, type) and issubclass(declared, BaseModel):
            found = [f.annotation for n, f in declared.model_fields.items() if (f.alias or n) == step]
            declared = found[0] if found else None
        else:
            declared = get_args(declared)[-1] if get_args(declared) else None
        if get_origin(declared) in {Union, UnionType}:
            declared = next(a for a in get_args(declared) if a is not type(None))
    return declared


def _keys_of(declared: Any) -> list[str]:
    if isinstance(declared, type) and issubclass(declared, BaseModel):
        return [f.alias or n for n, f in declared.model_fields.items()]
    if get_origin(declared) is dict:
        return [str(name) for name in get_args(get_args(declared)[0])]
    return []


def _sections(model: type[BaseModel]) -> list[Keys]:
    """The root and its sections: where a key that stands in the wrong place may belong."""
    return [(), *((f.alias or n,) for n, f in model.model_fields.items())]


def _example(model: type[BaseModel], way: Keys) -> str:
    parent, declared_type = _type_at(model, way[:-1]), _type_at(model, way)
    if isinstance(parent, type) and issubclass(parent, BaseModel):
        for name, declared in parent.model_fields.items():
            if (declared.alias or name) == way[-1] and declared.examples:
                return str(declared.examples[0])
    return "{}" if isinstance(declared_type, type) and issubclass(declared_type, BaseModel) else "..."


def _position(text: str, offset: int) -> tuple[int, int]:
    before = text[:offset]
    return before.count("\n") + 1, len(before) - before.rfind("\n")
