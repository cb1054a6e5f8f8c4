"""A workshop for whole builds in seconds: a tiny BERT with random weights, data manifests, and recipes that name them.

The weights mean nothing, so budgets here are wide; what is tested with it is the machinery, not accuracy.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import medcompile
from medcompile.bundle import Bundle
from tests.runtime import fakes

PLANTED = "Quokkaville Brzezinski xylophagous 74218"
"""Words that no vocabulary, recipe or library holds: wherever they turn up, they came out of the data."""
TASKS = ("embed", "token-classification", "sequence-classification", "fill-mask")
BUDGET = {
    "embed": {"cosine": {"max_drop": 0.5}},
    "token-classification": {"agreement": {"max_drop": 0.6}},
    "sequence-classification": {"agreement": {"max_drop": 0.7}},
    "fill-mask": {"top1_agreement": {"max_drop": 0.9}},
}
HIDDEN, LAYERS, POSITIONS = 32, 2, 64
_WORDS = [w for w in fakes.WORDS if w.isalpha()]


def write_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A BertModel with heads for all four tasks, in one folder."""
    from safetensors.numpy import save_file

    random = np.random.default_rng(seed)
    vocabulary, labels = len(fakes.VOCABULARY), len(fakes.LABELS)
    tensors: dict[str, np.ndarray[Any, Any]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        tensors[f"{name}.weight"] = random.normal(0, 1 / np.sqrt(inputs), (outputs, inputs)).astype(np.float32)
        tensors[f"{name}.bias"] = random.normal(0, 0.1, outputs).astype(np.float32)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = np.ones(HIDDEN, np.float32)
        tensors[f"{name}.bias"] = np.zeros(HIDDEN, np.float32)

    for name, rows in (("word", vocabulary), ("position", POSITIONS), ("token_type", 2)):
        table = random.normal(0, 1, (rows, HIDDEN)).astype(np.float32)
        tensors[f"bert.embeddings.{name}_embeddings.weight"] = table
    norm("bert.embeddings.LayerNorm")
    for i in range(LAYERS):
        layer = f"bert.encoder.layer.{i}"
        for part in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{part}", HIDDEN, HIDDEN)
        linear(f"{layer}.attention.output.dense", HIDDEN, HIDDEN)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", HIDDEN, 2 * HIDDEN)
        linear(f"{layer}.output.dense", 2 * HIDDEN, HIDDEN)
        norm(f"{layer}.output.LayerNorm")
    linear("bert.pooler.dense", HIDDEN, HIDDEN)
    linear("classifier", HIDDEN, labels)
    linear("cls.predictions.transform.dense", HIDDEN, HIDDEN)
    norm("cls.predictions.transform.LayerNorm")
    tensors["cls.predictions.bias"] = np.zeros(vocabulary, np.float32)

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 2 * HIDDEN,
        "hidden_act": "gelu",
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "pad_token_id": 0,
        "id2label": {str(i): label for i, label in enumerate(fakes.LABELS)},
        "label2id": {label: i for i, label in enumerate(fakes.LABELS)},
    }
    (folder / "config.json").write_text(json.dumps(config))
    fakes.tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def records(count: int, seed: int) -> list[dict[str, Any]]:
    """Labelled items of a few known words each; the planted sentence is one of them."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        words = [str(w) for w in random.choice(_WORDS, random.integers(4, 9))]
        if i == count // 2:
            words = [*PLANTED.split(), str(seed)]
        labels = [fakes.LABELS[int(random.integers(0, 2))] for _ in words]
        found.append({"words": words, "labels": labels, "label": fakes.LABELS[i % 3], "document": f"d{i}"})
    return found


def write_data(folder: Path, name: str, items: Sequence[Mapping[str, Any]], **keys: Any) -> Path:
    """<name>.jsonl and its manifest in folder. keys replace those of the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = "".join(json.dumps(item) + "\n" for item in items).encode()
    (folder / f"{name}.jsonl").write_bytes(raw)
    manifest = {
        "name": name,
        "source": "random words",
        "licence": "CC0-1.0",
        "phi": "none",
        "role": "acceptance",
        "format": "jsonl",
        "fields": {field: field for field in items[0]},
        "path": f"{name}.jsonl",
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(manifest | keys, sort_keys=False))
    return path


def recipe(**sections: Any) -> dict[str, Any]:
    """A whole recipe as a dict. sections replace those of the default; None leaves one out."""
    document = {
        "schema_version": 1,
        "name": "tiny",
        "model": {"family": "bert", "tasks": ["embed"], "source": "path:../model"},
        "shapes": {"batch": [1, 4, 16], "sequence": [4, 16, 64]},
        "calibration": {"data": "notes", "samples": 40},
        "evaluation": {"data": "held-out"},
        "budget": BUDGET["embed"],
        "variants": {"fp32": {}, "int8": {"weights": "int8", "activations": "int8", "symmetric": False}},
        "targets": ["onnxruntime-cpu"],
    } | sections
    return {key: value for key, value in document.items() if value is not None}


def write_recipe(folder: Path, document: Mapping[str, Any]) -> Path:
    path = folder / "recipes" / f"{document['name']}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def write_workshop(folder: Path, tasks: Sequence[str] = ("embed",)) -> Path:
    """model/, calibration/ and recipes/tiny.yaml under folder. Returns the recipe's path."""
    write_checkpoint(folder / "model")
    write_data(folder / "calibration", "notes", records(48, 1), role="calibration")
    write_data(folder / "calibration", "held-out", records(40, 2))
    budget = {metric: margin for task in tasks for metric, margin in BUDGET[task].items()}
    model = {"family": "bert", "tasks": list(tasks), "source": "path:../model"}
    return write_recipe(folder, recipe(model=model, budget=budget))


@dataclass(frozen=True)
class Workshop:
    """What write_workshop() wrote under root, the cache that the build filled, and the bundle that came out."""

    root: Path
    recipe: Path
    cache: Path
    bundle: Path

    def build(self, **how: Any) -> Bundle:
        """Build the recipe again with this cache, into the same place unless told otherwise."""
        return medcompile.build(**{"path": self.recipe, "out": self.bundle, "cache_folder": self.cache} | how)

    def copy(self, root: Path) -> Workshop:
        """A copy of its own under root, cache and bundle included."""
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        return Workshop(root, *(root / p.relative_to(self.root) for p in (self.recipe, self.cache, self.bundle)))


def built(root: Path, tasks: Sequence[str]) -> Workshop:
    made = Workshop(root, write_workshop(root, tasks), root / "cache", root / "engines" / "tiny")
    made.build()
    return made


class Events:
    """A Progress that remembers. began: names of steps that ran; cached: of those that did not have to."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.cached: list[str] = []
        self.notes: list[str] = []

    def begin(self, name: str) -> None:
        self.began.append(name)

    def step(self, message: str, done: int = 0, total: int = 0) -> None: ...

    def end(self, record: Any) -> None:
        if record.cached:
            self.cached.append(record.name)

    def note(self, message: str) -> None:
        self.notes.append(message)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below folder by its relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
