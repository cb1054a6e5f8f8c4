"""Looks: what evidence on the tuning data, or of a look that failed, says of the next look at the acceptance data.

Evidence in, numbers out; which points there are, and which is taken, is the search's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist

from medcompile.spec import Evidence, Margin, Verdict

_ROOM, _LAST_ROOM = 0.9, 0.7  # the part of a margin that the next look's point may be expected to use
_MOST_SHARE = 0.95


def at_looks(margins: Sequence[Margin], looks: int) -> tuple[Margin, ...]:
    """The margins at the confidence that each of so many looks needs, so that all together err as one would have.

    Source: Bonferroni.
    """
    return tuple(replace(m, confidence=1.0 - (1.0 - m.confidence) / looks) for m in margins)


def promising(evidence: Sequence[Evidence], growth: float) -> str:
    """Empty if a point is more likely than not to pass the acceptance test, else why not, in words.

    What was lost on the tuning data is taken for the truth; the acceptance data's interval for what it will be narrower
    or wider by having growth times as many items.
    """
    for e in evidence:
        if e.margin is None:
            continue
        if e.verdict is Verdict.INFERIOR or not math.isfinite(e.difference):
            return f"{e.metric} is inferior on the tuning data"
        expected = e.difference - (e.difference - e.lower) / math.sqrt(growth)
        if expected <= -e.margin:
            return f"{e.metric} moved by {e.difference:+.4f}, which would not be shown to be within {e.margin:g}"
    return ""


def chance_to_pass(evidence: Sequence[Evidence], growth: float) -> float:
    """That the acceptance data shows the point to be non-inferior by the metric that is least likely to.

    The loss there is the tuning data's, give or take what either of them errs by.
    """
    found = 1.0
    for e in evidence:
        if e.margin is None:
            continue
        width = e.difference - e.lower
        if e.verdict is Verdict.INFERIOR or not math.isfinite(width):
            return 0.0
        spread = width / NormalDist().inv_cdf(e.confidence) * math.sqrt(1 + 1 / growth)
        room = e.margin + e.difference - width / math.sqrt(growth)
        found = min(found, NormalDist().cdf(room / max(spread, 1e-12)))
    return found


def error_to_pass(evidence: Sequence[Evidence], *, last: bool) -> float:
    """After a look that failed: the share of the point's error at which it would have passed, below 1.

    What is lost is taken to fall with the error, and the width of its interval, which counts changed answers, with the
    error's root. Some of the margin is left for what the next point does otherwise; more before the last look.
    """
    share = 1.0
    for e in evidence:
        if e.margin is None or e.verdict is Verdict.NON_INFERIOR:
            continue
        room, loss, width = e.margin * (_LAST_ROOM if last else _ROOM), max(-e.difference, 0.0), e.difference - e.lower
        if not (math.isfinite(loss) and math.isfinite(width)):
            return 0.0
        # loss s + width sqrt(s) = room
        if loss > 1e-12:
            share = min(share, ((math.sqrt(width**2 + 4 * loss * room) - width) / (2 * loss)) ** 2)
        elif width > 0:
            share = min(share, (room / width) ** 2)
    return min(share, _MOST_SHARE)
