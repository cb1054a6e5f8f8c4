"""The exam of language models: texts scored token by token, and questions answered by the likeliest of a few answers.

How a text is cut: it is tokenized with the special tokens of its tokenizer, into windows of at most WINDOW tokens or
the model's context, each run as a fresh sequence. A window begins with the last token of the one before, so that every
token of a text but its first is predicted exactly once (the rolling windows of EleutherAI's lm-evaluation-harness).

Where every item has a label, it is a question as well: the answers to choose from are the labels that occur, and the
one of the highest mean log-likelihood per token is given, after the prompt of prompt(). The mean makes answers of
different lengths comparable; where all are equally long it changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.backends import Executor
from medcompile.data import Item
from medcompile.errors import DataError
from medcompile.exams import Answers, Setting, key_of
from medcompile.metrics import Predictions
from medcompile.metrics.language import LIKELIEST
from medcompile.runtime.decoder import StepBatch, StepModel
from medcompile.runtime.prompts import DecoderText
from medcompile.spec import GraphSpec, TensorSpec

if TYPE_CHECKING:
    from medcompile.program import Feeds

Array = np.ndarray[Any, Any]

WINDOW = 512
QUESTION = 1024
"""A longer question loses its beginning: the abstract's, where there is one."""
DRAWN = 16
"""Tokens drawn from all but the likeliest ones, for the divergence (metrics/language.py)."""
POSITIONS = 8192
"""Places at most where tokens are kept for it. Of more places every second, third, ... is: each takes 640 bytes."""
BLOCKS = QUESTION // 16
"""Blocks of any size that a StepModel needs for an exam."""
PAST = 64
"""Tokens before the ones of a step that is timed."""
_FEED_TOKENS = 1024
_CELLS = 1 << 22  # probabilities held at once: 32 MiB


