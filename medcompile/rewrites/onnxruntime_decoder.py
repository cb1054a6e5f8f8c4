"""A decoder's norms and rotary positions as the one operator that ONNX Runtime has for each, on a CPU.

The library fuses both from other spellings only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from medcompile.rewrites import TURN, insert, ints, only_user, other_input, perm, producer, replace, stored

if TYPE_CHECKING:
    import onnx_ir as ir

_DOMAIN = "com.microsoft"


def rewrite(model: ir.Model) -> dict[str, int]:
    """Rewrite the decoder's graph in place. How often each operator was put in."""
    from onnx_ir.passes import common

    norms = sum(_norm(model, node) for node in list(model.graph) if node.op_type == "Reciprocal")
    turned = sum(_rotary(model, node) for node in list(model.graph) if node.op_type == "Add")
    for node in model.graph:
        _skip_reshape(node)
    model.opset_imports[_DOMAIN] = 1
    common.RemoveUnusedNodesPass()(model)
    return {"RMS norm": norms, "rotary embedding": turned}


def _norm(model: ir.Model, reciprocal: ir.Node) -> bool:
    """weight * (x / sqrt(mean(x^2) + epsilon)), which the library fuses from other spellings only."""
    root = producer(reciprocal.inputs[0], "Sqrt")
    add = producer(root.inputs[0], "Add") if root is not None else None
    mean = next((m for v in add.inputs if (m := producer(v, "ReduceMean"))), None) if add is not None else None
    power = producer(mean.inputs[0], "Pow") if mean is not None else None
    scaled = only_user(reciprocal.outputs[0], "Mul")
    weighted = only_user(scaled.outputs[0], "Mul") if scaled is not None else None
    if add is None or mean is None or power is None or scaled is None or weighted is None:
        return False
    x, weight = power.inputs[0], other_input(weighted, scaled.outputs[0])
    epsilon, two = stored(other_input(add, mean.outputs[0])), stored(power.inputs[1])
    axes = stored(mean.inputs[1]) if len(mean.inputs) > 1 else None
    if other_input(scaled, reciprocal.outputs[0]) is not x or epsilon is None or two is None or axes is None:
        return False
    if weight is None or stored(weight) is None or two.item() != 2 or axes.tolist() != [-1] or epsilon.size != 1:
        return False
    attributes = {"axis": -1, "epsilon": float(epsilon.item()), "stash_type": 1}
    name = f"{weighted.name}/fused"
    replace(weighted.outputs[0], insert(model, weighted, "SimplifiedLayerNormalization", [x, weight], name, attributes))
    return True


def _rotary(model: ir.Model, add: ir.Node) -> bool:
    """x * cos + [-x2, x1] * sin, between [batch, tokens, heads, width] turned and turned back."""
    back = only_user(add.outputs[0], "Transpose")
    straight, crossed = (producer(value, "Mul") for value in add.inputs)
    if back is None or straight is None or crossed is None:
        return False
    swapped = next((c for value in crossed.inputs if (c := producer(value, "Concat"))), None)
    if swapped is None or len(swapped.inputs) != 2 or swapped.attributes["axis"].as_int() != -1:
        return False
    negative = producer(swapped.inputs[0], "Neg")
    halves = [producer(value, "Slice") for value in (swapped.inputs[1], negative.inputs[0] if negative else None)]
    first, second = halves
    turn = producer(first.inputs[0], "Transpose") if first is not None else None
    if first is None or second is None or turn is None or second.inputs[0] is not first.inputs[0]:
        return False
    x = turn.outputs[0]
    cos, sin = (_table(other_input(straight, x)), _table(other_input(crossed, swapped.outputs[0])))
    if x not in straight.inputs or cos is None or sin is None or cos[1] is not sin[1]:
        return False
    half = int(cos[0].shape[1]) if cos[0].shape is not None else 0  # type: ignore[arg-type]
    if [_bounds(part) for part in (first, second)] != [(0, half), (half, _END)]:
        return False
    if [perm(turn), perm(back)] != [TURN, TURN]:
        return False

    name = f"{add.name or add.outputs[0].name}/rotary"
    rows = _rows(turn.inputs[0], 2 * half) or insert(
        model, add, "Reshape", [turn.inputs[0], ints(model, 0, 0, -1)], f"{name}/rows"
    )
    inputs: list[ir.Value | None] = [rows, cos[1], cos[0], sin[0]]
    turned = insert(model, add, "RotaryEmbedding", inputs, name, {"interleaved": 0}, _DOMAIN)
    heads = insert(model, add, "Reshape", [turned, ints(model, 0, 0, -1, 2 * half)], f"{name}/heads")
    replace(back.outputs[0], heads)
    return True


def _rows(split: ir.Value | None, width: int) -> ir.Value | None:
    """The [batch, tokens, heads * width] that split, [batch, tokens, heads, width], is a view of, if it is one."""
    reshape = producer(split, "Reshape")
    x, dims = (reshape.inputs[0], stored(reshape.inputs[1])) if reshape is not None else (None, None)
    if x is None or x.shape is None or dims is None or len(x.shape) != 3 or dims.size != 4 or dims[3] != width:
        return None
    return x if x.shape[0] == dims[0] and x.shape[2] == dims[2] * width else None


def _skip_reshape(node: ir.Node) -> None:
    """Let a reshape read what the reshape in front of it reads: such a node alone costs microseconds in every step."""
    first = producer(node.inputs[0], "Reshape") if node.op_type == "Reshape" and node.domain == "" else None
    dims = stored(node.inputs[1]) if first is not None else None
    if first is not None and dims is not None and (dims != 0).all():
        node.replace_input_with(0, first.inputs[0])


_END = np.iinfo(np.int64).max


def _bounds(part: ir.Node) -> tuple[int, int] | None:
    """Where a slice of the last axis begins and ends, one by one; None for another slice."""
    numbers = [stored(value) for value in part.inputs[1:]]
    if len(numbers) != 4 or any(n is None or n.size != 1 for n in numbers):
        return None
    begin, end, axis, step = (int(n.item()) for n in numbers if n is not None)
    return (begin, end) if axis in (-1, 3) and step == 1 else None


def _table(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """What value, [batch, 1, tokens, width], was looked up in, [positions, width / 2], and the positions."""
    spread = producer(value, "Unsqueeze")
    twice = producer(spread.inputs[0], "Concat") if spread is not None else None
    axes = stored(spread.inputs[1]) if spread is not None else None
    if twice is None or axes is None or axes.tolist() != [1] or len(twice.inputs) != 2:
        return None
    if twice.inputs[0] is not twice.inputs[1] or twice.attributes["axis"].as_int() != -1:
        return None
    found = producer(twice.inputs[0], "Gather")
    if found is None or ("axis" in found.attributes and found.attributes["axis"].as_int() != 0):
        return None
    table, positions = found.inputs
    return None if stored(table) is None or table is None or positions is None else (table, positions)
