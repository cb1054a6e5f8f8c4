"""What is compared: a bundle or a recipe as a Job, and the inputs that every contender gets.

The inputs are the evaluation data's own texts and images: tokens of real text make accuracy mean something, and full
rows make times comparable. Without data they are random tokens, and the comparison says so.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile import bundle
from medcompile.bench.peer import MODEL, TEXT, Array, Cell, Job, Span
from medcompile.bundle import Bundle
from medcompile.errors import SourceError, UsageError
from medcompile.runtime.text import TextAssets, Tokens, read_json

if TYPE_CHECKING:
    from medcompile.data import Dataset, Item

ITEMS = 64
"""Rows that a cell's inputs hold, or one batch where that is more."""
CALIBRATION_ITEMS = 256
SEED = 0

_CELL = re.compile(r"(\d+)(?:x(\d+))?(?:\+(\d+))?")
_SHAPES = {
    "image": "1,8",
    "generate": "1x128+64,8x128+64",
    MODEL: "1x128,8x128,1x512",
    TEXT: "1,32",
}


@dataclass(frozen=True)
class Subject:
    """A model to compare ways of running. job: what is known of it, without cells, inputs and option.

    assets: the folder with its tokenizer, transform and labels. data, calibration: manifests, if they are here.
    notes: what is worth telling. digests: of the bundle and the source's files.
    """

    name: str
    job: Job
    tasks: tuple[str, ...]
    assets: Path
    data: Path | None = None
    calibration: Path | None = None
    notes: tuple[str, ...] = ()
    digests: dict[str, str] = field(default_factory=dict)


def of(path: Path, scratch: Path, source: str = "", data: Path | None = None) -> Subject:
    """The bundle in that folder, or the model of that recipe (with its bundle in engines/, if it was built).

    scratch: a folder for what must be made of a recipe. source: a checkpoint's folder, instead of the one that was
    compiled. data: manifest of the texts or images, instead of the evaluation data. Raises UsageError, BundleError,
    RecipeError, SourceError.
    """
    if path.is_dir():
        return _of_bundle(path, source, data)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _of_recipe(path, scratch, source, data)
    raise UsageError(f"{path} is no bundle and no recipe", fix="give a folder in engines/, or a recipe's .yaml")


def _of_bundle(path: Path, source: str, data: Path | None) -> Subject:
    import yaml

    found = bundle.read(path)
    said: dict[str, Any] = yaml.safe_load((found.root / "recipe.resolved.yaml").read_text(encoding="utf-8"))
    model = said["model"]
    folder, why = _checkpoint(found, f"path:{source}" if source else model["source"], model.get("revision"))
    manifests = [_manifest(found.root, said.get(section)) for section in ("evaluation", "calibration")]
    assets = found.root / "assets"
    labels = read_json(assets / "labels.json", list) if (assets / "labels.json").is_file() else []
    job = Job(
        family=found.family,
        task="",
        source=folder,
        bundle=str(found.root),
        pooling=model.get("pooling", "mean"),
        normalize=model.get("normalize", True),
        max_length=_max_length(assets),
        labels=tuple(str(label) for label in labels),
    )
    digests = {"bundle": found.digest}
    notes = (f"contenders that read the checkpoint do not run: {why}",) if why else ()
    return Subject(found.name, job, found.tasks, assets, data or manifests[0], manifests[1], notes, digests)


