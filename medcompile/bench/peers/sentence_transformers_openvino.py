"""sentence-transformers on OpenVINO: its export of float32 weights, hint LATENCY.

The precision to compute in is left to OpenVINO, as its users leave it: bfloat16 on a CPU that has it. Other settings:
_sentences.py.
"""

from __future__ import annotations

from medcompile.bench.peer import Job
from medcompile.bench.peers import _openvino, _sentences
from medcompile.bench.peers._runner import FunctionRunner

_INSTALL = 'pip install "sentence-transformers[openvino]"'
_MODULES = {"sentence_transformers": _INSTALL, "optimum.intel": _INSTALL, "openvino": _INSTALL}


class SentenceTransformersOpenVino(_sentences.SentencePeer):
    name = "sentence_transformers_openvino"
    title = "sentence-transformers OpenVINO"
    modules = _MODULES
    engine = "openvino"
    backend = "openvino"

    def prepare(self, job: Job) -> None:
        self.load(job, job.source, {"export": True}).save_pretrained(job.work)

    def open(self, job: Job) -> FunctionRunner:
        settings = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"}
        model = self.load(job, job.work, {"ov_config": settings})
        inner = model[0].auto_model
        inner.compile()  # else the first run does
        notes = _openvino.facts(inner.request, {"hint": "LATENCY"})
        return self.runner(job, model, notes | {"precision": notes["float_precision"]})


PEER = SentenceTransformersOpenVino()
