"""ONNX Runtime in float32: our export of the checkpoint, after its own optimizer for transformers."""

from __future__ import annotations

from pathlib import Path

from medcompile.bench.peer import Job, Peer
from medcompile.bench.peers import _onnx, _torch
from medcompile.bench.peers._runner import FunctionRunner


class OnnxRuntimeFp32(Peer):
    name = "onnxruntime_fp32"
    title = "ONNX Runtime fp32"
    tasks = _torch.TASKS
    modules = _onnx.MODULES
    engine = "onnxruntime"

    def prepare(self, job: Job) -> None:
        work = Path(job.work)
        exported = _onnx.export(job, work / "export.onnx")
        _onnx.optimize(job, exported, work / "model.onnx")
        exported.unlink()

    def open(self, job: Job) -> FunctionRunner:
        return _onnx.runner(job, Path(job.work) / "model.onnx", {})


PEER = OnnxRuntimeFp32()
