"""OpenVINO after NNCF's post-training quantization: int8 linear layers, bfloat16 around them, hint LATENCY.

Settings: nncf.quantize with model_type TRANSFORMER, everything else by default, on the calibration data; these are what
its documentation advises for BERT and ViT, and the fastest that was found.
"""

from __future__ import annotations

from pathlib import Path

from medcompile.bench.peer import Job
from medcompile.bench.peers import _openvino
from medcompile.bench.peers._runner import FunctionRunner


class OpenVinoInt8(_openvino.NncfPeer):
    name = "openvino_int8"
    title = "OpenVINO NNCF int8, bf16"

    def open(self, job: Job) -> FunctionRunner:
        path = Path(job.work) / _openvino.INT8_FILE
        return _openvino.latency_runner(job, path, "bf16", {"quantized by": "NNCF"})


PEER = OpenVinoInt8()
