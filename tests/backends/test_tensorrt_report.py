"""The layer table against the typed graph, from dumps as TensorRT-RTX 1.7.1 prints them."""

from __future__ import annotations

from medcompile.backends._tensorrt_report import Layer, Product, Tensor, computed, faults, parse, products, summary
from tests import graphs

_ROW = "Dimensions: {}, Strides: [1], StrideOrder: [1,0], Datatype: {}, Format: (Linear) Row major linear format }}"
QUERY, KEY = (Product(f"attention.{part}/MatMul", "int8", "int8", 64) for part in ("query", "key"))


def _row(name: str, kind: str, inputs: str, weights: list[tuple[str, str]], nodes: list[str]) -> str:
    def tensors(*operands: tuple[str, str]) -> str:
        return ", ".join("{ Name: t, " + _ROW.format(shape, kind) for shape, kind in operands)

    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return (
        f"Name: {name}, LayerType: {kind}, "
        f"Inputs: [ {tensors(('[-1,8]', inputs))}], Constants: [ {tensors(*weights)}], "
        f"Outputs: [ {tensors(('[-1,8]', 'Half'))}], TacticName: some_kernel, StreamId: 0, Metadata: {metadata}"
    )


def _dump(*rows: str) -> str:
    order = (
        "Name: __mye1_myl0_3, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, "
    )
    end = "\nI/O Tensors:\n Name: input_ids, IOMode: Input, DataType: Int64"
    return "\n".join(["Layers:", *rows, f"{order}EventId: 1, Metadata: ", end])


MERGED = _row(
    "attention.key/MatMul+attention.query/MatMul_myl0_2", "gemm", "Int8", [("[8,16]", "Int8"), ("[1]", "Float")],
    [QUERY.node, KEY.node],
)  # fmt: skip
FINISH = _row("__myl_MulAdd_myl0_3", "kgen", "Half", [("[1,8]", "Half")], [QUERY.node, "attention.query/Add"])


def test_rows_keep_operands_and_nodes_and_leave_out_what_only_orders_streams() -> None:
    rows = parse(_dump(MERGED, FINISH))
    assert [row.kind for row in rows] == ["gemm", "kgen"]
    assert rows[0].inputs == (Tensor("int8", (-1, 8)),)
    assert rows[0].weights == (Tensor("int8", (8, 16)), Tensor("float32", (1,)))
    assert rows[0].nodes == (QUERY.node, KEY.node)
    assert rows[0].row()["weights"] == ["int8 [8, 16]", "float32 [1]"]


def test_products_merged_into_one_gemm_count_each() -> None:
    found = computed(parse(_dump(MERGED, FINISH)), (QUERY, KEY))
    assert summary(found) == "2 int8 x int8"
    assert faults((QUERY, KEY), found) == ()


def test_a_gemm_that_stays_in_float_is_a_fault_that_names_node_and_formats() -> None:
    row = _row("attention.query/MatMul_myl0_2", "gemm", "Half", [("[8,8]", "Half")], [QUERY.node])
    found = computed(parse(_dump(row)), (QUERY,))
    assert faults((QUERY,), found) == ("attention.query/MatMul: float16 x float16, not int8 x int8",)


def test_a_kernel_that_dequantizes_before_its_product_is_no_int8_product() -> None:
    row = _row("__myl_CastMulCastFc_myl0_4", "runtime_fusion", "Int8", [("[8,8]", "Int8")], [QUERY.node])
    assert computed(parse(_dump(row)), (QUERY,)) == {QUERY.node: "float16 x int8"}


def test_a_product_that_no_row_computes_is_a_fault() -> None:
    assert faults((QUERY,), computed(parse(_dump(FINISH)), (QUERY,))) == (
        "attention.query/MatMul: not found in the layer table, not int8 x int8",
    )


def test_float_products_are_told_but_never_faults() -> None:
    product = Product("head/MatMul", "float32", "float32", 64)
    assert summary(computed([], (product,))) == "1 not found"
    assert faults((product,), {}) == ()


def test_products_of_a_typed_graph_are_its_linear_layers_and_not_attention() -> None:
    static = products(graphs.typed(graphs.VARIANTS["static"]))
    assert {p.asked for p in static} == {"int8 x int8"}
    assert [p.node for p in static if p.node.startswith(("scores", "context"))] == []
    assert len(static) == len(products(graphs.typed(graphs.VARIANTS["fp32"]))) == 6
    assert {p.asked for p in products(graphs.typed(graphs.VARIANTS["weights"]))} == {"float32 x int8"}
    assert {p.size for p in static} == {graphs.HIDDEN**2, graphs.HIDDEN * graphs.INNER}


def test_a_layer_without_inputs_or_weights_computes_nothing() -> None:
    layer = Layer("x", "gemm", "", (), (Tensor("int8", (8, 8)),), (), (QUERY.node,))
    assert computed([layer], (QUERY,)) == {QUERY.node: ""}
