"""Charts: plain numbers to inline SVG, as strings that a page puts where it likes. Standard library only, no script.

Every chart is a <figure>: a caption, the drawing with its title and description for those who can't see it, and the
same numbers as a table. Kinds differ by shape and dash, not by colour alone; colours are page.STYLE's variables, light
and dark. The same numbers always give the same bytes. What the numbers mean is the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from medcompile.page import escape, number, table

_DASHES = ("none", "7 4", "2 3", "9 3 2 3", "12 5", "4 2")
_KINDS = len(_DASHES)
STYLE = (
    """.chart{margin:1.5rem 0;break-inside:avoid}
.chart figcaption{margin-bottom:.5rem}
.chart .plot{overflow-x:auto}
.chart svg{display:block;width:100%;min-width:36rem;max-width:52rem;height:auto;font:12px system-ui,sans-serif}
.chart text{fill:var(--ink);paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
.chart .faint{fill:var(--faint)}
.chart .end{text-anchor:end}
.chart .middle{text-anchor:middle}
.chart .grid{stroke:var(--grid);stroke-width:1;fill:none}
.chart .axis{stroke:var(--faint);stroke-width:1;fill:none}
.chart .halo{stroke:var(--paper);stroke-width:4;fill:none}
.chart .limit{stroke:var(--ink);stroke-width:2;stroke-dasharray:6 4;fill:none}
.chart .cell{fill:var(--ink);stroke:var(--paper)}
.chart .none{fill:none;stroke:var(--grid)}
"""
    + "".join(
        f".chart .m{k}{{fill:var(--k{k});stroke:var(--k{k});stroke-width:1.5}}"
        f".chart .l{k}{{fill:none;stroke:var(--k{k});stroke-width:2;stroke-dasharray:{dash}}}\n"
        for k, dash in enumerate(_DASHES)
    )
    + ".chart .open{fill:var(--paper)}\n@media print{.chart svg{min-width:0}.chart .plot{overflow:visible}}\n"
)
"""The charts' style sheet, to stand once on a page after page.STYLE."""

_WIDTH = 720.0
_MOST = 1e150  # what is beyond is as good as infinite, and differences stay finite
_LETTER = 6.6  # average width of a letter of 12 px


@dataclass(frozen=True)
class Caption:
    """key: unique on the page, an HTML id. text: what to see in the chart, in a sentence or two."""

    key: str
    title: str
    text: str


@dataclass(frozen=True)
class Axis:
    """label names the quantity and its unit. log: values that are not above 0 are then only in the table."""

    label: str
    log: bool = False


@dataclass(frozen=True)
class Limit:
    """A line that is not to be crossed, or a cut: its place on the axis, and its name."""

    value: float
    label: str


@dataclass(frozen=True)
class Dot:
    """A point of a scatter plot. kind: what its shape tells."""

    x: float
    y: float
    label: str
    kind: str = ""


@dataclass(frozen=True)
class Series:
    """A line through points (x, y), in the order given."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Bar:
    """A row: an estimate with its interval, where it has one, and a limit of its own. An infinite end is an arrow."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    kind: str = ""


def scatter(
    caption: Caption, dots: Sequence[Dot], x: Axis, y: Axis, limit: Limit | None = None, kinds: Sequence[str] = ()
) -> str:
    """Dots with their labels, where there is room for one (first come first), and a limit on y.

    kinds: the order in which shapes are given out; by appearance where it names none.
    """
    order = _order(kinds, (d.kind for d in dots))
    legend, top = _legend([k for k in order if k], order, limit.label if limit else "")
    plot = _Plot.of([(d.x, d.y) for d in dots], x, y, top, limit)
    drawn = [d for d in dots if plot.holds(d.x, d.y)]
    body = [*legend, *plot.frame(x, y, limit)]
    taken = [(plot.x(d.x) - 6, plot.y(d.y) - 6, plot.x(d.x) + 6, plot.y(d.y) + 6) for d in drawn]
    for dot in drawn:
        at = plot.x(dot.x), plot.y(dot.y)
        said = f"{dot.label}: {number(dot.x)}, {number(dot.y)}"
        body.append(f"<g><title>{escape(said)}</title>{_marker(order.index(dot.kind), *at)}</g>")
        body += _placed(dot.label, at, taken, plot)
    columns = ("Name", *(["Kind"] if any(order) else []), x.label, y.label)
    rows = [(d.label, *([d.kind] if any(order) else []), number(d.x), number(d.y)) for d in dots]
    return _figure(caption, plot.bottom + 46, body, columns, rows)


def lines(caption: Caption, series: Sequence[Series], x: Axis, y: Axis, limit: Limit | None = None) -> str:
    """One line for each series, told apart by dash and marker, and a limit on y."""
    names = [s.name for s in series]
    legend, top = _legend(names, names, limit.label if limit else "", line=True)
    plot = _Plot.of([p for s in series for p in s.points], x, y, top, limit)
    body = [*legend, *plot.frame(x, y, limit)]
    for k, one in enumerate(series):
        places = [(plot.x(a), plot.y(b)) for a, b in one.points if plot.holds(a, b)]
        if places:
            path = "L".join(f"{_px(a)} {_px(b)}" for a, b in places)
            body.append(f'<path class="l{k % _KINDS}" d="M{path}"/>')
        body += [_marker(k, a, b) for a, b in places]
    rows = [(s.name, number(a), number(b)) for s in series for a, b in s.points]
    return _figure(caption, plot.bottom + 46, body, ("Series", x.label, y.label), rows)


def bars(caption: Caption, rows: Sequence[Bar], axis: Axis, kinds: Sequence[str] = ()) -> str:
    """A bar from zero (of a log axis: from its low end) for each row, with its interval and its limit."""
    return _rows(caption, rows, axis, kinds, "limit", filled=True)


def forest(caption: Caption, rows: Sequence[Bar], axis: Axis, kinds: Sequence[str] = ()) -> str:
    """A mark for each row's estimate on its interval, a line at zero, and a dashed one at its limit, the margin."""
    return _rows(caption, rows, axis, kinds, "margin", filled=False)


def histogram(
    caption: Caption, edges: Sequence[float], counts: Sequence[int], x: Axis, y: Axis, cuts: Sequence[Limit] = ()
) -> str:
    """counts[i] values lie from edges[i] to edges[i + 1]; cuts are marked by dashed lines."""
    base = 1.0 if y.log else 0.0
    tops = [float(c) for c in counts]
    corners = [(at, base) for at in (*edges, *(c.value for c in cuts))] + [(edges[0], top) for top in tops]
    plot = _Plot.of(corners, x, y, 12.0 + 14 * len(cuts), None)
    body = plot.frame(x, y, None)
    for low, high, count in zip(edges[:-1], edges[1:], tops, strict=True):
        if plot.holds(low, max(count, base)) and plot.holds(high, base):
            left, right, head = plot.x(low), plot.x(high), plot.y(max(count, base))
            size = f'width="{_px(max(right - left, 0.5))}" height="{_px(plot.bottom - head)}"'
            body.append(f'<rect class="m0" stroke="none" x="{_px(left)}" y="{_px(head)}" {size}/>')
    for k, cut in enumerate(c for c in cuts if _drawable(c.value, x)):
        at, level = plot.x(cut.value), 12.0 + 14 * k
        side = "end" if at > _WIDTH / 2 else ""
        body.append(f'<path class="limit" d="M{_px(at)} {_px(level)}V{_px(plot.bottom)}"/>')
        body.append(_text(cut.label, at + (-5 if side else 5), level + 4, side))
    table = [(f"{number(a)} to {number(b)}", number(c)) for a, b, c in zip(edges[:-1], edges[1:], counts, strict=True)]
    table += [(cut.label, f"at {number(cut.value)}") for cut in cuts]
    return _figure(caption, plot.bottom + 46, body, (x.label, y.label), table)


def heat(
    caption: Caption, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], axis: Axis
) -> str:
    """A strip of cells for each row, of a stronger shade where values[row][column] is larger; empty where it is None.

    Columns are numbered; their names are in the table.
    """
    known = [v for row in values for v in row if v is not None and _drawable(v, axis)]
    steps = 5 if known and min(known) < max(known) else min(len(known), 1)
    scale = _Scale.of(known, axis, 0, 5, rounded=False)
    left = _column(rows)
    wide = min((_WIDTH - left - 10) / max(len(columns), 1), 44.0)
    body, y = [], 12.0
    for name, row in zip(rows, values, strict=True):
        body.append(_text(name, left - 8, y + 16, "end"))
        for k, (column, value) in enumerate(zip(columns, row, strict=True)):
            box = f'x="{_px(left + k * wide)}" y="{_px(y)}" width="{_px(wide)}" height="24"'
            drawn = value is not None and _drawable(value, axis)
            shade = f'class="cell" fill-opacity="{_shade(value, scale)}"' if drawn else 'class="none"'
            body.append(f"<rect {shade} {box}><title>{escape(f'{column}: {number(value)}')}</title></rect>")
        y += 28
    every = max(1, math.ceil(24 / wide))
    numbered = range(0, len(columns), every)
    body += [_text(str(k + 1), left + (k + 0.5) * wide, y + 10, "middle faint") for k in numbered]
    y += 34
    body.append(_text(f"{axis.label}:", 12, y + 11))
    at = 30 + _LETTER * len(axis.label)
    for step in range(steps):
        low, high = (scale.back(step), scale.back(step + 1)) if steps > 1 else (known[0], known[0])
        told = f"{number(low, 2)} to {number(high, 2)}" if steps > 1 else number(low)
        if at + 30 + _LETTER * len(told) > _WIDTH:
            at, y = 30.0, y + 20
        box = f'x="{_px(at)}" y="{_px(y)}" width="18" height="14"'
        body.append(f'<rect class="cell" fill-opacity="{_shade((low + high) / 2, scale)}" {box}/>')
        body.append(_text(told, at + 23, y + 11, "faint"))
        at += 36 + _LETTER * len(told)
    table = [(f"{k + 1}. {c}", *(number(row[k]) for row in values)) for k, c in enumerate(columns)]
    return _figure(caption, y + 24, body, ("Column", *rows), table)


