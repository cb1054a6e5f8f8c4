"""Two towers, images and texts in one space: embeddings of either, and how well each image matches each prompt.

Images are decoded and resized in threads while the model runs (flow.py); how is image.py's business. Texts are cut at
the model's context, as its own tokenizer does. Searching embeddings is index.py; answering by deadline is stream.py.
"""

from __future__ import annotations

import html
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.backends import Executor
from medcompile.errors import BundleError, InputError, ProfileError, UsageError
from medcompile.runtime.flow import ahead
from medcompile.runtime.stream import Stream
from medcompile.runtime.text import Text, TextAssets, checked, read_json
from medcompile.spec import Axis, GraphSpec, Profile

if TYPE_CHECKING:
    from medcompile.runtime import image
    from medcompile.runtime.image import ImageTransform

Array = np.ndarray[Any, Any]
Prompts = Sequence[str | Sequence[str]] | Mapping[str, str | Sequence[str]]
"""What each class is called, in a list or by label: one name or several. Every name goes into every template."""

BATCH_BYTES = 32 * 2**20
"""Pixels of one batch at most, unless one image alone takes more; three batches are in memory at a time."""
NAMED = 20
"""Bad images that one error describes; further ones are counted."""

log = logging.getLogger("medcompile")


@dataclass(frozen=True)
class ImageResult:
    """The answer to one image: its place among those given, and its embedding, float32 [dim], or what is wrong."""

    index: int
    embedding: Array | None = None
    error: InputError | None = None


