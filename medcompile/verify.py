"""Verify: what a model answers on evaluation data, and the evidence that an artifact answers as well as the reference.

Used by the build for every artifact, and by `medcompile verify` to repeat the evidence where there is no torch:
the bundle keeps the reference's answers by item digest. No text is kept anywhere. An artifact that can't run here is
judged by the typed graph that it was built from, and says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medcompile import backends, data, metrics, run_onnx
from medcompile.backends import Backend, Executor, check_feeds
from medcompile.bundle import Bundle, rewrite
from medcompile.data import Dataset, Item
from medcompile.errors import BackendError, BackendUnavailable, BundleError, DataError, UsageError
from medcompile.metrics import Predictions
from medcompile.runtime.encoder import Encoder
from medcompile.runtime.text import TextAssets, read_json
from medcompile.spec import (
    GRAPH_VERIFIED,
    NOT_VERIFIED,
    Artifact,
    Evidence,
    GraphSpec,
    Margin,
    Target,
    Variant,
    Verdict,
)

Array = np.ndarray[Any, Any]

DID_NOT_RUN = "it did not run: "
"""How Artifact.notes begins to say why its graph stood in for it."""

_TIMED_RUNS = 5
_TIMED_S = 2.0


@dataclass(frozen=True)
class Question:
    """An evaluation item as one task asks it. text: for fill-mask, with the mask token in it; gold: a token's id."""

    item: Item
    text: str
    gold: int = -1


def questions(task: str, items: Sequence[Item], text: TextAssets) -> tuple[Question, ...]:
    """The items that the task can ask. fill-mask hides one word that is a single token, chosen by the item's digest.

    An item without words is asked for token-classification by its white space, so that plain text can calibrate.

    Raises DataError if none of the items suits the task.
    """
    if task == "fill-mask":
        asked = tuple(q for item in items if (q := _masked(item, text)))
    elif task == "token-classification":
        asked = tuple(Question(i if i.words else replace(i, words=tuple(i.text.split())), i.text) for i in items)
    else:
        asked = tuple(Question(item, item.text) for item in items)
    if not asked:
        raise DataError(
            f"none of the {len(items)} evaluation items can be asked for {task}",
            fix="token-classification needs words and labels, the other tasks text; see the manifest's fields",
        )
    return asked


def _masked(item: Item, text: TextAssets) -> Question | None:
    words = (item.text_pair or item.text).split()
    tokens = text.encode_words([words])[0]
    counts = np.bincount(tokens.words, minlength=len(words)) if len(tokens) else np.zeros(len(words), int)
    single = [i for i, word in enumerate(words) if counts[i] == 1 and word.isalpha()]
    if not single or text.mask_token is None:
        return None
    chosen = single[int(item.digest[:12], 16) % len(single)]
    gold = int(tokens.ids[tokens.words == chosen][0])
    return Question(item, " ".join([*words[:chosen], text.mask_token, *words[chosen + 1 :]]), gold)


def predict(encoder: Encoder, task: str, asked: Sequence[Question]) -> Predictions:
    """What the encoder's executor for this task answers to each question, in order."""
    if task == "token-classification":
        return Predictions(encoder.label_words([q.item.words for q in asked]))
    if task == "sequence-classification":
        pairs = [q.item.text_pair for q in asked]
        return Predictions(encoder.class_ids([q.text for q in asked], pairs if any(pairs) else None))
    if task == "fill-mask":
        return Predictions(encoder.mask_ids([q.text for q in asked]))
    values = encoder.embed([q.text for q in asked])
    passages = [q.item.text_pair for q in asked]
    return Predictions(values, encoder.embed(passages) if all(passages) else None)


def check(task: str, items: Sequence[Item], text: TextAssets, labels: Sequence[str]) -> None:
    """Raise DataError if none of the items suits the task, or one has a label that the model lacks."""
    _gold(task, questions(task, items, text), labels)


def judge(
    task: str,
    margins: Sequence[Margin],
    reference: Predictions,
    candidate: Predictions,
    asked: Sequence[Question],
    labels: Sequence[str],
) -> tuple[Evidence, ...]:
    """Evidence of one graph: every margin that is a metric of this task, and the task's other metrics, not judged."""
    own = [m for m in margins if metrics.is_metric(task, m.metric)]
    units = [q.item.document or None for q in asked]
    return metrics.evaluate(task, own, reference, candidate, _gold(task, asked, labels), units, labels)


def _gold(task: str, asked: Sequence[Question], labels: Sequence[str]) -> list[Array] | Array | None:
    """The right answers as ids, or None where the data has none. Raises DataError on a label the model lacks."""
    if task == "fill-mask":
        return np.array([q.gold for q in asked], np.int64)
    ids = {label: i for i, label in enumerate(labels)}
    if task == "token-classification" and all(q.item.labels for q in asked):
        return [np.array([_id(ids, label) for label in q.item.labels], np.int64) for q in asked]
    if task == "sequence-classification" and all(q.item.label for q in asked):
        return np.array([_id(ids, q.item.label) for q in asked], np.int64)
    return None


