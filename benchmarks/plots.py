"""Draw the checked-in tables of benchmarks/results as docs/plots/*.svg, which docs/results.md shows.

    python benchmarks/plots.py

Nothing is measured here, and every number drawn stands in a table: a figure is as old as its table.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from medcompile import charts, page
from medcompile.charts import Axis, Bar, Caption, Dot, Limit

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PLOTS = ROOT / "benchmarks/results", ROOT / "docs/plots"
OURS, OTHERS = "medcompile", "others"
KINDS = (OURS, OTHERS)
Table = list[dict[str, str]]


def tables(file: str) -> Iterator[tuple[str, Table]]:
    """Every table of a results file, a row by column name, with the heading that it stands under."""
    heading, columns, rows = "", list[str](), Table()
    for line in [*(RESULTS / file).read_text(encoding="utf-8").splitlines(), ""]:
        if not line.startswith("|"):
            if rows:
                yield heading, rows
            columns, rows = [], []
            heading = line.lstrip("# ") if line.startswith("#") else heading
        elif not columns:
            columns = _cells(line)
        elif not set(line) <= set("|- "):
            rows.append(dict(zip(columns, _cells(line), strict=True)))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def numbers(cell: str) -> list[float]:
    return [float(found) for found in re.findall(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?", cell)]


def bar(label: str, cell: str, kind: str, limit: float | None = None) -> Bar:
    """Of `40 ms, 1.05 [0.96, 1.16]` the ratio with its interval; the yardstick itself, `40 ms`, is 1."""
    found = numbers(cell.partition(",")[2]) or [1.0]
    low, high = found[1:3] if len(found) == 3 else (None, None)
    return Bar(label, found[0], low, high, limit, kind)


def kind(contender: str) -> str:
    return OURS if contender.startswith(OURS) else OTHERS


def encoders(heading: str, key: str, columns: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    rows = next(rows for found, rows in tables("encoder_speed.md") if found.startswith(heading))
    for column in columns:
        bars = [bar(r["contender"].removeprefix("medcompile "), r[column], kind(r["contender"]), 1.0) for r in rows]
        name = f"{key}-{column}".replace(" ", "-").replace(",", "")
        text = f"{column}. Time of one run over that of OpenVINO after NNCF, with 95 % intervals; less is faster."
        axis = Axis("time, OpenVINO after NNCF = 1")
        yield name, charts.bars(Caption(name, f"{heading}, int8 and others", text), bars, axis, KINDS)


def trade() -> tuple[str, str]:
    rows = next(rows for found, rows in tables("encoder_speed.md") if found.startswith("MiniLM"))
    accuracy = next(column for column in rows[0] if column.startswith("cosine"))
    dots = [
        Dot(
            bar("", r["1 thread, 1x128"], "").value,
            numbers(r[accuracy])[0],
            r["contender"].removeprefix("medcompile "),
            kind(r["contender"]),
        )
        for r in rows
    ]
    nncf = next(d for d in dots if "NNCF" in d.label)
    text = "One thread, 1x128. Right is slower, high is closer to float32; the line is what NNCF's result keeps."
    caption = Caption("trade", "MiniLM: what speed costs", text)
    axes = Axis("time, OpenVINO after NNCF = 1"), Axis("cosine to float32, mean")
    return "trade", charts.scatter(caption, dots, *axes, Limit(nncf.y, "NNCF"), KINDS)


def decoders() -> Iterator[tuple[str, str]]:
    rows = next(rows for _, rows in tables("decoder_speed.md"))
    for column in ("prefill 512", "decode, batch 1", "decode, batch 8", "decode, batch 16"):
        bars = [
            Bar(r["contender"].removeprefix("medcompile "), numbers(r[column])[0], kind=kind(r["contender"]))
            for r in rows
        ]
        key = column.replace(", ", "-").replace(" ", "-")
        caption = Caption(
            key, f"TinyLlama's shape in 4 bits: {column}", "Tokens per second, two threads; more is better."
        )
        yield key, charts.bars(caption, bars, Axis("tokens/s"), KINDS)


def work() -> Iterator[tuple[str, str]]:
    for heading, rows in tables("encoder_work.md"):
        bars = [
            Bar(r["contender"].removeprefix("medcompile "), numbers(r["texts/s"])[0], kind=kind(r["contender"]))
            for r in rows
        ]
        data = heading.partition(":")[0]
        title = "entities" if any("F1" in r["answers as the reference's"] for r in rows) else "embeddings"
        key = f"work-{title}-{data}"
        caption = Caption(
            key, f"{title.capitalize()}, texts of {data}", "Texts per second, two threads; more is better."
        )
        yield key, charts.bars(caption, bars, Axis("texts/s"), KINDS)


def drawing(figure: str) -> str:
    """The figure's drawing as a file of its own, on paper."""
    found = re.search(r'<svg (.*?viewBox="0 0 (\S+) (\S+)")>(.*?)</svg>', figure, re.DOTALL)
    assert found is not None
    attributes, width, height, inside = found.groups()
    colours = "".join(f"{name}:{value};" for name, value in page.LIGHT.items())
    style = f"svg{{{colours}font:12px system-ui,sans-serif}}\n" + charts.STYLE.replace(".chart ", "")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {attributes} width="{width}" height="{height}"><style>{style}</style>'
        f'<rect width="{width}" height="{height}" fill="{page.LIGHT["--paper"]}"/>{inside}</svg>\n'
    )


def main() -> None:
    PLOTS.mkdir(exist_ok=True)
    figures = [
        *encoders("BERT-base", "bert", ("1 thread, 1x128", "2 threads, 8x128")),
        *encoders("ViT-B/16", "vit", ("1 thread, 1", "2 threads, 8")),
        trade(),
        *work(),
        *decoders(),
    ]
    for name, figure in figures:
        (PLOTS / f"{name}.svg").write_text(drawing(figure), encoding="utf-8")
        sys.stdout.write(f"{name}.svg\n")


if __name__ == "__main__":
    main()