class Towers:
    """Runs the two towers. Holds no state of its own, so threads may share it.

    text, transform: the assets of the towers that are there. executors, graphs: by task, `image` and `text`.
    logit_scale, logit_bias: probabilities are softmax(logit_scale * cosine + logit_bias). templates: texts with one
    {} each, for the name of a class. unescape: &lt; in a text is <, as open_clip's tokenizers take it. A tower that is
    not there raises UsageError.
    """

    def __init__(
        self,
        text: TextAssets | None,
        transform: ImageTransform | None,
        executors: Mapping[str, Executor],
        graphs: Mapping[str, GraphSpec],
        *,
        logit_scale: float = 1.0,
        logit_bias: float = 0.0,
        templates: Sequence[str] = ("{}",),
        unescape: bool = False,
    ) -> None:
        self.text = text
        self.transform = transform
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self.templates = tuple(templates)
        self.unescape = unescape
        self._executors = executors
        self._graphs = graphs

    @classmethod
    def read(cls, assets: Path, executors: Mapping[str, Executor], graphs: Mapping[str, GraphSpec]) -> Towers:
        """From a bundle's assets folder: towers.json, and what the towers that are in graphs need beside it."""
        from medcompile.runtime.image import ImageTransform

        facts = read_json(assets / "towers.json", dict)
        try:
            return cls(
                TextAssets.read(assets) if "text" in graphs else None,
                ImageTransform.read(assets) if "image" in graphs else None,
                executors,
                graphs,
                logit_scale=float(facts["logit_scale"]),
                logit_bias=float(facts["logit_bias"]),
                templates=[str(template) for template in facts["templates"]],
                unescape=bool(facts["unescape"]),
            )
        except KeyError as error:
            raise BundleError(f"{assets / 'towers.json'}: no {error}", fix="rebuild the bundle") from None

    def embed_images(
        self,
        images: image.Image | Iterable[image.Image],
        *,
        normalize: bool = True,
        resolution: int | None = None,
        frame: int | None = None,
    ) -> Array:
        """One row per image, float32 [n, dim]; a single image is a list of one.

        resolution: the edge in pixels, where the graph takes several. frame: which one of files with several, from 0.
        Raises InputError that names every image that
        can't be used; images() gives each its own answer instead.
        """
        spec, _ = self._image_tower()
        results = list(self.images(images, normalize=normalize, resolution=resolution, frame=frame))
        bad = [(r.index, r.error) for r in results if r.error is not None]
        if bad:
            told = [f"  [{i}] {error.message}" for i, error in bad[:NAMED]]
            more = [f"  and {len(bad) - NAMED} more"] if len(bad) > NAMED else []
            raise InputError(
                "\n".join([f"{len(bad)} of {len(results)} images can't be used:", *told, *more]),
                fix="leave them out, or take images(), which answers each image by itself",
            ) from bad[0][1]
        rows = [r.embedding for r in results if r.embedding is not None]
        return np.stack(rows) if rows else np.zeros((0, _dim(spec)), np.float32)

    def images(
        self,
        images: image.Image | Iterable[image.Image],
        *,
        normalize: bool = True,
        resolution: int | None = None,
        frame: int | None = None,
    ) -> Iterator[ImageResult]:
        """The answer to each image, in order, as batches are done: a bad one gets its error, the others are unharmed.

        images may be endless: no more than three batches of it are in memory.
        """
        spec, transform = self._image_tower()
        size = (resolution, resolution) if resolution else transform.size
        batch = image_batch(spec, size)
        held: list[Array | InputError] = []
        good = done = 0

        def pixels(numbered: tuple[int, image.Image]) -> Array | InputError:
            try:
                return transform.pixels(numbered[1], frame=frame, resolution=resolution, name=f"image {numbered[0]}")
            except InputError as error:
                return error

        for prepared in ahead(pixels, enumerate(_listed(images)), depth=2 * batch.opt):
            held.append(prepared)
            good += not isinstance(prepared, InputError)
            if good == batch.opt:
                yield from self._results(spec, held, batch, done, normalize)
                done += len(held)
                held, good = [], 0
        yield from self._results(spec, held, batch, done, normalize)

    def embed_pixels(self, pixels: Sequence[Array], *, normalize: bool = True) -> Array:
        """Embeddings of images that the transform made ready, all of one size: float32 [n, dim]."""
        spec, transform = self._image_tower()
        batch = image_batch(spec, pixels[0].shape[1:] if len(pixels) else transform.size)
        parts = [pixels[i : i + batch.max] for i in range(0, len(pixels), batch.max)] or [[]]
        return np.concatenate([self._embed_pixels(spec, part, batch, normalize) for part in parts])

    def embed_texts(self, texts: Text | Iterable[Text], *, normalize: bool = True) -> Array:
        """One row per text, float32 [n, dim]; a single text is a list of one.

        A text beyond the model's context is cut, and its last special token kept; a warning says how many were.
        """
        spec = self._graph("text")
        if self.text is None:
            raise UsageError("this bundle has no tokenizer for its text tower", fix="rebuild the bundle")
        length = self.text.window_length(spec)
        strings = checked(texts)
        if self.unescape:
            strings = [html.unescape(html.unescape(string)) for string in strings]
        tokens = self.text.encode(strings)
        windows = [self.text.first_window(i, t, length) for i, t in enumerate(tokens)]
        cut = sum(w.own[1] < len(t) for w, t in zip(windows, tokens, strict=True))
        if cut:
            log.warning("%d of %d texts are longer than the model's %d tokens and were cut", cut, len(tokens), length)
        rows = np.zeros((len(tokens), _dim(spec)), np.float32)
        for batch in self.text.batches(spec, windows):
            rows[list(batch.rows)] = self._run(spec, batch.feeds)[: len(batch.rows)]
        return unit(rows) if normalize else rows

    def match(
        self, images: image.Image | Iterable[image.Image], prompts: Prompts, templates: Sequence[str] | None = None
    ) -> Array:
        """How probable each class is for each image, float32 [n, classes], rows summing to 1. See classes()."""
        return self.scores(self.embed_images(images), self.classes(prompts, templates))

    def classes(self, prompts: Prompts, templates: Sequence[str] | None = None) -> Array:
        """One unit row per class, float32 [classes, dim]: the mean over its names and all templates.

        templates: the bundle's own if None; ["{}"] takes the names as they are. Source: CLIP, zero-shot ensembling.
        """
        templates = self.templates if templates is None else templates
        if isinstance(templates, str) or not templates or any(t.count("{}") != 1 for t in templates):
            raise UsageError("templates are texts with one {} each", fix='for example ["an X-ray of {}"]')
        if isinstance(prompts, str) or not prompts:
            raise UsageError("match wants several prompts", fix="give a list of prompts, or a mapping label -> prompt")
        names = prompts.values() if isinstance(prompts, Mapping) else prompts
        groups = [[name] if isinstance(name, str) else list(name) for name in names]
        if not all(groups):
            raise UsageError("a class has no prompt", fix="give each label at least one prompt")
        texts = [t.replace("{}", name) for group in groups for name in checked(group) for t in templates]
        rows = self.embed_texts(texts)
        starts = np.cumsum([0, *(len(group) * len(templates) for group in groups[:-1])])
        return unit(np.add.reduceat(rows, starts, axis=0))

    def scores(self, images: Array, classes: Array) -> Array:
        """Probabilities, float32 [n, classes], from unit embeddings [n, dim] and [classes, dim]."""
        logits = self.logit_scale * (images.astype(np.float64) @ classes.astype(np.float64).T) + self.logit_bias
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), np.float32)

    def stream(
        self,
        source: Iterable[Any],
        task: str = "image",
        *,
        max_latency_ms: float,
        batch: int | None = None,
        capacity: int | None = None,
        normalize: bool = True,
        resolution: int | None = None,
    ) -> Stream[Any, Array]:
        """Embeddings, float32 [dim], of images or texts as they come, each an Answer: see Stream.

        source: images or texts, or Requests of them. task: `image` or `text`. batch: None for the profile's opt.
        """
        if task == "text":
            usual = max((a.opt for p in self._graph(task).profiles for a in p.axes if a.name == "batch"), default=1)
            return Stream(
                source,
                partial(self.embed_texts, normalize=normalize),
                batch=usual if batch is None else batch,
                max_latency_ms=max_latency_ms,
                capacity=capacity,
            )
        if task != "image":
            raise UsageError(f"towers have no task {task!r}", fix="choose image or text")
        spec, transform = self._image_tower()
        axis = image_batch(spec, (resolution, resolution) if resolution else transform.size)
        return Stream(
            source,
            partial(self._embed_pixels, spec, batch=axis, normalize=normalize),
            batch=axis.opt if batch is None else min(batch, axis.max),
            max_latency_ms=max_latency_ms,
            prepare=partial(transform.pixels, resolution=resolution),
            capacity=capacity,
        )

    # ---- one tower each

    def _graph(self, task: str) -> GraphSpec:
        if task not in self._graphs:
            raise UsageError(
                f"no task {task} here; the tasks are: {', '.join(sorted(self._graphs))}",
                fix=f"add {task} to model.tasks in the recipe and rebuild, or use a bundle that has it",
            )
        return self._graphs[task]

    def _image_tower(self) -> tuple[GraphSpec, ImageTransform]:
        spec = self._graph("image")
        if self.transform is None:
            raise UsageError("this bundle has no transform for its image tower", fix="rebuild the bundle")
        return spec, self.transform

    def _results(
        self, spec: GraphSpec, held: Sequence[Array | InputError], batch: Axis, first: int, normalize: bool
    ) -> Iterator[ImageResult]:
        good = [p for p in held if not isinstance(p, InputError)]
        rows = iter(self._embed_pixels(spec, good, batch, normalize))
        for index, prepared in enumerate(held, first):
            if isinstance(prepared, InputError):
                yield ImageResult(index, error=prepared)
            else:
                yield ImageResult(index, next(rows))

    def _embed_pixels(self, spec: GraphSpec, pixels: Sequence[Array], batch: Axis, normalize: bool) -> Array:
        """One batch. pixels: at most batch.max of [3, h, w] float32. Returns [n, dim]."""
        if not pixels:
            return np.zeros((0, _dim(spec)), np.float32)
        filled = [*pixels, *[pixels[0]] * (batch.min - len(pixels))]
        rows = self._run(spec, {spec.inputs[0].name: np.stack(filled)})[: len(pixels)]
        return unit(rows) if normalize else rows

    def _run(self, spec: GraphSpec, feeds: Mapping[str, Array]) -> Array:
        return self._executors[spec.name].run(feeds)[spec.outputs[0].name]


