"""Models, data and margins on which the search and the published tools are compared; data in three roles.

budget_peers.py and budget_search.py both build from settings(), so that all see the same model and the same items.
MODELS (a folder): minilm-ner, tiny-biomedclip and tiny-medllama, small trained checkpoints. DATA: what MEDCOMPILE_DATA
names. The manifests of a part that calibration/ does not describe are written into the folder of the comparison.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

import medcompile
from medcompile import bundle, data, exams
from medcompile.errors import OverBudgetError

if TYPE_CHECKING:
    from medcompile.program import Feeds

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("openvino-cpu", "onnxruntime-cpu")
POINTS = (0.005, 0.01, 0.02)
PERPLEXITY = (0.001, 0.005, 0.01, 0.02)
MEDQUAD_SHARES = {"calibration": range(10, 20), "tuning": range(5, 10), "acceptance": range(5)}
"""Of 20 parts of all diseases, by a hash of the disease's name: none stands in two roles."""


@dataclass(frozen=True)
class Model:
    """checkpoint: a folder of MODELS. recipe: whose settings it is built with, changed by changes.

    calibration, tuning, acceptance: data of each role, and how many items; None is all of them.
    """

    name: str
    checkpoint: str
    recipe: str
    metric: str
    margins: tuple[float, ...]
    calibration: tuple[tuple[str, ...], int]
    tuning: tuple[str, int | None]
    acceptance: tuple[str, int | None]
    changes: tuple[str, ...] = ()


_CLIP = (
    'model.templates=["a medical image: {}"]',
    "model.revision=null",
    "shapes.sequence=[4, 16, 64]",
)
_DRAWN = (("medical-phantoms", "image-captions"), 256)
_LLAMA = ("model.max_length=512", "shapes.sequence=[1, 128, 512]")

MODELS = {
    model.name: model
    for model in (
        Model(
            "minilm-ner",
            "minilm-ner",
            "benchmarks/ner.yaml",
            "f1",
            POINTS,
            (("ncbi-disease-train",), 256),
            ("ncbi-disease-devel", None),
            ("bc5cdr-disease", None),
        ),
        Model(
            "tiny-biomedclip-mednist",
            "tiny-biomedclip",
            "recipes/biomedclip.yaml",
            "accuracy",
            POINTS,
            _DRAWN,
            ("mednist-tuning", 900),
            ("mednist", None),
            _CLIP,
        ),
        Model(
            "tiny-biomedclip-pneumonia",
            "tiny-biomedclip",
            "recipes/biomedclip.yaml",
            "accuracy",
            POINTS,
            _DRAWN,
            ("pneumoniamnist-tuning", 900),
            ("pneumoniamnist", None),
            _CLIP,
        ),
        Model(
            "tiny-medllama",
            "tiny-medllama",
            "recipes/quickstart-llm.yaml",
            "perplexity",
            PERPLEXITY,
            (("medquad-calibration",), 128),
            ("medquad-tuning", 200),
            ("medquad-acceptance", 400),
            _LLAMA,
        ),
    )
}


@dataclass(frozen=True)
class Places:
    """work: the folder of the comparison. models, files: of checkpoints and data; None where neither is looked at."""

    work: Path
    models: Path | None = None
    files: Path | None = None

    def of(self, model: Model) -> Path:
        return self.work / model.name

    def prepared(self) -> Places:
        """With manifests written, and MEDCOMPILE_DATA set."""
        if self.files is not None:
            os.environ[data.manifest.DATA_FOLDER] = str(self.files)
            _write_manifests(self.work / "calibration", self.files)
        return self

    def manifest(self, name: str) -> Path:
        own = self.work / "calibration" / f"{name}.yaml"
        return own if own.is_file() else ROOT / f"calibration/{name}.yaml"

    def dataset(self, name: str, samples: int | None) -> data.Dataset:
        return data.read(data.load_manifest(self.manifest(name)), limit=samples)


def settings(model: Model, places: Places, margin: float) -> list[str]:
    """A build's --set arguments over model.recipe: everything but variants, or what is searched for."""
    assert places.models is not None
    names, samples = model.calibration
    evaluation, items = model.acceptance
    return [
        f"name={model.name}",
        f"model.source=path:{places.models / model.checkpoint}",
        *model.changes,
        f"calibration={{data: [{', '.join(str(places.manifest(n)) for n in names)}], samples: {samples}, method: mse}}",
        f"evaluation={{data: {places.manifest(evaluation)}{f', samples: {items}' if items else ''}}}",
        f"budget={{{model.metric}: {{max_drop: {margin}}}}}",
        f"targets=[{', '.join(TARGETS)}]",
    ]


