"""ONNX Runtime's dynamic int8: our export, its optimizer's fusions, then quantize_dynamic per channel.

The fastest int8 that its own tools give. Optimum's contender (optimum.py) is the same quantization without the fusions.
"""

from __future__ import annotations

from pathlib import Path

from medcompile.bench.peer import Job, Peer
from medcompile.bench.peers import _onnx, _torch
from medcompile.bench.peers._runner import FunctionRunner


class OnnxRuntimeInt8(Peer):
    name = "onnxruntime_int8"
    title = "ONNX Runtime dynamic int8"
    tasks = _torch.TASKS
    modules = _onnx.MODULES
    engine = "onnxruntime"
    precision = "int8"

    def prepare(self, job: Job) -> None:
        work = Path(job.work)
        exported, fused = _onnx.export(job, work / "export.onnx"), work / "fused.onnx"
        _onnx.optimize(job, exported, fused)
        _onnx.quantize_dynamic(fused, work / "model.onnx")
        exported.unlink()
        fused.unlink()

    def open(self, job: Job) -> FunctionRunner:
        notes = {"quantized": "weights per channel, activations as they come"}
        return _onnx.runner(job, Path(job.work) / "model.onnx", notes)


PEER = OnnxRuntimeInt8()
