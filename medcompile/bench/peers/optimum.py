"""Optimum (optimum-onnx): its export on ONNX Runtime, in fp32 or after its dynamic int8; under transformers' pipeline.

Settings: ORTModelForX.from_pretrained(export=True); int8: ORTQuantizer with AutoQuantizationConfig for this CPU's
instructions, dynamic, per channel, as its documentation has them. With arrays: the ORTModel called with numpy arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from medcompile.bench.peer import MODEL, TEXT, Array, Job, Note, Peer
from medcompile.bench.peers import _onnx, _texts, _torch
from medcompile.bench.peers._runner import FunctionRunner, array_runner, onnxruntime_instructions

INSTALL = 'pip install "optimum-onnx[onnxruntime]"'
_CLASSES = {
    "embed": "ORTModelForFeatureExtraction",
    "token-classification": "ORTModelForTokenClassification",
    "sequence-classification": "ORTModelForSequenceClassification",
}
_MODULES = {"optimum.onnxruntime": INSTALL, "transformers": _torch.INSTALL}


class Optimum(Peer):
    name = "optimum"
    title = "Optimum (ONNX Runtime)"
    tasks = tuple(_CLASSES)
    clocks = (MODEL, TEXT)
    modules = _MODULES
    engine = "onnxruntime"

    def options(self, job: Job) -> tuple[str, ...]:
        return ("fp32", "int8")

    def prepare(self, job: Job) -> None:
        from optimum import onnxruntime as ort

        work = Path(job.work)
        getattr(ort, _CLASSES[job.task]).from_pretrained(job.source, export=True).save_pretrained(work)
        if job.option == "int8":
            from optimum.onnxruntime.configuration import AutoQuantizationConfig

            settings = getattr(AutoQuantizationConfig, onnxruntime_instructions())(is_static=False, per_channel=True)
            quantizer = ort.ORTQuantizer.from_pretrained(work, file_name="model.onnx")
            quantizer.quantize(save_dir=work, quantization_config=settings)
            (work / "model.onnx").unlink()

    def open(self, job: Job) -> FunctionRunner:
        import torch
        from optimum import onnxruntime as ort

        torch.set_num_threads(job.threads)
        file = "model_quantized.onnx" if job.option == "int8" else "model.onnx"
        model = getattr(ort, _CLASSES[job.task]).from_pretrained(
            job.work, file_name=file, provider="CPUExecutionProvider", session_options=_onnx.session_options(job)
        )
        notes: dict[str, Note] = {"threads": job.threads, "precision": "float32"}
        if job.option == "int8":
            notes |= {"precision": "int8", "quantized": f"per channel, for {onnxruntime_instructions()}"}
        if job.clock == TEXT:
            return _texts.runner(job, model, notes)

        def call(feeds: Mapping[str, Array]) -> Array:
            result = model(**feeds)
            if job.task != "embed":
                return result.logits  # type: ignore[no-any-return]
            return _torch.pooled(result.last_hidden_state, feeds["attention_mask"], job.pooling)  # type: ignore[no-any-return]

        return array_runner(call, notes)


PEER = Optimum()
