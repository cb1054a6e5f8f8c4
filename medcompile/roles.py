"""The data of a build by role: calibration, tuning (what a search sees) and evaluation (what only the final test sees).

They are disjoint: what also stands in data that judges is left out of what is judged, and told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from medcompile import data
from medcompile.data import Dataset
from medcompile.errors import DataError
from medcompile.recipe import Recipe


@dataclass(frozen=True)
class Datasets:
    calibration: Dataset | None
    tuning: Dataset | None
    evaluation: Dataset

    @property
    def judging(self) -> tuple[Dataset, ...]:
        """What the original answers, too."""
        return (self.evaluation,) if self.tuning is None else (self.evaluation, self.tuning)

    def described(self) -> dict[str, dict[str, Any] | None]:
        """By role, what provenance tells of it."""
        return {role: _described(found) for role, found in vars(self).items()}


def read(job: Recipe, *, allow_phi: bool, note: Callable[[str], None]) -> Datasets:
    """The recipe's data. Raises DataError, also where a role and the manifests don't fit."""

    def one(name: str, limit: int | None) -> Dataset:
        return data.read(data.load_manifest(job.manifests[name]), limit=limit, allow_phi=allow_phi)

    def apart(dataset: Dataset, judged: Dataset, role: str, other: str) -> Dataset:
        kept, dropped = data.without_overlap(dataset, judged)
        if dropped:
            note(f"{dropped} {role} items also stand in the {other} data and were left out")
        return kept

    evaluation = one(job.evaluation.data, job.evaluation.samples)
    tuning = calibration = None
    if job.tuning is not None:
        tuning = one(job.tuning.data, job.tuning.samples)
        _check(evaluation, tuning)
        tuning = apart(tuning, evaluation, "tuning", "evaluation")
    if job.calibration is not None:
        sets = [one(name, job.calibration.samples) for name in job.calibration.data]
        calibration = apart(data.joined(sets), evaluation, "calibration", "evaluation")
        if tuning is not None:
            calibration = apart(calibration, tuning, "calibration", "tuning")
    return Datasets(calibration, tuning, evaluation)


def _check(evaluation: Dataset, tuning: Dataset) -> None:
    """What a search looks at many times can't be what it is accepted by. Raises DataError by what the manifests say."""
    if evaluation.role != "acceptance":
        raise DataError(
            f"{evaluation.name} has the role {evaluation.role}; what optimize finds is accepted on other data than it "
            "was tuned on",
            fix="name data under evaluation whose manifest says role: acceptance, and that no search has seen",
        )
    if tuning.role == "acceptance":
        raise DataError(
            f"{tuning.name} has the role acceptance, and tuning would look at it many times",
            fix="name other data under tuning, or, if it is not kept for acceptance, write role: tuning",
        )


def _described(dataset: Dataset | None) -> dict[str, Any] | None:
    if dataset is None:
        return None
    return {
        "name": dataset.name,
        "role": dataset.role,
        "digest": dataset.digest,
        "items": len(dataset.items),
        "licence": dataset.licence,
        "phi": dataset.phi,
        "source": dataset.source,
    }
