"""From text to token windows, and from windows to batches of one graph's inputs.

A text becomes Tokens (ids, and where each came from), Tokens become Windows that fit the model, Windows become
Batches that fit a profile and a budget of memory. What the model's answers mean lives in encoder.py.

Defined for odd input: bytes must be UTF-8; a lone surrogate is refused; NUL and control characters go where the
tokenizer sends them (BERT's drops them, and offsets still point into the original); an empty or blank text has no
tokens and makes one window of special tokens alone. Errors name positions, never the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.errors import BundleError, InputError, ProfileError
from medcompile.spec import Axis, GraphSpec, Profile

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Array = np.ndarray[Any, Any]
Text = str | bytes
"""A text as callers may give it; bytes are decoded as strict UTF-8, and offsets count the decoded characters."""

BATCH_TOKENS = 4096
"""Rows times padded length of one batch: bounds the memory of a run whatever the input's size."""
STREAM_TOKENS = (256, 512)
"""The same where batches run side by side: at least, and at most. Small ones fit a core's cache and end together."""
DENSITY = 7 / 8
"""Of a batch that must be tokens and not padding; one of fewer than SMALL_TOKENS is filled up first, because a run has
its own cost."""
SMALL_TOKENS = 256
SLICE = 256
"""Texts tokenized at once; a tokenizer's encodings weigh some hundred bytes per token until they are cut down."""


@dataclass(frozen=True)
class Tokens:
    """One text's tokens without special ones. ids: [n] int64. offsets: [n, 2], characters of the original text.

    words: [n], the index of the word each token belongs to: the tokenizer's own words for a text, the caller's for
    a text that came as words.
    """

    ids: Array
    offsets: Array
    words: Array

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Window:
    """A stretch of one text, dressed in special tokens: what one row of a batch holds.

    ids, types: [length] int64. start: index in the text's tokens of the first one here; lead: where in ids it stands.
    own: the range of the text's tokens for which no other window has more context on the narrower side; the owned
    ranges of a text's windows follow each other without gap or overlap.
    """

    item: int
    ids: Array
    types: Array
    start: int
    lead: int
    own: tuple[int, int]

    @property
    def weight(self) -> int:
        """Owned tokens: what this window counts for when a text's windows are averaged. An empty text's counts 1."""
        return max(1, self.own[1] - self.own[0])


@dataclass(frozen=True)
class Batch:
    """rows: indices of the windows, in the order of the feeds' first rows; any further row repeats the first one."""

    rows: tuple[int, ...]
    feeds: Mapping[str, Array]


@dataclass(frozen=True)
class _Template:
    """The special tokens around one text or a pair, with the type ids of every part. Each part: (ids, types)."""

    before: tuple[list[int], list[int]]
    between: tuple[list[int], list[int]]
    after: tuple[list[int], list[int]]
    type_a: int
    type_b: int

    @property
    def size(self) -> int:
        return len(self.before[0]) + len(self.between[0]) + len(self.after[0])


