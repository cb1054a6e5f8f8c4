"""Print every case of tests/bad_input.py with the message it gets, as the markdown of docs/errors.md.

PYTHONPATH=. python benchmarks/bad_input.py > docs/errors.md
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from pathlib import Path

from tests import tiny, tiny_pair
from tests.bad_input import GROUPS, Case, Outcome, Place

HEAD = """\
# What goes wrong, and what to do about it

Every message that a mistake gets says what is wrong and, on a line of its own, how to mend it. Exit codes: 0 good,
1 failed, 2 wrong usage or recipe, 3 built but over budget. The tables below are printed by `benchmarks/bad_input.py`
from real runs; `...` stands for a folder or a long list.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        workshop, pair = tiny.built(root / "workshop", tiny.TASKS), tiny_pair.built(root / "pair")
        print(HEAD)
        for group, cases in GROUPS.items():
            print(f"## {group}\n\n| mistake | exit | message | fix |\n|---|---|---|---|")
            for number, case in enumerate(cases):
                folder = root / f"{group} {number}".replace(" ", "-")
                folder.mkdir()
                with contextlib.redirect_stdout(None):
                    outcome = case.make(Place(workshop, folder, pair))
                print(row(case, outcome, root))
            print()


def row(case: Case, outcome: Outcome, root: Path) -> str:
    said = re.sub(re.escape(str(root)) + r"[^\s:,'\"()]*/", ".../", outcome.said)
    said = re.sub(re.escape(str(root)) + r"[^\s:,'\"()]*", "...", said)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if case.fix:
        at = next(i for i, line in enumerate(lines) if case.says[0] in line and not line.startswith("note: "))
        message, fix = lines[at], next(line.removeprefix("fix: ") for line in lines[at:] if line.startswith("fix: "))
    else:  # the way to the help, then the error in a box
        fix = next(line for line in lines if line.startswith("Try"))
        message = next(line.strip("│ ") for line in lines if line.startswith("│"))
    return f"| {case.name} | {outcome.exit_code} | {_cell(message)} | {_cell(fix)} |"


def _cell(text: str, longest: int = 260) -> str:
    text = text if len(text) <= longest else f"{text[:longest]} ..."
    return text.replace("|", "\\|").replace("<", "\\<")


if __name__ == "__main__":
    main()