# ---- rows of estimates


def _rows(caption: Caption, rows: Sequence[Bar], axis: Axis, kinds: Sequence[str], limit: str, *, filled: bool) -> str:
    order = _order(kinds, (r.kind for r in rows))
    limited = [r.limit for r in rows if r.limit is not None]
    intervals = any(r.low is not None or r.high is not None for r in rows)
    legend, top = _legend([k for k in order if k], order, limit if limited else "", filled=filled)
    seen = [v for r in rows for v in (r.value, r.low, r.high, r.limit) if v is not None and _drawable(v, axis)]
    right = min(30 + _LETTER * max((len(_estimate(r)) for r in rows), default=0), 260.0)
    scale = _Scale.of(seen if axis.log else [0.0, *seen], axis, _column([r.label for r in rows]), _WIDTH - right)
    bottom = top + 10 + 24 * len(rows)
    body = [*legend]
    for tick in scale.ticks():
        at = _px(scale(tick))
        body.append(f'<path class="grid" d="M{at} {_px(top)}V{_px(bottom)}"/>')
        body.append(_text(number(tick), scale(tick), bottom + 16, "middle faint"))
    body.append(_text(axis.label, (scale.start + scale.end) / 2, bottom + 36, "middle"))
    base = scale.start if axis.log else scale(0.0)
    body.append(f'<path class="axis" d="M{_px(base)} {_px(top)}V{_px(bottom)}"/>')
    for k, row in enumerate(rows):
        y = top + 10 + 24 * k + 10
        body.append(f"<g><title>{escape(row.label)}</title>")
        body.append(_text(_short(row.label, scale.start - 14), scale.start - 8, y + 4, "end"))
        body += _row(row, y, base, scale, axis, order.index(row.kind), filled)
        body.append(_text(_estimate(row), _WIDTH - right + 10, y + 4) + "</g>")
    named = ["Kind"] if any(order) else []
    columns = (
        "Name",
        *named,
        axis.label,
        *(["From", "To"] if intervals else []),
        *([limit.capitalize()] if limited else []),
    )
    table = [
        (r.label, *([r.kind] if named else []), number(r.value))
        + ((number(r.low), number(r.high)) if intervals else ())
        + ((number(r.limit),) if limited else ())
        for r in rows
    ]
    return _figure(caption, bottom + 46, body, columns, table)


