"""Files of a program: shared weights, streaming, references, and the same bytes every time."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from medcompile import onnx_files
from medcompile.errors import PassError
from medcompile.passes import derived
from medcompile.passes.derived import Derived


def model(**arrays: np.ndarray) -> ir.Model:
    """One Identity per array; enough of a model to be written."""
    graph = ir.Graph([], [], nodes=[], name="g", opset_imports={"": 21})
    for name, array in arrays.items():
        tensor = array if isinstance(array, ir.TensorProtocol) else ir.tensor(array, name=name)
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        graph.register_initializer(value)
        node = ir.node("Identity", [value], name=f"{name}/Identity")
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"{name}/out", value.type, shape
        graph.append(node)
        graph.outputs.append(node.outputs[0])
    return ir.Model(graph, ir_version=10)


def stored(folder: Path, name: str) -> dict[str, np.ndarray]:
    read = onnx_files.load(folder / f"{name}.onnx")
    return {k: v.const_value.numpy() for k, v in read.graph.initializers.items()}


BIG = np.random.default_rng(0).standard_normal((40, 70), np.float32)


def test_equal_weights_of_two_graphs_are_stored_once(tmp_path: Path) -> None:
    onnx_files.save({"a": model(w=BIG, own=BIG + 1), "b": model(v=BIG.copy())}, tmp_path)
    assert (tmp_path / "weights.bin").stat().st_size <= 2 * BIG.nbytes + 64
    np.testing.assert_array_equal(stored(tmp_path, "a")["w"], BIG)
    np.testing.assert_array_equal(stored(tmp_path, "a")["own"], BIG + 1)
    np.testing.assert_array_equal(stored(tmp_path, "b")["v"], BIG)


def test_a_repeated_weight_at_the_end_leaves_no_bytes_behind(tmp_path: Path) -> None:
    onnx_files.save({"a": model(odd=np.arange(333, dtype=np.float32), w=BIG), "b": model(w=BIG)}, tmp_path)
    assert (tmp_path / "weights.bin").stat().st_size == 1344 + BIG.nbytes


def test_small_tensors_stay_inside_the_graph(tmp_path: Path) -> None:
    onnx_files.save({"a": model(shape=np.array([0, -1], np.int64), scale=np.float32([2]))}, tmp_path)
    assert (tmp_path / "weights.bin").stat().st_size == 0
    assert stored(tmp_path, "a")["shape"].tolist() == [0, -1]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.int8, np.uint8, ml_dtypes.int4, np.float64])
def test_every_dtype_comes_back(tmp_path: Path, dtype: type) -> None:
    array = np.arange(-7, 7).repeat(200).reshape(70, 40).clip(0 if dtype is np.uint8 else -7, 7).astype(dtype)
    onnx_files.save({"a": model(w=array)}, tmp_path)
    np.testing.assert_array_equal(stored(tmp_path, "a")["w"], array)


def test_references_stay_where_they_are_and_load_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    onnx_files.save({"a": model(w=BIG)}, first)
    onnx_files.save({"a": onnx_files.load(first / "a.onnx")}, second, keep_references=True)
    assert (second / "weights.bin").stat().st_size == 0
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(stored(second, "a")["w"], BIG)


def test_saving_does_not_change_the_model_in_memory(tmp_path: Path) -> None:
    one = model(w=BIG)
    onnx_files.save({"a": one}, tmp_path)
    assert isinstance(one.graph.initializers["w"].const_value, ir.Tensor)


@pytest.mark.parametrize("piece", [100, 1000, 1 << 20])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_a_derived_weight_is_the_same_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, transposed: bool, dtype: ir.DataType
) -> None:
    monkeypatch.setattr(derived, "_PIECE_BYTES", piece)
    monkeypatch.setattr(derived, "_READ_BYTES", piece)
    onnx_files.save({"a": model(before=BIG + 1, w=BIG)}, tmp_path)
    source = onnx_files.load(tmp_path / "a.onnx").graph.initializers["w"].const_value
    made = Derived(source, dtype, transposed=transposed, name="w.T")
    expected = (BIG.T if transposed else BIG).astype(dtype.numpy())
    np.testing.assert_array_equal(made.numpy(), expected)
    (tmp_path / "b").mkdir()
    onnx_files.save({"b": model(w=made)}, tmp_path / "b")
    np.testing.assert_array_equal(stored(tmp_path / "b", "b")["w"], expected)


def test_a_derived_weight_of_a_derived_one_reads_the_source() -> None:
    source = ir.tensor(BIG.astype(np.float16))
    raised = Derived(source, ir.DataType.FLOAT)
    turned = Derived(raised, ir.DataType.FLOAT, transposed=True)
    back = Derived(turned, ir.DataType.BFLOAT16, transposed=True)
    assert turned.source is back.source is source
    np.testing.assert_array_equal(turned.numpy(), BIG.astype(np.float16).T.astype(np.float32))
    np.testing.assert_array_equal(back.numpy(), BIG.astype(np.float16).astype(ml_dtypes.bfloat16))


def test_vectors_and_scalars_are_derived_too() -> None:
    assert Derived(ir.tensor(np.float32([1, 2])), ir.DataType.FLOAT16).numpy().tolist() == [1, 2]
    assert Derived(ir.tensor(np.float32(3)), ir.DataType.FLOAT16).numpy().shape == ()


def test_a_value_beyond_the_dtype_is_an_error_that_names_the_weight(tmp_path: Path) -> None:
    large = BIG.copy()
    large[3, 4] = -70000
    lowered = Derived(ir.tensor(large, name="encoder.query.weight"), ir.DataType.FLOAT16, name="low")
    with pytest.raises(PassError, match=r"encoder\.query\.weight reaches 70000, beyond float16"):
        onnx_files.save({"a": model(w=lowered)}, tmp_path)
