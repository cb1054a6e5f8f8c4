"""sentence-transformers on ONNX Runtime: its export in float32, or export_dynamic_quantized_onnx_model's int8.

Settings: int8 for this CPU's instructions, as its page on speed has it. Other settings: _sentences.py.
"""

from __future__ import annotations

from pathlib import Path

from medcompile.bench.peer import Job, Note
from medcompile.bench.peers import _onnx, _sentences
from medcompile.bench.peers._runner import FunctionRunner, onnxruntime_instructions

_INSTALL = 'pip install "sentence-transformers[onnx]"'
_MODULES = {"sentence_transformers": _INSTALL, "optimum.onnxruntime": _INSTALL}


class SentenceTransformersOnnx(_sentences.SentencePeer):
    name = "sentence_transformers_onnx"
    title = "sentence-transformers ONNX"
    modules = _MODULES
    engine = "onnxruntime"
    backend = "onnx"

    def options(self, job: Job) -> tuple[str, ...]:
        return ("fp32", "int8")

    def prepare(self, job: Job) -> None:
        model = self.load(job, job.source, {"export": True, "provider": "CPUExecutionProvider"})
        model.save_pretrained(job.work)
        if job.option == "int8":
            from sentence_transformers import export_dynamic_quantized_onnx_model

            export_dynamic_quantized_onnx_model(model, onnxruntime_instructions(), job.work)

    def open(self, job: Job) -> FunctionRunner:
        name, notes = "model.onnx", dict[str, Note](precision="float32")
        if job.option == "int8":
            name = f"model_qint8_{onnxruntime_instructions()}.onnx"
            notes = {"precision": "int8", "quantized": f"for {onnxruntime_instructions()}"}
        file = next(p for p in Path(job.work).rglob(name))
        settings = {
            "provider": "CPUExecutionProvider",
            "session_options": _onnx.session_options(job),
            "file_name": str(file.relative_to(job.work)),
        }
        return self.runner(job, self.load(job, job.work, settings), notes)


PEER = SentenceTransformersOnnx()