def _of_recipe(path: Path, scratch: Path, source: str, data: Path | None) -> Subject:
    from medcompile import models, recipe, sources

    said = recipe.load(path)
    built = Path("engines") / said.name
    if (built / bundle.MANIFEST).is_file():
        return _of_bundle(built, source, data)
    model = said.model
    checkpoint = sources.resolve(f"path:{source}" if source else model.source, model.revision, base=path.parent)
    options = models.ModelOptions(
        tasks=tuple(model.tasks),
        profiles=said.profiles,
        pooling=model.pooling,
        normalize=model.normalize,
        max_length=model.max_length,
        labels=tuple(model.labels or ()),
        templates=tuple(model.templates or ()),
    )
    assets = scratch / "assets"
    assets.mkdir()
    models.get(model.family).assets(checkpoint, options, assets)
    labels = read_json(assets / "labels.json", list) if (assets / "labels.json").is_file() else []
    job = Job(
        family=model.family,
        task="",
        source=str(checkpoint.folder),
        pooling=model.pooling,
        normalize=model.normalize,
        max_length=_max_length(assets),
        labels=tuple(str(label) for label in labels),
    )
    calibration = said.manifests[said.calibration.data[0]] if said.calibration else None
    notes = (f"{built} is not built, so nothing of ours runs: medcompile build {path}",)
    return Subject(
        said.name, job, options.tasks, assets, data or said.manifests[said.evaluation.data], calibration, notes
    )


def _checkpoint(found: Bundle, source: str, revision: str | None) -> tuple[str, str]:
    """The folder of the checkpoint that was compiled, or an empty one and why not. Nothing is downloaded.

    A relative path counts from where the recipe lay, which is most likely a folder beside the bundle's.
    """
    from medcompile import sources

    try:
        checkpoint = sources.resolve(source, revision, base=found.root.parent, offline=True)
    except SourceError as error:
        return "", error.message
    compiled = found.provenance.get("source_files")
    if compiled is not None and dict(checkpoint.files) != compiled:
        return "", f"{checkpoint.folder} holds other files than those that were compiled"
    return str(checkpoint.folder), ""


def _manifest(root: Path, section: Any) -> Path | None:
    """The first manifest that a section of a resolved recipe names, if it is found from here or beside the bundle."""
    named = (section or {}).get("data")
    name = str(named[0] if isinstance(named, list) else named)
    places = (Path(name), *(f / "calibration" / f"{name}.yaml" for f in (Path(), root.parent.parent)))
    return next((p for p in places if p.is_file()), None)


def _max_length(assets: Path) -> int:
    for name, key in (("text.json", "max_length"), ("decoder.json", "context")):
        if (assets / name).is_file():
            return int(read_json(assets / name, dict)[key])
    return 0


# ---- shapes


def cells(said: str, task: str, clock: str, max_length: int) -> tuple[Cell, ...]:
    """The shapes of a command line (`1x128,8x128`; `1x128+64` generates 64 tokens; `8` of images, and of texts as long
    as they are), or the usual ones. Raises UsageError."""
    if task == "generate" and clock == TEXT:
        raise UsageError("decoders are timed from tokens to tokens", fix="leave --clock out")
    usual = _SHAPES[TEXT] if clock == TEXT else _SHAPES.get(task, _SHAPES[MODEL])
    found = []
    for part in (said or usual).split(","):
        match = _CELL.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"--shapes: {part!r} is no shape", fix=f"write them as {usual}")
        cell = Cell(*(int(group or 0) for group in match.groups()))
        rows = task != "image" and clock == MODEL
        if cell.batch < 1 or (rows != bool(cell.sequence)) or (task == "generate") != bool(cell.new):
            raise UsageError(f"--shapes: {part!r} is no shape of {task} with the clock {clock}", fix=f"write {usual}")
        if max_length and cell.sequence + cell.new > max_length:
            if said:
                raise UsageError(f"--shapes: {part} is above the model's {max_length} tokens", fix="make it shorter")
            continue
        found.append(cell)
    if not found:
        raise UsageError(f"the usual shapes are above the model's {max_length} tokens", fix="give --shapes")
    return tuple(dict.fromkeys(found))


# ---- inputs


