"""Verify: the evidence that an artifact answers as well as the reference, made by running it through its exam.

Used by the build for every artifact, and by `medcompile verify` to repeat the evidence where there is no torch:
the bundle keeps the reference's answers by item digest. No text is kept anywhere. An artifact that can't run here is
judged by the typed graph that it was built from, and says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medcompile import backends, data, exams, flips, report, run_onnx
from medcompile.backends import Backend, Executor, check_feeds
from medcompile.bundle import Bundle, rewrite
from medcompile.data import Dataset
from medcompile.errors import BackendError, BackendUnavailable, BundleError, DataError, UsageError
from medcompile.exams import Exam
from medcompile.exams.decoder import BLOCKS, FreshGraph, FreshSequence
from medcompile.flips import Flips
from medcompile.metrics import Predictions
from medcompile.spec import (
    GRAPH_VERIFIED,
    NOT_VERIFIED,
    Artifact,
    Evidence,
    GraphSpec,
    Margin,
    Profile,
    Target,
    Variant,
    Verdict,
)

Array = np.ndarray[Any, Any]

DID_NOT_RUN = "it did not run: "
"""How Artifact.notes begins to say why its graph stood in for it."""

_TIMED_RUNS = 5
_TIMED_S = 2.0


def latency_ms(executor: Executor, spec: GraphSpec) -> float:
    """Median milliseconds of one run at the first profile's opt shape, after a warm-up."""
    return _median_ms(one_run(executor, spec, spec.profiles[0]))


def one_run(executor: Executor, spec: GraphSpec, profile: Profile) -> Callable[[], object]:
    """What is timed: a run at the profile's opt shape, every position a real token.

    Of a decoder: a step that gives each of opt sequences its next token.
    """
    if isinstance(executor, FreshSequence):
        return executor.timed(profile.axis("sequences").opt)
    sizes = {axis.name: axis.opt for axis in profile.axes}
    feeds = {t.name: np.ones([sizes[d] if isinstance(d, str) else d for d in t.shape], t.dtype) for t in spec.inputs}
    return lambda: executor.run(feeds)


def _median_ms(run: Callable[[], object]) -> float:
    run()
    times: list[float] = []
    while len(times) < _TIMED_RUNS and sum(times) < _TIMED_S:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times) * 1000, 3)


# ---- one artifact


@dataclass(frozen=True)
class Findings:
    """What a trial came to: Artifact's fields of the same names. reason: why the artifact itself did not run.

    flips: by item (flips.py); None where nothing ran, or nothing is decided.
    """

    evidence: tuple[Evidence, ...]
    latency_ms: float | None
    verified_on: str
    reason: str = ""
    flips: Flips | None = None


@dataclass(frozen=True)
class Trial:
    """What artifacts of one graph are judged by: its exam, the reference's answers to it, and the budget."""

    exam: Exam
    reference: Predictions
    budget: Sequence[Margin]

    @classmethod
    def of(cls, exam: Exam, reference: Path, budget: Sequence[Margin]) -> Trial:
        """reference: the .npz of the answers that were kept."""
        answers = read_reference(reference, exam)
        return cls(exam.against(answers), answers, budget)

    def run(
        self,
        backend: Backend,
        paths: Mapping[str, Path],
        variant: Variant,
        target: Target,
        typed: Mapping[str, Path] | None,
        threads: int | None = None,
    ) -> Findings:
        """Run the artifacts at paths where this machine can, else the typed graphs they were built from, if given.

        paths, typed: by graph, for every graph that the exam needs. target: the artifacts'. Raises BackendError if
        they were built for just this kind of machine and do not run.
        """
        graphs = self.exam.graphs
        with ExitStack() as opened:
            here: Target | None = None
            try:
                here = backend.probe(target.name)
                executors = {
                    name: opened.enter_context(loaded(backend, paths[name], spec, variant.on(name), target, threads))
                    for name, spec in graphs.items()
                }
            except BackendError as error:
                if here is not None and here.present and here == target:
                    raise  # not another machine, but a fault
                return self._run_graphs(typed, str(error)) if typed else Findings((), None, NOT_VERIFIED, str(error))
            own = executors[self.exam.spec.name]
            evidence, flipped = self._judged(executors)
            return Findings(evidence, latency_ms(own, self.exam.spec), here.verified_on, flips=flipped)

    def _run_graphs(self, typed: Mapping[str, Path], reason: str) -> Findings:
        """The evidence of the graphs alone; none where ONNX Runtime's CPU provider lacks an operator or a format."""
        try:
            with ExitStack() as opened:
                graphs = self.exam.graphs
                executors = {n: opened.enter_context(on_cpu(typed[n], spec)) for n, spec in graphs.items()}
                evidence, flipped = self._judged(executors)
                return Findings(evidence, None, GRAPH_VERIFIED, reason, flipped)
        except BackendError as error:
            return Findings((), None, NOT_VERIFIED, f"{reason}; nor does its graph run here: {error.message}")

    def _judged(self, executors: Mapping[str, Executor]) -> tuple[tuple[Evidence, ...], Flips | None]:
        answers = self.exam.answers(executors)
        evidence = exams.judge(self.exam, self.budget, self.reference, answers)
        found = exams.flips(self.exam, self.reference, answers)
        return evidence, None if found is None else flips.ranked(found)