class TextAssets:
    """A bundle's tokenizer with the facts of its text.json. Never changed after loading, so threads may share it.

    tokenizer: any truncation or padding it carries is switched off. max_length: the model's window, special tokens
    included. Raises BundleError where the assets are unusable.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        pad_id: int = 0,
        normalize: bool = False,
        mask_token: str | None = None,
        multi_label: bool = False,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pad_id = pad_id
        self.normalize = normalize
        self.mask_token = mask_token
        self.mask_id: int | None = tokenizer.token_to_id(mask_token) if mask_token else None
        self.multi_label = multi_label
        self._single = _probe(tokenizer.encode("a"))
        self._pair = _probe(tokenizer.encode("a", "a"))
        if max_length <= self._pair.size + 1:
            raise BundleError(f"text.json: max_length {max_length} leaves no room for text", fix="rebuild the bundle")

    @classmethod
    def read(cls, assets: Path) -> TextAssets:
        """From a folder with tokenizer.json and text.json."""
        from tokenizers import Tokenizer

        facts = read_json(assets / "text.json", dict)
        try:
            tokenizer = Tokenizer.from_file(str(assets / "tokenizer.json"))
        except Exception as error:  # tokenizers raises no narrower type
            raise BundleError(f"{assets / 'tokenizer.json'}: {error}", fix="rebuild the bundle") from error
        try:
            return cls(
                tokenizer,
                max_length=int(facts["max_length"]),
                pad_id=int(facts["pad_id"]),
                normalize=bool(facts["normalize"]),
                mask_token=facts["mask_token"],
                multi_label=bool(facts.get("multi_label", False)),
            )
        except KeyError as error:
            raise BundleError(f"{assets / 'text.json'}: no {error}", fix="rebuild the bundle") from None

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of each text, as checked() returned it."""
        return self._encode(texts, pretokenized=False)

    def encode_words(self, sentences: Sequence[Sequence[str]]) -> list[Tokens]:
        """Tokens of each sentence given as words; Tokens.words index those words. Offsets count within each word."""
        return self._encode([list(s) for s in sentences], pretokenized=True)

    def _encode(self, texts: Sequence[Any], *, pretokenized: bool) -> list[Tokens]:
        tokens = []
        for i in range(0, len(texts), SLICE):
            for encoding in self.tokenizer.encode_batch(
                texts[i : i + SLICE], is_pretokenized=pretokenized, add_special_tokens=False
            ):
                ids = np.array(encoding.ids, np.int64)
                offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
                tokens.append(Tokens(ids, offsets, np.array(encoding.word_ids, np.int64)))
        return tokens

    def window_length(self, spec: GraphSpec) -> int:
        """The longest window that both the model and the graph's profiles take."""
        return min(self.max_length, max(_axes(spec, p)[1].max for p in _profiles(spec)))

    def windows(self, item: int, tokens: Tokens, length: int, pair: Tokens | None = None) -> list[Window]:
        """Cut one text into overlapping windows of at most length ids; a short one is a single window.

        Neighbours share a quarter of a window, and the last one is moved back to be full. Of a pair, the longer text
        (Window.start and own count its tokens) is cut and the shorter stands whole in every window.
        Raises InputError where the shorter text of a pair takes more than half a window.
        """
        if pair is None:
            t = self._single
            before, after, kind = t.before, t.after, t.type_a
        else:
            t = self._pair
            first = _part(tokens, t.type_a)
            second = _part(pair, t.type_b)
            if len(pair) >= len(tokens):
                before, after, kind = _join(t.before, first, t.between), t.after, t.type_b
                tokens = pair
            else:
                before, after, kind = t.before, _join(t.between, second, t.after), t.type_a
        room = length - len(before[0]) - len(after[0])
        if len(tokens) > room < (length - t.size) // 2:
            raise InputError(
                f"pair {item}: both texts are longer than half of the model's window of {length} tokens",
                fix="shorten one of the two; the other may be of any length",
            )
        head = (np.array(before[0], np.int64), np.array(before[1], np.int64))
        tail = (np.array(after[0], np.int64), np.array(after[1], np.int64))
        starts = _window_starts(len(tokens), room)
        cuts = [
            0,
            *((a + min(b + room, len(tokens))) // 2 for b, a in pairwise(starts)),
            len(tokens),
        ]
        windows = []
        for i, start in enumerate(starts):
            ids = tokens.ids[start : start + room]
            types = np.concatenate([head[1], np.full(len(ids), kind, np.int64), tail[1]])
            ids = np.concatenate([head[0], ids, tail[0]])
            windows.append(Window(item, ids, types, start, len(head[0]), (cuts[i], cuts[i + 1])))
        return windows

    def first_window(self, item: int, tokens: Tokens, length: int) -> Window:
        """One window of at most length ids with a text's first tokens: how a tokenizer that truncates cuts it."""
        room = length - self._single.size
        cut = Tokens(tokens.ids[:room], tokens.offsets[:room], tokens.words[:room])
        return self.windows(item, cut, length)[0]

    def batches(
        self,
        spec: GraphSpec,
        windows: Sequence[Window],
        extra: Mapping[str, Array] | None = None,
        tokens: int = BATCH_TOKENS,
        step: int = 1,
    ) -> Iterator[Batch]:
        """Pack windows into feeds for spec, longest first, each batch within so many tokens and one profile, and with
        little padding.

        extra: further inputs by name, one entry per window. step: lengths are a multiple of it where the profile has
        room. Raises ProfileError if no profile holds a window.
        """
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))
        taken = 0
        while taken < len(order):
            batch, sequence = _fitting_axes(spec, len(windows[order[taken]].ids))
            length = -(-len(windows[order[taken]].ids) // step) * step
            length = min(max(sequence.min, length), sequence.max)
            rows = order[taken : taken + max(1, min(batch.max, tokens // length))]
            rows = rows[: _dense([len(windows[i].ids) for i in rows], length)]
            taken += len(rows)
            filled = rows + [rows[0]] * (batch.min - len(rows))
            feeds = self._feeds([windows[i] for i in filled], length)
            feeds |= {name: values[filled] for name, values in (extra or {}).items()}
            wanted = {t.name: t.dtype for t in spec.inputs}
            yield Batch(tuple(rows), {n: feeds[n].astype(dtype, copy=False) for n, dtype in wanted.items()})

    def _feeds(self, windows: Sequence[Window], length: int) -> dict[str, Array]:
        ids = np.full((len(windows), length), self.pad_id, np.int64)
        mask = np.zeros_like(ids)
        types = np.zeros_like(ids)
        for row, window in enumerate(windows):
            n = len(window.ids)
            ids[row, :n] = window.ids
            mask[row, :n] = 1
            types[row, :n] = window.types
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def _dense(sizes: Sequence[int], length: int) -> int:
    """How many of these, longest first and padded to length, a batch takes before padding is too much of it."""
    real = 0
    for count, size in enumerate(sizes):
        real += size
        if count * length >= SMALL_TOKENS and real < DENSITY * (count + 1) * length:
            return count
    return len(sizes)


def checked(texts: Text | Iterable[Text]) -> list[str]:
    """Each text as a str that a tokenizer takes; a single text becomes a list of one.

    Raises InputError naming the item and position: not a text, bytes that are not UTF-8, a lone surrogate.
    """
    if isinstance(texts, (str, bytes)):
        texts = [texts]
    if not isinstance(texts, Iterable):
        raise InputError(
            f"a text or a list of texts is wanted, not {type(texts).__name__}", fix="pass str or list[str]"
        )
    return [_checked(text, f"text {i}") for i, text in enumerate(texts)]


def checked_words(sentences: Sequence[Sequence[str]]) -> list[list[str]]:
    """The same for sentences given as words. Raises InputError for a sentence that is one str."""
    for i, sentence in enumerate(sentences):
        if isinstance(sentence, (str, bytes)):
            raise InputError(f"sentence {i} is one text, not a list of words", fix="split it into words first")
    return [[_checked(w, f"sentence {i}, word {j}") for j, w in enumerate(s)] for i, s in enumerate(sentences)]


def _checked(text: object, where: str) -> str:
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where}: not UTF-8 at byte {error.start} (0x{text[error.start]:02x})",
                fix="decode it with its own encoding first, for example .decode('latin-1')",
            ) from None
    if not isinstance(text, str):
        raise InputError(f"{where} is {type(text).__name__}, not a text", fix="pass str, or UTF-8 bytes")
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: a lone surrogate at character {error.start}, which no Unicode text holds",
            fix="read the file with errors='strict' and its own encoding",
        ) from None
    return text


def read_json(path: Path, kind: type[Any]) -> Any:
    """The JSON in path, which must be of that kind. Raises BundleError."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: {error}", fix="rebuild the bundle") from error
    if not isinstance(value, kind):
        raise BundleError(f"{path}: not a JSON {kind.__name__}", fix="rebuild the bundle")
    return value


def _probe(encoding: Encoding) -> _Template:
    """Learn a tokenizer's special tokens and type ids from what it puts around one or two texts."""
    sequence = encoding.sequence_ids
    rows = list(zip(encoding.ids, encoding.type_ids, strict=True))
    first, last = sequence.index(0), len(sequence) - 1 - sequence[::-1].index(0)
    if 1 in sequence:
        second, end = sequence.index(1), len(sequence) - sequence[::-1].index(1)
    else:
        second, end = last + 1, last + 1

    def part(a: int, b: int) -> tuple[list[int], list[int]]:
        return [i for i, _ in rows[a:b]], [t for _, t in rows[a:b]]

    type_b = rows[second][1] if 1 in sequence else 0
    return _Template(part(0, first), part(last + 1, second), part(end, len(rows)), rows[first][1], type_b)


def _part(tokens: Tokens, kind: int) -> tuple[list[int], list[int]]:
    return tokens.ids.tolist(), [kind] * len(tokens)


def _join(*parts: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
    return [i for ids, _ in parts for i in ids], [t for _, types in parts for t in types]


def _window_starts(count: int, room: int) -> list[int]:
    """First token of each window of room tokens over count of them: a quarter shared, the last one moved back."""
    if count <= room:
        return [0]
    return [*range(0, count - room, room - room // 4), count - room]


def _profiles(spec: GraphSpec) -> tuple[Profile, ...]:
    """A graph of fixed shape may have no profile; one without axes then stands for it."""
    return spec.profiles or (Profile("fixed", ()),)


def _axes(spec: GraphSpec, profile: Profile) -> tuple[Axis, Axis]:
    """The batch and sequence axes of input_ids under a profile; a fixed size is an axis of one value."""
    shape = next(t.shape for t in spec.inputs if t.name == "input_ids")
    batch, sequence = (Axis("fixed", d, d, d) if isinstance(d, int) else profile.axis(d) for d in shape)
    return batch, sequence


def _fitting_axes(spec: GraphSpec, length: int) -> tuple[Axis, Axis]:
    """Axes of the profile that takes the most rows of that length. Raises ProfileError if none takes any."""
    fitting = [axes for axes in (_axes(spec, p) for p in _profiles(spec)) if length <= axes[1].max]
    if not fitting:
        raise ProfileError(
            f"{spec.name}: a sequence of {length} tokens is above every profile's max",
            fix="raise shapes.sequence in the recipe and rebuild",
        )
    return max(fitting, key=lambda axes: (axes[0].max, -axes[1].min))
