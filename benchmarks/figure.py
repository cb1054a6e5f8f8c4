"""Draw a bundle's evidence: latency against the metric's difference with its interval, and the budget's line.

    python benchmarks/figure.py engines/quickstart cosine docs/quickstart.svg

Everything drawn is read from the bundle: latencies are those of the machine that built it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

from medcompile import bundle
from medcompile.spec import Artifact, Evidence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 380, 90, 30, 60, 60
COLORS = {"onnxruntime-cpu": "#1b6ca8", "openvino-cpu": "#c05621"}


def points(path: str, metric: str) -> list[tuple[Artifact, Evidence]]:
    found = bundle.read(path).artifacts
    return [(a, e) for a in found for e in a.evidence if e.metric == metric and a.latency_ms is not None and e.margin]


def draw(rows: list[tuple[Artifact, Evidence]], metric: str) -> str:
    slowest = max(a.latency_ms or 0.0 for a, _ in rows) * 1.15
    margin = rows[0][1].margin or 0.0
    low = min(-margin, *(e.interval[0] for _, e in rows)) - margin * 0.2
    high = max(0.0, *(e.interval[1] for _, e in rows)) + margin * 0.2

    def x(ms: float) -> float:
        return LEFT + ms / slowest * (WIDTH - LEFT - RIGHT)

    def y(difference: float) -> float:
        return TOP + (high - difference) / (high - low) * (HEIGHT - TOP - BOTTOM)

    title = f"{metric}: difference to the fp32 original against latency"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
        f'<text x="{LEFT}" y="44" fill="#555">bars: confidence interval of the paired difference; '
        f"below the red line more than {margin:g} would be lost</text>",
        f'<line x1="{LEFT}" y1="{y(0):.1f}" x2="{WIDTH - RIGHT}" y2="{y(0):.1f}" stroke="#999"/>',
        f'<line x1="{LEFT}" y1="{y(-margin):.1f}" x2="{WIDTH - RIGHT}" y2="{y(-margin):.1f}" stroke="#c00" '
        'stroke-dasharray="6 4"/>',
        f'<text x="{LEFT - 8}" y="{y(0) + 4:.1f}" text-anchor="end">0</text>',
        f'<text x="{LEFT - 8}" y="{y(-margin) + 4:.1f}" text-anchor="end" fill="#c00">-{margin:g}</text>',
        f'<line x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{HEIGHT - BOTTOM}" stroke="#333"/>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle">'
        "latency of one batch at the profile's opt shape, ms</text>",
    ]
    step = max(10, round(slowest / 6 / 10) * 10)
    out += [
        f'<text x="{x(ms):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{ms}</text>'
        for ms in range(0, int(slowest) + 1, step)
    ]
    for i, (target, color) in enumerate(COLORS.items()):
        out.append(
            f'<circle cx="{WIDTH - RIGHT - 130}" cy="{TOP + 10 + 20 * i}" r="5" fill="{color}"/>'
            f'<text x="{WIDTH - RIGHT - 118}" y="{TOP + 14 + 20 * i}" fill="{color}">{target}</text>'
        )
    for artifact, e in rows:
        cx, color = x(artifact.latency_ms or 0.0), COLORS.get(artifact.target.name, "#444")
        out.append(
            f'<line x1="{cx:.1f}" y1="{y(e.interval[0]):.1f}" x2="{cx:.1f}" y2="{y(e.interval[1]):.1f}" '
            f'stroke="{color}" stroke-width="3"/>'
            f'<circle cx="{cx:.1f}" cy="{y(e.difference):.1f}" r="5" fill="{color}"/>'
            f'<text transform="translate({cx + 4:.1f} {y(e.interval[0]) + 12:.1f}) rotate(30)" fill="{color}">'
            f"{escape(artifact.variant)}</text>"
        )
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    rows = points(sys.argv[1], sys.argv[2])
    if not rows:
        sys.exit(f"{sys.argv[1]} has no judged {sys.argv[2]} with a latency")
    Path(sys.argv[3]).write_text(draw(rows, sys.argv[2]), encoding="utf-8")


if __name__ == "__main__":
    main()