def loaded(
    backend: Backend, path: Path, spec: GraphSpec, variant: Variant, target: Target, threads: int | None
) -> Executor:
    """The artifact at path with the face that its exam takes. variant: as it is on this graph. Raises BackendError."""
    if backends.is_paged(spec):
        return FreshSequence(spec.name, backends.load_decoder(backend, path, variant, threads, BLOCKS))
    return backend.load(path, spec, variant, target, threads)


def on_cpu(typed: Path, spec: GraphSpec) -> Executor:
    """A typed graph on ONNX Runtime's CPU provider. Raises BackendError where that lacks an operator or a format."""
    try:
        if backends.is_paged(spec):
            return FreshGraph(typed, spec.name, int(spec.outputs[0].shape[-1]))
        return _OnCpu(typed, spec)
    except BackendUnavailable:
        raise
    except ImportError as error:
        raise BackendUnavailable(
            f"its graph is run with onnx_ir: {error}", fix='pip install "medcompile[build]"'
        ) from error
    except run_onnx.errors() as error:
        raise BackendError(f"ONNX Runtime's CPU provider refuses it: {str(error).splitlines()[0]}") from error


class _OnCpu(Executor):
    """A typed graph as it is, run by ONNX Runtime's CPU provider: the numerical oracle for what can't run here."""

    def __init__(self, typed: Path, spec: GraphSpec) -> None:
        super().__init__(spec)
        self._session: Any = run_onnx.session(typed)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        check_feeds(self.spec, feeds)
        names = [tensor.name for tensor in self.outputs]
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))

    def close(self) -> None:
        self._session = None


# ---- the reference's answers, kept by digest


def write_reference(path: Path, exam: Exam, predictions: Predictions) -> None:
    """An .npz without pickle: the items' digests [n, 32] bytes, and every array of the answers by its name.

    Answers of different lengths lie end to end, with each item's length in `lengths`.
    """
    digests = b"".join(bytes.fromhex(digest) for digest in exam.digests())
    arrays = {"digests": np.frombuffer(digests, np.uint8).reshape(-1, 32)}
    for name, value in vars(predictions).items():
        if isinstance(value, np.ndarray):
            arrays[name] = value
        elif value is not None:
            arrays |= {name: np.concatenate(value), "lengths": np.array([len(v) for v in value], np.int64)}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def read_reference(path: Path, exam: Exam) -> Predictions:
    """The kept answers. Raises DataError if the exam asks about other items, BundleError if the file is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        digests, values = arrays.pop("digests"), arrays.pop("values")
        lengths = arrays.pop("lengths", None)
        by_item = {"values": values} | {n: arrays.pop(n) for n in ("confidences",) if n in arrays}
        if lengths is not None:
            by_item = {name: np.split(array, np.cumsum(lengths)[:-1]) for name, array in by_item.items()}
        found = Predictions(**by_item, **arrays)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path.name} holds no reference answers: {error}", fix="rebuild the bundle") from error
    if tuple(bytes(d).hex() for d in digests) != exam.digests():
        raise DataError(
            f"the {len(exam.digests())} items asked about are not the {len(digests)} that the bundle was judged on",
            fix="give the evaluation data that the bundle's provenance names",
        )
    return found


# ---- a finished bundle, again


@dataclass(frozen=True)
class Repeated:
    """An artifact with the evidence made here, and what the bundle recorded of it.

    made: False where nothing could be run here; the artifact is then as the bundle has it. reason: why it did not run
    itself (its graph may have). renewed: it, or else its graph, ran for the first time: the bundle should know.
    flips: Findings.flips.
    """

    artifact: Artifact
    recorded: Verdict | None
    made: bool = True
    reason: str = ""
    renewed: bool = False
    flips: Flips | None = None


def evaluation(bundle: Bundle, manifest: Path | None, *, allow_phi: bool = False) -> Dataset:
    """The very data that the bundle was judged on, by its manifest; calibration/<name>.yaml if that is None.

    Raises UsageError where there is no manifest, DataError if it is other data: evidence holds for its items alone.
    """
    judged_on = bundle.provenance.get("evaluation") or {}
    path = manifest or Path("calibration") / f"{judged_on.get('name')}.yaml"
    if not path.is_file():
        raise UsageError(
            f"the evidence can't be made again: no manifest {path} of the evaluation data",
            fix="name it with --data FILE, or check the files alone with --digests-only",
        )
    found = data.read(data.load_manifest(path), limit=judged_on.get("items"), allow_phi=allow_phi)
    if found.digest != judged_on.get("digest"):
        raise DataError(
            f"{found.name} is not the data that {bundle.name} was judged on: that is {judged_on.get('name')}, "
            f"{judged_on.get('items')} items, digest {str(judged_on.get('digest'))[:12]}; this has {len(found.items)}, "
            f"digest {found.digest[:12]}",
            fix="give the manifest of that data, with the same labels, or rebuild the bundle to judge it on this",
        )
    return found


def trial(bundle: Bundle, graph: str, dataset: Dataset) -> Trial:
    """What a finished bundle's artifacts of that graph are judged by."""
    exam = exams.of(graph, setting(bundle, dataset))
    return Trial.of(exam, bundle.root / f"reference/{graph}.npz", bundle.budget)


