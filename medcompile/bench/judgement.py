"""What a comparison means: who is faster than whom, what is beyond noise, what should make one doubt the numbers.

Computed from results.Bench alone, so that a file of last month is read by today's rules; shown by table.py and page.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median

from medcompile.bench import roofline, statistics
from medcompile.bench.results import Bench, Entry, Shape, Timing
from medcompile.bench.statistics import Ratio
from medcompile.errors import UsageError

UNSTEADY_CLOCK = 0.03
OTHER_LOAD = 0.05
SLOWER_CLOCK = 0.05
COLD_CHANGE = 0.1
FALSE_ALARM = 0.05
TOLERANCE = 0.02
"""A change below this is nobody's fault: where memory lies differs from process to process, and moves times by that."""

_NARROW = {"int8": 1, "int4": 1, "float8": 1, "bfloat16": 2, "float16": 2, "float32": 3}


def against_reference(found: Bench, entry: Entry, cell: str) -> Ratio | None:
    """Its time over the reference's, in that cell; None where one has no numbers, and for the reference itself."""
    reference = found.entry(found.reference)
    if reference is None or entry.name == reference.name:
        return None
    own, other = entry.timing(cell), reference.timing(cell)
    return None if own is None or other is None else statistics.ratio(own.turns, other.turns)


def warnings(found: Bench) -> Iterator[str]:
    """What should make one doubt the numbers, or the engine, in sentences."""
    spins = [ms for shape in found.shapes for ms in shape.spin_ms]
    if (share := statistics.variation(spins)) > UNSTEADY_CLOCK:
        yield (
            f"the clock is unsteady: a fixed piece of arithmetic varied by {share:.0%} between turns; ratios within a"
            " round hold, times less so"
        )
    third = len(spins) // 3
    if third >= 5 and (fall := median(spins[-third:]) / median(spins[:third]) - 1) > SLOWER_CLOCK:
        yield f"the clock fell by {fall:.0%} from the first third of the run to the last: heat, or a limit of power"
    if found.throttled:
        yield f"cores were slowed for heat {found.throttled} times while this ran"
    for shape in found.shapes:
        if shape.other_load is not None and shape.other_load > OTHER_LOAD:
            yield f"{shape.name}: other processes had {shape.other_load:.0%} of the cores' time during the turns"
        if shape.stolen is not None and shape.stolen > OTHER_LOAD:
            yield f"{shape.name}: the hypervisor gave {shape.stolen:.0%} of the cores' time to others"
        yield from _slower_though_narrower(found, shape)
    if any(s.share > 1 for e in found.entries for t in e.cells for s in roofline.shares(found, e, t)):
        yield "a contender is above the physical limit that was measured: other work ran while the limit was taken"
    if not found.reference:
        yield "nothing ran that the others could be compared with"
    elif found.rounds < statistics.MIN_ROUNDS:
        yield f"{found.rounds} rounds are too few for intervals; they take {statistics.MIN_ROUNDS}"


def _slower_though_narrower(found: Bench, shape: Shape) -> Iterator[str]:
    """Fewer bits that cost time: the same engine's own wider format is faster, beyond noise."""
    timed = [(e, t) for e in found.entries if (t := e.timing(shape.name)) is not None and e.engine]
    for entry, own in timed:
        for other, wider in timed:
            pair = (_NARROW.get(entry.precision, 3), _NARROW.get(other.precision, 3))
            if entry.engine != other.engine or entry.ours != other.ours or pair[0] >= pair[1]:
                continue
            compared = statistics.ratio(own.turns, wider.turns)
            if compared is not None and compared.low is not None and compared.low > 1:
                yield (
                    f"{shape.name}: {entry.name} ({entry.precision}) is slower than {other.name} ({other.precision}) "
                    f"on the same engine: {compared.value:.2f} times its time"
                )


# ---- against an earlier run


@dataclass(frozen=True)
class Change:
    """One contender in one cell, then and now. ratio: of its ratios to the reference, above 1 is slower now.

    regressed: beyond noise and tolerance, or its answers have become wrong; wrong says how.
    """

    entry: str
    cell: str
    ours: bool
    ratio: Ratio | None
    regressed: bool
    wrong: str = ""


def compare(new: Bench, old: Bench, tolerance: float = TOLERANCE) -> list[Change]:
    """Every contender and cell that both have. All of them together raise a false alarm in at most 5 % of comparisons.

    Raises UsageError where the two can't be compared.
    """
    for what in ("task", "clock", "threads", "reference"):
        mine, theirs = getattr(new, what), getattr(old, what)
        if mine != theirs:
            raise UsageError(
                f"the earlier run had {what} {theirs or 'none'}, this one has {mine or 'none'}",
                fix=f"measure again with the same {what}" + (", with --reference" if what == "reference" else ""),
            )
    pairs = list(_pairs(new, old))
    if not pairs:
        raise UsageError(
            "the earlier run has no cell and contender in common with this one", fix="measure the same --shapes again"
        )
    confidence = 1 - 2 * FALSE_ALARM / max(len(pairs), 1)  # one-sided, and Bonferroni's share of it
    changes = []
    for entry, own, before, references in pairs:
        found = None
        if entry.name != new.reference:
            found = statistics.change((own.turns, references[0].turns), (before.turns, references[1].turns), confidence)
        slower = found is not None and found.low is not None and found.low > 1 + tolerance
        wrong = own.accuracy.wrong if own.accuracy else ""
        if before.accuracy and before.accuracy.wrong:
            wrong = ""
        changes.append(Change(entry.name, own.cell, entry.ours, found, slower or bool(wrong), wrong))
    return changes


def _pairs(new: Bench, old: Bench) -> Iterator[tuple[Entry, Timing, Timing, tuple[Timing, Timing]]]:
    """Contenders and cells with numbers in both runs, with the reference's numbers in each."""
    references = (new.entry(new.reference), old.entry(old.reference))
    for entry in new.entries:
        earlier = old.entry(entry.name)
        for shape in new.shapes:
            found = [e.timing(shape.name) if e else None for e in (entry, earlier, *references)]
            own, before, mine, theirs = found
            if own is not None and before is not None and mine is not None and theirs is not None:
                yield entry, own, before, (mine, theirs)


def regressions(changes: Iterable[Change]) -> list[Change]:
    """Those that fail a check: of our own contenders, or of all where none of ours competes."""
    every = list(changes)
    ours = [c for c in every if c.ours]
    return [c for c in ours or every if c.regressed]
