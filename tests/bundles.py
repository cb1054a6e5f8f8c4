"""Small bundles on disk for tests: real assets and manifest, artifacts of a few bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from medcompile.bundle import Bundle, Contents, Writer
from medcompile.spec import Artifact, Evidence, Margin, Precision, Target, Variant, Verdict
from tests.runtime.fakes import spec, write_assets

FP32 = Variant("fp32")
INT8 = Variant("int8", weights=Precision.INT8, activations=Precision.INT8)
CPU = Target("fake-cpu", "fake", "cpu", "x86_64", "linux", "1.0")


def evidence(verdict: Verdict | None) -> tuple[Evidence, ...]:
    one = Evidence(
        "f1", 0.82, 0.815, -0.005, -0.009, (-0.009, float("inf")), 0.95, 923, 923, "sentence", "bca", 0.01, verdict
    )
    return (one,)


def artifact(
    variant: str,
    verdict: Verdict | None = None,
    latency_ms: float | None = None,
    *,
    graph: str = "embed",
    target: Target = CPU,
) -> Artifact:
    path = f"artifacts/{target.name}/{variant}/{graph}/model.bin"
    return Artifact(
        graph, variant, target, path, "", 0, evidence(verdict) if verdict else (), target.verified_on, latency_ms
    )


def contents(artifacts: Sequence[Artifact] = (artifact("fp32"),), tasks: Sequence[str] = ("embed",)) -> Contents:
    variants = {a.variant: INT8 if a.variant.startswith("int8") else FP32 for a in artifacts}
    return Contents(
        name="sample",
        family="bert",
        tasks=tuple(tasks),
        graphs={t: spec(t) for t in tasks},
        variants={name: dataclasses.replace(v, name=name) for name, v in variants.items()},
        artifacts=tuple(artifacts),
        budget=(Margin("f1", 0.01),),
        assets={"tokenizer": "assets/tokenizer.json", "labels": "assets/labels.json", "text": "assets/text.json"},
        provenance={"revision": "0" * 40, "libraries": {"onnx": "1.23"}, "note": "caf\u00e9"},
    )


def write(place: Path, what: Contents, payload: bytes = b"weights", files: Mapping[str, str] | None = None) -> Bundle:
    """A bundle whose artifacts are payload, each with its variant's name times its length as size; and other files."""
    with Writer(place) as writer:
        write_assets(writer.path("assets/tokenizer.json").parent)
        writer.path("graphs/fp32/embed.onnx").write_bytes(payload)
        for a in what.artifacts:
            writer.path(a.path).write_bytes(payload * len(a.variant))
        for path, text in (files or {}).items():
            writer.path(path).write_text(text, encoding="utf-8")
        return writer.commit(what)
