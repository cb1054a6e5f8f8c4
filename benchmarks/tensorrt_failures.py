"""Every way in which a TensorRT-RTX build or load is known to fail, provoked for real, with the message that it gives.

    python benchmarks/tensorrt_failures.py [--into docs/tensorrt.md]

Prints a Markdown table; --into replaces what stands between the two marks of that file. The GPU, if there is one, is
hidden: what is shown must not depend on the machine.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.abc import MetaPathFinder
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import onnx_ir as ir

from medcompile import onnx_files
from medcompile.backends import Built, tensorrt
from medcompile.errors import MedcompileError
from medcompile.passes.quantize import Quantize
from medcompile.program import Context, Graph, Program, Silent
from medcompile.spec import Axis, GraphSpec, Precision, Profile, Stage, TensorSpec, Variant
from medcompile.statistics import Observer

MARKS = ("<!-- failures: written by benchmarks/tensorrt_failures.py -->", "<!-- end of failures -->")
BACKEND = tensorrt.BACKEND
CHANNELS = 64
SPEC = GraphSpec(
    "embed",
    (TensorSpec("x", "float32", ("batch", CHANNELS)),),
    (TensorSpec("y", "float32", ("batch", CHANNELS)),),
    (Profile("default", (Axis("batch", 1, 4, 8),)),),
)
INT8 = Variant("int8", weights=Precision.INT8, activations=Precision.INT8)


@dataclass
class Place:
    """A folder for one failure, and what is built in it."""

    folder: Path

    def build(
        self, variant: Variant = INT8, *, spec: GraphSpec = SPEC, activation: str = "Gelu", compute: Any = None
    ) -> Built:
        graph = Graph(SPEC, model(activation))
        observer = Observer()
        observer.add(np.random.default_rng(0).standard_normal((64, CHANNELS)).astype(np.float32) + 1)
        program = Program("bert", {SPEC.name: graph}, Stage.SIMPLIFIED, {SPEC.name: {"x": observer.statistics()}})
        typed = Quantize()(program, Context(self.folder, Silent(), variant)).graphs[SPEC.name].model
        onnx_files.save({SPEC.name: typed}, self.folder)
        asked = replace(variant, compute=compute or {})
        target = BACKEND.probe("tensorrt-rtx")
        return BACKEND.build(self.folder / f"{SPEC.name}.onnx", spec, asked, target, self.folder)

    def load(self, built: Built) -> None:
        BACKEND.load(self.folder / built.file, SPEC, INT8, built.target, None)


def model(activation: str) -> ir.Model:
    """One linear layer and an activation."""
    weight = ir.tensor(np.random.default_rng(1).standard_normal((CHANNELS, CHANNELS)).astype(np.float32), name="weight")
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", CHANNELS]))
    stored = ir.Value(name="weight", type=ir.TensorType(weight.dtype), shape=weight.shape, const_value=weight)
    product = ir.node("MatMul", [x, stored], name="dense/MatMul")
    last = ir.node(activation, product.outputs, name="dense/activation")
    for node, name in ((product, "product"), (last, "y")):
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, x.type, x.shape
    graph = ir.Graph(
        [x], last.outputs, nodes=[product, last], initializers=[stored], opset_imports={"": 21}, name="embed"
    )
    return ir.Model(graph, ir_version=10)


def unknown_operator(place: Place) -> None:
    place.build(activation="Mish2")


def asymmetric(place: Place) -> None:
    place.build(replace(INT8, symmetric=False))


def dynamic(place: Place) -> None:
    place.build(replace(INT8, dynamic=True))


def missing_axis(place: Place) -> None:
    place.build(spec=replace(SPEC, profiles=(Profile("default", (Axis("sequence", 1, 4, 8),)),)))


class Killer(logging.Handler):
    """Kills the build's process when it says the first word of its progress."""

    def emit(self, record: logging.LogRecord) -> None:
        children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text(encoding="ascii")
        os.kill(int(children.split()[0]), signal.SIGKILL)


def killed(place: Place) -> None:
    log, killer = logging.getLogger("medcompile.backends._tensorrt_job"), Killer()
    log.setLevel(logging.INFO)
    log.addHandler(killer)
    try:
        place.build()
    finally:
        log.removeHandler(killer)


def too_slow(place: Place) -> None:
    place.build(compute={"build_timeout_s": 0.05})


def misspelt(place: Place) -> None:
    place.build(compute={"workspace_mbb": 512})


def unknown_gpu(place: Place) -> None:
    place.build(compute={"compute_capability": 90})


def version_compatible(place: Place) -> None:
    place.build(compute={"version_compatible": True})


def truncated(place: Place) -> None:
    built = place.build()
    plan = place.folder / built.file
    plan.write_bytes(plan.read_bytes()[:100_000])
    place.load(built)


def no_plan(place: Place) -> None:
    built = place.build()
    plan = place.folder / built.file
    plan.write_bytes(b"?" * plan.stat().st_size)
    place.load(built)


def other_version(place: Place) -> None:
    built = place.build()
    place.load(replace(built, target=replace(built.target, version="1.6.0.1")))


def other_system(place: Place) -> None:
    built = place.build()
    place.load(replace(built, target=replace(built.target, os="windows-amd64")))


def no_gpu(place: Place) -> None:
    place.load(place.build())


class Missing(MetaPathFinder):
    """Lets a module look as if it were not installed."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == self.module:
            raise ModuleNotFoundError(f"No module named {fullname!r}")


def without(module: str, target: str) -> None:
    """Probe the target as if the module were not installed."""
    missing, kept = Missing(module), sys.modules.pop(module, None)
    sys.meta_path.insert(0, missing)
    try:
        BACKEND.probe(target)
    finally:
        sys.meta_path.remove(missing)
        if kept is not None:
            sys.modules[module] = kept


def no_library(place: Place) -> None:
    without("tensorrt_rtx", "tensorrt-rtx")


def no_tensorrt(place: Place) -> None:
    without("tensorrt", "tensorrt")


FAILURES: dict[str, Callable[[Place], None]] = {
    "an unsupported operator": unknown_operator,
    "an asymmetric zero point": asymmetric,
    "activations rounded at run time": dynamic,
    "a missing profile axis": missing_axis,
    "a killed build": killed,
    "a build that takes too long": too_slow,
    "a misspelt setting": misspelt,
    "a GPU that the library does not name": unknown_gpu,
    "a version-compatible plan": version_compatible,
    "a truncated plan": truncated,
    "a file that is no plan": no_plan,
    "a plan of another version": other_version,
    "a plan of another system": other_system,
    "TensorRT-RTX is not installed": no_library,
    "TensorRT is not installed": no_tensorrt,
    "no GPU": no_gpu,
}


def table() -> str:
    rows = ["| what went wrong | message |", "|---|---|"]
    for what, provoke in FAILURES.items():
        with TemporaryDirectory() as folder:
            try:
                provoke(Place(Path(folder)))
            except MedcompileError as error:
                told = str(error).replace("|", "\\|").replace("<", "&lt;").replace("\n  ", "<br>")
                rows.append(f"| {what} | {type(error).__name__}: {told} |")
            else:
                raise SystemExit(f"{what}: nothing failed")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, help="a Markdown file that holds the two marks")
    arguments = parser.parse_args()
    text = table()
    print(text)
    if arguments.into:
        page = arguments.into.read_text(encoding="utf-8")
        before, _, rest = page.partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        arguments.into.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
