"""The evidence report: report.html, one page that a reviewer reads offline, and evidence.json, which says the same.

Both are made from one set of facts (facts.py) after all else of a bundle is written, and before its manifest, whose
digests cover them. The same bundle gives the same bytes. The page needs no network and runs no script; it quotes
numbers, names and digests, and never an item of the data.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcompile import charts, flips, page
from medcompile.bundle import EVIDENCE, Contents
from medcompile.report import figures, words
from medcompile.report.facts import CALIBRATION, Facts, evidence_text, gather

__all__ = ["CALIBRATION", "REPORT", "render", "texts"]

if TYPE_CHECKING:
    from jinja2 import Environment

REPORT = "report.html"
_IDS_SHOWN = 200


def texts(contents: Contents, root: Path) -> dict[str, str]:
    """What a bundle says of itself in words, by path: evidence.json and report.html.

    root: the folder that holds its other files. Raises BundleError where one of those can't be read.
    """
    facts = gather(contents, root)
    told = words.tell(facts)
    return {EVIDENCE: evidence_text(facts, told), REPORT: render(facts, told)}


def render(facts: Facts, told: words.Told) -> str:
    """The page."""
    several = len({a.graph for a in facts.artifacts}) > 1
    template = resources.files(__name__).joinpath("report.html.j2").read_text(encoding="utf-8")
    body = (
        _environment()
        .from_string(template)
        .render(
            facts=facts,
            told=told,
            figures=figures.draw(facts),
            commands=words.commands(facts),
            several=several,
            who={a.path: f"{a.variant} on {a.target.name}{f', {a.graph}' if several else ''}" for a in facts.artifacts},
            ids_shown=_IDS_SHOWN,
            most_flips=flips.MOST,
        )
    )
    return page.document(f"{facts.name}: evidence", body, page.STYLE + charts.STYLE)


def _environment() -> Environment:
    """Escaping is page.escape's, for every value that is not HTML of ours already."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        return value if isinstance(value, Markup) else Markup(page.escape(value))

    def exact(value: float | None, digits: int = 4) -> Markup:
        """A figure as a reader wants it, with all of its digits for machines."""
        if value is None:
            return Markup("-")
        return Markup(f'<data value="{page.escape(value)}">{page.escape(page.number(value, digits))}</data>')

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=finalize, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": page.number, "exact": exact, "html": Markup, "settings": words.settings}
    return environment