def tuning(model: Model, places: Places) -> str:
    """The --set argument that names the tuning data to a search."""
    name, samples = model.tuning
    return f"tuning={{data: {places.manifest(name)}{f', samples: {samples}' if samples else ''}}}"


def yardstick(model: Model, places: Places) -> bundle.Bundle:
    """Our fp32, with the reference's answers on the acceptance data; built only once."""
    return _built(model, places, "bundle", {"fp32": "{}"}, [])


def plain(model: Model, places: Places, variants: dict[str, str]) -> bundle.Bundle:
    """Our variants of that name -> a recipe's keys, for others to judge: the build itself asks a few items alone."""
    asked = f"evaluation={{data: {places.manifest(model.tuning[0])}, samples: 32}}"
    return _built(model, places, "plain", variants, [asked])


def _built(model: Model, places: Places, folder: str, variants: dict[str, str], changes: list[str]) -> bundle.Bundle:
    place = places.of(model) / folder
    if (place / bundle.MANIFEST).is_file():
        return bundle.read(place)
    written = "{" + ", ".join(f"{name}: {how}" for name, how in variants.items()) + "}"
    changed = [*settings(model, places, model.margins[-1]), *changes, f"variants={written}"]
    try:
        return medcompile.build(ROOT / model.recipe, out=place, overrides=changed, cache_folder=places.work / "cache")
    except OverBudgetError:
        return bundle.read(place)


@dataclass(frozen=True)
class Questions:
    """What a finished bundle's graphs are asked on the data of each role."""

    model: Model
    places: Places
    bundle: bundle.Bundle

    @functools.cached_property
    def acceptance(self) -> data.Dataset:
        return self.places.dataset(*self.model.acceptance)

    @functools.cached_property
    def tuning(self) -> data.Dataset:
        return self.places.dataset(*self.model.tuning)

    @functools.cached_property
    def calibration(self) -> data.Dataset:
        names, samples = self.model.calibration
        found = data.joined([self.places.dataset(name, samples) for name in names])
        for other in (self.acceptance, self.tuning):
            found, _ = data.without_overlap(found, other)
        return found

    def exam(self, graph: str, dataset: data.Dataset) -> exams.Exam:
        root = self.bundle.root
        kept = root / "reference"
        return exams.of(graph, exams.Setting(self.bundle.graphs, root / "assets", dataset, lambda g: kept / f"{g}.npz"))

    def feeds(self, graph: str) -> Iterator[Feeds]:
        """Calibration data, one item at a time, so that none is padded."""
        return self.exam(graph, self.calibration).feeds(1)


# ---- manifests that calibration/ does not have


def _write_manifests(folder: Path, source: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("mednist", "pneumoniamnist"):
        keys = yaml.safe_load((ROOT / f"calibration/{name}.yaml").read_text(encoding="utf-8"))
        keys |= {"name": f"{name}-tuning", "role": "tuning"}
        keys["fields"] = {"image": "train_images", "label": "train_labels"}
        _write(folder / f"{name}-tuning.yaml", yaml.safe_dump(keys, sort_keys=False))
    rows = [json.loads(line) for line in (source / "text/medquad_sample.jsonl").open(encoding="utf-8")]
    for role, parts in MEDQUAD_SHARES.items():
        texts = [json.dumps({k: r[k] for k in ("id", "focus", "answer")}) for r in rows if _part(r["focus"]) in parts]
        file = folder / f"medquad-{role}.jsonl"
        _write(file, "\n".join(texts) + "\n")
        keys = {
            "name": f"medquad-{role}",
            "source": "https://github.com/abachaa/MedQuAD",
            "licence": "CC BY 4.0; cite Ben Abacha and Demner-Fushman 2019",
            "phi": "none",
            "role": role,
            "format": "jsonl",
            "fields": {"id": "id", "text": "answer", "document": "focus"},
            "path": file.name,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        _write(folder / f"medquad-{role}.yaml", yaml.safe_dump(keys, sort_keys=False))


def _part(disease: str) -> int:
    return int(hashlib.sha256(disease.encode()).hexdigest(), 16) % 20


def _write(path: Path, text: str) -> None:
    """Once: several may be at work in the folder."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