def _id(ids: Mapping[str, int], label: str) -> int:
    if label not in ids:
        raise DataError(
            f"the evaluation data has the label {label!r}; the model's labels are {', '.join(ids)}",
            fix="rename it with label_map, or drop it with keep, in the data's manifest",
        )
    return ids[label]


def latency_ms(executor: Executor, spec: GraphSpec) -> float:
    """Median milliseconds of one run at the first profile's opt shape, every position a real token, after a warm-up."""
    sizes = {axis.name: axis.opt for axis in spec.profiles[0].axes}
    feeds = {t.name: np.ones([sizes[d] if isinstance(d, str) else d for d in t.shape], t.dtype) for t in spec.inputs}
    executor.run(feeds)
    times: list[float] = []
    while len(times) < _TIMED_RUNS and sum(times) < _TIMED_S:
        start = time.perf_counter()
        executor.run(feeds)
        times.append(time.perf_counter() - start)
    return round(statistics.median(times) * 1000, 3)


# ---- one artifact


@dataclass(frozen=True)
class Findings:
    """What a trial came to: Artifact's fields of the same names. reason: why the artifact itself did not run."""

    evidence: tuple[Evidence, ...]
    latency_ms: float | None
    verified_on: str
    reason: str = ""


@dataclass(frozen=True)
class Trial:
    """What artifacts of one graph are judged by: its questions, the reference's answers to them, and the budget."""

    spec: GraphSpec
    text: TextAssets
    labels: Sequence[str]
    asked: tuple[Question, ...]
    reference: Predictions
    budget: Sequence[Margin]

    @classmethod
    def of(
        cls,
        spec: GraphSpec,
        text: TextAssets,
        labels: Sequence[str],
        items: Sequence[Item],
        reference: Path,
        budget: Sequence[Margin],
    ) -> Trial:
        """reference: the .npz of the answers that were kept."""
        answers, asked = read_reference(reference, spec.name, questions(spec.name, items, text))
        return cls(spec, text, labels, asked, answers, budget)

    def run(
        self,
        backend: Backend,
        path: Path,
        variant: Variant,
        target: Target,
        typed: Path | None,
        threads: int | None = None,
    ) -> Findings:
        """Run the artifact at path where this machine can, else the typed graph that it was built from, if given.

        target: the artifact's. Raises BackendError if it was built for just this kind of machine and does not run.
        """
        here: Target | None = None
        try:
            here = backend.probe(target.name)
            executor = backend.load(path, self.spec, variant, target, threads)
        except BackendError as error:
            if here is not None and here.present and here == target:
                raise  # not another machine, but a fault
            return self._run_graph(typed, str(error)) if typed else Findings((), None, NOT_VERIFIED, str(error))
        with executor:
            return Findings(self._judged(executor), latency_ms(executor, self.spec), here.verified_on)

    def _run_graph(self, typed: Path, reason: str) -> Findings:
        """The evidence of the graph alone; none where ONNX Runtime's CPU provider lacks an operator or a format."""
        try:
            with _OnCpu(typed, self.spec) as executor:
                return Findings(self._judged(executor), None, GRAPH_VERIFIED, reason)
        except BackendError as error:
            return Findings((), None, NOT_VERIFIED, f"{reason}; nor does its graph run here: {error.message}")

    def _judged(self, executor: Executor) -> tuple[Evidence, ...]:
        name = self.spec.name
        encoder = Encoder(self.text, {name: executor}, {name: self.spec}, self.labels)
        answers = predict(encoder, name, self.asked)
        return judge(name, self.budget, self.reference, answers, self.asked, self.labels)


class _OnCpu(Executor):
    """A typed graph as it is, run by ONNX Runtime's CPU provider: the numerical oracle for what can't run here."""

    def __init__(self, typed: Path, spec: GraphSpec) -> None:
        super().__init__(spec)
        try:
            self._session: Any = run_onnx.session(typed)
        except BackendUnavailable:
            raise
        except run_onnx.errors() as error:
            raise BackendError(f"ONNX Runtime's CPU provider refuses it: {str(error).splitlines()[0]}") from error

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        check_feeds(self.spec, feeds)
        names = [tensor.name for tensor in self.outputs]
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))

    def close(self) -> None:
        self._session = None


# ---- the reference's answers, kept by digest