def _row(row: Bar, y: float, base: float, scale: _Scale, axis: Axis, kind: int, filled: bool) -> Iterator[str]:
    known = _drawable(row.value, axis)
    if known and filled:
        left, right = sorted((base, scale(row.value)))
        size = f'x="{_px(left)}" y="{_px(y - 7)}" width="{_px(max(right - left, 1))}" height="14"'
        yield _rectangle(kind, size)
    if row.low is not None or row.high is not None:
        ends = []
        for end, beyond in ((row.low, scale.start), (row.high, scale.end)):
            open_end = end is None or not _drawable(end, axis)
            ends.append((beyond if open_end or end is None else scale(end), open_end))
        (low, open_low), (high, open_high) = ends
        path = f"M{_px(low)} {_px(y)}H{_px(high)}"
        path += f"M{_px(low + 6)} {_px(y - 5)}l-6 5l6 5" if open_low else f"M{_px(low)} {_px(y - 5)}v10"
        path += f"M{_px(high - 6)} {_px(y - 5)}l6 5l-6 5" if open_high else f"M{_px(high)} {_px(y - 5)}v10"
        if filled:  # seen on the bar, too
            yield f'<path class="halo" d="{path}"/>'
        yield f'<path class="{"axis" if filled else f"l{kind % _KINDS}"}" style="stroke-dasharray:none" d="{path}"/>'
    if row.limit is not None and _drawable(row.limit, axis):
        yield f'<path class="limit" d="M{_px(scale(row.limit))} {_px(y - 12)}v24"/>'
    if known and not filled:
        yield _marker(kind, scale(row.value), y)


