from __future__ import annotations

from pathlib import Path

import pytest

from medcompile import backends
from medcompile.errors import BackendError
from medcompile.spec import GraphSpec, TensorSpec, Variant
from tests import graphs

BACKEND = backends.for_target("null")


def _load(spec: GraphSpec, folder: Path) -> backends.Executor:
    target = BACKEND.probe("null")
    built = BACKEND.build(folder / "never read.onnx", spec, Variant("v"), target, folder)
    return BACKEND.load(folder / built.file, spec, Variant("v"), target, None)


def test_outputs_are_zeros_in_the_shape_of_the_face(tmp_path: Path) -> None:
    outputs = (TensorSpec("logits", "float32", ("batch", "sequence", 5)), TensorSpec("best", "int64", ("batch",)))
    executor = _load(GraphSpec("embed", graphs.SPEC.inputs, outputs, graphs.SPEC.profiles), tmp_path)
    result = executor.run(graphs.feeds(2, 9))
    assert result["logits"].shape == (2, 9, 5) and result["logits"].dtype == "float32"
    assert result["best"].shape == (2,) and result["best"].dtype == "int64"
    assert not result["logits"].any() and not result["best"].any()


def test_an_artifact_of_another_graph_is_refused(tmp_path: Path) -> None:
    _load(graphs.SPEC, tmp_path)
    other = GraphSpec("fill-mask", graphs.SPEC.inputs, graphs.SPEC.outputs, graphs.SPEC.profiles)
    with pytest.raises(BackendError, match="fill-mask"):
        BACKEND.load(tmp_path / "null.txt", other, Variant("v"), BACKEND.probe("null"), None)
