"""Print the evidence of bundles as one markdown table.

python benchmarks/evidence_table.py BUNDLE ... [--out benchmarks/results/ner.md] [--title "..."]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from medcompile import bundle


def rows(path: str) -> list[str]:
    found = bundle.read(path)
    data = found.provenance["evaluation"]["name"]
    lines = []
    for a in found.artifacts:
        for e in a.evidence:
            if e.margin is None and e.metric != "agreement":
                continue
            power = "" if e.power is None else f"{e.power:.2f}"
            flips = "" if e.discordant is None else str(e.discordant)
            lines.append(
                f"| {data} | {a.variant} | {a.target.name} | {e.metric} | {e.reference:.4f} | {e.value:.4f} "
                f"| {e.difference:+.4f} | {e.lower:+.4f} | {flips} | {e.samples} "
                f"| {e.verdict or 'reported'} | {power} |"
            )
    return lines


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("bundles", nargs="+")
    arguments.add_argument("--title", default="Evidence")
    arguments.add_argument("--note", default="")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    lines = [
        f"# {given.title}",
        "",
        *([given.note, ""] if given.note else []),
        "| data | variant | target | metric | reference | value | difference | lower | flips | n | verdict | power |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(row for path in given.bundles for row in rows(path)),
    ]
    print("\n".join(lines))
    if given.out:
        given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
