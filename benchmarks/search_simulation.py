"""How often a whole search, with all its looks, says "non-inferior" of what is not; and its power.

    python benchmarks/search_simulation.py [--experiments 1000] [--seed 1] [--write FILE]

A planted classifier (tests/search/planted.py): whatever the search lowers loses exactly the margin, or nothing, on
items that are drawn anew in each experiment; each variant changes answers of its own. The search runs as it is, on
tuning and acceptance data, with up to three looks. Where tuning data flatters (it shows no loss at all), every look is
taken: the worst case. False: it confirmed a variant with a layer below float. Its rate
must stay at 5 % (6.4 % is the limit that 1,000 experiments can tell from it).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from medcompile.spec import Margin
from tests.search.planted import PlantedBench, searcher

LAYERS = 8


@dataclass(frozen=True)
class Row:
    """One setting. drop: the true one. tuning, acceptance: items of either data. looks: how many are allowed."""

    margin: float
    drop: float
    tuning: int
    acceptance: int
    looks: int
    flattered: bool = False


NOISE = 0.01
ROWS = [
    Row(margin, margin if lossy else 0.0, tuning, acceptance, looks, flattered)
    for lossy, flattered in ((True, False), (True, True), (False, False))
    for margin in (0.01, 0.02)
    for tuning, acceptance in ((500, 2000), (2000, 8000))
    for looks in (1, 3)
]


def confirmed(row: Row, seed: int) -> tuple[bool, int]:
    """Whether a variant below float was confirmed, and how many looks were taken."""
    errors = {f"layer.{i}": 0.001 * (i + 1) for i in range(LAYERS)}
    items = {"tuning": row.tuning, "acceptance": row.acceptance}
    margins = (Margin("accuracy", row.margin),)
    drop, flattered = row.drop, row.flattered
    bench = PlantedBench(errors, items, margins, True, (), seed, drop, NOISE, flattered, quick=True)
    found = searcher(bench, looks=row.looks).run()
    below = bool(found.chosen) and set(found.point(found.chosen).formats) != {"float"}
    return below, len(found.looks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experiments", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    lines = [
        "# Whole searches, simulated",
        "",
        f"Made by `benchmarks/search_simulation.py --experiments {options.experiments} --seed {options.seed}`:",
        "8 layers, two formats below float, answers that flip either way without any loss: 1 %. below float: how often",
        "the search confirmed a variant with a layer below float. Where the true drop is the margin, it is false, and",
        "5 % may do so (6.4 % is what 1,000 experiments can tell from it); where it is zero, it is the power. tuning",
        "flatters: the tuning data shows no loss, so that nearly every look is taken.",
        "",
        "| margin | true drop | tuning n | acceptance n | tuning flatters | looks allowed | taken | below float |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        results = [confirmed(row, options.seed * 1_000_003 + i) for i in range(options.experiments)]
        share = sum(below for below, _ in results) / len(results)
        looks = sum(taken for _, taken in results) / len(results)
        kind = "false" if row.drop else "power"
        flatters = "yes" if row.flattered else "no"
        setting = f"{row.margin} | {row.drop} | {row.tuning} | {row.acceptance} | {flatters} | {row.looks}"
        lines.append(f"| {setting} | {looks:.2f} | {kind} {share:.1%} |")
        print(lines[-1], flush=True)
    if options.write:
        options.write.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
