"""Tiny BERT programs, exported and simplified once per process, with feeds and answers of transformers' own classes."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from medcompile import sources
from medcompile.models import ModelOptions, bert
from medcompile.passes.export import export
from medcompile.passes.simplify import Simplify
from medcompile.program import Context, Program, Silent
from medcompile.run_onnx import run_onnx
from medcompile.sources import Checkpoint
from medcompile.spec import Axis, Profile
from tests import tiny

PROFILES = (
    Profile("short", (Axis("batch", 1, 2, 8), Axis("sequence", 1, 8, 16))),
    Profile("long", (Axis("batch", 1, 1, 2), Axis("sequence", 1, 32, tiny.POSITIONS))),
)
CLASSES = {
    "embed": "BertModel",
    "token-classification": "BertForTokenClassification",
    "sequence-classification": "BertForSequenceClassification",
    "fill-mask": "BertForMaskedLM",
}
Array = np.ndarray[Any, Any]


def options(*tasks: str, pooling: str = "mean", labels: tuple[str, ...] = ()) -> ModelOptions:
    return ModelOptions(tasks or tiny.TASKS, PROFILES, pooling=pooling, labels=labels)


@functools.cache
def checkpoint() -> Checkpoint:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return sources.resolve(f"path:{tiny.write_checkpoint(folder / 'model')}", cache=folder / "cache")


@functools.cache
def exported() -> Program:
    return export(bert.FAMILY, checkpoint(), options())


@functools.cache
def simplified() -> Program:
    return Simplify()(exported(), context())


def simplified_from(folder: Path, task: str) -> Program:
    """The simplified program of another checkpoint folder."""
    return Simplify()(export(bert.FAMILY, sources.resolve(f"path:{folder}"), options(task)), context())


def context() -> Context:
    return Context(Path(), Silent())


def feeds(batch: int, sequence: int, vocabulary: int, *, mask_position: bool = False) -> dict[str, Array]:
    """Random ids with ragged masks (the first row is full) and both token types."""
    random = np.random.default_rng(batch * 1000 + sequence)
    lengths = np.maximum(1, np.array([sequence, *random.integers(1, sequence + 1, batch - 1)]))
    mask = (np.arange(sequence)[None] < lengths[:, None]).astype(np.int64)
    made = {
        "input_ids": random.integers(0, vocabulary, (batch, sequence)),
        "attention_mask": mask,
        "token_type_ids": random.integers(0, 2, (batch, sequence)),
    }
    return made | ({"mask_position": lengths // 2} if mask_position else {})


def run(model: ir.Model, given: Mapping[str, Array]) -> Array:
    name = str(model.graph.outputs[0].name)
    return next(run_onnx(model, iter([given]), (name,)))[name]


def of_transformers(folder: Path, task: str, given: Mapping[str, Array], pooling: str = "mean") -> Array:
    """What transformers' public class answers in fp32, through its own mask path, pooled or gathered here."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, CLASSES[task]).from_pretrained(folder, dtype=torch.float32).eval()
    three = {k: torch.from_numpy(given[k]) for k in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.inference_mode():
        answer = model(**three)
    if task == "embed":
        hidden = answer.last_hidden_state.numpy()
        real = given["attention_mask"][:, :, None].astype(np.float32)
        return hidden[:, 0] if pooling == "cls" else (hidden * real).sum(1) / real.sum(1)
    logits: Array = answer.logits.numpy()
    return logits[np.arange(len(logits)), given["mask_position"]] if task == "fill-mask" else logits
