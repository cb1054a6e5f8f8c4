"""What an encoder's answers mean: embeddings, entities, classes, masked words. All numpy, one executor per task.

Long texts go through overlapping windows and come back as one result: per-token answers come from the window that
gives the token most context; per-text answers (embeddings, with mean or cls pooling alike, and class probabilities)
are averaged over the windows, each weighing the tokens it owns, so that no token counts twice. Which words make an
entity is entities.py; cutting and packing is text.py; choosing artifacts is session.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from medcompile.backends import Executor
from medcompile.errors import BundleError, InputError, UsageError
from medcompile.runtime.entities import Entity, LabelScheme, first_tokens
from medcompile.runtime.text import (
    BATCH_TOKENS,
    STREAM_TOKENS,
    Text,
    TextAssets,
    Tokens,
    Window,
    checked,
    checked_words,
)
from medcompile.spec import GraphSpec

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Score:
    """A class and its probability."""

    label: str
    score: float


@dataclass(frozen=True)
class Fill:
    """A candidate for a masked position: the vocabulary's token (##ing for a word's continuation), its probability."""

    token: str
    token_id: int
    score: float


class Encoder:
    """Runs the tasks of one encoder. Holds no state of its own, so threads may share it.

    executors, graphs: by task. labels: class names by id, for the two classification tasks.
    A task that is not there raises UsageError; a text that can't be used raises InputError before anything runs.
    """

    def __init__(
        self,
        text: TextAssets,
        executors: Mapping[str, Executor],
        graphs: Mapping[str, GraphSpec],
        labels: Sequence[str] = (),
    ) -> None:
        self.text = text
        self.labels = tuple(labels)
        self._executors = executors
        self._graphs = graphs
        self._scheme = LabelScheme(self.labels)
        for task in {"token-classification", "sequence-classification"} & set(graphs):
            if graphs[task].outputs[0].shape[-1] != len(self.labels):
                raise BundleError(
                    f"{task} has {graphs[task].outputs[0].shape[-1]} classes, but labels.json names {len(self.labels)}",
                    fix="rebuild the bundle",
                )

    def embed(self, texts: Text | Iterable[Text]) -> Array:
        """One row per text, float32 [n, hidden]; unit length where the model says so. A single text is a list of one.

        An empty text gets the embedding of the special tokens alone.
        """
        return self.embed_tokens(self.text.encode(checked(texts)))

    def embed_tokens(self, tokens: Sequence[Tokens]) -> Array:
        """embed() of texts that are tokenized."""
        spec = self._graph("embed")
        hidden = spec.outputs[0].shape[-1]
        total = np.zeros((len(tokens), int(hidden)), np.float64)
        windows = self._windows(spec, tokens)
        for rows, output in self._run(spec, windows):
            weights = np.array([[windows[i].weight] for i in rows], np.float64)
            np.add.at(total, [windows[i].item for i in rows], weights * output)
        total /= _weights(windows, len(tokens))[:, None]
        if self.text.normalize:
            total /= np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)
        return total.astype(np.float32)

    @overload
    def extract(self, texts: Text) -> list[Entity]: ...  # type: ignore[overload-overlap]  # a str is iterable as well
    @overload
    def extract(self, texts: Iterable[Text]) -> list[list[Entity]]: ...
    def extract(self, texts: Text | Iterable[Text]) -> list[Entity] | list[list[Entity]]:
        """Entities in reading order: list[Entity] for one text, list[list[Entity]] for several.

        A word takes the label of its first token; offsets are str indices into the text (for bytes: into its decoded
        form), and Entity.text is exactly that slice. A text without words gives [].
        """
        strings = checked(texts)
        found = self.extract_tokens(strings, self.text.encode(strings))
        return found[0] if isinstance(texts, (str, bytes)) else found

    def extract_tokens(self, texts: Sequence[str], tokens: Sequence[Tokens]) -> list[list[Entity]]:
        """extract() of texts that are tokenized."""
        return [
            self._scheme.entities(text, t, _softmax(logits))
            for text, t, logits in zip(texts, tokens, self._token_logits(tokens), strict=True)
        ]

    def classify(self, texts: Text | Iterable[Text], pairs: Text | Iterable[Text] | None = None) -> list[list[Score]]:
        """Every class with its probability, most probable first, per text (or per text and its pair).

        Softmax over the classes; sigmoid of each where the model is multi-label. A long text's probabilities are the
        mean over its windows.
        """
        found = []
        for row in self._class_probabilities(texts, pairs):
            order = np.argsort(-row, kind="stable")
            found.append([Score(self.labels[i], float(row[i])) for i in order])
        return found

    def fill_mask(self, text: Text, top_k: int = 5) -> list[list[Fill]]:
        """For each mask token of the text, in order, the top_k most probable tokens.

        Raises InputError if the text has no mask token (TextAssets.mask_token names it).
        """
        if top_k < 1:
            raise UsageError(f"top_k is {top_k}; it must be at least 1")
        strings = checked(text)
        if len(strings) != 1:
            raise InputError(f"fill_mask takes one text, not {len(strings)}", fix="call it once per text")
        ids, scores = self._fill(strings, top_k)
        name = self.text.tokenizer.id_to_token
        return [
            [Fill(name(int(i)) or "", int(i), float(s)) for i, s in zip(row_ids, row_scores, strict=True)]
            for row_ids, row_scores in zip(ids, scores, strict=True)
        ]

    # ---- answers as bare ids, for evaluation

    def label_words(self, sentences: Sequence[Sequence[str]]) -> tuple[list[Array], list[Array]]:
        """The label id of each word of each sentence and its probability, int64 and float32 [words].

        A word without tokens gets the outside label, with probability 1.
        """
        tokens = self.text.encode_words(checked_words(sentences))
        labels, confidences = [], []
        for sentence, t, logits in zip(sentences, tokens, self._token_logits(tokens), strict=True):
            ids, sure = np.full(len(sentence), self._scheme.outside, np.int64), np.ones(len(sentence), np.float32)
            first = first_tokens(t)
            ids[t.words[first]] = logits[first].argmax(axis=1)
            sure[t.words[first]] = _softmax(logits[first]).max(axis=1, initial=0.0)
            labels.append(ids)
            confidences.append(sure)
        return labels, confidences

    def class_ids(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> tuple[Array, Array]:
        """The most probable class of each text and its probability, int64 and float32 [n]."""
        probabilities = self._class_probabilities(texts, pairs)
        return probabilities.argmax(axis=1), probabilities.max(axis=1, initial=0.0).astype(np.float32)

    def mask_ids(self, texts: Sequence[str]) -> Array:
        """The most probable token at every mask token, int64 [masks], in reading order over all texts."""
        return self._fill(checked(texts), 1)[0][:, 0]

    # ---- one task each

    def _graph(self, task: str) -> GraphSpec:
        if task not in self._graphs:
            raise UsageError(
                f"no task {task} here; the tasks are: {', '.join(sorted(self._graphs))}",
                fix=f"add {task} to model.tasks in the recipe and rebuild, or use a bundle that has it",
            )
        return self._graphs[task]

    def _windows(
        self, spec: GraphSpec, tokens: Sequence[Tokens], pairs: Sequence[Tokens] | None = None
    ) -> list[Window]:
        length = self.text.window_length(spec)
        return [
            window
            for i, t in enumerate(tokens)
            for window in self.text.windows(i, t, length, pairs[i] if pairs is not None else None)
        ]

    def _run(
        self, spec: GraphSpec, windows: Sequence[Window], extra: Mapping[str, Array] | None = None
    ) -> Iterator[tuple[tuple[int, ...], Array]]:
        """The graph's one output, batch by batch: window indices, and as many rows of output."""
        if not windows:
            return
        executor = self._executors[spec.name]
        tokens = BATCH_TOKENS
        if executor.streams > 1:
            share = sum(len(w.ids) for w in windows) // (2 * executor.streams)
            tokens = max(STREAM_TOKENS[0], min(share, STREAM_TOKENS[1]))
        rows: list[tuple[int, ...]] = []

        def feeds() -> Iterator[Mapping[str, Array]]:
            for batch in self.text.batches(spec, windows, extra, tokens, executor.step):
                rows.append(batch.rows)
                yield batch.feeds

        for i, outputs in enumerate(executor.run_each(feeds())):
            yield rows[i], outputs[spec.outputs[0].name][: len(rows[i])]

    def _token_logits(self, tokens: Sequence[Tokens]) -> list[Array]:
        """Logits of each text's tokens, float32 [tokens, labels], each token from the window that owns it."""
        spec = self._graph("token-classification")
        logits = [np.zeros((len(t), len(self.labels)), np.float32) for t in tokens]
        windows = [w for w in self._windows(spec, tokens) if w.own[1] > w.own[0]]
        for rows, output in self._run(spec, windows):
            for window, row in zip((windows[i] for i in rows), output, strict=True):
                a, b = window.own
                at = window.lead - window.start
                logits[window.item][a:b] = row[a + at : b + at]
        return logits

    def _class_probabilities(self, texts: Text | Iterable[Text], pairs: Text | Iterable[Text] | None) -> Array:
        """float64 [n, classes]."""
        spec = self._graph("sequence-classification")
        tokens = self.text.encode(checked(texts))
        others = None if pairs is None else self.text.encode(checked(pairs))
        if others is not None and len(others) != len(tokens):
            raise InputError(f"{len(tokens)} texts but {len(others)} pairs", fix="give one pair text per text")
        total = np.zeros((len(tokens), len(self.labels)), np.float64)
        windows = self._windows(spec, tokens, others)
        for rows, output in self._run(spec, windows):
            probabilities = _sigmoid(output) if self.text.multi_label else _softmax(output)
            weights = np.array([[windows[i].weight] for i in rows], np.float64)
            np.add.at(total, [windows[i].item for i in rows], weights * probabilities)
        return total / _weights(windows, len(tokens))[:, None]

    def _fill(self, texts: Sequence[str], top_k: int) -> tuple[Array, Array]:
        """The top_k token ids and probabilities at every mask of every text: int64 and float64, [masks, top_k]."""
        spec = self._graph("fill-mask")
        tokens = self.text.encode(texts)
        rows: list[Window] = []
        positions: list[int] = []
        for i, t in enumerate(tokens):
            masks = np.flatnonzero(t.ids == (-1 if self.text.mask_id is None else self.text.mask_id))
            if not len(masks):
                raise InputError(
                    f"text {i} has no {self.text.mask_token or 'mask token'}", fix="put it where a word is missing"
                )
            windows = self._windows(spec, [t])
            owners = np.searchsorted([w.own[1] for w in windows], masks, side="right")
            rows += [windows[w] for w in owners]
            positions += [int(m) - windows[w].start + windows[w].lead for m, w in zip(masks, owners, strict=True)]
        vocabulary = int(spec.outputs[0].shape[-1])
        top_k = min(top_k, vocabulary)
        ids = np.zeros((len(rows), top_k), np.int64)
        scores = np.zeros((len(rows), top_k), np.float64)
        for batch, output in self._run(spec, rows, {"mask_position": np.array(positions, np.int64)}):
            probabilities = _softmax(output)
            if top_k == 1:  # a sort of the whole vocabulary costs more than the model
                best = probabilities.argmax(axis=1)[:, None]
            else:
                best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
            ids[list(batch)] = best
            scores[list(batch)] = np.take_along_axis(probabilities, best, axis=1)
        return ids, scores


def _weights(windows: Sequence[Window], items: int) -> Array:
    """Total weight of each text's windows, float64 [items]."""
    return np.bincount([w.item for w in windows], [w.weight for w in windows], minlength=items)


def _softmax(logits: Array) -> Array:
    """Over the last axis, in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True, initial=-np.inf))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def _sigmoid(logits: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-logits.astype(np.float64))))
