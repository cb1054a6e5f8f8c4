"""TensorRT in float16: our export in fp16, strongly typed, built and run through Polygraphy. NOT RUN HERE (no GPU)."""

from __future__ import annotations

from medcompile.bench.peers import _onnx, _tensorrt

_MODULES = {
    **_onnx.MODULES,
    "tensorrt": "pip install tensorrt",
    "polygraphy": "pip install polygraphy",
}


class TensorRt(_tensorrt.TensorRtPeer):
    name = "tensorrt"
    title = "TensorRT fp16"
    modules = _MODULES
    engine = "tensorrt"


PEER = TensorRt()