def setting(bundle: Bundle, dataset: Dataset) -> exams.Setting:
    """What a finished bundle's exams are set from."""
    root = bundle.root
    return exams.Setting(bundle.graphs, root / "assets", dataset, lambda graph: root / f"reference/{graph}.npz")


def repeat(bundle: Bundle, dataset: Dataset, threads: int | None = None) -> tuple[Repeated, ...]:
    """Judge every artifact again against the kept reference. One that can't run here is judged by its graph, unless
    it ran elsewhere already: that evidence is the better one, and stays."""
    trials = {graph: trial(bundle, graph, dataset) for graph in bundle.graphs}
    return tuple(_again(bundle, artifact, trials[artifact.graph], threads) for artifact in bundle.artifacts)


def _again(bundle: Bundle, artifact: Artifact, trial: Trial, threads: int | None) -> Repeated:
    backend, variant = backends.get(artifact.target.backend), bundle.variants[artifact.variant]
    pair = (artifact.variant, artifact.target.name)
    beside = [a for a in bundle.artifacts if (a.variant, a.target.name) == pair]
    paths = {a.graph: bundle.root / a.path for a in beside}
    typed = {a.graph: bundle.root / f"graphs/{a.variant}/{a.graph}.onnx" for a in beside}
    found = trial.run(backend, paths, variant, artifact.target, None if artifact.ran else typed, threads)
    ran = not found.reason
    if found.verified_on == NOT_VERIFIED:
        return Repeated(artifact, artifact.verdict, made=False, reason=found.reason)
    again = replace(artifact, evidence=found.evidence, verified_on=found.verified_on, latency_ms=found.latency_ms)
    notes = [note for note in artifact.notes if not note.startswith(DID_NOT_RUN)]
    again = replace(again, notes=(*notes, *([] if ran else [f"{DID_NOT_RUN}{found.reason}"])))
    first = (ran and not artifact.ran) or artifact.verified_on == NOT_VERIFIED
    return Repeated(again, artifact.verdict, reason=found.reason, renewed=first, flips=found.flips)


def renew(bundle: Bundle, repeated: Sequence[Repeated]) -> Bundle:
    """Write the bundle anew with the evidence of what ran for the first time. Nothing else is changed.

    Raises BundleError where its folder can't be written.
    """
    artifacts = [r.artifact if r.renewed else a for r, a in zip(repeated, bundle.artifacts, strict=True)]
    try:
        fresh = {r.artifact.path: r.flips for r in repeated if r.renewed and r.flips is not None}
        with flips.renewed(bundle.root, fresh, [a.path for a in artifacts]) as files:
            return rewrite(bundle, bundle.root, artifacts, files, told=report.texts)
    except OSError as error:
        raise BundleError(
            f"{bundle.root}: the evidence was made, but can't be written into it: {error.strerror or error}",
            fix="verify a copy in a folder that can be written",
        ) from error
