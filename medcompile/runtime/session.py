"""load(): a bundle, one of its variants, a backend that can run it here, and the answers.

Which artifact runs is decided here, from the bundle's evidence and latencies; how one runs is the backend's business,
and what its numbers mean is encoder.py's.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from medcompile import backends, bundle
from medcompile.backends import Backend, Executor
from medcompile.bundle import Bundle
from medcompile.errors import BackendUnavailable, OverBudgetError, UsageError
from medcompile.runtime.encoder import Encoder, Fill, Score
from medcompile.runtime.entities import Entity
from medcompile.runtime.parallel import load_streamed
from medcompile.runtime.text import Text, TextAssets, read_json
from medcompile.spec import Artifact, Precision, Target, Variant, Verdict

if TYPE_CHECKING:
    from medcompile.runtime.decoder import StepModel
    from medcompile.runtime.generator import Generator
    from medcompile.runtime.image import Image
    from medcompile.runtime.index import Index
    from medcompile.runtime.prompts import Prompt
    from medcompile.runtime.request import Chunk, Completion
    from medcompile.runtime.sampling import Sampling
    from medcompile.runtime.stream import Stream
    from medcompile.runtime.towers import Prompts, Towers

Vectors = np.ndarray[Any, np.dtype[np.float32]]

AUTO = "auto"
MEANINGLESS = "null"
"""The backend that answers zeros: it runs only when named."""

_TOWERS = {"image", "text"}
GENERATE = "generate"
KV_SEQUENCES = 8
"""Sequences of full length that a decoder's blocks hold, unless load() is told how many there are."""

log = logging.getLogger("medcompile")


@dataclass(frozen=True)
class Choice:
    """One variant lowered for one target, with an artifact for every graph of the bundle (by graph name)."""

    variant: Variant
    target: Target
    artifacts: Mapping[str, Artifact]

    @property
    def eligible(self) -> bool:
        """True if load() may pick it unasked: non-inferior, or float32 throughout and not found inferior."""
        verdicts = {a.verdict for a in self.artifacts.values()}
        reference = self.variant.float_dtype is Precision.FLOAT32 and not self.variant.quantized
        exact = reference and self.variant.compute.get("float", Precision.FLOAT32) == Precision.FLOAT32
        return verdicts == {Verdict.NON_INFERIOR} or (exact and Verdict.INFERIOR not in verdicts)

    @property
    def latency_ms(self) -> float | None:
        """Sum over the graphs; None if one was never timed."""
        times = [a.latency_ms for a in self.artifacts.values() if a.latency_ms is not None]
        return sum(times) if len(times) == len(self.artifacts) else None

    def timed_on(self, machine: Target) -> bool:
        """Whether its latencies hold for this kind of machine. Target.arch can't tell: an engine for sm_80+ was timed
        on one kind of GPU among all those that take it, which the evidence names."""
        return {a.verified_on for a in self.artifacts.values()} == {
            machine.verified_on
        } and self.target.os == machine.os


