"""Export: weights stay in the checkpoint, bytes don't depend on the place, and folders of other exporters come in."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from medcompile import sources
from medcompile.errors import PassError, SourceError
from medcompile.models import bert
from medcompile.passes.cast import Cast
from medcompile.passes.export import export
from medcompile.passes.linear import linear_groups
from medcompile.passes.simplify import Simplify
from medcompile.program import Program
from medcompile.spec import Precision, Stage
from tests import simplified, tiny
from tests.runtime import fakes

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = len(fakes.VOCABULARY)
SCRIPT = """
import sys
from pathlib import Path
from medcompile import cache
from tests import simplified, tiny
folder = tiny.write_checkpoint(Path(sys.argv[1]) / "model")
out = Path(sys.argv[1]) / "out"
out.mkdir()
cache.write_program(simplified.simplified_from(folder, "sequence-classification"), out)
"""


def test_every_initializer_points_into_the_checkpoint() -> None:
    program = simplified.exported()
    assert program.stage is Stage.EXPORTED
    for graph in program.graphs.values():
        for name, value in graph.model.graph.initializers.items():
            assert isinstance(value.const_value, ir.ExternalTensor), name
            assert Path(value.const_value.path) == (simplified.checkpoint().folder / "model.safetensors").resolve()


def test_an_exported_program_survives_the_cache_without_its_weights(tmp_path: Path) -> None:
    from medcompile import cache

    cache.write_program(simplified.exported(), tmp_path)
    assert (tmp_path / "weights.bin").stat().st_size == 0
    read = Simplify()(cache.read_program(tmp_path), simplified.context())
    given = simplified.feeds(2, 7, VOCABULARY)
    expected = simplified.run(simplified.simplified().graphs["embed"].model, given)
    np.testing.assert_array_equal(simplified.run(read.graphs["embed"].model, given), expected)


def test_two_processes_in_two_folders_write_the_same_bytes_and_no_path(tmp_path: Path) -> None:
    digests = []
    for place in (tmp_path / "one", tmp_path / "two/deeper"):
        place.mkdir(parents=True)
        command = [sys.executable, "-c", SCRIPT, str(place)]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
        files = {p.name: p.read_bytes() for p in (place / "out").iterdir()}
        digests.append({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
        for name, data in files.items():
            for trace in (str(tmp_path), str(ROOT), sys.prefix, "site-packages", "model.safetensors", ".py"):
                assert trace.encode() not in data, f"{trace} in {name}"
    assert digests[0] == digests[1]
    assert set(digests[0]) == {"sequence-classification.onnx", "weights.bin", "program.json"}


def test_a_parameter_that_the_family_does_not_map_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    whole = bert.Bert.trace

    def partial(*arguments: object) -> object:
        traced = whole(*arguments)  # type: ignore[arg-type]
        parameters = {k: v for k, v in traced.parameters.items() if "pooler" not in k and "LayerNorm.bias" not in k}
        return dataclasses.replace(traced, parameters=parameters)

    monkeypatch.setattr(bert.Bert, "trace", partial)
    with pytest.raises(PassError, match=r"embed: the graph holds model\..*LayerNorm\.bias"):
        export(bert.FAMILY, simplified.checkpoint(), simplified.options("embed"))


def exporters_folder(folder: Path, task: str, opset: int, *, token_types: bool = True) -> Path:
    """A folder as Optimum leaves it: torch's TorchScript exporter, its output names, config and tokenizer beside."""
    import torch
    import transformers

    shutil.copytree(simplified.checkpoint().folder, folder)
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if token_types else [])
    output = "last_hidden_state" if task == "embed" else "logits"
    extra = {"add_pooling_layer": False} if task == "embed" else {}
    cls = getattr(transformers, simplified.CLASSES[task])
    model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **extra).eval()

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            return getattr(self.model(**dict(zip(inputs, given, strict=True))), output)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Named(),
            tuple(torch.ones(2, 8, dtype=torch.int64) for _ in inputs),
            str(folder / "model.onnx"),
            dynamo=False,
            opset_version=opset,
            input_names=inputs,
            output_names=[output],
            dynamic_axes={n: {0: "batch_size", 1: "sequence_length"} for n in inputs},
        )
    (folder / "model.safetensors").unlink()
    return folder


def imported(folder: Path, task: str) -> Program:
    return Simplify()(
        export(bert.FAMILY, sources.resolve(f"path:{folder}"), simplified.options(task)), simplified.context()
    )