def with_inputs(subject: Subject, job: Job, folder: Path, *, allow_phi: bool) -> tuple[Job, str, str]:
    """The job with its inputs written into folder and its calibration into job.work, where it stays: what contenders
    make of it is kept beside it. Then what the inputs are in words, and their digest."""
    from medcompile import data

    items: list[Item] = []
    dataset: Dataset | None = None
    if subject.data is not None:
        dataset = data.read(data.load_manifest(subject.data), allow_phi=allow_phi)
        items = list(dataset.items)
        np.random.default_rng(SEED).shuffle(items)
    kept = _images(items) if job.task == "image" else [i for i in items if i.text]
    made_up = "random pixels" if job.task == "image" else "random tokens"
    told = f"{len(kept)} items of {dataset.name}" if dataset and kept else made_up
    inputs = folder / "inputs"
    inputs.mkdir()
    digest = hashlib.sha256()
    for cell in job.cells:
        rows = max(cell.batch, ITEMS // cell.batch * cell.batch)
        if job.clock == TEXT:
            written = _items(job.task, items, rows, inputs)
            raw = json.dumps(written).encode()
            (inputs / f"{cell.name}.json").write_bytes(raw)
            digest.update(raw)
            if gold := _gold(job, items, rows):
                (inputs / f"{cell.name}.gold.json").write_text(json.dumps(gold), encoding="utf-8")
        else:
            arrays = _arrays(subject, job, items, cell, rows)
            np.savez(inputs / f"{cell.name}.npz", **arrays)  # type: ignore[arg-type]
            for name in sorted(arrays):
                digest.update(name.encode() + arrays[name].tobytes())
    job = replace(job, inputs=str(inputs))
    if subject.calibration is not None and job.task != "generate":
        calibration = data.read(data.load_manifest(subject.calibration), limit=CALIBRATION_ITEMS, allow_phi=allow_phi)
        if dataset is not None and dataset.name != calibration.name:
            calibration, _ = data.without_overlap(calibration, dataset)
        arrays = _calibration(subject, job, calibration.items)
        path = Path(job.work) / f"calibration-{_digest(arrays)}.npz"
        if arrays and not path.is_file():
            np.savez(path, **arrays)  # type: ignore[arg-type]
        job = replace(job, calibration=str(path) if arrays else "")
    return job, told, digest.hexdigest()


def _digest(arrays: dict[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + str(arrays[name].shape).encode() + arrays[name].tobytes())
    return digest.hexdigest()[:16]


def _items(task: str, items: Sequence[Item], rows: int, folder: Path) -> list[str]:
    """Texts, or paths of images; images that lie in an array become files in folder."""
    if task == "image":
        found = []
        for k, source in enumerate(_images(items)[:rows]):
            path = source if isinstance(source, Path) else folder / f"{k}.png"
            if not isinstance(source, Path):
                from medcompile.runtime.image import from_array

                from_array(source).save(path)
            found.append(str(path.resolve()))
    else:
        found = [i.text for i in items if i.text]
    if not found:
        raise UsageError(f"no data for {task} with the clock {TEXT}", fix="name a manifest with --data")
    return [found[k % len(found)] for k in range(rows)]


def _gold(job: Job, items: Sequence[Item], rows: int) -> list[Any]:
    """What the data itself says of the items that _items() gives: entities as spans, or a class's id; [] if nothing."""
    labelled = [i for i in items if i.text]
    if job.task == "token-classification" and labelled and all(i.labels for i in labelled):
        return [_spans(labelled[k % len(labelled)]) for k in range(rows)]
    if job.task == "sequence-classification" and labelled and all(i.label in job.labels for i in labelled):
        return [job.labels.index(labelled[k % len(labelled)].label) for k in range(rows)]
    return []


def _spans(item: Item) -> list[Span]:
    """The entities of an item whose text is its words with spaces between."""
    found: list[Span] = []
    at, open_label = 0, ""
    for word, label in zip(item.words, item.labels, strict=True):
        kind, _, name = label.partition("-")
        if label == "O":
            open_label = ""
        elif kind == "I" and name == open_label:
            found[-1] = (found[-1][0], at + len(word), name)
        else:
            found.append((at, at + len(word), name))
            open_label = name
        at += len(word) + 1
    return found


def _images(items: Sequence[Item]) -> list[Any]:
    return [i.image.source for i in items if i.image]


def _arrays(subject: Subject, job: Job, items: Sequence[Item], cell: Cell, rows: int) -> dict[str, Array]:
    """rows rows of the graph's inputs, every position a token."""
    if job.task == "image":
        return {"pixel_values": _pixels(subject.assets, _images(items), rows)}
    texts = [i.text for i in items if i.text]
    if job.task == "generate":
        from medcompile.runtime.prompts import DecoderText

        tokenizer = DecoderText.read(subject.assets).tokenizer
        return {"input_ids": _packed(_ids(tokenizer, texts), rows, cell.sequence, tokenizer.get_vocab_size())}
    text = TextAssets.read(subject.assets)
    ids = _ids(text.tokenizer, texts)
    shell = text.first_window(0, _tokens(np.zeros(cell.sequence, np.int64)), cell.sequence)
    room = shell.own[1] - shell.own[0]
    packed = _packed(ids, rows, room, text.tokenizer.get_vocab_size())
    windows = [text.first_window(i, _tokens(row), cell.sequence) for i, row in enumerate(packed)]
    arrays = {
        "input_ids": np.stack([w.ids for w in windows]),
        "attention_mask": np.ones((rows, cell.sequence), np.int64),
        "token_type_ids": np.stack([w.types for w in windows]),
    }
    if job.task == "fill-mask":
        _mask(arrays, text, np.full(rows, shell.lead), np.full(rows, room))
    return arrays


def _ids(tokenizer: Any, texts: Sequence[str]) -> Array:
    """The tokens of all texts, end to end, without special ones."""
    found = tokenizer.encode_batch(list(texts), add_special_tokens=False) if texts else []
    return np.array([i for encoding in found for i in encoding.ids], np.int64)


def _packed(ids: Array, rows: int, length: int, vocabulary: int) -> Array:
    """[rows, length] int64: the stream of ids cut up, begun anew where it ends; random ones if there are none."""
    if not len(ids):
        return np.random.default_rng(SEED).integers(vocabulary // 10, vocabulary, (rows, length))
    return np.resize(ids, (rows, length))


def _tokens(ids: Array) -> Tokens:
    return Tokens(ids, np.zeros((len(ids), 2), np.int64), np.zeros(len(ids), np.int64))


def _pixels(assets: Path, images: Sequence[Any], rows: int) -> Array:
    from medcompile.runtime.image import ImageTransform

    transform = ImageTransform.read(assets)
    if not images:
        return np.random.default_rng(SEED).standard_normal((rows, 3, *transform.size)).astype(np.float32)
    return np.stack([transform.pixels(images[k % len(images)]) for k in range(rows)])


def _calibration(subject: Subject, job: Job, items: Sequence[Item]) -> dict[str, Array]:
    """One item in each row, padded; {} if the data holds nothing for the task."""
    if job.task == "image":
        images = _images(items)
        return {"pixel_values": _pixels(subject.assets, images, min(len(images), ITEMS))} if images else {}
    texts = [i.text for i in items if i.text]
    if not texts:
        return {}
    text = TextAssets.read(subject.assets)
    windows = [text.first_window(i, t, job.max_length) for i, t in enumerate(text.encode(texts))]
    size = (len(windows), max(len(w.ids) for w in windows))
    arrays = {name: np.zeros(size, np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    arrays["input_ids"][...] = text.pad_id
    for row, window in enumerate(windows):
        n = len(window.ids)
        arrays["input_ids"][row, :n], arrays["token_type_ids"][row, :n] = window.ids, window.types
        arrays["attention_mask"][row, :n] = 1
    if job.task == "fill-mask":
        lengths = [w.own[1] for w in windows]
        _mask(arrays, text, np.array([w.lead for w in windows]), np.maximum(lengths, 1))
    return arrays


def _mask(arrays: dict[str, Array], text: TextAssets, lead: Array, room: Array) -> None:
    """Put the mask token somewhere among each row's own tokens, and say where."""
    if text.mask_id is None:
        raise UsageError("this tokenizer has no mask token", fix="compare another task")
    rows = len(arrays["input_ids"])
    at = lead + np.random.default_rng(SEED).integers(0, room, rows)
    arrays["input_ids"][np.arange(rows), at] = text.mask_id
    arrays["mask_position"] = at.astype(np.int64)
