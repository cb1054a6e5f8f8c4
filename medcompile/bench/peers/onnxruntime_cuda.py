"""ONNX Runtime on an NVIDIA GPU in float16: our export, its optimizer's fusions, its CUDA provider.

Inputs and outputs stay float32 on the host, as session.run() takes them: copies are inside the clock. NOT RUN
HERE (no GPU).
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from medcompile.bench.peer import Job, Missing, Peer
from medcompile.bench.peers import _onnx, _torch
from medcompile.bench.peers._runner import FunctionRunner

_MODULES = {**_onnx.MODULES, "onnxruntime": 'pip install "medcompile[gpu]"'}


class OnnxRuntimeCuda(Peer):
    name = "onnxruntime_cuda"
    title = "ONNX Runtime CUDA fp16"
    tasks = _torch.TASKS
    modules = _MODULES
    engine = "onnxruntime CUDA"
    precision = "float16"
    float_precision = "float16"
    device = "cuda"

    def missing(self, job: Job) -> Missing | None:
        found = super().missing(job)
        if found is None:
            try:
                importlib.metadata.version("onnxruntime-gpu")
            except importlib.metadata.PackageNotFoundError:
                fix = 'pip uninstall onnxruntime; pip install "medcompile[gpu]"'
                return Missing("onnxruntime is installed without CUDA", fix=fix)
        return found

    def prepare(self, job: Job) -> None:
        import onnx
        from onnxruntime.transformers import float16

        work = Path(job.work)
        exported, fused = _onnx.export(job, work / "export.onnx"), work / "fused.onnx"
        _onnx.optimize(job, exported, fused)
        half = float16.convert_float_to_float16(onnx.load(fused), keep_io_types=True)
        onnx.save(half, work / "model.onnx")
        exported.unlink()
        fused.unlink()

    def open(self, job: Job) -> FunctionRunner:
        path = Path(job.work) / "model.onnx"
        return _onnx.runner(job, path, {}, ("CUDAExecutionProvider",))


PEER = OnnxRuntimeCuda()
