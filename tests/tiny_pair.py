"""A workshop of two towers: a tiny CLIP with random weights, drawn images with captions on disk, and its bundle.

The weights mean nothing, so budgets here are wide; what is tested with it is the machinery, not accuracy.
"""

from __future__ import annotations

import csv
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import yaml

from tests import tiny
from tests.tiny import Workshop

CLASSES = {"disc": "a chest x-ray with a round shadow", "bars": "the ribs in a row"}
LABELS = tuple(sorted(CLASSES))
BUDGET = {"agreement": {"max_drop": 0.9}, "cosine": {"max_drop": 0.5}}
INT8 = {"weights": "int8", "activations": "int8"}


def drawn(label: str, seed: int, edge: int = 40) -> PIL.Image.Image:
    """A gray image of its class with noise; no two seeds give the same."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:edge, :edge] / edge
    cx, cy, size = rng.uniform((0.3, 0.3, 0.1), (0.7, 0.7, 0.25))
    shape = np.hypot(x - cx, y - cy) < size if label == "disc" else np.sin(x * 25 * (1 + size) + cy) > 0
    return PIL.Image.fromarray((60 + 120 * shape + rng.integers(0, 60, (edge, edge))).astype(np.uint8))


def write_images(folder: Path, name: str, count: int, seed: int, *, without: tuple[str, ...] = (), **keys: Any) -> Path:
    """<name>/ with images and an index, and the manifest <name>.yaml. A caption and a patient are the planted words.

    without: fields that the index lacks. keys replace those of the manifest.
    """
    (folder / name).mkdir(parents=True)
    rows = []
    for i in range(count):
        label = LABELS[i % 2]
        file = f"{i}.{'jpg' if i % 3 else 'png'}"
        drawn(label, seed * 1000 + i).save(folder / name / file)
        caption = f"{tiny.PLANTED if i == count // 2 else CLASSES[label]} number {seed * 1000 + i}"
        patient = tiny.PLANTED if i < 2 else f"p{i}"
        row = {"image": file, "label": label, "text": caption, "document": patient}
        rows.append({field: value for field, value in row.items() if field not in without})
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    index = folder / name / "index.csv"
    index.write_text(text.getvalue())
    manifest = {
        "name": name,
        "source": "drawn",
        "licence": "CC0-1.0",
        "phi": "none",
        "role": "acceptance",
        "format": "images",
        "fields": {field: field for field in rows[0]},
        "path": f"{name}/index.csv",
        "sha256": hashlib.sha256(index.read_bytes()).hexdigest(),
    }
    if "label" not in without:
        manifest["prompts"] = CLASSES
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(manifest | keys, sort_keys=False))
    return path


def recipe(**sections: Any) -> dict[str, Any]:
    """A whole recipe as a dict. sections replace those of the default; None leaves one out."""
    return tiny.recipe(
        **{
            "model": {
                "family": "clip",
                "tasks": ["image", "text"],
                "source": "path:../model",
                "templates": ["an image of {}", "{}"],
            },
            "shapes": {"batch": [1, 4, 16], "sequence": [2, 16, 24]},
            "calibration": {"data": ["phantoms"], "samples": 40},
            "budget": BUDGET,
            "variants": {
                "fp32": {},
                "int8": {**INT8, "symmetric": False},
                "int8-images": {**INT8, "dynamic": True, "graphs": ["image"]},
            },
        }
        | sections
    )


def built(root: Path) -> Workshop:
    from tests.models.tiny_clip import write_hf  # and with it torch

    write_hf(root / "model")
    write_images(root / "calibration", "phantoms", 40, 1, role="calibration")
    write_images(root / "calibration", "held-out", 24, 2)
    path = tiny.write_recipe(root, recipe())
    made = Workshop(root, path, root / "cache", root / "engines" / "tiny")
    made.build()
    return made