def write_reference(path: Path, asked: Sequence[Question], predictions: Predictions) -> None:
    """An .npz without pickle: digests [n, 32] bytes, and the answers as one flat array with each item's length."""
    digests = np.frombuffer(b"".join(bytes.fromhex(q.item.digest) for q in asked), np.uint8).reshape(-1, 32)
    values = [np.asarray(v) for v in predictions.values]
    arrays: dict[str, Array] = {
        "digests": digests,
        "lengths": np.array([v.size for v in values], np.int64),
        "values": np.concatenate([v.reshape(-1) for v in values]),
    }
    if predictions.passages is not None:
        arrays["passages"] = predictions.passages
    np.savez(path, **arrays)  # type: ignore[arg-type]


def read_reference(path: Path, task: str, asked: Sequence[Question]) -> tuple[Predictions, tuple[Question, ...]]:
    """The kept answers to those of the questions that were asked when the bundle was built, and these questions.

    Raises DataError if none was, BundleError if the file is no reference.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            digests, lengths, values = arrays["digests"], arrays["lengths"], arrays["values"]
            passages = arrays["passages"] if "passages" in arrays.files else None
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(f"{path.name} holds no reference answers: {error}", fix="rebuild the bundle") from error
    parts = np.split(values, np.cumsum(lengths)[:-1])
    rows = {bytes(d).hex(): i for i, d in enumerate(digests)}
    known = tuple(q for q in asked if q.item.digest in rows)
    if not known:
        raise DataError(
            f"none of the {len(asked)} items is among those that the bundle was judged on",
            fix="give the evaluation data that the bundle's provenance names",
        )
    taken = [rows[q.item.digest] for q in known]
    found = [parts[i] for i in taken]
    if task == "token-classification":
        return Predictions(found), known
    stacked = np.stack(found) if task == "embed" else np.concatenate(found)
    return Predictions(stacked, None if passages is None else passages[taken]), known


# ---- a finished bundle, again


@dataclass(frozen=True)
class Repeated:
    """An artifact with the evidence made here, and what the bundle recorded of it.

    made: False where nothing could be run here; the artifact is then as the bundle has it. reason: why it did not run
    itself (its graph may have). renewed: it, or else its graph, ran for the first time: the bundle should know.
    """

    artifact: Artifact
    recorded: Verdict | None
    made: bool = True
    reason: str = ""
    renewed: bool = False


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
    text = TextAssets.read(bundle.root / "assets")
    labels = read_json(bundle.root / bundle.assets["labels"], list) if "labels" in bundle.assets else []
    reference = bundle.root / f"reference/{graph}.npz"
    names = [str(name) for name in labels]
    return Trial.of(bundle.graphs[graph], text, names, dataset.items, reference, bundle.budget)


def repeat(bundle: Bundle, dataset: Dataset, threads: int | None = None) -> tuple[Repeated, ...]:
    """Judge every artifact again against the kept reference. One that can't run here is judged by its graph, unless
    it ran elsewhere already: that evidence is the better one, and stays."""
    trials = {graph: trial(bundle, graph, dataset) for graph in bundle.graphs}
    return tuple(_again(bundle, artifact, trials[artifact.graph], threads) for artifact in bundle.artifacts)


def _again(bundle: Bundle, artifact: Artifact, trial: Trial, threads: int | None) -> Repeated:
    backend, variant = backends.get(artifact.target.backend), bundle.variants[artifact.variant]
    typed = None if artifact.ran else bundle.root / f"graphs/{artifact.variant}/{artifact.graph}.onnx"
    found = trial.run(backend, bundle.root / artifact.path, variant, artifact.target, typed, threads)
    ran = not found.reason
    if found.verified_on == NOT_VERIFIED:
        return Repeated(artifact, artifact.verdict, made=False, reason=found.reason)
    again = replace(artifact, evidence=found.evidence, verified_on=found.verified_on, latency_ms=found.latency_ms)
    notes = [note for note in artifact.notes if not note.startswith(DID_NOT_RUN)]
    again = replace(again, notes=(*notes, *([] if ran else [f"{DID_NOT_RUN}{found.reason}"])))
    first = (ran and not artifact.ran) or artifact.verified_on == NOT_VERIFIED
    return Repeated(again, artifact.verdict, reason=found.reason, renewed=first)


def renew(bundle: Bundle, repeated: Sequence[Repeated]) -> Bundle:
    """Write the bundle anew with the evidence of what ran for the first time. Nothing else is changed.

    Raises BundleError where its folder can't be written.
    """
    artifacts = [r.artifact if r.renewed else a for r, a in zip(repeated, bundle.artifacts, strict=True)]
    try:
        return rewrite(bundle, bundle.root, artifacts)
    except OSError as error:
        raise BundleError(
            f"{bundle.root}: the evidence was made, but can't be written into it: {error.strerror or error}",
            fix="verify a copy in a folder that can be written",
        ) from error