def _estimate(row: Bar) -> str:
    if row.low is None and row.high is None:
        return number(row.value, 3)
    ends = [number(v, 3) if v is not None and math.isfinite(v) else "..." for v in (row.low, row.high)]
    return f"{number(row.value, 3)} [{ends[0]}, {ends[1]}]"


# ---- axes


@dataclass(frozen=True)
class _Scale:
    """low..high of a quantity onto start..end of the drawing, in px."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def of(cls, values: Iterable[float], axis: Axis, start: float, end: float, *, rounded: bool = True) -> _Scale:
        known = sorted(v for v in values if _drawable(v, axis))
        low, high = (known[0], known[-1]) if known else (1.0, 2.0)
        extent = max(-low, high)
        if high - low <= max(1e-12 * extent, 1 / _MOST):  # one value, as far as a drawing goes
            half = extent / 2 if extent > 1 / _MOST else 0.5
            low, high = (low / 2, high * 2) if axis.log else (low - half, high + half)
        elif rounded and not axis.log:
            low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)
        elif rounded:
            low, high = low / 1.1, high * 1.1
        return cls(low, high, start, end, axis.log)

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def back(self, at: float) -> float:
        share = (at - self.start) / (self.end - self.start)
        return self.low * (self.high / self.low) ** share if self.log else self.low + (self.high - self.low) * share

    def ticks(self) -> list[float]:
        if self.log and self.high / self.low > 4:
            places = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(places) <= 4 else (1,)
            found = [s * 10.0**p for p in places for s in steps]
        else:
            rough = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
            first = math.ceil(self.low / step)
            found = [round(k * step, 12 - math.floor(math.log10(step))) for k in range(first, first + 12)]
        return [t for t in found if self.low <= t <= self.high]


@dataclass(frozen=True)
class _Plot:
    """A frame with two scales. y runs upwards."""

    x: _Scale
    y: _Scale
    axes: tuple[Axis, Axis]

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]], x: Axis, y: Axis, top: float, limit: Limit | None) -> _Plot:
        """Wide enough for every point that can be drawn, and for the limit."""
        drawn = [(a, b) for a, b in points if _drawable(a, x) and _drawable(b, y)]
        bottom = top + 300
        levels = [b for _, b in drawn] + ([limit.value] if limit else [])
        return cls(_Scale.of([a for a, _ in drawn], x, 78, _WIDTH - 20), _Scale.of(levels, y, bottom, top), (x, y))

    @property
    def bottom(self) -> float:
        return self.y.start

    def holds(self, x: float, y: float) -> bool:
        return _drawable(x, self.axes[0]) and _drawable(y, self.axes[1])

    def frame(self, x: Axis, y: Axis, limit: Limit | None) -> list[str]:
        left, right, top, bottom = self.x.start, self.x.end, self.y.end, self.y.start
        parts = []
        for tick in self.x.ticks():
            parts.append(f'<path class="grid" d="M{_px(self.x(tick))} {_px(top)}V{_px(bottom)}"/>')
            parts.append(_text(number(tick), self.x(tick), bottom + 16, "middle faint"))
        for tick in self.y.ticks():
            parts.append(f'<path class="grid" d="M{_px(left)} {_px(self.y(tick))}H{_px(right)}"/>')
            parts.append(_text(number(tick), left - 6, self.y(tick) + 4, "end faint"))
        parts.append(f'<path class="axis" d="M{_px(left)} {_px(top)}V{_px(bottom)}H{_px(right)}"/>')
        parts.append(_text(x.label, (left + right) / 2, bottom + 36, "middle"))
        middle = (top + bottom) / 2
        turn = f'transform="rotate(-90 16 {_px(middle)})"'
        parts.append(f'<text class="middle" x="16" y="{_px(middle)}" {turn}>{escape(y.label)}</text>')
        if limit is not None and _drawable(limit.value, y):
            level = self.y(limit.value)
            parts.append(f'<path class="limit" d="M{_px(left)} {_px(level)}H{_px(right)}"/>')
        return parts


def _drawable(value: float, axis: Axis) -> bool:
    return abs(value) < _MOST and (value > 1 / _MOST or not axis.log)


# ---- parts of a drawing


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _text(text: str, x: float, y: float, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f'<text{attribute} x="{_px(x)}" y="{_px(y)}">{escape(text)}</text>'


def _marker(kind: int, x: float, y: float) -> str:
    """Circle, square, triangle, diamond, cross, plus; past those the same again, hollow."""
    shapes = ("m-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", "m-4.5-4.5h9v9h-9z", "m0-6l5.5 10h-11z", "m0-6l6 6l-6 6l-6-6z")
    strokes = ("m-4.5-4.5l9 9m0-9l-9 9", "m-6 0h12m-6-6v12")
    shape = (*shapes, *strokes)[kind % _KINDS]
    hollow = " open" if kind >= _KINDS else ""
    return f'<path class="m{kind % _KINDS}{hollow}" d="M{_px(x)} {_px(y)}{shape}"/>'


def _legend(
    names: Sequence[str], order: Sequence[str], limit: str = "", *, line: bool = False, filled: bool = False
) -> tuple[list[str], float]:
    """The legend's parts, and where the plot may begin. limit: what its dashed line is called."""
    parts, x, y = [], 12.0, 12.0
    for name in [*names, *([limit] if limit else [])]:
        width = 44 + _LETTER * len(name)
        if x + width > _WIDTH and x > 12:
            x, y = 12.0, y + 20
        if name == limit:
            parts.append(f'<path class="limit" d="M{_px(x - 4)} {_px(y)}h24"/>')
        elif filled:
            size = f'x="{_px(x)}" y="{_px(y - 6)}" width="16" height="12"'
            parts.append(_rectangle(order.index(name), size))
        else:
            if line:
                parts.append(f'<path class="l{order.index(name) % _KINDS}" d="M{_px(x - 4)} {_px(y)}h24"/>')
            parts.append(_marker(order.index(name), x + 8, y))
        parts.append(_text(name, x + 24, y + 4))
        x += width
    return parts, (y + 18 if parts else 10.0)