def unit(rows: Array) -> Array:
    """Each row at length 1, float32; a row of zeros stays one."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, 1e-12), np.float32)


def image_batch(spec: GraphSpec, size: tuple[int, int]) -> Axis:
    """The batch axis of the profile that takes most images of size (h, w), its max cut down to BATCH_BYTES.

    Raises ProfileError if no profile takes that size.
    """
    fitting = []
    for profile in spec.profiles or (Profile("fixed", ()),):
        axes = [Axis("fixed", d, d, d) if isinstance(d, int) else profile.axis(d) for d in spec.inputs[0].shape]
        if all(axis.min <= n <= axis.max for axis, n in zip(axes[2:], size, strict=True)):
            fitting.append(axes[0])
    if not fitting:
        raise ProfileError(
            f"{spec.name}: an image of {size[0]} x {size[1]} pixels is outside every profile",
            fix="leave resolution out, or widen shapes.resolution in the recipe and rebuild",
        )
    widest = max(fitting, key=lambda axis: axis.max)
    most = max(widest.min, min(widest.max, BATCH_BYTES // (12 * size[0] * size[1])))
    return Axis(widest.name, widest.min, min(max(widest.opt, widest.min), most), most)


def _listed(images: Any) -> Iterable[image.Image]:
    """Several images, whatever was given; an array of four dimensions is several."""
    from PIL import Image

    kinds = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)
    one = images.ndim < 4 if isinstance(images, np.ndarray) else isinstance(images, kinds)
    if one:
        return [images]
    if not isinstance(images, Iterable):
        raise InputError(
            f"an image or a list of images is wanted, not {type(images).__name__}",
            fix="pass a path, the file's bytes, an array, a PIL image, or a list of these",
        )
    return images


def _dim(spec: GraphSpec) -> int:
    return int(spec.outputs[0].shape[-1])