class Session:
    """A loaded bundle. Thread-safe; a context manager; a task's artifact is checked and loaded on its first use.

    bundle: its facts, digest included. variant, target: what was chosen.
    """

    def __init__(self, loaded: Bundle, choice: Choice, executors: _Executors, kv_blocks: int | None = None) -> None:
        self.bundle = loaded
        self.variant = choice.variant
        self.target = choice.target
        self._executors = executors
        loaded.check(loaded.under("assets"))
        self._assets = loaded.root / "assets"
        self._kv_blocks = kv_blocks

    @cached_property
    def encoder(self) -> Encoder:
        """A text encoder's tasks. Raises UsageError for a bundle of another kind."""
        self._check_kind("a text encoder", not {*_TOWERS, GENERATE} & set(self.bundle.graphs))
        labels = read_json(self._assets / "labels.json", list) if "labels" in self.bundle.assets else []
        names = [str(name) for name in labels]
        return Encoder(TextAssets.read(self._assets), self._executors, self.bundle.graphs, names)

    @cached_property
    def towers(self) -> Towers:
        """An image and a text tower, or one of them. Raises UsageError for a bundle of another kind."""
        from medcompile.runtime.towers import Towers

        self._check_kind("a model of images and texts", bool(_TOWERS & set(self.bundle.graphs)))
        return Towers.read(self._assets, self._executors, self.bundle.graphs)

    @cached_property
    def generator(self) -> Generator:
        """A decoder, for any number of requests at once. Raises UsageError for a bundle of another kind."""
        from medcompile.runtime.generator import REQUESTS, STEP_TOKENS, Generator
        from medcompile.runtime.prompts import DecoderText

        self._check_kind("a decoder", GENERATE in self.bundle.graphs)
        facts = read_json(self._assets / "decoder.json", dict)
        blocks = self._kv_blocks or KV_SEQUENCES * -(-int(facts["context"]) // int(facts["block_size"]))
        text = DecoderText.read(self._assets)
        tokens, requests = STEP_TOKENS, REQUESTS
        if self.target.device != "cpu":  # an engine takes no step beyond its profiles, so none is planned
            largest = max(self.bundle.graphs[GENERATE].profiles, key=lambda p: p.axis("tokens").max)
            tokens = min(tokens, largest.axis("tokens").max)
            requests = min(requests, largest.axis("sequences").max)
        return Generator(self._executors.decoder(blocks), text, step_tokens=tokens, requests=requests)

    def _check_kind(self, what: str, right: bool) -> None:
        if not right:
            raise UsageError(
                f"{self.bundle.name} is not {what}; its tasks are: {', '.join(self.bundle.tasks)}",
                fix="call what goes with these tasks; docs/runtime.md lists them",
            )

    def embed(self, texts: Text | Iterable[Text]) -> Vectors:
        """Embeddings, float32 [n, hidden]: see Encoder.embed."""
        return self.encoder.embed(texts)

    @overload
    def extract(self, texts: Text) -> list[Entity]: ...  # type: ignore[overload-overlap]  # a str is iterable as well
    @overload
    def extract(self, texts: Iterable[Text]) -> list[list[Entity]]: ...
    def extract(self, texts: Text | Iterable[Text]) -> list[Entity] | list[list[Entity]]:
        """Entities with offsets into the text, for one text or for each of several: see Encoder.extract."""
        return self.encoder.extract(texts)

    def classify(self, texts: Text | Iterable[Text], pairs: Text | Iterable[Text] | None = None) -> list[list[Score]]:
        """All classes with their probabilities, per text: see Encoder.classify."""
        return self.encoder.classify(texts, pairs)

    def fill_mask(self, text: Text, top_k: int = 5) -> list[list[Fill]]:
        """Candidates for each mask token of one text: see Encoder.fill_mask."""
        return self.encoder.fill_mask(text, top_k)

    def embed_images(
        self,
        images: Image | Iterable[Image],
        *,
        normalize: bool = True,
        resolution: int | None = None,
        frame: int | None = None,
    ) -> Vectors:
        """Embeddings of paths, bytes, arrays or PIL images, float32 [n, dim]: see Towers.embed_images."""
        return self.towers.embed_images(images, normalize=normalize, resolution=resolution, frame=frame)

    def embed_texts(self, texts: Text | Iterable[Text], *, normalize: bool = True) -> Vectors:
        """Embeddings in the space of the images, float32 [n, dim]: see Towers.embed_texts."""
        return self.towers.embed_texts(texts, normalize=normalize)

    def match(
        self, images: Image | Iterable[Image], prompts: Prompts, templates: Sequence[str] | None = None
    ) -> Vectors:
        """How probable each prompt is for each image, float32 [n, prompts]: see Towers.match."""
        return self.towers.match(images, prompts, templates)

    def generate(
        self, prompts: str | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> list[Completion]:
        """Answers to prompts (texts, token ids, or conversations), computed together: see Generator.generate."""
        return self.generator.generate(prompts, sampling)

    def chunks(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[Chunk]:
        """One answer, piece by piece as it grows: see Generator.stream."""
        return self.generator.stream(prompt, sampling)

    def stream(
        self,
        source: Iterable[Any],
        *,
        max_latency_ms: float,
        task: str | None = None,
        batch: int | None = None,
        capacity: int | None = None,
    ) -> Stream[Any, Any]:
        """Answers to texts or images as they come, in batches formed by deadline: see Stream for priorities and order.

        source: what the task takes, bare or in Requests. task: default, the bundle's first. An answer's value is what
        the task's method gives for one item: a vector, entities, classes, candidates for masks. batch: items per run
        at most; default, what the graph's profile is best at.
        """
        chosen = task or self.bundle.tasks[0]
        if chosen in _TOWERS:
            return self.towers.stream(source, chosen, max_latency_ms=max_latency_ms, batch=batch, capacity=capacity)
        runs: Mapping[str, Callable[[list[Any]], Iterable[Any]]] = {
            "embed": self.embed,
            "token-classification": self.extract,
            "sequence-classification": self.classify,
            "fill-mask": lambda texts: [self.fill_mask(text) for text in texts],
        }
        if chosen not in self.bundle.tasks or chosen not in runs:
            raise UsageError(
                f"{self.bundle.name} streams no task {chosen!r}", fix=f"choose from: {', '.join(self.bundle.tasks)}"
            )
        from medcompile.runtime.stream import Stream

        best = max(a.opt for p in self.bundle.graphs[chosen].profiles for a in p.axes if a.name == "batch")
        return Stream(source, runs[chosen], batch=batch or best, max_latency_ms=max_latency_ms, capacity=capacity)

    def index(self, items: Iterable[Any], keys: Sequence[str], *, task: str | None = None) -> Index:
        """A searchable index of the embeddings of texts (tasks embed and text) or images, under these keys.

        Index.search takes an embedding of this session; Index.save and load_index keep it between runs.
        """
        from medcompile.runtime.index import Index

        chosen = task or self.bundle.tasks[0]
        ways: Mapping[str, Callable[[Iterable[Any]], Vectors]] = {"image": self.embed_images, "text": self.embed_texts}
        return Index.of(ways.get(chosen, self.embed)(items), keys, digest=self.bundle.digest)

    def load_index(self, path: str | os.PathLike[str]) -> Index:
        """An index that was saved. Raises UsageError if another bundle made it: its embeddings don't compare."""
        from medcompile.runtime.index import Index

        return Index.load(path, digest=self.bundle.digest)

    def close(self) -> None:
        """Free the executors. Safe to call twice; any later call raises UsageError."""
        if "generator" in vars(self):
            self.generator.close()
        self._executors.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def load(
    path: str | os.PathLike[str],
    backend: str = AUTO,
    variant: str = AUTO,
    threads: int | None = None,
    kv_blocks: int | None = None,
    streams: int | None = None,
) -> Session:
    """Open the bundle at path, checking the digest of every file that is used.

    backend: "auto", a target (onnxruntime-cpu) or a backend (onnxruntime). variant: "auto" or its name; "auto" takes
    the fastest non-inferior one as timed on this machine, else the smallest. A variant that is not non-inferior runs
    only when named, with a warning. threads: None for every core the process may use. streams: how
    many batches of an encoder are under way at once on a CPU; None for as many as threads, and 1 where memory is short
    (some libraries then hold the weights once more) or other work needs the cores. kv_blocks: of decoders, how
    many blocks of keys and values there are; default, what 8 sequences of full length take.
    Raises BundleError, UsageError (no such variant or backend), OverBudgetError (nothing non-inferior to pick), or
    BackendUnavailable (nothing that is installed here can run it; says what to install).
    """
    if kv_blocks is not None and kv_blocks < 1:
        raise UsageError(f"kv_blocks={kv_blocks}; it must be at least 1", fix="leave it out for 8 full sequences")
    for name, number in (("threads", threads), ("streams", streams)):
        if number is not None and number < 1:
            raise UsageError(f"{name}={number}; it must be at least 1", fix="leave it out to use every core")
    loaded = bundle.read(path, check=False)
    choice, executors = _available(_rank(loaded, _candidates(loaded, backend, variant)), loaded, threads, streams)
    if not choice.eligible:
        verdicts = ", ".join(f"{n}: {a.verdict or 'no evidence'}" for n, a in sorted(choice.artifacts.items()))
        log.warning(
            "%s: variant %s on %s is not shown to be non-inferior (%s)",
            loaded.name,
            choice.variant.name,
            choice.target.name,
            verdicts,
        )
    return Session(loaded, choice, executors, kv_blocks)


class _Executors(Mapping[str, Executor]):
    """Executors by graph name, each loaded when first asked for, once, whatever the number of threads asking."""

    def __init__(
        self, loaded: Bundle, choice: Choice, backend: Backend, threads: int | None, streams: int | None
    ) -> None:
        self._bundle = loaded
        self._choice = choice
        self._backend = backend
        self._threads = threads
        self._streams = streams
        self._open: dict[str, Executor] = {}
        self._closed = False
        self._lock = threading.Lock()

    def __getitem__(self, graph: str) -> Executor:
        with self._lock:
            if self._closed:
                raise UsageError("this session is closed", fix="load the bundle again")
            if graph not in self._open:
                self._open[graph] = load_streamed(
                    self._backend,
                    self._checked(graph),
                    self._bundle.graphs[graph],
                    self._choice.variant.on(graph),
                    self._choice.target,
                    self._threads,
                    self._streams,
                )
            return self._open[graph]

    def decoder(self, blocks: int) -> StepModel:
        """The decoder with pools of so many blocks; whoever asks for it closes it."""
        with self._lock:
            if self._closed:
                raise UsageError("this session is closed", fix="load the bundle again")
            variant = self._choice.variant.on(GENERATE)
            return backends.load_decoder(self._backend, self._checked(GENERATE), variant, self._threads, blocks)

    def _checked(self, graph: str) -> Path:
        """The artifact's file, once every file beside it has the digest of the manifest."""
        artifact = self._choice.artifacts[graph]
        self._bundle.check(self._bundle.under(self._bundle.folder_of(artifact)))
        return self._bundle.root / artifact.path

    def load(self) -> None:
        """Load all that there is, to see whether this machine takes it."""
        for graph in self:
            if backends.is_paged(self._bundle.graphs[graph]):
                self.decoder(blocks=1).close()  # how large its pools shall be is known when it is asked for
            else:
                self[graph]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choice.artifacts)

    def __len__(self) -> int:
        return len(self._choice.artifacts)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            while self._open:
                self._open.popitem()[1].close()


def _candidates(loaded: Bundle, backend: str, variant: str) -> list[Choice]:
    """What the caller's wishes allow, evidence included. Raises UsageError or OverBudgetError if that is nothing."""
    if variant not in (AUTO, *loaded.variants):
        raise UsageError(
            f"{loaded.name} has no variant {variant!r}; it has {', '.join(loaded.variants)}",
            fix="choose one of these, or leave it at auto",
        )
    every = _choices(loaded)
    asked = [
        c
        for c in every
        if backend in (c.target.name, c.target.backend) or (backend == AUTO and c.target.backend != MEANINGLESS)
        if variant in (AUTO, c.variant.name)
    ]
    if not asked:
        there = ", ".join(sorted({f"{c.variant.name} on {c.target.name}" for c in every})) or "none"
        raise UsageError(
            f"{loaded.name} has nothing for backend={backend!r}, variant={variant!r}; it has: {there}",
            fix="choose one of these, or add the target to the recipe and rebuild",
        )
    allowed = [c for c in asked if c.eligible or variant != AUTO]
    if not allowed:
        names = ", ".join(sorted({c.variant.name for c in asked}))
        raise OverBudgetError(
            f"{loaded.name}: no variant is shown to be non-inferior (built: {names})",
            fix=f"name one all the same, for example variant={asked[0].variant.name!r}, or rebuild with another budget",
        )
    return allowed


def _choices(loaded: Bundle) -> list[Choice]:
    """Every pair of variant and target that has an artifact for all graphs, in the manifest's order."""
    groups: dict[tuple[str, str], list[Artifact]] = {}
    for artifact in loaded.artifacts:
        groups.setdefault((artifact.variant, artifact.target.name), []).append(artifact)
    choices = [
        Choice(loaded.variants[name], group[0].target, {a.graph: a for a in group})
        for (name, _), group in groups.items()
    ]
    return [c for c in choices if set(c.artifacts) == set(loaded.graphs)]


def _rank(loaded: Bundle, choices: Iterable[Choice]) -> list[Choice]:
    """Eligible ones first; of these the timed ones, fastest first; then the others, smallest first."""

    def size(choice: Choice) -> int:
        folders = {loaded.folder_of(a) for a in choice.artifacts.values()}
        return sum(loaded.files[p].size for folder in folders for p in loaded.under(folder))

    def key(choice: Choice) -> tuple[bool, bool, float, int]:
        return not choice.eligible, choice.latency_ms is None, choice.latency_ms or 0.0, size(choice)

    return sorted(choices, key=key)


def _available(
    ranked: list[Choice], loaded: Bundle, threads: int | None, streams: int | None
) -> tuple[Choice, _Executors]:
    """The first choice whose backend works here. Libraries are imported in that order only, because imports are slow.

    Latencies timed on another kind of machine don't count: once a target turns out to be one, its choices are ranked
    again without them. What was built for a device may not fit the one that is here, so it is loaded before it is
    chosen. Raises BackendUnavailable with every reason and fix.
    """
    unfit: dict[str, BackendUnavailable] = {}
    here: dict[str, Target | BackendUnavailable] = {}
    waiting = list(ranked)
    while waiting:
        choice = waiting.pop(0)
        name = choice.target.name
        backend = backends.get(choice.target.backend)
        if name not in here:
            here[name] = _probe(backend, name)
        target = here[name]
        if isinstance(target, BackendUnavailable):
            continue
        if choice.latency_ms is not None and not choice.timed_on(target):
            waiting = _rank(loaded, [_untimed(c) if c.target.name == name else c for c in (choice, *waiting)])
            continue
        executors = _Executors(loaded, choice, backend, threads, streams)
        try:
            if target.device != "cpu":
                executors.load()
        except BackendUnavailable as error:
            executors.close()
            unfit[f"{choice.variant.name} for {name}"] = error
            log.info("%s: variant %s for %s is passed over: %s", loaded.name, choice.variant.name, name, error.message)
            continue
        return choice, executors
    missing = {name: error for name, error in here.items() if isinstance(error, BackendUnavailable)}
    reasons = [f"{name}: {error}" for name, error in {**missing, **unfit}.items()]
    raise BackendUnavailable(
        f"{loaded.name}: nothing on this machine can run it\n" + "\n".join(reasons),
        fix="do one of the above, or rebuild the bundle for a target that `medcompile doctor` finds here",
    )


def _probe(backend: Backend, target: str) -> Target | BackendUnavailable:
    try:
        found = backend.probe(target)
    except BackendUnavailable as error:
        return error
    if found.present:
        return found
    return BackendUnavailable(
        f"{backend.name} {found.version} is here, but no {found.device} device to run it on",
        fix="run it on a machine that has one and its driver; `medcompile doctor` says what is found",
    )


def _untimed(choice: Choice) -> Choice:
    return replace(choice, artifacts={g: replace(a, latency_ms=None) for g, a in choice.artifacts.items()})
