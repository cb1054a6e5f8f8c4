"""The error tree. Every error says what happened and, in .fix, what to do about it.

MedcompileError                    exit 1
├── UsageError                     exit 2   wrong command line or wrong argument
│   └── RecipeError                exit 2   the recipe: .problems lists every one found
├── SourceError                    a model could not be found, fetched or trusted
│   └── UnsafeWeightsError         a checkpoint wants to run code, or is no checkpoint
├── DataError                      calibration or evaluation data: missing, malformed, overlapping
│   └── PhiError                   the data states patient information and this run did not allow it
├── PassError                      a pass failed: names pass, graph, node and what ran before
│   ├── CalibrationError
│   └── QuantizeError
├── BundleError                    a bundle is unfinished, altered, or of another format
├── BackendError                   a backend failed to build or to run
│   └── BackendUnavailable         its library or device is not here
├── ProfileError                   a shape lies outside every profile
├── InputError                     a text, image or file given to a session can't be used
├── CacheFull                      the pool of keys and values has no room for what was asked
├── AuditError                     the audit log can't be written, or its chain is broken
└── OverBudgetError                exit 3   built, but no variant is non-inferior
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class MedcompileError(Exception):
    """Root of every error this package raises on purpose. str() gives the message and, on its own line, the fix."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


class UsageError(MedcompileError):
    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: where (line and column count from 1; 0 is unknown), what, and a one-line fix."""

    path: str
    line: int
    column: int
    message: str
    fix: str = ""

    def __str__(self) -> str:
        where = f"{self.path}:{self.line}:{self.column}" if self.line else self.path
        return f"{where}: {self.message}" + (f"\n  fix: {self.fix}" if self.fix else "")


class RecipeError(UsageError):
    """Holds every problem of a recipe at once, in file order."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(str(p) for p in problems))
        self.problems = problems


class SourceError(MedcompileError):
    pass


class UnsafeWeightsError(SourceError):
    pass


class DataError(MedcompileError):
    pass


class PhiError(DataError):
    pass


class PassError(MedcompileError):
    """A pass failed. The pipeline fills in where.

    step: the pass, and the variant it ran for. at: the graph, and the node if known. before: the steps done by then.
    """

    step: str = ""
    at: str = ""
    before: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.step:
            return super().__str__()
        # A pass that names the graph itself knows the place better than its last word of progress.
        told = self.message.startswith(self.at.partition(":")[0])
        where = "" if told else f" at {self.at}"
        lines = [f"{self.step} failed{where}: {self.message}", f"  ran before: {', '.join(self.before) or 'nothing'}"]
        return "\n".join(lines + ([f"  fix: {self.fix}"] if self.fix else []))


class CalibrationError(PassError):
    pass


class QuantizeError(PassError):
    pass


class BundleError(MedcompileError):
    pass


class BackendError(MedcompileError):
    pass


class BackendUnavailable(BackendError):
    pass


class ProfileError(MedcompileError):
    pass


class InputError(MedcompileError):
    pass


class CacheFull(MedcompileError):
    pass


class AuditError(MedcompileError):
    pass


class OverBudgetError(MedcompileError):
    """bundle: the folder that was written all the same, if there is one."""

    exit_code = 3

    def __init__(self, message: str, *, fix: str = "", bundle: str = "") -> None:
        super().__init__(message, fix=fix)
        self.bundle = bundle
