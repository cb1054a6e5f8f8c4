"""Verify: what a model answers on evaluation data, and the evidence that an artifact answers as well as the reference.

Used by the pipeline for every artifact, and by `medcompile verify` to repeat the evidence where there is no torch:
the bundle keeps the reference's answers by item digest. No text is kept anywhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile import backends, data, metrics
from medcompile.backends import Executor
from medcompile.data import Dataset, Item
from medcompile.errors import BackendUnavailable, BundleError, DataError, UsageError
from medcompile.metrics import Predictions
from medcompile.runtime.encoder import Encoder
from medcompile.runtime.text import TextAssets, read_json
from medcompile.spec import Artifact, Evidence, GraphSpec, Margin, Verdict

if TYPE_CHECKING:
    from medcompile.bundle import Bundle

    Array = np.ndarray[Any, Any]

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
    """An artifact with the evidence made here, and the verdict that the bundle recorded.

    reason: why it could not be run here; the artifact is then as the bundle has it.
    """

    artifact: Artifact
    recorded: Verdict | None
    reason: str = ""


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


def repeat(bundle: Bundle, dataset: Dataset, threads: int | None = None) -> tuple[Repeated, ...]:
    """Run every artifact that can run here on the evaluation data, and judge it against the kept reference."""
    text = TextAssets.read(bundle.root / "assets")
    labels = (
        [str(n) for n in read_json(bundle.root / bundle.assets["labels"], list)] if "labels" in bundle.assets else []
    )
    results: list[Repeated] = []
    for artifact in bundle.artifacts:
        spec = bundle.graphs[artifact.graph]
        asked = questions(spec.name, dataset.items, text)
        reference, asked = read_reference(bundle.root / f"reference/{spec.name}.npz", spec.name, asked)
        backend = backends.get(artifact.target.backend)
        variant = bundle.variants[artifact.variant]
        try:
            backend.probe(artifact.target.name)
            executor = backend.load(bundle.root / artifact.path, spec, variant, artifact.target, threads)
        except BackendUnavailable as error:
            results.append(Repeated(artifact, artifact.verdict, str(error)))
            continue
        with executor:
            encoder = Encoder(text, {spec.name: executor}, {spec.name: spec}, labels)
            answers = predict(encoder, spec.name, asked)
            evidence = judge(spec.name, bundle.budget, reference, answers, asked, labels)
        results.append(Repeated(replace(artifact, evidence=evidence), artifact.verdict))
    return tuple(results)
