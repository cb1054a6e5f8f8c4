"""The physical limit of each contender, and how near it came: what a run must do over what the machine can do.

The operations come from the bundle's own float32 graph at the cell's shape; limits.py measured the machine. A run can
be no faster than its weights are read and its multiplications done, in the precision that the contender says it has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from medcompile import bundle
from medcompile.bench import limits
from medcompile.bench.peer import MODEL, Cell, Job
from medcompile.bench.results import Bench, Entry, Limits, Timing, Work
from medcompile.errors import MedcompileError
from medcompile.runtime.text import read_json

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "float8": 1.0, "int4": 0.5}
"""Of a stored weight, at least: scales come on top."""
_ARITHMETIC = {"int4": "int8", "float8": "int8", "float16": "bfloat16"}
"""What a format is multiplied in at its fastest, where it has no speed of its own."""
_TIMEOUT_S = 180.0
_KV_BYTES = 2.0


def measure(threads: int, cpus: Sequence[int]) -> Limits:
    """This machine's limits with so many threads; none where its process failed."""
    environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-P", str(Path(limits.__file__)), str(threads), ",".join(map(str, cpus))]
    try:
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, timeout=_TIMEOUT_S, check=True
        )
        return Limits(**json.loads(done.stdout))
    except (subprocess.SubprocessError, ValueError, TypeError):
        return Limits()


# ---- what a run must do


def work(job: Job) -> tuple[tuple[Work, ...], str]:
    """The work of each cell, and why there is none, in words: with texts in, runs are of all shapes."""
    if job.clock != MODEL:
        return (), "texts and images are of all sizes"
    if not job.bundle:
        return (), "there is no bundle, whose graph tells the operations"
    try:
        import onnx

        found = bundle.read(job.bundle, check=False)
        graphs = [found.root / f"graphs/{name}/{job.task}.onnx" for name in found.variants]
        exact = next((g for g, v in zip(graphs, found.variants.values(), strict=True) if not v.quantized), None)
        if exact is None or not exact.is_file():
            return (), "the bundle has no float32 graph"
        model = onnx.load(str(exact), load_external_data=False)
    except ImportError:
        return (), 'onnx is not installed: pip install "medcompile[build]"'
    except MedcompileError as error:
        return (), error.message
    if job.task == "generate":
        facts = read_json(found.root / "assets/decoder.json", dict)
        return tuple(w for cell in job.cells for w in _of_decoder(model, cell, facts)), ""
    return tuple(_of_encoder(model, cell) for cell in job.cells), ""


def _of_encoder(model: Any, cell: Cell) -> Work:
    """Every MatMul, Gemm and Conv at the cell's shape."""
    import onnx

    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    sizes = {"batch": cell.batch, "sequence": cell.sequence}
    for tensor in sized.graph.input:
        for dim in tensor.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    del sized.graph.value_info[:]
    for tensor in sized.graph.output:
        tensor.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
    weights = {i.name: list(i.dims) for i in graph.initializer}
    known = {
        t.name: [d.dim_value for d in t.type.tensor_type.shape.dim]
        for t in (*graph.value_info, *graph.input, *graph.output)
    }
    linear = attention = elements = 0.0
    for node in graph.node:
        out = known.get(node.output[0], [])
        if node.op_type in ("MatMul", "Gemm"):
            second = weights.get(node.input[1]) or known.get(node.input[1], [])
            inner = prod(known.get(node.input[0], [0])[-1:])
            operations = 2.0 * prod(out) * inner
            if node.input[1] in weights:
                linear, elements = linear + operations, elements + prod(second)
            else:
                attention += operations
        elif node.op_type == "Conv" and node.input[1] in weights:
            kernel = weights[node.input[1]]
            linear, elements = linear + 2.0 * prod(out) * prod(kernel[1:]), elements + prod(kernel)
    return Work(cell.name, "run", linear, attention, elements)


def _of_decoder(model: Any, cell: Cell, facts: Mapping[str, Any]) -> list[Work]:
    """The first token, which takes the whole prompt, and a later one, half way through the answer."""
    weights = {i.name: prod(i.dims) for i in model.graph.initializer if len(i.dims) == 2}
    heads = {i.name for i in model.graph.initializer if facts["vocabulary"] in i.dims}
    used = [node.input[1] for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    head = float(sum(weights.get(name, 0) for name in used if name in heads))
    body = float(sum(weights.get(name, 0) for name in used if name not in heads))
    width = facts["layers"] * facts["head_dim"]
    tokens, context = cell.batch * cell.sequence, cell.sequence + cell.new / 2
    attention = 4.0 * width * facts["heads"]  # operations of one token for each that it looks at
    kept = 2 * width * facts["kv_heads"] * _KV_BYTES  # bytes of one token's keys and values
    first = 2 * (body * tokens + head * cell.batch)
    return [
        Work(cell.name, "first", first, attention * tokens * cell.sequence / 2, body + head),
        Work(
            cell.name,
            "step",
            2 * (body + head) * cell.batch,
            attention * cell.batch * context,
            body + head,
            kept * cell.batch * context,
        ),
    ]


# ---- how near


@dataclass(frozen=True)
class Share:
    """limit_ms: the least time that the work can take here. share: of the measured time. bound: by what."""

    phase: str
    limit_ms: float
    share: float
    bound: str


def shares(found: Bench, entry: Entry, timing: Timing) -> list[Share]:
    """One for each phase of the cell's work (one of an encoder, two of a decoder); none where a limit is not known."""
    from statistics import median

    shown = []
    for one in found.work:
        times = {"run": timing.p50}
        for phase, turns in (("first", timing.first), ("step", timing.step)):
            known = [v for v in turns if v is not None]
            times[phase] = median(known) if known else None
        took = times[one.phase]
        if one.cell != timing.cell or took is None or entry.device != "cpu":
            continue
        parts = _least_ms(found.limits, one, entry)
        if parts is not None:
            memory, arithmetic = parts
            least = max(memory, arithmetic)
            bound = "memory" if memory > arithmetic else "arithmetic"
            shown.append(Share(one.phase, least, least / took, bound))
    return shown


def _least_ms(limits: Limits, work: Work, entry: Entry) -> tuple[float, float] | None:
    """Milliseconds that reading and that multiplying take at least."""
    linear = _speed(limits, entry.precision)
    attention = _speed(limits, entry.float_precision or "float32")
    if limits.memory_gbs is None or linear is None or attention is None or entry.precision not in BYTES:
        return None
    read = work.weights * BYTES[entry.precision] + work.state_bytes
    in_cache = read < limits.cache_mb * 1e6
    memory = 0.0 if in_cache else read / limits.memory_gbs / 1e6
    return memory, (work.linear_ops / linear + work.attention_ops / attention) / 1e6


def _speed(limits: Limits, precision: str) -> float | None:
    """10^9 operations a second in that precision, or in the one that it is multiplied in."""
    return limits.gops.get(precision) or limits.gops.get(_ARITHMETIC.get(precision, ""))
