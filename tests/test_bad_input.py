"""Whatever a user gets wrong ends in an exit code, a message that says what, and a fix; never in a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_input import GROUPS, Case, Place
from tests.tiny import PLANTED, Workshop

CASES = [pytest.param(case, id=case.name.replace(" ", "_")) for cases in GROUPS.values() for case in cases]


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_gets_a_message_and_a_fix(case: Case, workshop: Workshop, pair: Workshop, tmp_path: Path) -> None:
    outcome = case.make(Place(workshop, tmp_path, pair))
    assert outcome.exit_code == case.exit_code, outcome.said
    for part in case.says:
        assert part in outcome.said
    assert ("fix: " in outcome.said) == case.fix, outcome.said
    assert "Traceback" not in outcome.said
    assert not any(word in outcome.said for word in PLANTED.split())
    if case.exit_code != 3:
        assert not (tmp_path / "out" / "bundle.json").exists()


def test_there_are_enough_cases_and_no_two_of_one_name() -> None:
    names = [case.name for cases in GROUPS.values() for case in cases]
    assert len(names) >= 45
    assert len(set(names)) == len(names)
