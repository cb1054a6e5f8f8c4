"""What a TensorRT engine really computes in: its layer table, read at build time, held against the typed graph.

The library prints the table as one message that starts with `Layers:`; every row names the ONNX nodes that it came
from, so that merged layers (query, key and value in one product) and renamed ones are still found. Nothing here
needs the library, or a GPU.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

# What the library calls a format -> what we call it.
_FORMATS = {
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "FP8": "float8",
    "Int8": "int8",
    "Int4": "int4",
}
_FIELD = re.compile(r", (?=(?:LayerType|Inputs|Constants|Outputs|TacticName|StreamId|EventId|Metadata): )")
_TENSOR = re.compile(r"Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")
_BINDING = re.compile(r" Name: (.*), IOMode: (\w+), DataType: (\w+), Dimensions: \[([^\]]*)\]")
_SHAPES = re.compile(r"MinShape: \[([^\]]*)\], OptShape: \[([^\]]*)\], MaxShape: \[([^\]]*)\]")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# A generated kernel that turns integers into floats before its product: the integers only saved memory.
_DEQUANTIZING = re.compile(r"__myl_\w*Cast\w*Fc")


@dataclass(frozen=True)
class Tensor:
    """An operand of a layer: format in our words, shape with -1 for dynamic axes."""

    format: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.format} {list(self.shape)}"


@dataclass(frozen=True)
class Layer:
    """One row: kind and kernel in the library's words (the kernel may be chosen on the GPU and is empty then)."""

    name: str
    kind: str
    kernel: str
    inputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        """As it is stored in layers.json."""
        operands = {part: [str(t) for t in getattr(self, part)] for part in ("inputs", "weights", "outputs")}
        return {"name": self.name, "kind": self.kind, "kernel": self.kernel, **operands, "nodes": list(self.nodes)}


@dataclass(frozen=True)
class Product:
    """A linear layer of the typed graph: its node, the formats of its operands, and how many weights it has."""

    node: str
    activation: str
    weight: str
    size: int

    @property
    def quantized(self) -> bool:
        return self.weight.startswith(("int", "float8"))

    @property
    def asked(self) -> str:
        return f"{self.activation} x {self.weight}"


def parse(dump: str) -> tuple[Layer, ...]:
    """The rows of the library's dump that compute or move data, in the order of execution."""
    layers = []
    for line in dump.splitlines():
        if line.startswith("I/O Tensors"):
            break
        if not line.startswith("Name: "):
            continue
        fields = dict(field.partition(": ")[::2] for field in _FIELD.split(line))
        if fields.get("LayerType") in ("signal", "wait"):  # order between streams, no work
            continue
        inputs, weights, outputs = (_tensors(fields.get(name, "")) for name in ("Inputs", "Constants", "Outputs"))
        nodes = tuple(_NODE.findall(fields.get("Metadata", "")))
        kind, kernel = fields.get("LayerType", ""), fields.get("TacticName", "")
        layers.append(Layer(fields["Name"], kind, kernel, inputs, weights, outputs, nodes))
    return tuple(layers)


def bindings(dump: str) -> list[dict[str, Any]]:
    """What the engine takes and gives: name, mode (Input, Output), format, shape; for inputs, by profile, the smallest,
    usual and largest shape."""
    found = []
    for line in dump.splitlines():
        if match := _BINDING.match(line):
            name, mode, kind, shape = match.groups()
            profiles = [[_sizes(end) for end in ends] for ends in _SHAPES.findall(line)]
            formats = {"name": name, "mode": mode, "format": _FORMATS.get(kind, kind.lower()), "shape": _sizes(shape)}
            found.append(formats | ({"profiles": profiles} if profiles else {}))
    return found


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


def _tensors(text: str) -> tuple[Tensor, ...]:
    found = _TENSOR.findall(text)
    return tuple(Tensor(_FORMATS.get(kind, kind.lower()), tuple(_sizes(shape))) for shape, kind in found)


def products(model: ir.Model) -> tuple[Product, ...]:
    """Every MatMul over a stored weight, quantized or not, in graph order."""
    found = []
    for node in model.graph:
        if node.op_type != "MatMul" or node.domain or len(node.inputs) != 2:
            continue
        (activation, _), (weight, size) = _operand(node.inputs[0]), _operand(node.inputs[1])
        if size:
            found.append(Product(node.name or "", activation, weight, size))
    return tuple(found)


def _operand(value: ir.Value | None) -> tuple[str, int]:
    """The format that value holds, behind a DequantizeLinear if there is one, and its size if it is stored, else 0."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        value = producer.inputs[0]
    if value is None or value.dtype is None:
        return "float32", 0
    name = "float8" if value.dtype.name.startswith("FLOAT8") else value.dtype.numpy().name
    return name, math.prod(value.const_value.shape.numpy()) if value.const_value is not None else 0


def computed(layers: Sequence[Layer], wanted: Iterable[Product]) -> dict[str, str]:
    """By node of a linear layer, the formats that the engine multiplies in: `int8 x int8`. Empty if not found."""
    return {product.node: _computed(layers, product) for product in wanted}


def _computed(layers: Sequence[Layer], product: Product) -> str:
    """From the row that reads the weight; rows which only finish the product (scale it, add a bias) don't hold it."""
    for layer in layers:
        if product.node not in layer.nodes:
            continue
        weights = [t for t in layer.weights if len(t.shape) >= 2 and math.prod(t.shape) >= product.size]
        if not weights or not layer.inputs:
            continue
        formats = {t.format for t in layer.inputs}
        activation = product.activation if product.activation in formats else layer.inputs[0].format
        integers = activation.startswith(("int", "float8"))
        if integers and layer.kind != "gemm" and _DEQUANTIZING.match(layer.name):
            activation = next((t.format for t in layer.outputs if t.format.startswith("float")), "float")
        return f"{activation} x {weights[0].format}"
    return ""


def faults(wanted: Sequence[Product], found: Mapping[str, str]) -> tuple[str, ...]:
    """For each quantized linear layer that the engine does not compute as the typed graph asks: which, and as what."""
    return tuple(
        f"{p.node}: {found.get(p.node) or 'not found in the layer table'}, not {p.asked}"
        for p in wanted
        if p.quantized and found.get(p.node) != p.asked
    )


def summary(found: Mapping[str, str]) -> str:
    """`72 int8 x int8, 1 float16 x float16`: how many linear layers are computed in what."""
    counts = Counter(found.values())
    return ", ".join(f"{count} {formats or 'not found'}" for formats, count in sorted(counts.items()))