@pytest.mark.parametrize(
    ("task", "opset", "token_types"),
    [
        ("embed", 14, True),
        ("embed", 17, False),
        ("embed", 18, True),
        ("token-classification", 17, True),
        ("sequence-classification", 18, True),
        ("fill-mask", 14, True),
    ],
)
def test_a_folder_of_another_exporter_enters_and_looks_like_ours(
    tmp_path: Path, task: str, opset: int, token_types: bool
) -> None:
    folder = exporters_folder(tmp_path / "other", task, opset, token_types=token_types)
    program = imported(folder, task)
    model = program.graphs[task].model
    ops = [node.op_type for node in model.graph]
    assert ops.count("LayerNormalization") == 1 + 2 * tiny.LAYERS + (task == "fill-mask")
    assert ops.count("Gelu") == tiny.LAYERS + (task == "fill-mask")
    heads = {"embed": 0, "token-classification": 1, "sequence-classification": 2, "fill-mask": 2}
    linears = [node for group in linear_groups(model) for node in group.nodes]
    assert len(linears) == 6 * tiny.LAYERS + heads[task]
    attention = [n for n in model.graph if n.op_type == "Reshape" and "/attention/" in (n.name or "")]
    assert len(attention) == 4 * tiny.LAYERS
    assert all(node.inputs[1].const_value is not None for node in attention)

    given = simplified.feeds(3, 11, VOCABULARY, mask_position=task == "fill-mask")
    if not token_types:
        given["token_type_ids"][:] = 0
    expected = simplified.of_transformers(simplified.checkpoint().folder, task, given)
    real = given["attention_mask"].astype(bool) if task == "token-classification" else slice(None)
    np.testing.assert_allclose(simplified.run(model, given)[real], expected[real], rtol=1e-4, atol=2e-5)
    checkpoint = sources.resolve(f"path:{folder}")
    with bert.FAMILY.reference(checkpoint, task, simplified.options(task)) as reference:
        (answer,) = reference.run(given).values()
    np.testing.assert_allclose(answer[real], expected[real], rtol=1e-4, atol=2e-5)
    low = Cast(Precision.FLOAT16)(program, simplified.context()).graphs[task].model
    np.testing.assert_allclose(simplified.run(low, given)[real], expected[real], atol=0.03)


def test_our_own_saved_graph_enters_too(tmp_path: Path) -> None:
    shutil.copytree(simplified.checkpoint().folder, tmp_path / "own")
    (tmp_path / "own/model.safetensors").unlink()
    task = "token-classification"
    model = simplified.simplified().graphs[task].model
    ir.save(ir.from_proto(ir.to_proto(in_memory(model))), tmp_path / "own/model.onnx")
    given = simplified.feeds(3, 11, VOCABULARY)
    again = simplified.run(imported(tmp_path / "own", task).graphs[task].model, given)
    np.testing.assert_allclose(again, simplified.run(model, given), atol=1e-6)


def in_memory(model: ir.Model) -> ir.Model:
    """model with its weights in memory, so that it fits one file."""
    copy = model.clone()
    for value in copy.graph.initializers.values():
        value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"opset": 22}, "is opset 22"),
        ({"output": "sentence_embedding"}, "needs inputs of BERT and the output last_hidden_state"),
        ({"input": "pixel_values"}, "pixel_values"),
        ({"dtype": ir.DataType.FLOAT16}, "gives last_hidden_state as float16"),
        ({"external": "elsewhere.bin"}, r"keeps table in elsewhere\.bin, which is not in the folder"),
    ],
)
def test_a_foreign_model_that_can_not_be_used_says_why(tmp_path: Path, change: dict, message: str) -> None:
    shutil.copytree(simplified.checkpoint().folder, tmp_path / "bad")
    (tmp_path / "bad/model.safetensors").unlink()
    floats = change.get("dtype", ir.DataType.FLOAT)
    table = ir.tensor(np.zeros((VOCABULARY, tiny.HIDDEN), floats.numpy()), name="table")
    weight = ir.Value(name="table", type=ir.TensorType(floats), shape=ir.Shape(table.shape.numpy()), const_value=table)
    names = [change.get("input", "input_ids"), "attention_mask"]
    inputs = [ir.Value(name=n, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["b", "s"])) for n in names]
    node = ir.node("Gather", [weight, inputs[0]], name="Gather")
    node.outputs[0].name = change.get("output", "last_hidden_state")
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(floats), ir.Shape(["b", "s", tiny.HIDDEN])
    opset = {"": change.get("opset", 18)}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], initializers=[weight], name="g", opset_imports=opset)
    ir.save(ir.Model(graph, ir_version=8), tmp_path / "bad/model.onnx", external_data=change.get("external"))
    with pytest.raises(SourceError, match=message):
        imported(tmp_path / "bad", "embed")
