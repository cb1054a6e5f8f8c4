"""Reads a page as a checker does: elements nest, ids are unique and pointed at, headings go down by one."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

_VOID = {"meta", "br"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def all(self, *tags: str) -> list[Element]:
        """Every element below with one of these tags, in order."""
        found = []
        for child in self.children:
            found += [child] if child.tag in tags else []
            found += child.all(*tags)
        return found

    @property
    def words(self) -> str:
        """Its text and that of all below, with single spaces."""
        return " ".join(" ".join([self.text, *(c.words for c in self.children)]).split())

    def values(self) -> list[Any]:
        """The exact figures below."""
        return [_number(e.attributes["value"]) for e in self.all("data")]


class Page(HTMLParser):
    """The tree below root. problems: what a checker would object to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.problems: list[str] = []
        self._open = [self.root]
        self.feed(text)
        self.close()
        if len(self._open) > 1:
            self.problems.append(f"not closed: {[e.tag for e in self._open[1:]]}")
        self._check(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        if len(set(names)) < len(names):
            self.problems.append(f"<{tag}> has an attribute twice")
        element = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(element)
        if tag not in _VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if self._open[-1].tag == tag:
            self._open.pop()
        else:
            self.problems.append(f"</{tag}> closes <{self._open[-1].tag}>")

    def handle_data(self, data: str) -> None:
        self._open[-1].text += data

    def _check(self, text: str) -> None:
        everything = self.root.all(*{e.tag for e in _walk(self.root)})
        ids = [e.attributes["id"] for e in everything if "id" in e.attributes]
        self.problems += [f"id {i} twice" for i in set(ids) if ids.count(i) > 1]
        for e in everything:
            wanted = e.attributes.get("aria-labelledby", "").split()
            wanted += [e.attributes["href"].removeprefix("#")] if "href" in e.attributes else []
            self.problems += [f"<{e.tag}> points at {w}" for w in wanted if w not in ids]
        levels = [int(e.tag[1]) for e in everything if re.fullmatch(r"h[1-6]", e.tag)]
        if levels[:1] != [1] or levels.count(1) != 1:
            self.problems.append(f"headings begin with {levels[:1]}")
        self.problems += [f"h{b} after h{a}" for a, b in pairwise(levels) if b > a + 1]
        for table in self.root.all("table"):
            if not table.all("caption"):
                self.problems.append("a table without a caption")
            self.problems += ["a table header without a scope" for h in table.all("th") if "scope" not in h.attributes]
            columns = {len(r.all("th", "td")) for r in table.all("tr")} - {1}
            if len(columns) > 1:
                self.problems.append(f"rows of {columns} cells in {table.all('caption')[0].words!r}")
        for svg in self.root.all("svg"):
            if svg.attributes.get("role") != "img" or not svg.attributes.get("aria-labelledby"):
                self.problems.append("a drawing without a name")
        if re.search(r"https?:|//|url\(|@import|<script|\son\w+=", re.sub(r"<(code|td|li|dd|p)[^>]*>[^<]*", "", text)):
            self.problems.append("something that a browser would fetch or run")


def _walk(element: Element) -> list[Element]:
    return [element, *(e for child in element.children for e in _walk(child))]


def _number(text: str) -> Any:
    return float(text) if text in ("inf", "-inf", "nan") else json.loads(text)