class FreshSequence(Executor):
    """A step model behind the face that the reference has: input_ids [tokens] -> logits [tokens, vocabulary].

    Every run is a sequence of its own, in blocks 0, 1, ... close() closes the model.
    """

    def __init__(self, name: str, model: StepModel) -> None:
        super().__init__(_face(name, model.vocabulary))
        self._model = model

    def timed(self, sequences: int) -> Callable[[], object]:
        """A step that gives each of so many sequences its next token, after a history of PAST tokens."""
        size = self._model.block_size
        used = -(-(PAST + 1) // size)
        held = min(sequences, self._model.blocks // used)
        batch = StepBatch(
            input_ids=np.ones(held, np.int64),
            positions=np.full(held, PAST),
            query_starts=np.arange(held + 1, dtype=np.int32),
            past_lens=np.full(held, PAST, np.int32),
            block_table=np.arange(held * used, dtype=np.int32).reshape(held, used),
            logit_rows=np.arange(held),
        )
        return lambda: self._model.step(batch)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        return {"logits": self._model.step(StepBatch(**fresh_step([feeds["input_ids"]], self._model.block_size)))}

    def close(self) -> None:
        self._model.close()


def fresh_step(sequences: Sequence[Array], block_size: int) -> dict[str, Array]:
    """The six integer inputs of a step (runtime/decoder.py) for whole sequences, every token's logits wanted."""
    lengths = np.array([len(ids) for ids in sequences])
    used = -(-lengths // block_size)
    entries = np.arange(used.max())
    table = np.where(entries < used[:, None], (np.cumsum(used) - used)[:, None] + entries, 0)
    return {
        "input_ids": np.concatenate(sequences).astype(np.int64),
        "positions": np.concatenate([np.arange(n) for n in lengths]),
        "query_starts": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        "past_lens": np.zeros(len(lengths), np.int32),
        "block_table": table.astype(np.int32),
        "logit_rows": np.arange(lengths.sum()),
    }


class FreshGraph(Executor):
    """A typed graph behind the same face, run by ONNX Runtime's CPU provider: the numerical oracle. Needs onnx_ir.

    Raises what the library raises on a graph that it refuses.
    """

    def __init__(self, typed: Path, name: str, vocabulary: int) -> None:
        import onnx_ir as ir

        from medcompile import onnx_files, run_onnx
        from medcompile.rewrites import fresh_attention

        super().__init__(_face(name, vocabulary))
        self._model = onnx_files.load(typed)
        fresh_attention.rewrite(self._model)
        self._session: Any = run_onnx.session(ir.to_proto(self._model).SerializeToString(), typed.parent)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        from medcompile.rewrites.fresh_attention import feeds_of

        return {"logits": self._session.run(["logits"], feeds_of(self._model, fresh_step([feeds["input_ids"]], 32)))[0]}

    def close(self) -> None:
        self._session = None


def _face(name: str, vocabulary: int) -> GraphSpec:
    ids = TensorSpec("input_ids", "int64", ("tokens",))
    return GraphSpec(name, (ids,), (TensorSpec("logits", "float32", ("tokens", vocabulary)),), ())


@dataclass(frozen=True)
class DecoderExam:
    """items: the texts that have two tokens or more, their tokens in ids. choices: the answers; empty without labels.

    reference: whose kept tokens are looked up; None where the reference itself is being asked.
    """

    spec: GraphSpec
    text: DecoderText
    items: tuple[Item, ...]
    ids: tuple[Array, ...]
    choices: tuple[str, ...]
    vocabulary: int
    reference: Predictions | None = None

    def against(self, reference: Predictions) -> DecoderExam:
        """The exam as a candidate has to take it. reference: the reference's answers to this exam."""
        return replace(self, reference=reference)

    @property
    def graphs(self) -> Mapping[str, GraphSpec]:
        return {self.spec.name: self.spec}

    @cached_property
    def key(self) -> Answers:
        numbers = {label: i for i, label in enumerate(self.choices)}
        gold = np.array([numbers[item.label] for item in self.items], np.int64) if numbers else None
        return key_of(gold, self.items, self.choices)

    def digests(self) -> tuple[str, ...]:
        return tuple(item.digest for item in self.items)

    def answers(self, executors: Mapping[str, Executor]) -> Predictions:
        """executors: of the graph alone, with the face of FreshSequence."""
        model, kept = executors[self.spec.name], _Kept(self._positions(), self.reference)
        logs = []
        for ids in self.ids:
            found = []
            for window in windows(ids, self._window):
                logits = model.run({"input_ids": window})["logits"][:-1]
                for rows in _pieces(logits):
                    log = log_likelihoods(logits[rows])
                    found.append(np.take_along_axis(log, window[1:][rows, None], axis=1)[:, 0].astype(np.float32))
                    kept.add(log)
            logs.append(np.concatenate(found))
        return kept.predictions(logs, self._answered(model) if self.choices else None)

    def feeds(self, batch: int) -> Iterator[Feeds]:
        """Steps over fresh sequences, without pools: at most batch windows and about a thousand tokens each."""
        held: list[Array] = []
        for window in (window for ids in self.ids for window in windows(ids, self._window)):
            if held and (len(held) == batch or sum(map(len, held)) + len(window) > _FEED_TOKENS):
                yield fresh_step(held, 32)
                held = []
            held.append(window)
        yield fresh_step(held, 32)

    @property
    def _window(self) -> int:
        return min(self.text.window, WINDOW)

    def _positions(self) -> Array:
        """Where distributions are kept, among the tokens scored of all texts end to end."""
        scored = sum(len(ids) - 1 for ids in self.ids)
        return np.arange(0, scored, -(-scored // POSITIONS))

    def _answered(self, model: Executor) -> Array:
        """Mean log-likelihood per token of each answer, [items, answers]. Answers of one token share a run."""
        scores = np.zeros((len(self.items), len(self.choices)), np.float32)
        for i, item in enumerate(self.items):
            before = self.text.encode(prompt(item), self.vocabulary)
            known: dict[bytes, Array] = {}
            for j, choice in enumerate(self.choices):
                whole = self.text.encode(f"{prompt(item)} {choice}", self.vocabulary)
                shared = min(len(before), len(whole) - 1)
                while not np.array_equal(before[:shared], whole[:shared]):
                    shared -= 1  # the answer may merge with the prompt's last token
                answer = whole[shared:]
                given = whole[: len(whole) - 1][-(min(self.text.window, QUESTION) - 1) :]
                if given.tobytes() not in known:
                    rows = model.run({"input_ids": given})["logits"]
                    known[given.tobytes()] = log_likelihoods(rows[-len(answer) :])
                scores[i, j] = np.take_along_axis(known[given.tobytes()], answer[:, None], axis=1).mean()
        return scores


def exam(graph: str, setting: Setting) -> DecoderExam:
    """The exam of `generate`. Raises DataError if no item has text of two tokens or more."""
    spec, text = setting.graphs[graph], DecoderText.read(setting.assets)
    vocabulary = spec.outputs[0].shape[-1]
    assert isinstance(vocabulary, int)
    pairs = [(item, text.encode(passage(item), vocabulary)) for item in setting.dataset.items if item.text]
    pairs = [(item, ids) for item, ids in pairs if len(ids) > 1]
    if not pairs:
        raise DataError(
            f"{setting.dataset.name} holds no texts, so it says nothing of a language model",
            fix="name a manifest with fields.text; see docs/recipes.md",
        )
    items = tuple(item for item, _ in pairs)
    labels = sorted({item.label for item in items})
    choices = tuple(labels) if all(labels) and len(labels) > 1 else ()
    return DecoderExam(spec, text, items, tuple(ids for _, ids in pairs), choices, vocabulary)


def passage(item: Item) -> str:
    """What of an item is scored token by token: what its text refers to, where it has that, then the text."""
    return f"{item.text_pair}\n\n{item.text}" if item.text_pair else item.text


def prompt(item: Item) -> str:
    """What stands before each answer to choose from, with a space between."""
    context = f"{item.text_pair}\n\n" if item.text_pair else ""
    return f"{context}Question: {item.text}\nAnswer:"


def windows(ids: Array, size: int) -> Iterator[Array]:
    """Cut ids into windows of at most size, each beginning with the last token of the one before."""
    for start in range(0, len(ids) - 1, size - 1):
        yield ids[start : start + size]


def log_likelihoods(logits: Array) -> Array:
    """Natural logarithms of softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        found: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def _pieces(logits: Array) -> Iterator[slice]:
    step = max(1, _CELLS // logits.shape[1])
    for start in range(0, len(logits), step):
        yield slice(start, start + step)


class _Kept:
    """What is kept of each token's distribution, beside the right token's likelihood."""

    def __init__(self, positions: Array, reference: Predictions | None) -> None:
        self._positions = positions
        self._given = reference.kept_ids if reference is not None else None
        self._chances = np.random.default_rng(0).random((len(positions), DRAWN))
        self._tokens = self._places = 0
        self._parts: list[tuple[Array, Array, Array]] = []

    def add(self, log: Array) -> None:
        """log: [rows, vocabulary], of the tokens that come next."""
        end = self._tokens + len(log)
        places = slice(self._places, self._places + np.searchsorted(self._positions[self._places :], end))
        at = log[self._positions[places] - self._tokens]
        ids = _chosen(at, self._chances[places]) if self._given is None else self._given[places].astype(np.int64)
        top1 = np.where(np.isfinite(log.max(axis=1)), log.argmax(axis=1), -1)
        self._parts.append((top1, ids, np.take_along_axis(at, ids, axis=1)))
        self._tokens, self._places = end, int(places.stop)

    def predictions(self, logs: Sequence[Array], scores: Array | None) -> Predictions:
        top1, ids, kept_logs = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        return Predictions(
            logs,
            scores=scores,
            top1=top1.astype(np.int32),
            positions=self._positions,
            kept_ids=ids.astype(np.int32),
            kept_logs=kept_logs.astype(np.float32),
        )


def _chosen(log: Array, chances: Array) -> Array:
    """Ids of the LIKELIEST tokens of each row, and of as many others as there are chances, drawn by their likelihood.

    The likeliest ones are all there is of a small vocabulary.
    """
    if log.shape[1] <= LIKELIEST:
        return np.broadcast_to(np.arange(log.shape[1]), log.shape)
    top = np.sort(np.argpartition(-log, LIKELIEST - 1, axis=1)[:, :LIKELIEST], axis=1)
    others = np.exp(log)
    np.put_along_axis(others, top, 0.0, axis=1)
    sums = np.cumsum(others, axis=1)
    drawn = [np.searchsorted(row, row[-1] * chance, side="right") for row, chance in zip(sums, chances, strict=True)]
    found = np.array(drawn, np.int64).reshape(len(log), chances.shape[1])
    return np.concatenate([top, np.minimum(found, log.shape[1] - 1)], axis=1)