def _rectangle(kind: int, size: str) -> str:
    """The first kind is full, the others are lighter within their outline."""
    return f'<rect class="m{kind % _KINDS}" fill-opacity="{1.0 if kind == 0 else 0.12 * (kind % 3)}" {size}/>'


def _placed(
    label: str, at: tuple[float, float], taken: list[tuple[float, float, float, float]], plot: _Plot
) -> list[str]:
    """The label beside its dot, if it is clear of all other labels and dots on any side; it is in the table anyway."""
    wide = _LETTER * len(label)
    x, y = at
    sides = ((x + 9, y + 4, ""), (x - 9 - wide, y + 4, ""), (x - wide / 2, y - 10, ""), (x - wide / 2, y + 20, ""))
    for left, foot, kind in sides:
        box = (left, foot - 11, left + wide, foot + 3)
        inside = box[0] > plot.x.start and box[2] < _WIDTH and box[1] > plot.y.end - 12 and box[3] < plot.bottom
        if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
            taken.append(box)
            return [_text(label, left, foot, kind)]
    return []


def _shade(value: float | None, scale: _Scale) -> str:
    return _px(0.08 + 0.2 * min(int(scale(value)), 4)) if value is not None else "0"


def _order(kinds: Sequence[str], seen: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*kinds, *seen]))


def _column(labels: Sequence[str]) -> float:
    """Where a plot may begin beside a column of labels."""
    return min(max((_LETTER * len(text) for text in labels), default=0.0), 330.0) + 20


def _short(label: str, wide: float) -> str:
    most = max(int(wide / _LETTER), 4)
    return label if len(label) <= most else f"{label[: most // 3]}...{label[-(most - most // 3 - 3) :]}"


def _figure(
    caption: Caption, height: float, body: Iterable[str], columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> str:
    key, title, text = escape(caption.key), escape(caption.title), escape(caption.text)
    return (
        f'<figure class="chart" id="{key}"><figcaption><strong>{title}.</strong> {text}</figcaption>\n'
        f'<div class="plot" role="group" aria-label="{title}" tabindex="0">'
        f'<svg role="img" aria-labelledby="{key}-title {key}-text" viewBox="0 0 {_px(_WIDTH)} {_px(height)}">'
        f'<title id="{key}-title">{title}</title><desc id="{key}-text">{text}</desc>\n'
        + "\n".join(body)
        + f"\n</svg></div>\n<details><summary>Numbers: {title}</summary>\n"
        + table(caption.title, columns, rows)
        + "</details></figure>\n"
    )
