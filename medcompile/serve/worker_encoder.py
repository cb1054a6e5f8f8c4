"""Encoders in a worker: texts and images of many requests in common batches, by deadline.

Which items go together is lanes.py's. One thread runs batches, one after the other, and a batch holds what is there
when the one before ends: nobody waits for company. Texts are tokenized, and images decoded and resized, meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.errors import InputError, MedcompileError
from medcompile.runtime.deadlines import PATIENCES, Priority
from medcompile.runtime.flow import default_threads
from medcompile.runtime.session import Session
from medcompile.runtime.text import checked
from medcompile.serve.desk import Desk, Line, unknown
from medcompile.serve.frames import Frame
from medcompile.serve.lanes import Item, Job, Waiting

if TYPE_CHECKING:
    from medcompile.runtime.text import TextAssets, Tokens

log = logging.getLogger("medcompile.serve.worker")

Array = np.ndarray[Any, Any]

PATIENCE_S = 30.0
"""How long routine requests let emergencies overtake; background ones, four times that."""
CHARACTERS = 16
"""Of one token, at most: a text beyond that is too long before it is tokenized."""
CLASSES_KEPT = 64
"""Sets of prompts whose embeddings are kept."""


@dataclass(frozen=True)
class Kind:
    """What is done with items of one graph. run: values -> as many answers. prepare: one value, and its length."""

    run: Callable[[list[Any]], Iterable[Any]]
    prepare: Callable[[Any], tuple[Any, int]]
    slow: bool = False


class EncoderDesk(Desk):
    """Text encoders, and towers of images and texts. text_tokens: of one text at most."""

    def __init__(self, session: Session, line: Line, text_tokens: int) -> None:
        self._text_tokens = text_tokens
        self._sizes: Counter[int] = Counter()  # of batches
        self._running_since_s: float | None = None  # None: nothing runs
        self._alone = False
        self._session = session
        self._line = line
        self._tasks = frozenset(session.bundle.tasks)
        self._kinds = dict(self._made_kinds())
        self._waiting = Waiting()
        self._changed = threading.Condition()
        self._jobs: dict[int, Job] = {}
        self._classes: dict[str, Array] = {}
        self._sums = {"batches": 0, "items": 0, "tokens": 0, "busy_s": 0.0}
        self._pool = ThreadPoolExecutor(default_threads(), thread_name_prefix="medcompile-prepare")
        self._warm_up()
        threading.Thread(target=self._run_all, name="medcompile-batches", daemon=True).start()

    def facts(self) -> dict[str, Any]:
        told: dict[str, Any] = {"tasks": sorted(self._tasks)}
        if "image" not in self._tasks and "text" not in self._tasks:
            told["labels"] = list(self._session.encoder.labels)
        return told

    def stats(self) -> dict[str, Any]:
        with self._changed:
            since_s = self._running_since_s
            waiting = sum(not job.started_s for job in self._jobs.values())
            now = {"waiting": waiting, "running": len(self._jobs) - waiting}
            return {
                **self._sums,
                **now,
                "sizes": dict(self._sizes),
                "busy_for_s": time.monotonic() - since_s if since_s else 0.0,
            }

    def cancel(self, number: int) -> None:
        with self._changed:
            if job := self._jobs.pop(number, None):
                job.over = True

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ---- requests

    def take(self, frame: Frame, *, alone: bool) -> None:
        self._alone = alone
        h, op = frame.header, frame.header["op"]
        if op == "embed":
            wanted: list[tuple[str, Any]] = [("image", image) for image in _cut(frame)]
            wanted = wanted or [(self._text_kind(), text) for text in checked(h["texts"])]
            self._begin(frame, wanted, self._finish_rows)
        elif op == "extract":
            self._begin(frame, [("extract", t) for t in checked(h["texts"])], self._finish_entities)
        elif op == "classify":
            texts, pairs = checked(h["texts"]), h.get("pairs")
            both = [("pairs", both) for both in zip(texts, checked(pairs), strict=True)] if pairs else None
            self._begin(frame, both or [("classify", t) for t in texts], self._finish_scores)
        elif op == "rerank":
            self._begin(frame, self._ranked(checked(h["query"])[0], checked(h["texts"])), self._finish_ranks)
        elif op == "match":
            self._match(frame)
        else:
            raise unknown(op, self._session)

    def _text_kind(self) -> str:
        return "embed" if "embed" in self._tasks else "text"

    def _ranked(self, query: str, texts: Sequence[str]) -> list[tuple[str, Any]]:
        """By cosine where the bundle embeds, else by its classes of the pair of query and text."""
        if self._tasks & {"embed", "text"}:
            return [(self._text_kind(), text) for text in (query, *texts)]
        return [("pairs", (query, text)) for text in texts]

    def _match(self, frame: Frame) -> None:
        """Images against prompts, whose embeddings are kept: most clients ask with the same ones each time."""
        prompts, templates = frame.header["prompts"], frame.header.get("templates")
        key = repr((prompts, templates))
        wanted: list[tuple[str, Any]] = [("image", image) for image in _cut(frame)]
        with self._changed:
            classes = self._classes.pop(key, None)
            if classes is not None:
                self._classes[key] = classes  # the last used is the last to go
        if classes is None:
            wanted.append(("classes", (prompts, templates)))
        self._begin(frame, wanted, self._finish_match, {"key": key, "classes": classes})

    def _begin(
        self,
        frame: Frame,
        wanted: Sequence[tuple[str, Any]],
        finish: Callable[[Job], None],
        more: Mapping[str, Any] | None = None,
    ) -> None:
        for kind, _ in wanted:
            if kind not in self._kinds:
                raise unknown(frame.header["op"], self._session)
        count = len(wanted)
        priority = frame.header["priority"]
        job = Job(frame.header["id"], finish, priority, time.monotonic(), [None] * count, count, more=more or {})
        with self._changed:
            self._jobs[job.number] = job
        slow = any(self._kinds[kind].slow for kind, _ in wanted) or sum(_size(v) for _, v in wanted) > 20_000
        if not slow:
            self._enter(job, wanted, alone=self._alone)
            return
        for at in range(0, count, 16):
            self._pool.submit(self._enter, job, wanted[at : at + 16], at)

    def _enter(self, job: Job, wanted: Sequence[tuple[str, Any]], first: int = 0, *, alone: bool = False) -> None:
        """Prepare items, and let them wait for their turn. One that is alone, and has nobody before it, is run at once
        by the thread that read it: no other has to wake up for it."""
        due_s = job.arrived_s + PATIENCES[Priority(job.priority)] * PATIENCE_S
        items = []
        try:
            for index, (kind, value) in enumerate(wanted, first):
                prepared, length = self._prepared(kind, value)
                items.append(Item(job, index, kind, prepared, length, due_s))
        except Exception as error:  # noqa: BLE001  # in a thread of the pool nobody else would tell
            self._fail(job, error, index)
            return
        with self._changed:
            at_once = alone and len(items) == 1 and not self._running_since_s and not len(self._waiting)
            if at_once:
                self._running_since_s = time.monotonic()
            else:
                for item in items:
                    self._waiting.add(item)
                self._changed.notify_all()
        if at_once:
            self._run(items)

    def _prepared(self, kind: str, value: Any) -> tuple[Any, int]:
        """Raises InputError for a text that would keep the model from all others for too long."""
        limit = self._text_tokens
        if not self._kinds[kind].slow and _size(value) > limit * CHARACTERS:
            raise InputError(
                f"a text of {_size(value)} characters; {limit} tokens are the limit", fix="send it in parts"
            )
        prepared, length = self._kinds[kind].prepare(value)
        if length > limit:
            raise InputError(f"a text of {length} tokens; the limit is {limit}", fix="send it in parts")
        return prepared, length

    def _fail(self, job: Job, error: BaseException, index: int = 0) -> None:
        with self._changed:
            if job.over:
                return
            job.over = True
            self._jobs.pop(job.number, None)
        if isinstance(error, MedcompileError) and len(job.answers) > 1:
            error = type(error)(f"item {index}: {error.message}", fix=error.fix)
        elif not isinstance(error, MedcompileError):
            log.error("a batch failed", exc_info=error)
        self._line.fail(job.number, error)

    # ---- batches

    def _run_all(self) -> None:
        while True:
            with self._changed:
                while self._running_since_s or not (batch := self._waiting.take()):
                    self._changed.wait()
                self._running_since_s = time.monotonic()
            self._run(batch)

    def _run(self, batch: Sequence[Item]) -> None:
        """Run a batch and tell its answers. Whoever calls has set since when something runs: nothing else does."""
        started_s = time.monotonic()
        for item in batch:
            item.job.started_s = item.job.started_s or started_s
        done = self._answer(batch)
        with self._changed:
            self._running_since_s = None
            self._sizes[len(batch)] += 1
            self._sums["batches"] += 1
            self._sums["items"] += len(batch)
            self._sums["tokens"] += sum(i.length for i in batch)
            self._sums["busy_s"] += time.monotonic() - started_s
            if len(self._waiting):
                self._changed.notify_all()
        for job in done:
            self._finish(job)

    def _answer(self, batch: Sequence[Item]) -> list[Job]:
        """Run a batch; where it fails, one by one, to find whose fault it is. Returns the jobs that are complete."""
        kind = self._kinds[batch[0].kind]
        done = []
        try:
            answers = list(kind.run([item.value for item in batch]))
        except Exception as error:  # noqa: BLE001  # told to the client, and logged where it is a bug
            if len(batch) == 1:
                self._fail(batch[0].job, error, batch[0].index)
                return []
            return [job for item in batch if not item.job.over for job in self._answer([item])]
        for item, answer in zip(batch, answers, strict=True):
            job = item.job
            job.answers[item.index] = answer
            job.left -= 1
            job.batch = max(job.batch, len(batch))
            job.tokens += item.length if item.kind not in {"image", "classes"} else 0
            if job.left == 0:
                done.append(job)
        return done

    def _finish(self, job: Job) -> None:
        with self._changed:
            if job.over:
                return
            job.over = True
            del self._jobs[job.number]
        try:
            job.finish(job)
        except Exception as error:  # a bug in telling one answer
            log.error("a batch failed", exc_info=error)
            self._line.fail(job.number, error)

    # ---- answers

    def _finish_rows(self, job: Job) -> None:
        rows = np.stack(job.answers) if job.answers else np.zeros((0, 0), np.float32)
        self._line.send(({"id": job.number, "shape": rows.shape, **job.facts}, rows.astype("<f4").tobytes()))

    def _finish_entities(self, job: Job) -> None:
        found = [[asdict(entity) for entity in entities] for entities in job.answers]
        self._line.send(({"id": job.number, "found": found, **job.facts}, b""))

    def _finish_scores(self, job: Job) -> None:
        found = [[asdict(score) for score in scores] for scores in job.answers]
        self._line.send(({"id": job.number, "found": found, **job.facts}, b""))

    def _finish_ranks(self, job: Job) -> None:
        if self._tasks & {"embed", "text"}:
            rows = np.stack(job.answers).astype(np.float64)
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
            scores = (rows[1:] @ rows[0]).tolist()
        else:
            label = self._session.encoder.labels[-1]
            scores = [next(s.score for s in scores if s.label == label) for scores in job.answers]
        self._line.send(({"id": job.number, "scores": scores, **job.facts}, b""))

    def _finish_match(self, job: Job) -> None:
        classes, answers = job.more["classes"], job.answers
        if classes is None:
            *answers, classes = answers
            with self._changed:
                self._classes[job.more["key"]] = classes
                while len(self._classes) > CLASSES_KEPT:
                    del self._classes[next(iter(self._classes))]
        rows = self._session.towers.scores(np.stack(answers), classes)
        self._line.send(({"id": job.number, "shape": rows.shape, **job.facts}, rows.astype("<f4").tobytes()))

    # ---- what this bundle can do

    def _made_kinds(self) -> Iterable[tuple[str, Kind]]:
        session = self._session
        if "image" in self._tasks:
            towers = session.towers
            assert towers.transform
            pixels = towers.transform.pixels
            yield "image", Kind(towers.embed_pixels, lambda image: (pixels(image, name="image"), 1), slow=True)
        if "text" in self._tasks:
            towers = session.towers
            assert towers.text
            yield "text", Kind(towers.embed_texts, _counted(towers.text))
            if "image" in self._tasks:
                yield "classes", Kind(lambda asked: [towers.classes(*one) for one in asked], lambda asked: (asked, 1))
        if self._tasks & {"image", "text"}:
            return
        encoder, text = session.encoder, session.encoder.text
        if "embed" in self._tasks:
            yield "embed", Kind(lambda read: encoder.embed_tokens([tokens for _, tokens in read]), _tokenized(text))
        if "token-classification" in self._tasks:
            yield "extract", Kind(lambda read: encoder.extract_tokens(*zip(*read, strict=True)), _tokenized(text))
        if "sequence-classification" in self._tasks:
            yield "classify", Kind(session.classify, _counted(text))
            yield "pairs", Kind(lambda both: session.classify(*map(list, zip(*both, strict=True))), _counted(text))

    def _warm_up(self) -> None:
        """Load every graph now, and not in the first request's time."""
        for name in ("embed", "extract", "classify", "text"):
            if name in self._kinds:
                kind = self._kinds[name]
                list(kind.run([kind.prepare("warm up")[0]]))
        if "image" in self._kinds:
            self._session.embed_images(np.zeros((32, 32), np.uint8))


def _tokenized(text: TextAssets) -> Callable[[str], tuple[tuple[str, Tokens], int]]:
    """A text with its tokens, and how many they are."""

    def prepare(value: str) -> tuple[tuple[str, Tokens], int]:
        (tokens,) = text.encode([value])
        return (value, tokens), len(tokens)

    return prepare


def _counted(text: TextAssets) -> Callable[[Any], tuple[Any, int]]:
    """A text (or two), and how many tokens it has."""

    def prepare(value: Any) -> tuple[Any, int]:
        parts = [value] if isinstance(value, str) else list(value)
        return value, sum(len(tokens) for tokens in text.encode(parts))

    return prepare


def _cut(frame: Frame) -> list[bytes]:
    """The images in a frame's body, by their sizes in its header."""
    found, at = [], 0
    for size in frame.header.get("images") or ():
        found.append(frame.body[at : at + size])
        at += size
    return found


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes)) else sum(len(v) for v in value if isinstance(v, str))
