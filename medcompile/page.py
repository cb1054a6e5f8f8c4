"""What the project's HTML pages share: their frame, colours, escaping, figures as text, tables. Standard library only.

A page is one file that needs no network and runs no script. Drawings are charts.py's; what a page says is its writer's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape as _html

LIGHT = {
    "--paper": "#ffffff",
    "--ink": "#1a1f26",
    "--faint": "#565e6a",
    "--grid": "#d5dae1",
    "--k0": "#0b5cad",
    "--k1": "#b3261e",
    "--k2": "#00695c",
    "--k3": "#8a4b00",
    "--k4": "#6a3fa0",
    "--k5": "#3d4451",
}
DARK = {
    "--paper": "#14181f",
    "--ink": "#eceff4",
    "--faint": "#aab3c0",
    "--grid": "#3a424e",
    "--k0": "#7cb8ff",
    "--k1": "#ff9c8f",
    "--k2": "#5fd6c2",
    "--k3": "#f0b35f",
    "--k4": "#c9a8ff",
    "--k5": "#c3c9d4",
}
"""Text and marks have a contrast of 4.5 or more against --paper; --grid is decoration."""


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"{name}:{colour};" for name, colour in colours.items())


STYLE = (
    f":root{{color-scheme:light;{_variables(LIGHT)}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{color-scheme:dark;{_variables(DARK)}}}}}\n"
    """*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
header,main,footer,nav{max-width:66rem;margin:0 auto;padding:0 1.25rem}
h1,h2,h3{line-height:1.25;break-after:avoid}
h2{margin-top:2.5rem;padding-top:.75rem;border-top:1px solid var(--grid)}
a{color:var(--k0)}
:focus-visible{outline:3px solid var(--k0);outline-offset:2px}
.skip{position:absolute;left:-100rem}
.skip:focus{position:static}
.wide{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.875rem}
caption{text-align:left;font-weight:600;padding:.25rem 0}
th,td{text-align:left;vertical-align:top;padding:.25rem .75rem .25rem 0;border-bottom:1px solid var(--grid)}
td{font-variant-numeric:tabular-nums}
.dense{font-size:.8125rem}
.dense th,.dense td{padding-right:.5rem}
.verdict{white-space:nowrap}
.headline{font-size:1.125rem}
code,pre{font-family:ui-monospace,monospace;font-size:.875em;overflow-wrap:anywhere}
pre{padding:.75rem;border:1px solid var(--grid);overflow-x:auto;white-space:pre-wrap}
summary{cursor:pointer}
.faint{color:var(--faint)}
@page{size:A4;margin:16mm}
@media print{body{font-size:10pt}header,main,footer{max-width:none;padding:0}
.skip,nav{display:none}.wide{overflow:visible}
table{font-size:8pt}.dense{font-size:6.5pt}
tr{break-inside:avoid}thead{display:table-header-group}a{color:inherit;text-decoration:none}}
"""
)
"""Colours follow the reader's light or dark; print is light."""

_CONTROLS = (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
_READABLE = dict.fromkeys(_CONTROLS, "\ufffd") | dict.fromkeys(map(ord, "\t\n\r"), " ")


def document(title: str, body: str, style: str = STYLE) -> str:
    """A whole page around body, which is HTML; its policy lets a browser fetch and run nothing. title is escaped."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def escape(text: object) -> str:
    """text for HTML, in an element or an attribute; control characters and those that turn the line become U+FFFD."""
    return _html(str(text).translate(_READABLE), quote=True)


def number(value: float | None, digits: int = 4) -> str:
    """value to that many significant digits; whole numbers in full, with commas."""
    if value is None:
        return "-"
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "-infinite"
    if isinstance(value, int):
        return f"{value:,}"
    if 10**digits <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}".replace("e-0", "e-") if value else "0"


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first cell of each row heads it. Everything is escaped."""
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(c)}</td>" for c in row[1:]) + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="wide" role="group" aria-label="{escape(caption)}, as a table" tabindex="0"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>\n"
    )
