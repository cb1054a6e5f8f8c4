"""A bundle on disk with all that a report can tell: a search, flips, ranges, layers, labels, what did not run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from medcompile import flips, manifest, report
from medcompile.bundle import Bundle, Contents, Writer
from medcompile.passes.clipping import Clipping
from medcompile.search import record
from medcompile.search.record import Alternative, LayerChoice, Look, Point, Search
from medcompile.spec import GRAPH_VERIFIED, Artifact, Evidence, Margin, Target, Variant, Verdict
from tests.bundles import CPU, FP32, INT8
from tests.runtime.fakes import spec, write_assets

TASK = "token-classification"
NASTY = "<script>alert('x')</script>\u202e"
GPU = Target("fake-gpu", "fake", "gpu", "fk_90", "linux", "2.0")
NAMES = tuple(f"encoder.layer.{n}.output.dense/MatMul" for n in range(6))


def evidence(
    metric: str, difference: float, margin: float | None = 0.01, verdict: Verdict | None = Verdict.NON_INFERIOR
) -> Evidence:
    return Evidence(
        metric=metric,
        reference=0.821,
        value=0.821 + difference,
        difference=difference,
        lower=difference - 0.004,
        interval=(difference - 0.005, float("inf")),
        confidence=0.98333,
        samples=923,
        units=100,
        unit="document",
        method="studentized paired bootstrap",
        margin=margin,
        verdict=verdict if margin is not None else None,
        discordant=7,
        power=0.62 if margin is not None else None,
        samples_needed=1500 if margin is not None else None,
        graph=TASK,
        note=NASTY,
        p_value=0.003 if margin is not None else None,
    )


def artifact(variant: str, target: Target, found: tuple[Evidence, ...], **other: Any) -> Artifact:
    path = f"artifacts/{target.name}/{variant}/{TASK}/model.bin"
    told = {"verified_on": target.verified_on, "latency_ms": 12.5} | other
    return Artifact(TASK, variant, target, path, "", 0, found, **told)


def contents() -> Contents:
    exact = (evidence("f1", 0.0), evidence("recall[Disease]", 0.0, 0.02))
    good = (evidence("f1", -0.001), evidence("recall[Disease]", -0.002, 0.02), evidence("recall[Drug]", -0.03, None))
    poor = (evidence("f1", -0.05, verdict=Verdict.INFERIOR), evidence("recall[Disease]", -0.01, 0.02))
    unclear = (evidence("f1", -0.008, verdict=Verdict.INCONCLUSIVE),)
    int4 = dataclasses.replace(INT8, name="int4")
    return Contents(
        name="full",
        family="bert",
        tasks=(TASK,),
        graphs={TASK: spec(TASK)},
        variants={v.name: v for v in (int4, INT8, FP32)},  # not in the order of their names
        artifacts=(
            artifact("fp32", CPU, exact, latency_ms=40.0),
            artifact("int8", CPU, good, notes=(NASTY,)),
            artifact("int8", GPU, unclear, verified_on=GRAPH_VERIFIED, latency_ms=None),
            artifact("int4", CPU, poor, latency_ms=9.0),
        ),
        budget=(Margin("f1", 0.01), Margin("recall[Disease]", 0.02)),
        assets={},
        provenance={
            "source": "hf:example/ner",
            "revision": "0" * 40,
            "source_files": {"model.safetensors": "ab" * 32},
            "recipe_sha256": "cd" * 32,
            "calibration": data("calibration", "notes", "11"),
            "tuning": data("tuning", "devel", "22"),
            "evaluation": data("acceptance", "held-out", "33"),
            "shared_items": 0,
            "machine": "Linux x86_64, 2 cores",
            "versions": {"torch": "2.15.0", "medcompile": "0.1.0"},
            "skipped_targets": [{"target": "tensorrt", "reason": "no GPU here", "fix": "get one"}],
            "skipped": [{"variant": "int4", "target": "fake-gpu", "reason": "no int4 there", "fix": "use int8"}],
            "notes": [NASTY],
        },
    )


def data(role: str, name: str, digit: str) -> dict[str, Any]:
    told = {"role": role, "name": name, "items": 923, "digest": digit * 32}
    return told | {"licence": "CC0-1.0", "phi": "deidentified", "source": "random words"}


def search() -> Search:
    def point(name: str, variant: Variant, cost: float | None, difference: float, passed: bool) -> Point:
        found = (evidence("f1", difference),)
        return Point(name, variant, {"int8": 6}, cost, 12.0, 1000, 0.02, found, passed, "passed on the tuning data")

    layers = tuple(
        LayerChoice(TASK, (name,), "float" if n == 3 else "int8", 0.0 if n == 3 else 0.01, (other(n),), f"because {n}")
        for n, name in enumerate(NAMES)
    )
    points = (point("all int8", INT8, 12.5, -0.001, True), point("all int4", INT8, None, -0.05, False))
    look = Look(1, "all int8", (0.98333,), (evidence("f1", -0.001),), accepted=True)
    return Search(
        target="fake-cpu",
        objective="latency",
        basis="measured on this machine",
        reference="fp32",
        points=points,
        layers=layers,
        looks=(look,),
        most_looks=3,
        chosen="all int8",
        variant="int8",
        seconds=61.5,
    )


def other(n: int) -> Alternative:
    return Alternative("int8", 0.9, -0.2) if n == 3 else Alternative("float", 0.0, 0.2)


def write(place: Path, what: Contents | None = None, *, bare: bool = False) -> Bundle:
    """bare: without search, flips, ranges and layers."""
    with Writer(place) as writer:
        what = what or contents()
        write_assets(writer.path("assets/tokenizer.json").parent)
        for one in what.artifacts:
            writer.path(one.path).write_bytes(b"weights" * len(one.variant))
        if not bare:
            record.write(writer.path(record.FILE), (search(),))
            rows = [{"name": name, "op": "MatMul", "precision": "int8 x int8"} for name in NAMES]
            rows.append({"name": "model/Add", "op": "Add", "precision": "float32"})
            _json(writer.path("layers.json"), {"int8": {TASK: rows}})
            ranges = [
                Clipping(f"t{n}", (name,), (-2.0, 3.5), (-2.5, 2.5), 0.001 * n, False) for n, name in enumerate(NAMES)
            ]
            ranges.append(Clipping("t9", NAMES[:1], (-2.0, 3.5), (-1.0, 1.0), 0.0, rescaled=True))
            _json(writer.path(report.CALIBRATION), manifest.encode({"int8": {TASK: ranges}}))
            flipped = [[f"{n:064x}", "harmful" if n % 2 else "other"] for n in range(450)]
            _json(writer.path(flips.FILE), {what.artifacts[1].path: flipped, what.artifacts[0].path: []})
        return writer.commit(what, report.texts)


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, sort_keys=True), encoding="utf-8")
